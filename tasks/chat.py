"""Chats as rows: their turns, how a prompt is written from them, and the tasks made of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tasks.base import Message, Preference, Row, Task, text_of

# The same words for every chat-like task, so that a model trained on one can be sampled by another.
CHAT_CLOSING = "\n\nAssistant:\n"
CHAT_STOP: tuple[str, ...] = ("\n\nHuman:",)
_HEADINGS = {"system": "System:\n", "user": "Human:\n", "assistant": "Assistant:\n"}
_SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "assistant": "assistant",
}
# As text these would be read as special tokens; the chats that hold them are left out.
_SPECIAL = ("<s>", "</s>", "<|endoftext|>")


def render(messages: Sequence[Message]) -> str:
    """The prompt of a chat that the assistant is to continue: every turn under its heading."""
    turns = (_HEADINGS[message["role"]] + message["content"] for message in messages)
    return "\n\n".join(turns) + CHAT_CLOSING


def user(content: str) -> list[Message]:
    """A chat of one instruction."""
    return [{"role": "user", "content": content}]


def has_special_tokens(*texts: str) -> bool:
    return any(token in text for text in texts for token in _SPECIAL)


def turns_of(entry: Row, field: str) -> list[Message]:
    """The chat in a field, a list of {from, value} or {role, content}; neighbours of one speaker are joined.

    Raises ValueError naming the field for anything else, such as an unknown speaker.
    """
    found = entry.get(field)
    if not isinstance(found, list):
        raise ValueError(f"field {field!r} should be a list of messages, is {found!r:.60}")
    turns: list[Message] = []
    for number, message in enumerate(found):
        speaker, content = _message(message, f"{field}[{number}]")
        if turns and turns[-1]["role"] == speaker:
            turns[-1] = {"role": speaker, "content": f"{turns[-1]['content']}\n\n{content}"}
        else:
            turns.append({"role": speaker, "content": content})
    return turns


def _message(message: Any, place: str) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise ValueError(f"field {place!r} should be a message, is {message!r:.60}")
    who, what = ("from", "value") if "from" in message else ("role", "content")
    speaker, content = message.get(who), message.get(what)
    if speaker not in _SPEAKERS:
        raise ValueError(f"field '{place}.{who}' should be one of {', '.join(_SPEAKERS)}, is {speaker!r:.60}")
    if not isinstance(content, str):
        raise ValueError(f"field '{place}.{what}' should be text, is {content!r:.60}")
    return _SPEAKERS[speaker], content.strip()


def examples_of(turns: Sequence[Message], num_turns: int) -> Iterator[Row]:
    """A row for each of the assistant's first num_turns turns, with all that was said before it.

    A chat that the assistant begins has none, and rows end before an empty answer.
    """
    start = 1 if turns and turns[0]["role"] == "system" else 0
    if len(turns) <= start or turns[start]["role"] != "user":
        return
    for index in list(range(start + 1, len(turns), 2))[:num_turns]:
        if not turns[index]["content"]:
            return
        yield {"messages": list(turns[:index]), "response": turns[index]["content"]}


class ChatTask(Task):
    """Rows {messages, response}, whatever the file holds; there is nothing to score."""

    metric: str | None = None
    scoring: tuple[str, ...] = ()
    splits: tuple[str, ...] = ("train",)
    held_out: str | None = None
    closing = CHAT_CLOSING
    stop = CHAT_STOP
    chat = True
    max_new_tokens = 512

    def messages(self, row: Row) -> list[Message]:
        return row["messages"]

    def prompt(self, row: Row) -> str:
        return render(self.messages(row))

    def target(self, row: Row) -> str:
        return row["response"]

    def instruction(self, row: Row) -> str:
        """The user's words of a chat of one message; of a longer one all turns, headings included."""
        messages = self.messages(row)
        return messages[0]["content"] if len(messages) == 1 else self.prompt(row).removesuffix(self.closing)


class PreferenceTask(ChatTask):
    """Rows {messages, chosen, rejected}; the preferred answer is the target for SFT."""

    @property
    def has_preferences(self) -> bool:
        return True

    def target(self, row: Row) -> str:
        return row["chosen"]

    def preference(self, row: Row) -> Preference:
        return Preference(self.prompt(row), row["chosen"], row["rejected"])


def preference_row(instruction: str, chosen: str, rejected: str) -> Row:
    """A row of a PreferenceTask whose prompt is one instruction."""
    return {"messages": user(instruction.strip()), "chosen": chosen.strip(), "rejected": rejected.strip()}


def instruction_row(entry: Row, instruction: str, context: str, response: str) -> Row:
    """A one-turn row from named fields: an instruction, perhaps something to work on, and the answer."""
    task = text_of(entry, instruction, empty=False).strip()
    given = text_of({context: "", **entry}, context).strip()
    answer = text_of(entry, response, empty=False).strip()
    return {"messages": user(f"{task}\n\n{given}" if given else task), "response": answer}
