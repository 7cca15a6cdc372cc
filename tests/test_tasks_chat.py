"""Chats, instructions and preferences."""

from __future__ import annotations

import json

import pytest

from tasks import get_task
from tasks.chat import render, turns_of
from tests.test_tasks_rows import HH, SHP

CHATS = ("sharegpt", "sharegpt4", "shareclaude", "ultrachat", "alpaca", "dolly", "purebad")
PAIRS = ("hh", "shp", "se", "ultrafeedback", "ultrafeedbacknarrow")


def said(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def test_a_chat_as_a_prompt():
    assert render(said("a", "b", "c")) == "Human:\na\n\nAssistant:\nb\n\nHuman:\nc\n\nAssistant:\n"
    assert render([{"role": "system", "content": "s"}, *said("a")]) == (
        "System:\ns\n\nHuman:\na\n\nAssistant:\n"
    )
    instruction = {"instruction": "a"}
    assert get_task("alpaca_eval").prompt(instruction) == render(said("a"))
    assert get_task("alpaca_eval").messages(instruction) == said("a")


def put(folder, name: str, content) -> None:
    path = folder / "sharegpt_data" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=1))


def talk(*values: str) -> dict:
    who = ("human", "gpt")
    return {"conversations": [{"from": who[i % 2], "value": text} for i, text in enumerate(values)]}


@pytest.mark.parametrize(("num_turns", "n"), [(1, 1), (2, 2), (9, 2)])
def test_every_answer_is_an_example(tmp_path, num_turns: int, n: int):
    put(tmp_path, "conversations.json", [talk("a", "b ", "c", "d", "e")])
    task = get_task("sharegpt").with_options(num_turns=num_turns)
    rows = task.load("train", tmp_path)
    expected = [(said("a"), "b"), (said("a", "b", "c"), "d")][:n]
    assert [(task.messages(row), task.target(row)) for row in rows] == expected
    assert all(task.prompt(row).endswith(task.closing) for row in rows)
    assert get_task("sharegpt").options["num_turns"] == 1  # a copy was configured


def test_what_is_left_out_is_counted(tmp_path, caplog):
    chats = [
        talk("a", "b"),
        {"conversations": [{"from": "gpt", "value": "x"}, {"from": "human", "value": "y"}]},
        talk("a", "ends </s> here"),
        talk("a"),
        talk("a", " "),
        {"conversations": []},
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "human", "value": "b"},
                *talk("", "c")["conversations"][1:],
            ]
        },
    ]
    put(tmp_path, "conversations.json", chats)
    with caplog.at_level("INFO"):
        rows = get_task("sharegpt").load("train", tmp_path)
    assert [row["response"] for row in rows] == ["b", "c"]
    assert rows[1]["messages"] == said("a\n\nb")  # one speaker twice
    assert "5 of 7 entries left out" in caplog.text


def test_completions_files(tmp_path):
    put(tmp_path, "b_gpt4_completions.json", '{"p": ["x"],\n"q": ["y", "z"]}')
    put(tmp_path, "a_gpt4_completions.json", '{"r": ["w"], "r": ["v"], "s": [""]}')
    put(tmp_path, "claude_completions.json", '{"t": ["u"]}')
    task = get_task("sharegpt4")
    rows = [(row["messages"][0]["content"], task.target(row)) for row in task.load("train", tmp_path)]
    assert rows == [("r", "w"), ("r", "v"), ("p", "x"), ("q", "y"), ("q", "z")]
    assert [row["response"] for row in get_task("shareclaude").load("train", tmp_path)] == ["u"]


CHAT = talk("a", "b")
PREFERENCE = {"instruction": "a", "output_1": "b", "output_2": "c", "preference": 2}
# (file, what is malformed in it, words of the error)
MALFORMED = [
    ("conversations", {"conversations": "a"}, "'conversations' should be a list of messages"),
    ("conversations", {"id": 1}, "'conversations' should be a list of messages, is None"),
    ("conversations", {"conversations": ["a"]}, r"'conversations\[0\]' should be a message"),
    ("conversations", {"conversations": [{"from": "cat"}]}, r"conversations\[0\].from' should be one of"),
    ("conversations", {"conversations": [{"from": "gpt", "value": 3}]}, r"\[0\].value' should be text, is 3"),
    ("prefs", {**PREFERENCE, "preference": 0}, "'preference' should be 1 or 2, is 0"),
    ("prefs", {**PREFERENCE, "output_2": None}, "'output_2' should be text"),
    ("prefs", {**PREFERENCE, "instruction": ""}, "'instruction' is empty"),
    ("gpt4_completions", '{"p": ["x"],\n"q": "y"}', "line 2: .*expected a list of texts"),
    ("gpt4_completions", '{"p": ["x"],\n"q": [1]}', "line 2: .*expected a list of texts"),
    ("gpt4_completions", '{"p": ["x"],\n3: ["y"]}', "line 2: .*3 is no text"),
    ("gpt4_completions", '{"p" ["x"]}', "line 1: not a JSON object"),
    ("gpt4_completions", '["p"]', "line 1: not a JSON object"),
    ("gpt4_completions", '{"p": ["x"]}\n}', "line 2: .*something follows"),
    ("gpt4_completions", '{"p": ["x"],\n"q": [', "line 2: not JSON"),
    ("gpt4_completions", "{}", "no rows"),
    ("gpt4_completions", "", "no rows"),
]


@pytest.mark.parametrize(("file", "malformed", "words"), MALFORMED)
def test_a_malformed_file_names_its_place(tmp_path, file: str, malformed: dict | str, words: str):
    path = tmp_path / "sharegpt_data" / f"{file}.json"
    tasks = {
        "conversations": get_task("sharegpt"),
        "prefs": get_task("sharegpt").with_options(prefs_path=path),
        "gpt4_completions": get_task("sharegpt4"),
    }
    good = {"conversations": CHAT, "prefs": PREFERENCE}
    put(tmp_path, path.name, malformed if isinstance(malformed, str) else [good[file], malformed])
    place = "" if isinstance(malformed, str) else r", line \d+: "
    with pytest.raises(ValueError, match=f"{path.name}{place}.*{words}"):
        tasks[file].load("train", tmp_path)


def test_sharegpt4_from_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    put(tmp_path / "cache", "file.json", {"p": ["x"]})
    asked = []
    path = str(tmp_path / "cache/sharegpt_data/file.json")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda **given: asked.append(given) or path)
    assert len(get_task("sharegpt4").load("train", tmp_path)) == 1
    assert asked == [
        {
            "repo_id": "TRI-ML/dpo-rlaif-data",
            "filename": "sharegpt1turn_df1.0_ff0_gpt4_completions.json",
            "repo_type": "dataset",
            "revision": "8d6ea743349dbbff448abee17f68820f5e15d2f8",
        }
    ]


def test_missing_chats_name_place_and_remedy(tmp_path, monkeypatch):
    import huggingface_hub

    def offline(**given):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(ValueError, match="no network") as error:
        get_task("sharegpt4").load("train", tmp_path)
    assert "wget https://huggingface.co/datasets/TRI-ML/" in str(error.value)
    assert str(error.value).endswith(f"put the file into {tmp_path}/sharegpt_data")
    with pytest.raises(ValueError, match=r"sharegpt_data/\*claude_completions.json; it has no hub set"):
        get_task("shareclaude").load("train", tmp_path)
    with pytest.raises(ValueError, match=r"sharegpt_data/conversations\.json"):
        get_task("sharegpt").load("train", tmp_path)


def test_options_are_known():
    with pytest.raises(ValueError, match="task gsm8k has no option num_turns; it has none"):
        get_task("gsm8k").with_options(num_turns=2)
    with pytest.raises(ValueError, match="no option turns; it has num_turns, prefs_path"):
        get_task("sharegpt").with_options(turns=2)


def test_chats_real_rows(shared):
    data = shared / "data"
    task = get_task("sharegpt")
    for num_turns, n in ((1, 500), (2, 833), (9, 1000)):  # chats of 1, 2 and 3 answers
        assert len(task.with_options(num_turns=num_turns).load("train", data)) == n
    assert len(get_task("sharegpt4").load("train", data)) == 985
    for name, split, n in (("hh", "train", 260), ("hh", "test", 40), ("se", "train", 25)):
        task = get_task(name)
        rows = task.load(split, data)
        assert len(rows) == n
        for row in rows:
            prompt, chosen, rejected = task.preference(row)
            assert prompt == task.prompt(row) and prompt.endswith("\n\nAssistant:\n")
            assert chosen == task.target(row) != rejected
            assert [m["role"] for m in task.messages(row)][::2] == ["user"] * len(row["messages"][::2])
            assert task.messages(row)[-1]["role"] == "user"


def test_instructions():
    alpaca, dolly = get_task("alpaca"), get_task("dolly")
    (row,) = alpaca.unpack({"instruction": "Sort.", "input": "3 1", "output": "1 3", "text": "..."})
    assert (alpaca.messages(row), alpaca.target(row)) == (said("Sort.\n\n3 1"), "1 3")
    (row,) = alpaca.unpack({"instruction": "Hi.", "input": "", "output": "Ho."})
    assert alpaca.prompt(row) == "Human:\nHi.\n\nAssistant:\n"
    assert list(alpaca.unpack({"instruction": "Hi.", "input": "", "output": ""})) == []
    (row,) = dolly.unpack({"instruction": "Who?", "context": "Ann did.", "response": "Ann", "category": "qa"})
    assert (dolly.messages(row), dolly.target(row)) == (said("Who?\n\nAnn did."), "Ann")
    ultrachat = get_task("ultrachat").with_options(num_turns=2)
    rows = list(ultrachat.unpack({"prompt": "a", "messages": said("a", "b", "c", "d")}))
    assert [ultrachat.target(row) for row in rows] == ["b", "d"]


@pytest.mark.parametrize("name", [*CHATS, *PAIRS, "alpaca_eval"])
def test_nothing_to_score(name: str):
    task = get_task(name)
    assert task.metric is None and task.scoring == () and task.chat
    assert task.has_preferences is (name in PAIRS)


def test_turns_take_either_layout():
    entry = {"a": [{"from": "human", "value": " x "}, {"role": "assistant", "content": "y"}]}
    assert turns_of(entry, "a") == said("x", "y")


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


def test_preferences_need_their_file():
    with pytest.raises(ValueError, match="only with prefs_path"):
        get_task("sharegpt").preference({"messages": []})


def test_hh_splits_at_the_last_answer():
    task = get_task("hh")
    (row,) = task.unpack(HH)
    assert task.messages(row) == said("a", "b", "c: Human: d")
    assert task.preference(row)[1:] == ("good", "")
    assert list(task.unpack({**HH, "rejected": "\n\nHuman: other\n\nAssistant: x"})) == []
    twice = {key: "\n\nHuman: a\n\nAssistant: b\n\nAssistant: " + key for key in HH}
    assert [row["chosen"] for row in task.unpack(twice)] == ["b\n\nchosen"]


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
