"""Instructions and answers for SFT: ultrachat, alpaca and dolly.

ultrachat (arXiv 2305.14233, MIT licence), chats between two models; `num_turns` answers of each are examples:
    {"prompt": "...", "messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": ...}]}
alpaca (github.com/tatsu-lab/stanford_alpaca, CC BY-NC 4.0):
    {"instruction": "Give three tips for staying healthy.", "input": "",
     "output": "1.Eat a balanced diet and make sure to include plenty of fruits and vegetables. ..."}
dolly (databricks-dolly-15k, CC BY-SA 3.0):
    {"instruction": "When did Virgin Australia start operating?", "context": "Virgin Australia, the trading
     name of ...", "response": "Virgin Australia commenced services on 31 August 2000 ...",
     "category": "closed_qa"}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tasks.base import HubSet, Row
from tasks.chat import ChatTask, examples_of, instruction_row, turns_of


class UltraChat(ChatTask):
    name = "ultrachat"
    splits = ("train", "test")
    held_out = "test"
    options: Mapping[str, Any] = {"num_turns": 1}
    hub = HubSet(
        path="HuggingFaceH4/ultrachat_200k",
        revision="8049631c405ae6576f93f445c6b8166f76f5505a",
        splits={"train": "train_sft", "test": "test_sft"},
    )

    def unpack(self, entry: Row) -> Iterator[Row]:
        yield from examples_of(turns_of(entry, "messages"), self.options["num_turns"])


class Instructions(ChatTask):
    """One-turn chats from three fields: the instruction, what it is about, and the answer."""

    def __init__(self, name: str, hub: HubSet, fields: tuple[str, str, str]) -> None:
        self.name, self.hub, self.columns = name, hub, fields

    def unpack(self, entry: Row) -> Iterator[Row]:
        if entry.get(self.columns[-1]) != "":  # some of alpaca's published answers are empty
            yield instruction_row(entry, *self.columns)


ALPACA = HubSet(
    path="tatsu-lab/alpaca",
    revision="dce01c9b08f87459cf36a430d809084718273017",
    splits={"train": "train"},
)
DOLLY = HubSet(
    path="databricks/databricks-dolly-15k",
    revision="bdd27f4d94b9c1f951818a7da7fd7aeea5dbff1a",
    splits={"train": "train"},
)
TASKS = {
    "ultrachat": UltraChat(),
    "alpaca": Instructions("alpaca", ALPACA, ("instruction", "input", "output")),
    "dolly": Instructions("dolly", DOLLY, ("instruction", "context", "response")),
}
