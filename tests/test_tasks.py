"""Tasks: rows from disk and hub, malformed data, names, and what gsm8k takes for an answer."""

from __future__ import annotations

import csv
import json

import pytest

import tasks
from tasks import get_task
from tasks.base import Task, read_rows

GSM8K = get_task("gsm8k")
ROW = {"question": "How many?", "answer": "Two and <<2+3=5>>three is 5.\n#### 5"}


def put(folder, name: str, content: str, task: str = "gsm8k"):
    path = folder / "tasks" / task / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode())
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_formats_hold_the_same_rows(tmp_path, kind: str):
    rows = [
        {"question": "a \u2028 b,\r\nsecond line", "answer": '"quoted" #### 1'},
        {"question": "c", "answer": "#### 2"},
    ]
    quoted = [",".join('"' + v.replace('"', '""') + '"' for v in row.values()) for row in rows]
    content = {
        "jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        "json": json.dumps(rows, indent=1, ensure_ascii=False),
        "csv": "\r\n".join(["question,answer", *quoted, ""]),
    }
    put(tmp_path, f"test.{kind}", content[kind])
    assert GSM8K.load("test", tmp_path) == rows


def test_text_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n\ntwo \r\nthree")
    assert [row["text"] for row in read_rows(path, lambda row: None)] == ["one", "", "two ", "three"]


def test_real_csv_with_line_ends_inside_fields(shared):
    rows = read_rows(shared / "data/tasks/samsum/train.csv", lambda row: None)
    assert len(rows) == 2048
    assert sum("\r\n" in row["dialogue"] for row in rows) > 1000
    assert all(set(row) == {"id", "dialogue", "summary"} for row in rows)


GOOD = json.dumps(ROW)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("test.jsonl", f"{GOOD}\n{{\n", ["test.jsonl, line 2", "not JSON"]),
        ("test.jsonl", f'{GOOD}\n\n{{"question": "x"}}\n', ["line 3", "'answer' is missing"]),
        ("test.jsonl", '{"question": 5, "answer": "#### 5"}\n', ["line 1", "'question' should be text"]),
        ("test.jsonl", '{"question": "x", "answer": "five"}\n', ["line 1", "'answer' has no number"]),
        ("test.jsonl", '{"question": " ", "answer": "#### 5"}\n', ["line 1", "'question' is empty"]),
        ("test.jsonl", "[1]\n", ["line 1", "expected an object"]),
        ("test.jsonl", "\n", ["test.jsonl: no rows"]),
        ("test.json", f"[\n{GOOD},\n{{}}\n]", ["test.json, line 3", "'question' is missing"]),
        ("test.json", f"[{GOOD},\n\n]", ["line 3", "not JSON"]),
        ("test.json", f"[{GOOD}\n{GOOD}]", ["line 2", "not a JSON list"]),
        ("test.json", f"[{GOOD}] 1", ["line 1", "something follows"]),
        ("test.json", '{"data": []}', ["line 1", "not a JSON list"]),
        ("test.json", "[]", ["test.json: no rows"]),
        ("test.json", "", ["test.json: no rows"]),
        ("test.csv", "question,answer\nx,#### 1\ny\n", ["test.csv, line 3", "'answer' is missing"]),
        ("test.csv", 'question,answer\n"a\r\nb",#### 1\ny,z,w\n', ["line 4", "more values"]),
        ("test.csv", 'question,answer\n"never closed', ["line 2", "not CSV"]),
        ("test.csv", "question,answer\n", ["test.csv: no rows"]),
        ("test.csv", "question,answer,question\nx,#### 1,y\n", ["line 1", "the column 'question' twice"]),
        ("test.csv", "question,answer\nx\0,#### 1\n", ["line 2", "'question' holds a NUL character"]),
        (
            "test.jsonl",
            f'{GOOD}\n{{"question": "a", "question": "b"}}',
            ["line 2", "'question' stands twice"],
        ),
        ("test.json", f'[{GOOD},\n{{"a": 1, "a": 2}}]', ["line 2", "the key 'a' stands twice"]),
        ("test.jsonl", GOOD.replace("many", "\\ud800"), ["line 1", r"'question' holds \ud800, one half"]),
        ("test.json", f"[{GOOD},\n{GOOD.replace('many', chr(92) + 'udc00')}]", ["line 2", r"\udc00"]),
        ("test.jsonl", f'{GOOD[:-1]}, "more": {{"a": ["\\u0000"]}}}}', ["'more.a.0' holds a NUL character"]),
        ("test.jsonl", f'{GOOD}\n{{"id": {"9" * 5000}}}', ["line 2", "5000 digits"]),
        ("test.json", f'[{GOOD},\n\n{{"id": {"9" * 5000}}}]', ["line 3", "5000 digits"]),
        ("test.jsonl", "[" * 200_000, ["line 1", "nested too deeply"]),
        ("test.json", "[" * 200_000, ["line 1", "nested too deeply"]),
    ],
)
def test_malformed_data_names_its_place(tmp_path, name: str, content: str, words: list[str]):
    put(tmp_path, name, content)
    with pytest.raises(ValueError) as error:
        GSM8K.load("test", tmp_path)
    for word in words:
        assert word in str(error.value)


def test_a_long_field_is_a_field(tmp_path):
    limit = csv.field_size_limit()
    put(tmp_path, "test.csv", f"question,answer\n{'x' * 200_000},#### 1\n")
    assert len(GSM8K.load("test", tmp_path)[0]["question"]) == 200_000
    assert csv.field_size_limit() == limit  # which is the whole process's


def test_held_out_rows_that_are_training_rows_are_counted(tmp_path, caplog):
    rows = [{"question": f"q{i}", "answer": f"#### {i}"} for i in range(5)]
    turned = [dict(reversed(row.items())) for row in rows]  # the same rows, written by somebody else
    for name, some in (("train", turned), ("test", [*rows[3:], {"question": "new", "answer": "#### 1"}])):
        put(tmp_path, f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in some))
    GSM8K.load("train", tmp_path)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(GSM8K.load("test", tmp_path)) == 3
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said.startswith(f"gsm8k: 2 of 3 rows of {tmp_path}/tasks/gsm8k/test.jsonl are training rows too")
    put(tmp_path, "train.jsonl", "{")  # which is told where it is trained on
    assert len(GSM8K.load("test", tmp_path)) == 3


def test_bytes_that_are_no_text(tmp_path):
    path = put(tmp_path, "test.jsonl", "")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8"):
        GSM8K.load("test", tmp_path)


def test_two_files_for_one_split_are_refused(tmp_path):
    put(tmp_path, "test.jsonl", GOOD)
    put(tmp_path, "test.json", f"[{GOOD}]")
    with pytest.raises(ValueError, match=r"test\.jsonl and test\.json"):
        GSM8K.load("test", tmp_path)


def test_rows_of_the_hub_are_checked(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda **arguments: [ROW])
    assert GSM8K.load("train", tmp_path) == [ROW]
    with pytest.raises(ValueError, match=r"hub set .*row 1: field 'instruction'"):
        get_task("alpaca_eval").load("eval", tmp_path)


def test_missing_data_names_both_places_and_the_remedy(tmp_path, monkeypatch):
    import datasets

    def offline(**arguments):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    put(tmp_path, "train.jsonl", GOOD)
    with pytest.raises(ValueError) as error:
        GSM8K.load("test", tmp_path)  # and not the rows of train
    message = str(error.value)
    for part in (str(tmp_path / "tasks/gsm8k/test"), "openai/gsm8k", "no network", "load_dataset("):
        assert part in message
    assert "to_json('test.jsonl')" in message
    assert message.endswith(f"put test.jsonl into {tmp_path}/tasks/gsm8k")


def test_unknown_split_is_refused(tmp_path):
    put(tmp_path, "validation.jsonl", GOOD)
    with pytest.raises(ValueError, match="no split 'validation'; it has train, test"):
        GSM8K.load("validation", tmp_path)


def test_task_without_a_hub_set(tmp_path):
    class Local(Task):
        name = "local"

    with pytest.raises(ValueError, match="it has no hub set"):
        Local().load("train", tmp_path)


def test_unknown_task_lists_the_nearest_names():
    with pytest.raises(ValueError, match=r"unknown task 'gsm8j' \(nearest: gsm8k"):
        get_task("gsm8j")


OWN = """
from tasks.base import Task

class Mine(Task):
    name = "mine"
    def extract(self, completion):
        return completion or None

class Other(Mine):
    name = "other"

TASK = Mine()
"""


def test_a_file_in_the_current_directory_is_a_task(tmp_path, monkeypatch):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.py").write_text(OWN)
    (tmp_path / "tasks" / "other.py").write_text(OWN)
    (tmp_path / "tasks" / "empty.py").write_text("")
    monkeypatch.chdir(tmp_path)
    assert get_task("mine").extract("a") == "a"
    with pytest.raises(ValueError, match=r"nearest: .*mine"):
        get_task("mime")
    with pytest.raises(ValueError, match=r"holds the tasks mine, not 'other'"):
        get_task("other")
    with pytest.raises(ValueError, match="holds no TASK or TASKS"):
        get_task("empty")


def test_relatives_share_a_file(tmp_path, monkeypatch):
    (tmp_path / "tasks").mkdir()
    shared_file = OWN.replace("TASK = Mine()", "TASKS = {task.name: task for task in (Mine(), Other())}")
    (tmp_path / "tasks" / "relatives.py").write_text(shared_file)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(tasks.TASKS, "other", "json")
    with pytest.raises(ValueError, match="not 'other'"):
        get_task("other")
    (tmp_path / "tasks" / "relatives.py").rename(tmp_path / "tasks" / "mine.py")
    assert get_task("mine").name == "mine"
