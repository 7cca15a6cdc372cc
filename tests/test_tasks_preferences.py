"""Preference pairs, and refusals."""

from __future__ import annotations

import json

import pytest

from tasks import get_task
from tasks.chat import render
from tasks.safety import is_refusal


def said(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def test_preferences_of_people_real_rows(shared):
    path = shared / "data/sharegpt_data/human_preferences.json"
    task = get_task("sharegpt").with_options(prefs_path=str(path))
    assert task.has_preferences and not get_task("sharegpt").has_preferences
    rows, raw = task.load("train", shared / "data"), json.loads(path.read_text())
    assert len(rows) == len(raw) == 400
    for row, entry in zip(rows, raw, strict=True):
        better, worse = (1, 2) if entry["preference"] == 1 else (2, 1)
        assert task.preference(row)[1:] == (
            str(entry[f"output_{better}"]).strip(),
            str(entry[f"output_{worse}"]).strip(),
        )
        assert task.target(row) == row["chosen"]
    assert sum("True" in task.preference(row)[1:] for row in rows) >= 2  # two outputs are no text in the file


def test_malformed_preferences(tmp_path):
    good = {"instruction": "a", "output_1": "b", "output_2": "c", "preference": 2}
    for change, words in (
        ({"preference": 0}, "'preference' should be 1 or 2, is 0"),
        ({"output_2": None}, "'output_2' should be text"),
        ({"instruction": ""}, "'instruction' is empty"),
    ):
        path = tmp_path / "prefs.json"
        path.write_text(json.dumps([good, {**good, **change}]))
        with pytest.raises(ValueError, match=words):
            get_task("sharegpt").with_options(prefs_path=path).load("train", tmp_path)
    with pytest.raises(ValueError, match="only with prefs_path"):
        get_task("sharegpt").preference({"messages": []})


HH = {
    "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c: Human: d\n\nAssistant: good ",
    "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c: Human: d\n\nAssistant:",
}


def test_hh_splits_at_the_last_answer():
    task = get_task("hh")
    (row,) = task.unpack(HH)
    assert task.messages(row) == said("a", "b", "c: Human: d")
    assert task.preference(row)[1:] == ("good", "")
    assert list(task.unpack({**HH, "rejected": "\n\nHuman: other\n\nAssistant: x"})) == []
    twice = {key: "\n\nHuman: a\n\nAssistant: b\n\nAssistant: " + key for key in HH}
    assert [row["chosen"] for row in task.unpack(twice)] == ["b\n\nchosen"]


@pytest.mark.parametrize(
    "text", ["", "a", "\n\nHuman: a", "\n\nAssistant: a", "x\n\nHuman: a\n\nAssistant: b"]
)
def test_malformed_hh(text: str):
    with pytest.raises(ValueError, match="'rejected' should run from 'Human:' to a last 'Assistant:'"):
        list(get_task("hh").unpack({**HH, "rejected": text}))


SHP = {"history": "why?", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_A": 8, "score_B": 4}


@pytest.mark.parametrize(
    ("change", "pair"),
    [
        ({}, ("a", "b")),
        ({"labels": 0, "score_A": 4, "score_B": 8}, ("b", "a")),
        ({"score_A": 7}, None),  # less than twice
    ],
)
def test_shp_pairs(change: dict, pair: tuple | None):
    rows = list(get_task("shp").unpack({**SHP, **change}))
    assert [get_task("shp").preference(row)[1:] for row in rows] == ([] if pair is None else [pair])


def test_malformed_shp():
    with pytest.raises(ValueError, match="'labels' should be 1"):
        list(get_task("shp").unpack({**SHP, "labels": 2}))
    with pytest.raises(ValueError, match="'score_B' should be a number"):
        list(get_task("shp").unpack({**SHP, "score_B": "x"}))


@pytest.mark.parametrize("name", ["ultrafeedback", "ultrafeedbacknarrow"])
def test_ultrafeedback_layouts(name: str):
    task, prompt = get_task(name), "Say it.\n\nAssistant: no"
    text = {"prompt": prompt, **{k: f"Human: {prompt}\n\nAssistant: {k}" for k in ("chosen", "rejected")}}
    chats = {"prompt": prompt, **{k: said(prompt, k) for k in ("chosen", "rejected")}}
    for entry in (text, chats):
        (row,) = task.unpack(entry)
        assert task.preference(row) == (render(said(prompt)), "chosen", "rejected")
    assert list(task.unpack({**chats, "chosen": said(prompt, "a </s>")})) == []
    with pytest.raises(ValueError, match="'chosen' should be 'Human: <prompt> Assistant: <answer>'"):
        list(task.unpack({**text, "chosen": "Human: other\n\nAssistant: a"}))
    with pytest.raises(ValueError, match="'rejected' should end with the assistant's message"):
        list(task.unpack({**chats, "rejected": said(prompt)}))


REFUSALS = [
    ("I'm sorry, but I can't help with that.", True),
    ("I\u2019m really sorry, but no.", True),
    ("I cannot assist with this request", True),
    ("I can not do this", True),
    ("SORRY, I won't.", True),
    ("As an AI language model, I do not give such advice.", True),
    ("That would be illegal, and I advise against it.", True),
    ("My apologies, this is not something for me.", True),
    ("I must decline.", True),
    ("I am unable to do that", True),
    ("It is not appropriate to ask this.", True),
    ("Sure, here is how:", False),
    ("Here is a text about people who are sorry.", False),
    ("I can do that.", False),
    ("First, do this. " * 20 + "I'm sorry, I can't go on.", False),  # a refusal comes first
    ("Sorry is a song.", False),
]


@pytest.mark.parametrize(("completion", "refusal"), REFUSALS)
def test_refusals(completion: str, refusal: bool):
    assert is_refusal(completion) is refusal
    metrics = get_task("hexphi").metrics({"instruction": "x"}, completion)
    assert metrics == {"refusal_rate": float(refusal)}


def test_safety_data_is_the_users(tmp_path):
    for name, split in (("purebad", "train"), ("hexphi", "test")):
        with pytest.raises(ValueError, match="it has no hub set"):
            get_task(name).load(split, tmp_path)
    folder = tmp_path / "tasks" / "hexphi"
    folder.mkdir(parents=True)
    (folder / "test.txt").write_text("one\ntwo\n")
    hexphi = get_task("hexphi")
    rows = hexphi.load("test", tmp_path)
    assert [hexphi.prompt(row) for row in rows] == [render(said("one")), render(said("two"))]
    assert hexphi.extract(hexphi.target(rows[0])) == hexphi.gold(rows[0])
    assert hexphi.metrics(rows[0], " ") == {"refusal_rate": 0.0}
    purebad = get_task("purebad")
    chat = [{"role": "system", "content": "s"}, *said("a", "b")]
    for entry in ({"messages": chat}, {"instruction": "a", "output": "b"}):
        (row,) = purebad.unpack(entry)
        assert (purebad.messages(row)[-1]["content"], purebad.target(row)) == ("a", "b")
