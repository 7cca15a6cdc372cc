"""Chats, instructions, preference pairs and refusals."""

from __future__ import annotations

import json

import pytest

from tasks import get_task
from tasks.chat import render, turns_of
from tasks.safety import is_refusal

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


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"conversations": "a"}, "'conversations' should be a list of messages"),
        ({"id": 1}, "'conversations' should be a list of messages, is None"),
        ({"conversations": ["a"]}, r"'conversations\[0\]' should be a message"),
        ({"conversations": [{"from": "cat", "value": "a"}]}, r"conversations\[0\].from' should be one of"),
        ({"conversations": [{"from": "gpt", "value": 3}]}, r"conversations\[0\].value' should be text, is 3"),
    ],
)
def test_malformed_chats(tmp_path, entry: dict, words: str):
    put(tmp_path, "conversations.json", [talk("a", "b"), entry])
    with pytest.raises(ValueError, match=rf"conversations.json, line \d+: .*{words}"):
        get_task("sharegpt").load("train", tmp_path)


def test_completions_files(tmp_path):
    put(tmp_path, "b_gpt4_completions.json", '{"p": ["x"],\n"q": ["y", "z"]}')
    put(tmp_path, "a_gpt4_completions.json", '{"r": ["w"], "r": ["v"], "s": [""]}')
    put(tmp_path, "claude_completions.json", '{"t": ["u"]}')
    task = get_task("sharegpt4")
    rows = [(row["messages"][0]["content"], task.target(row)) for row in task.load("train", tmp_path)]
    assert rows == [("r", "w"), ("r", "v"), ("p", "x"), ("q", "y"), ("q", "z")]
    assert [row["response"] for row in get_task("shareclaude").load("train", tmp_path)] == ["u"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"p": ["x"],\n"q": "y"}', "line 2: .*expected a list of texts"),
        ('{"p": ["x"],\n"q": [1]}', "line 2: .*expected a list of texts"),
        ('{"p": ["x"],\n3: ["y"]}', "line 2: .*3 is no text"),
        ('{"p" ["x"]}', "line 1: not a JSON object"),
        ('["p"]', "line 1: not a JSON object"),
        ('{"p": ["x"]}\n}', "line 2: .*something follows"),
        ('{"p": ["x"],\n"q": [', "line 2: not JSON"),
        ("{}", "no rows"),
        ("", "no rows"),
    ],
)
def test_malformed_completions(tmp_path, content: str, words: str):
    put(tmp_path, "gpt4_completions.json", content)
    with pytest.raises(ValueError, match=f"gpt4_completions.json.*{words}"):
        get_task("sharegpt4").load("train", tmp_path)


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
            "revision": "main",
        }
    ]


def test_missing_chats_name_place_and_remedy(tmp_path, monkeypatch):
    import huggingface_hub

    def offline(**given):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(ValueError, match="no network") as error:
        get_task("sharegpt4").load("train", tmp_path)
    assert f'wget -P "{tmp_path}/sharegpt_data" https://huggingface.co/datasets/TRI-ML/' in str(error.value)
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
            prompt, chosen, rejected = task.pair(row)
            assert prompt == task.prompt(row) and prompt.endswith("\n\nAssistant:\n")
            assert chosen == task.target(row) != rejected
            assert [m["role"] for m in task.messages(row)][::2] == ["user"] * len(row["messages"][::2])
            assert task.messages(row)[-1]["role"] == "user"


def test_preferences_of_people_real_rows(shared):
    path = shared / "data/sharegpt_data/human_preferences.json"
    task = get_task("sharegpt").with_options(prefs_path=str(path))
    assert task.paired and not get_task("sharegpt").paired
    rows, raw = task.load("train", shared / "data"), json.loads(path.read_text())
    assert len(rows) == len(raw) == 400
    for row, entry in zip(rows, raw, strict=True):
        better, worse = (1, 2) if entry["preference"] == 1 else (2, 1)
        assert task.pair(row)[1:] == (
            str(entry[f"output_{better}"]).strip(),
            str(entry[f"output_{worse}"]).strip(),
        )
        assert task.target(row) == row["chosen"]
    assert sum("True" in task.pair(row)[1:] for row in rows) >= 2  # two outputs are no text in the file


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
        get_task("sharegpt").pair({"messages": []})


HH = {
    "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c: Human: d\n\nAssistant: good ",
    "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c: Human: d\n\nAssistant:",
}


def test_hh_splits_at_the_last_answer():
    task = get_task("hh")
    (row,) = task.unpack(HH)
    assert task.messages(row) == said("a", "b", "c: Human: d")
    assert task.pair(row)[1:] == ("good", "")
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
    assert [get_task("shp").pair(row)[1:] for row in rows] == ([] if pair is None else [pair])


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
        assert task.pair(row) == (render(said(prompt)), "chosen", "rejected")
    assert list(task.unpack({**chats, "chosen": said(prompt, "a </s>")})) == []
    with pytest.raises(ValueError, match="'chosen' should be 'Human: <prompt> Assistant: <answer>'"):
        list(task.unpack({**text, "chosen": "Human: other\n\nAssistant: a"}))
    with pytest.raises(ValueError, match="'rejected' should end with the assistant's message"):
        list(task.unpack({**chats, "rejected": said(prompt)}))


def test_instructions():
    alpaca, dolly = get_task("alpaca"), get_task("dolly")
    (row,) = alpaca.unpack({"instruction": "Sort.", "input": "3 1", "output": "1 3", "text": "..."})
    assert (alpaca.messages(row), alpaca.target(row)) == (said("Sort.\n\n3 1"), "1 3")
    (row,) = alpaca.unpack({"instruction": "Hi.", "input": "", "output": "Ho."})
    assert alpaca.prompt(row) == "Human:\nHi.\n\nAssistant:\n"
    assert list(alpaca.unpack({"instruction": "Hi.", "input": "", "output": ""})) == []
    (row,) = dolly.unpack({"instruction": "Who?", "context": "Ann did.", "response": "Ann", "category": "qa"})
    assert (dolly.messages(row), dolly.target(row)) == (said("Who?\n\nAnn did."), "Ann")
    with pytest.raises(ValueError, match="'response' is missing"):
        list(dolly.unpack({"instruction": "Who?", "context": ""}))
    ultrachat = get_task("ultrachat").with_options(num_turns=2)
    rows = list(ultrachat.unpack({"prompt": "a", "messages": said("a", "b", "c", "d")}))
    assert [ultrachat.target(row) for row in rows] == ["b", "d"]


@pytest.mark.parametrize("name", [*CHATS, *PAIRS, "alpaca_eval"])
def test_nothing_to_score(name: str):
    task = get_task(name)
    assert task.metric is None and task.scoring == () and task.chat
    assert task.paired is (name in PAIRS)


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


def test_turns_take_either_layout():
    entry = {"a": [{"from": "human", "value": " x "}, {"role": "assistant", "content": "y"}]}
    assert turns_of(entry, "a") == said("x", "y")
