"""A task of preference pairs, as a user would put it into tasks/pairs.py: letters reversed are preferred."""

from tasks.base import Preference, Task


class Pairs(Task):
    name = "pairs"
    closing = " ->"
    fields = ("letters",)

    @property
    def has_preferences(self):
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

    def preference(self, row):
        return Preference(self.prompt(row), self.target(row), " " + row["letters"] + " a b")


TASK = Pairs()
