"""AlpacaEval's 805 instructions: prompts for sampling (github.com/tatsu-lab/alpaca_eval, CC BY-NC 4.0).

A row:
    {"dataset": "helpful_base", "instruction": "How did US states get their names?",
     "output": "The United States is a federal union of states. ...", "generator": "text_davinci_003"}

`output` is a reference answer to be compared with by a judge; there is nothing to extract and no score.
"""

from __future__ import annotations

from tasks.base import HubSet, Message, Row, text_of
from tasks.chat import ChatTask, user


class AlpacaEval(ChatTask):
    name = "alpaca_eval"
    splits = ("eval",)
    hub = HubSet(
        path="tatsu-lab/alpaca_eval",
        revision="2edc6fad8be6b14ea7230aabfd08188da6b8b814",
        splits={"eval": "eval"},
        file="alpaca_eval.json",
    )

    def messages(self, row: Row) -> list[Message]:
        return user(row["instruction"])

    def target(self, row: Row) -> str:
        """The reference answer."""
        return row["output"]

    def check(self, row: Row) -> None:
        text_of(row, "instruction", empty=False)


TASK = AlpacaEval()
