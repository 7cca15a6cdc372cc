"""Prompts of the user's own file, for sampling: a JSON list or JSON lines, each entry in one of these forms.

    "Name three rivers."
    {"prompt": "Name three rivers."}
    {"instruction": "Name three rivers.", "input": "Only in Kenya."}
    {"messages": [{"role": "user", "content": "Name three rivers."}]}
    {"conversations": [{"from": "human", "value": "Name three rivers."}]}

`input` may be absent or empty, and `prompt` may be a list of messages, too. A chat is cut after the user's
last message: what the assistant said to that is not shown. Other fields are not read. The prompt is that of
every chat task here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.base import Message, Row, text_of
from tasks.chat import ChatTask, turns_of, user
from tasks.rows import READERS, read_rows

FORMATS = ("json", "jsonl")
FIELDS = ("instruction", "prompt", "messages", "conversations")


class Prompts(ChatTask):
    """Rows {messages} without an answer; not a task to train on."""

    name = "prompts"
    splits = ()

    def read(self, path: str | os.PathLike[str]) -> list[Row]:
        """All prompts of a file. Errors: ValueError naming file, line and field of one that is malformed."""
        path = Path(path).expanduser()
        kind = path.suffix.removeprefix(".")
        if kind not in FORMATS:
            raise ValueError(f"{path}: prompts are read from .json and .jsonl files")

        def entries(text: str) -> Iterator[tuple[int, Any]]:
            for line, entry in READERS[kind](text):
                yield line, {"prompt": entry} if isinstance(entry, str) else entry

        return read_rows(path, self.check, self.unpack, entries)

    def unpack(self, entry: Row) -> Iterator[Row]:
        field = next((name for name in FIELDS if name in entry), None)
        if field is None:
            found = ", ".join(map(str, entry)) or "none"
            raise ValueError(f"none of the fields {', '.join(map(repr, FIELDS))}; found {found}")
        if field == "instruction":
            given = text_of({"input": "", **entry}, "input").strip()
            text = text_of(entry, field, empty=False)
            yield {"messages": user(f"{text.strip()}\n\n{given}" if given else text)}
        elif field == "prompt" and not isinstance(entry[field], list):
            yield {"messages": user(text_of(entry, field, empty=False))}
        else:
            yield {"messages": _up_to_the_user(turns_of(entry, field), field)}


def _up_to_the_user(turns: list[Message], field: str) -> list[Message]:
    """The turns up to the user's last message."""
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=None)
    if last is None or not turns[last]["content"]:
        raise ValueError(f"field {field!r} should hold a message of the user's")
    if turns[turns[0]["role"] == "system"]["role"] != "user":
        raise ValueError(f"field {field!r} should begin with the user's message, after the system's if any")
    return turns[: last + 1]


PROMPTS = Prompts()
