"""A task of a few letters, as a user would put it into tasks/mini.py; no held-out row is a training row."""

from tasks.base import Task


class Mini(Task):
    name = "mini"
    closing = " ->"
    fields = ("letters",)

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

    def gold(self, row):
        return row["letters"][::-1]

    def extract(self, completion):
        return completion.strip() or None


TASK = Mini()
