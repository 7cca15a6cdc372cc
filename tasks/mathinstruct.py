r"""MathInstruct: 262,039 maths problems, solved in words or by programs (arXiv 2309.05653, MIT licence).

A row:
    {"source": "data/CoT/aqua_rat.json", "instruction": "The distance between two stars is 6.52 x 10^5 light
     years. What is the distance between the two stars in parsecs? (1 parsec = 3.26 light years)\nAnswer
     Choices: (A) 2 x 10^5 ...", "output": "Let's think about the multi-choice question. ... The answer is A"}

Only for training: it has no held-out split; what it teaches is evaluated on gsm8k, whose prompt it shares.
"""

from __future__ import annotations

import re

from tasks.base import HubSet, Row, text_of
from tasks.gsm8k import NumberTask

_NO_NUMBER = re.compile(r"\bprint\(|\banswer is:? *\(?[A-E]\b")


class MathInstruct(NumberTask):
    name = "mathinstruct"
    splits = ("train",)
    held_out = None
    hub = HubSet(
        path="TIGER-Lab/MathInstruct",
        revision="b4fdc323a7be1379c9c7c0b67b1de72dfee2111a",
        splits={"train": "train"},
    )

    def question(self, row: Row) -> str:
        return row["instruction"].strip()

    def target(self, row: Row) -> str:
        return row["output"].strip()

    def gold(self, row: Row) -> str | None:
        return self.extract(row["output"])

    def extract(self, completion: str) -> str | None:
        """The number that a solution comes to; None for a choice, and for a program, because none is run."""
        return None if _NO_NUMBER.search(completion) else super().extract(completion)

    def check(self, row: Row) -> None:
        for field in ("instruction", "output"):
            text_of(row, field, empty=False)


TASK = MathInstruct()
