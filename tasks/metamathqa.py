r"""MetaMathQA to train on (arXiv 2309.12284, MIT licence), gsm8k to be measured on: PEFT's public comparison.

A training row, of which those of more than 1,300 characters, query and response, are left out:
    {"query": "Gracie and Joe are choosing numbers on the complex plane. ...", "type": "MATH_AnsAug",
     "original_question": "Gracie and Joe are choosing ...",
     "response": "The distance between two points ... The answer is: 10"}
Validation rows are 50 of gsm8k's training rows, test rows all of gsm8k's test rows, as {query, response}.
Prompt, splits and what counts as an answer are those of method_comparison/MetaMathQA in
github.com/huggingface/peft (5d602fd), except that an answer is looked for in the completion alone, not in the
question too.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from tasks.base import HubSet, Row, Task, text_of
from tasks.gsm8k import TASK as GSM8K

LONGEST = 1300  # characters of query, a blank and response
N_VALIDATION, VALIDATION_SEED = 50, 0
_VALIDATION = replace(GSM8K.hub, splits={"validation": "train"})
# In order: the first of these that a text holds introduces its answer
_MARKS = ("The answer is: ", "The answer is ", "The final answer is: ", "The final answer is ", "#### ")


class MetaMathQA(Task):
    name = "metamathqa"
    splits = ("train", "validation", "test")
    hub = HubSet(
        path="meta-math/MetaMathQA",
        revision="aa4f34d3d2d3231299b5b03d9b3e5a20da45aa18",
        splits={"train": "train"},
    )
    fields = ("query", "response")
    closing = " Think step by step.\nAnswer:"
    max_new_tokens = 300

    def prompt(self, row: Row) -> str:
        return f"Question: {row['query']}{self.closing}"

    def target(self, row: Row) -> str:
        return row["response"]

    def gold(self, row: Row) -> str | None:
        return self.extract(row["response"])

    def extract(self, completion: str) -> str | None:
        """What follows the last mark, to the end of its line, without blanks, stops and units at its ends."""
        text = completion.strip().rstrip(".!?")
        mark = next((mark for mark in _MARKS if mark in text), None)
        if mark is None:
            return None
        return text.rpartition(mark)[-1].strip().split("\n", 1)[0].strip(" .!?$%")

    def score(self, extracted: str | None, gold: str | None) -> float:
        """1.0 for the same number, also as a fraction; what is no number has to be the same text."""
        if extracted is None or gold is None:
            return 0.0
        return float(_number(extracted) == _number(gold))

    def unpack(self, entry: Row) -> Iterator[Row]:
        row = {field: text_of(entry, field) for field in self.fields}
        if len(f"{row['query']} {row['response']}") <= LONGEST:
            yield row

    def hub_of(self, split: str) -> HubSet | None:
        return {"train": self.hub, "test": GSM8K.hub, "validation": _VALIDATION}.get(split)

    def load(self, split: str, data_dir: str | os.PathLike[str]) -> list[Row]:
        """Training rows of MetaMathQA, other rows of gsm8k; errors as `Task.load`."""
        self.check_split(split)
        if split == "train":
            return super().load(split, data_dir)
        rows = GSM8K.load("test" if split == "test" else "train", data_dir)
        if split == "validation":
            order = np.arange(len(rows))
            np.random.RandomState(VALIDATION_SEED).shuffle(order)
            rows = [rows[i] for i in order[:N_VALIDATION]]
        return [{"query": row["question"], "response": row["answer"]} for row in rows]


def _number(text: str) -> float | str:
    """The number that a text writes as digits or as a fraction of such; else the text itself."""
    try:
        numbers = [float(part) for part in text.split("/")]
        if len(numbers) > 2 or not all(map(math.isfinite, numbers)):
            return text
        return numbers[0] / numbers[1] if len(numbers) == 2 else numbers[0]
    except (ValueError, ZeroDivisionError):
        return text


TASK = MetaMathQA()
