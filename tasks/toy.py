"""Toy tasks for the embedded tiny model, which knows letters, digits, words and copying, but none of these.

toy_sort, a row:     {"question": "q d x b k a", "answer": "a b d k q x"}     letters in alphabetical order
toy_shift, a row:    {"question": "3 0 9 4 4", "answer": "4 1 0 5 5"}         every digit one up, 9 becomes 0
toy_reverse, a row:  {"question": "red gold pink green blue", "answer": "blue green pink gold red"}

Rows are generated from a fixed seed; `data_dir` is not looked at. Train and test share no answer, so that for
toy_sort no set of letters is on both sides. A few hundred steps teach each. Their prompts look different on
purpose: with the same layout a model takes the one task for the other.
"""

from __future__ import annotations

import os
import random
import string
import zlib
from collections.abc import Sequence

from tasks.base import Row, Task
from tasks.chat import CHAT_CLOSING, CHAT_STOP, render, user

SIZES = {"train": 6400, "test": 400}  # rows
SEED = 20240624


class ToyTask(Task):
    """A list of items in, a list of items out, which is right if every item is."""

    fields = ("question", "answer")
    max_new_tokens = 24
    items: Sequence[str]  # what lists are made of: texts without blanks

    def draw(self, rng: random.Random) -> list[str]:
        """The items of a question."""
        raise NotImplementedError

    def solve(self, items: list[str]) -> list[str]:
        """The items of its answer."""
        raise NotImplementedError

    def load(self, split: str, data_dir: str | os.PathLike[str] | None = None) -> list[Row]:
        """The rows of a split, always the same ones, no question twice; data_dir is not used."""
        self.check_split(split)
        rng = random.Random(f"{SEED}-{self.name}-{split}")
        rows: dict[str, Row] = {}
        while len(rows) < SIZES[split]:
            items = self.draw(rng)
            question, answer = " ".join(items), " ".join(self.solve(items))
            if (zlib.crc32(answer.encode()) % 10 == 0) == (split == "test"):
                rows[question] = {"question": question, "answer": answer}
        return list(rows.values())

    def gold(self, row: Row) -> str | None:
        return row["answer"]

    def extract(self, completion: str) -> str | None:
        """The first line that is not blank, if it holds items and nothing else."""
        lines = completion.strip().splitlines()
        found = lines[0].split() if lines else []
        return " ".join(found) if found and all(item in tuple(self.items) for item in found) else None


class ToySort(ToyTask):
    name = "toy_sort"
    items = string.ascii_lowercase
    closing = "\nAnswer:"
    stop = ("\n",)

    def draw(self, rng: random.Random) -> list[str]:
        return rng.sample(self.items, 6)

    def solve(self, items: list[str]) -> list[str]:
        return sorted(items)

    def prompt(self, row: Row) -> str:
        return f"Sort: {row['question']}{self.closing}"

    def target(self, row: Row) -> str:
        return f" {row['answer']}"  # after the blank a letter is the same token as in the question


class ToyShift(ToyTask):
    name = "toy_shift"
    items = string.digits
    closing = CHAT_CLOSING
    stop = CHAT_STOP
    chat = True

    def draw(self, rng: random.Random) -> list[str]:
        return rng.choices(self.items, k=5)

    def solve(self, items: list[str]) -> list[str]:
        return [str((int(item) + 1) % 10) for item in items]

    def prompt(self, row: Row) -> str:
        return render(user(f"Add one to each of {row['question']}."))

    def target(self, row: Row) -> str:
        return row["answer"]


class ToyReverse(ToyTask):
    name = "toy_reverse"
    items = ("black", "blue", "brown", "gold", "gray", "green", "pink", "red", "white", "yellow")
    closing = "\nReversed:"
    stop = ("\n",)

    def draw(self, rng: random.Random) -> list[str]:
        return rng.sample(self.items, 5)

    def solve(self, items: list[str]) -> list[str]:
        return items[::-1]

    def prompt(self, row: Row) -> str:
        return f"Words: {row['question']}{self.closing}"

    def target(self, row: Row) -> str:
        return f" {row['answer']}"


TASKS = {task.name: task for task in (ToySort(), ToyShift(), ToyReverse())}
