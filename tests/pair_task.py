"""A task of preferences, as a user would put it into tasks/pairs.py: letters reversed are preferred."""

from tasks.base import Preference
from tests.mini_task import Mini


class Pairs(Mini):
    name = "pairs"
    has_preferences = True

    def preference(self, row):
        return Preference(self.prompt(row), self.target(row), " " + row["letters"] + " a b")


TASK = Pairs()
