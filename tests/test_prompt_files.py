"""Prompts of the user's own files: every form that an entry may have, and what is refused."""

from __future__ import annotations

import json

import pytest

from tasks.prompts import PROMPTS
from tests.test_tasks_chat import said


def test_every_form(tmp_path):
    """The same words have the same prompt in whatever form they come."""
    forms = [
        "Why?",
        {"prompt": "Why?", "completion": "not read"},
        {"instruction": "Why?", "input": "", "output": "not read"},
        {"messages": said("Why?", "Because.")},
        {"prompt": said("Why?")},
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
    ]
    system = {"role": "system", "content": "Be brief."}
    more = [
        {"instruction": "Sum.", "input": "1 2"},
        {"messages": said("Who?", "I.", "Why?", "So.")},
        {"messages": [system, *said("Who?")]},
    ]
    (tmp_path / "a.json").write_text(json.dumps([*forms, *more], indent=1))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in [*forms, *more]))
    rows = PROMPTS.read(tmp_path / "a.json")
    assert rows == PROMPTS.read(tmp_path / "a.jsonl")
    assert [PROMPTS.prompt(row) for row in rows[: len(forms)]] == ["Human:\nWhy?\n\nAssistant:\n"] * len(
        forms
    )
    assert [PROMPTS.instruction(row) for row in rows[len(forms) :]] == [
        "Sum.\n\n1 2",
        "Human:\nWho?\n\nAssistant:\nI.\n\nHuman:\nWhy?",
        "System:\nBe brief.\n\nHuman:\nWho?",
    ]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"question": "what?"}, "none of the fields 'instruction', 'prompt', 'messages', 'conversations'"),
        ({}, "none of the fields .*; found none"),
        (7, "expected an object with named fields, found 7"),
        ({"prompt": 7}, "field 'prompt' should be text, is 7"),
        ({"instruction": " "}, "field 'instruction' is empty"),
        ({"instruction": "a", "input": ["b"]}, "field 'input' should be text"),
        ("", "field 'prompt' is empty"),
        ({"messages": []}, "field 'messages' should hold a message of the user's"),
        ({"messages": said("a", "b")[1:]}, "field 'messages' should hold a message of the user's"),
        ({"messages": said("", "I.")}, "field 'messages' should hold a message of the user's"),
        (
            {"messages": [*said("a"), {"role": "owl", "content": "Hu."}]},
            r"'messages\[1\].role' should be one of",
        ),
        ({"conversations": said("a", "b")[::-1]}, "field 'conversations' should begin with the user's"),
    ],
)
def test_a_malformed_entry_is_named(tmp_path, entry, words):
    path = tmp_path / "bad.json"
    path.write_text('["fine",\n {"instruction": "fine"},\n' + json.dumps(entry) + "\n]")
    with pytest.raises(ValueError, match=f"bad.json, line 3: .*{words}"):
        PROMPTS.read(path)


def test_files_of_another_kind(tmp_path):
    (tmp_path / "a.csv").write_text("prompt\nfine\n")
    (tmp_path / "empty.json").write_text("[]")
    for name, words in (
        ("a.csv", "prompts are read from .json and .jsonl"),
        ("absent.jsonl", "no such file"),
        ("empty.json", "no rows"),
    ):
        with pytest.raises(ValueError, match=words):
            PROMPTS.read(tmp_path / name)
