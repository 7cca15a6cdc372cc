"""A task of preference pairs, as a user would put it into tasks/pairs.py: letters reversed are preferred."""

from tasks.base import Pair, Task


class Pairs(Task):
    name = "pairs"
    closing = " ->"
    fields = ("letters",)

    @property
    def paired(self):
        return True

    def load(self, split, data_dir):
        start, stop = {"train": (0, 40), "test": (40, 52)}[split]
        return [
            {"letters": " ".join(chr(97 + (7 * i + 3 * k) % 26) for k in range(3 + i % 4))}
            for i in range(start, stop)
        ]

    def prompt(self, row):
        return row["letters"] + self.closing

    def target(self, row):
        return " " + row["letters"][::-1]

    def pair(self, row):
        return Pair(self.prompt(row), self.target(row), " " + row["letters"] + " a b")


TASK = Pairs()
