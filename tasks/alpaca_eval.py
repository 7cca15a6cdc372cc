"""AlpacaEval's 805 instructions: prompts for sampling (github.com/tatsu-lab/alpaca_eval, CC BY-NC 4.0).

A row:
    {"dataset": "helpful_base", "instruction": "How did US states get their names?",
     "output": "The United States is a federal union of states. ...", "generator": "text_davinci_003"}

`output` is a reference answer to be compared with by a judge; there is nothing to extract and no score.
"""

from __future__ import annotations

from tasks.base import CHAT_CLOSING, CHAT_STOP, HubSet, Row, Task, chat_prompt


class AlpacaEval(Task):
    name = "alpaca_eval"
    version = 1
    metric = None
    splits = ("eval",)
    held_out = None
    hub = HubSet(
        path="tatsu-lab/alpaca_eval",
        revision="2edc6fad8be6b14ea7230aabfd08188da6b8b814",
        splits={"eval": "eval"},
        file="alpaca_eval.json",
    )
    fields = ("instruction",)
    closing = CHAT_CLOSING
    stop = CHAT_STOP
    chat = True
    max_new_tokens = 512

    def prompt(self, row: Row) -> str:
        return chat_prompt(row["instruction"])

    def check(self, row: Row) -> None:
        super().check(row)
        if not row["instruction"].strip():
            raise ValueError("field 'instruction' is empty")


TASK = AlpacaEval()
