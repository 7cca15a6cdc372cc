"""Rows from the web: arguments of load_dataset, one split cut in two; names of tasks and their table."""

from __future__ import annotations

import json
import re
import shlex
import time
from pathlib import Path

import pytest

from lota.data.task import Task
from tasks import EVALUATED_ON, TASKS, base, evaluation_names, get_task
from tasks.base import HubSet

ADAPTERS = (
    "https://raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters/816657208af4db747803f87ba40a4c71383fed7a"
)
ARC = "210d026faf9955653af8916fad021475a3f00453"
SQL = "9d80a6a118b838d9defc3798d659a54a2ac2ff37"
ULTRARM = "382c65cb95f62a7bd6be949898189f1a8d39069d"


def hub(path: str, revision: str, split: str, **more: str) -> dict[str, str]:
    return {"path": path, "revision": revision, "split": split, **more}


def adapters(file: str) -> dict[str, str]:
    return {"path": "json", "data_files": f"{ADAPTERS}/{file}", "split": "train"}


ASKED = {
    ("gsm8k", "test"): hub("openai/gsm8k", "e53f048856ff4f594e959d75785d2c2d37b678ee", "test", name="main"),
    ("metamathqa", "train"): hub("meta-math/MetaMathQA", "aa4f34d3d2d3231299b5b03d9b3e5a20da45aa18", "train"),
    ("finewiki", "test"): hub("HuggingFaceFW/finewiki", "main", "train") | {"streaming": True},
    ("mathinstruct", "train"): hub(
        "TIGER-Lab/MathInstruct", "b4fdc323a7be1379c9c7c0b67b1de72dfee2111a", "train"
    ),
    ("AQuA", "test"): hub(
        "deepmind/aqua_rat", "33301c6a050c96af81f63cad5562cb5363e88971", "test", name="raw"
    ),
    ("mathqa", "test"): hub("regisss/math_qa", "main", "test"),
    ("AddSub", "test"): adapters("dataset/AddSub/test.json"),
    ("MultiArith", "test"): adapters("dataset/MultiArith/test.json"),
    ("SingleEq", "test"): adapters("dataset/SingleEq/test.json"),
    ("SVAMP", "test"): hub("ChilleD/SVAMP", "5e0bf1e5e7c0e9c4bc39180d224f41f3f801b7ef", "test"),
    ("mawps", "test"): hub("MU-NLPC/Calc-mawps", "38c10053efeafd20ab6ff4e08c3ec17de26c19b7", "test"),
    ("arc", "test"): hub("allenai/ai2_arc", ARC, "test", name="ARC-Challenge"),
    ("commonsense", "train"): adapters("ft-training_set/commonsense_170k.json"),
    ("boolq", "test"): hub("google/boolq", "35b264d03638db9f4ce671b711558bf7ff0f80d5", "validation"),
    ("piqa", "test"): hub(
        "ybisk/piqa", "142c51238b3ca2bc61e9a075913871b8b600e8e1", "validation", name="plain_text"
    ),
    ("social_i_qa", "test"): hub("lighteval/siqa", "54c6a1f8cb6daf4f5abf24a601852612fb35eb25", "validation"),
    ("ARC-Challenge", "test"): hub("allenai/ai2_arc", ARC, "test", name="ARC-Challenge"),
    ("ARC-Easy", "train"): hub("allenai/ai2_arc", ARC, "train", name="ARC-Easy"),
    ("openbookqa", "test"): hub(
        "allenai/openbookqa", "388097ea7776314e93a529163e0fea805b8a6454", "test", name="main"
    ),
    ("hellaswag", "test"): hub("Rowan/hellaswag", "218ec52e09a7e7462a5400043bb9a69a41d06b76", "validation"),
    ("winogrande", "test"): hub(
        "allenai/winogrande", "01e74176c63542e6b0bcb004dcdea22d94fb67b5", "validation", name="winogrande_xl"
    ),
    ("samsum", "test"): hub("knkarthick/samsum", "f8040674894a743112febaddde2b32264c07bb20", "test"),
    ("sql", "test"): hub("b-mc2/sql-create-context", SQL, "train"),
    ("sql", "train"): hub("b-mc2/sql-create-context", SQL, "train"),
    ("hh", "test"): hub("Anthropic/hh-rlhf", "09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa", "test"),
    ("shp", "test"): hub("stanfordnlp/SHP", "e94b5f32602712d78ed494fe79105b1959396686", "test"),
    ("se", "train"): hub(
        "lvwerra/stack-exchange-paired",
        "0c0a1bc27a253683bdcdd061007b82bfc7bbddb1",
        "train",
        data_dir="data/rl",
    ),
    ("ultrafeedback", "train"): hub(
        "Asap7772/ultrafeedback_binarized_relabelled_ultrarm", ULTRARM, "train_prefs"
    ),
    ("ultrafeedbacknarrow", "train"): hub(
        "Asap7772/ultrafeedback_binarized_narrow", "fbd327c00b2dabafaaa41902e2941866bef89eca", "train_prefs"
    ),
    ("ultrafeedbacknarrow", "test"): hub(
        "Asap7772/ultrafeedback_binarized_relabelled_ultrarm", ULTRARM, "test_prefs"
    ),
    ("ultrachat", "test"): hub(
        "HuggingFaceH4/ultrachat_200k", "8049631c405ae6576f93f445c6b8166f76f5505a", "test_sft"
    ),
    ("alpaca", "train"): hub("tatsu-lab/alpaca", "dce01c9b08f87459cf36a430d809084718273017", "train"),
    ("dolly", "train"): hub(
        "databricks/databricks-dolly-15k", "bdd27f4d94b9c1f951818a7da7fd7aeea5dbff1a", "train"
    ),
    ("alpaca_eval", "eval"): {
        "path": "json",
        "data_files": "hf://datasets/tatsu-lab/alpaca_eval@2edc6fad8be6b14ea7230aabfd08188da6b8b814/alpaca_eval.json",
        "split": "train",
    },
    ("wikitext", "validation"): hub(
        "Salesforce/wikitext", "b08601e04326c79dfdd32d625aee71d232d685c3", "validation", name="wikitext-2-v1"
    ),
}
UNPINNED = {"mathqa", "finewiki"}  # held to the number of its rows instead
# sharegpt4 takes one file of the hub by itself; the toy tasks make their rows; the others are the user's own
NO_HUB_SET = {
    "sharegpt",
    "sharegpt4",
    "shareclaude",
    "purebad",
    "hexphi",
    "toy_sort",
    "toy_shift",
    "toy_reverse",
}


@pytest.mark.parametrize(("name", "split"), ASKED)
def test_the_hub_is_asked_with_pinned_arguments(name: str, split: str, tmp_path, monkeypatch):
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda **arguments: asked.append(arguments) or [])
    with pytest.raises(ValueError, match=r"hub set .*(: no rows|has changed: 0 rows)"):
        get_task(name).load(split, tmp_path)
    assert asked == [ASKED[name, split]]


def test_every_hub_set_is_covered_and_pinned():
    assert {name for name, _ in ASKED} == set(TASKS) - NO_HUB_SET
    for name in set(TASKS) - NO_HUB_SET:
        hub = get_task(name).hub
        if name in UNPINNED:
            assert hub.revision == "main" and set(hub.n_rows) == set(hub.splits)
        else:
            assert re.fullmatch("[0-9a-f]{40}", hub.revision) and hub.n_rows is None


def test_a_set_that_is_not_pinned_may_not_have_changed(tmp_path, monkeypatch):
    import datasets

    entry = {"Problem": "1 + 1 ?", "Rationale": "", "options": "a ) 2 , b ) 3", "correct": "a"}
    n = 2985
    monkeypatch.setattr(datasets, "load_dataset", lambda **arguments: [entry] * n)
    assert len(get_task("mathqa").load("test", tmp_path)) == n
    n = 2984
    with pytest.raises(ValueError, match="the set has changed: 2984 rows instead of 2985"):
        get_task("mathqa").load("test", tmp_path)


@pytest.mark.parametrize("name", ["gsm8k", "sharegpt4"])
def test_a_hub_out_of_reach_is_said_at_once(name: str, tmp_path, monkeypatch, caplog):
    """The libraries' own attempts take 24 seconds."""
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    monkeypatch.setattr("urllib.request.getproxies", dict)
    start = time.monotonic()
    with pytest.raises(
        ValueError, match=rf"task {name}: no data[^$]*On a machine with a network, run"
    ) as error:
        get_task(name).load("train", tmp_path)
    assert time.monotonic() - start < 20  # a busy machine takes some seconds as well
    assert str(tmp_path) in str(error.value).splitlines()[-1] and "mkdir" not in str(error.value)
    assert "Retrying" not in caplog.text
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE  # only meanwhile


ENTRIES = [
    {"question": f"q{i}", "context": "CREATE TABLE t (a INT)", "answer": "SELECT a"} for i in range(2000)
]


@pytest.fixture
def one_split(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda **arguments: ENTRIES)


def test_one_split_is_cut_by_hash(tmp_path, one_split):
    """Train and test of a set with one split share no row, lose none, and do not depend on its order."""
    task = get_task("sql")
    train, test = ({row["question"] for row in task.load(split, tmp_path)} for split in ("train", "test"))
    assert not train & test
    assert train | test == {entry["question"] for entry in ENTRIES}
    assert 0.01 < len(test) / len(ENTRIES) < 0.03
    assert test != {f"q{i}" for i in range(len(test))}  # not the first rows
    ENTRIES.reverse()
    assert {row["question"] for row in task.load("test", tmp_path)} == test


def test_a_cut_split_does_not_stand_beside_a_local_one(tmp_path, one_split):
    folder = tmp_path / "tasks" / "sql"
    folder.mkdir(parents=True)
    (folder / "train.json").write_text(json.dumps(ENTRIES[:3]))
    with pytest.raises(ValueError, match=r"holds train but not test.* may be those of train"):
        get_task("sql").load("test", tmp_path)
    assert len(get_task("sql").load("train", tmp_path)) == 3


def test_the_fetch_command_keeps_the_cut(tmp_path, one_split, monkeypatch):
    import datasets

    task = get_task("sql")
    path = tmp_path / "tasks/sql/test.jsonl"
    from_hub = task.load("test", tmp_path)
    path.parent.mkdir(parents=True)
    exec(shlex.split(task.hub.fetch_command("sql", "test", path))[-1])
    monkeypatch.setattr(datasets, "load_dataset", lambda **arguments: pytest.fail("there is a local file"))
    assert task.load("test", tmp_path) == from_hub


def test_what_is_fetched_can_be_read_in_an_editor(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(
        datasets, "load_dataset", lambda **arguments: [{"question": "Äpfel\u2028?", "answer": "5"}]
    )
    get_task("gsm8k").fetch("test", tmp_path / "test.jsonl")
    text = (tmp_path / "test.jsonl").read_text(encoding="utf-8")
    assert text == '{"question": "Äpfel\u2028?", "answer": "5"}\n'


def test_what_has_no_hub_set_cannot_be_fetched(tmp_path):
    with pytest.raises(ValueError, match="task sharegpt has no hub set to fetch split 'train' from"):
        get_task("sharegpt").fetch("train", tmp_path / "train.jsonl")
    assert not any(tmp_path.iterdir())


def test_files_outside_the_hub():
    at = HubSet("https://example.org/a", "c", {"test": "dev"}, file="x/{split}.json").arguments("test")
    assert at == {"path": "json", "data_files": "https://example.org/a/c/x/dev.json", "split": "train"}


def test_hub_set_without_a_name():
    arguments = HubSet(path="a/b", revision="c", splits={"test": "validation"}).arguments("test")
    assert arguments == {"path": "a/b", "split": "validation", "revision": "c"}


def test_names_on_the_evaluation_command():
    assert evaluation_names("gsm8k, arc,gsm8k,") == ["gsm8k", "arc"]
    assert evaluation_names("mathinstruct,gsm8k,purebad") == ["gsm8k", "hexphi"]
    assert evaluation_names(["boolq", "commonsense"]) == list(EVALUATED_ON["commonsense"])
    for names in EVALUATED_ON.values():
        assert all(get_task(name).held_out for name in names)
    assert all(get_task(name).held_out is None for name in EVALUATED_ON)


@pytest.mark.parametrize(
    "name",
    [
        "base", "chat", "choices", "hub", "rows", "math_word", "preferences", "prompts", "safety",
        "__init__", "../tasks/gsm8k", "",
    ],
)  # fmt: skip
def test_shared_files_are_no_tasks(name: str):
    with pytest.raises(ValueError, match=f"unknown task '{name}'"):
        get_task(name)


MEMBERS = {*Task.__annotations__, *(member for member in vars(Task) if not member.startswith("_"))}


@pytest.mark.parametrize("name", TASKS)
def test_contract(name: str):
    task = get_task(name)
    assert all(hasattr(task, member) for member in MEMBERS)
    assert task.name == name
    assert task.version >= 1
    assert set(task.scoring) <= {"generation", "loglik", "perplexity"}
    assert (task.metric is None) == (not task.scoring)
    assert task.closing or task.scoring == ("perplexity",)
    assert task.held_out is None or (task.held_out in task.splits and task.held_out != "train")
    assert task.hub is None or all(split in task.hub_of(split).splits for split in task.splits)
    assert task.max_new_tokens > 0


def test_what_every_task_inherits():
    """It decides scores: whoever changes it raises the version of each task that has it from here."""
    usual = base.Task
    assert (usual.version, usual.max_new_tokens, usual.stop, usual.closing) == (1, 256, (), "")
    cut_at_their_end = {name for name in TASKS if get_task(name).chat}
    assert not usual.chat and "gsm8k" not in cut_at_their_end and "ultrachat" in cut_at_their_end


DOCUMENT = (Path(__file__).parent.parent / "docs" / "TASKS.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(set(TASKS) - {"toy_sort", "toy_shift", "toy_reverse"}))
def test_the_table_of_tasks_is_true(name: str):
    (line,) = [line for line in DOCUMENT.splitlines() if line.startswith(f"| {name} |")]
    _, _, source, revision, splits, held_out, metrics, version, _ = (cell.strip() for cell in line.split("|"))
    task = get_task(name)
    if task.hub is not None:
        assert task.hub.path.removeprefix("https://raw.githubusercontent.com/") in source
        assert revision == (task.hub.revision[:12] if task.hub.revision != "main" else "main")
    assert splits == ", ".join(task.splits)
    assert held_out == (task.held_out or "-")
    assert metrics == (", ".join(filter(None, (task.metric, *task.more_metrics))) or "-")
    assert version == str(task.version)


def test_the_task_of_the_document_works(tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)[1]
    assert len(code.splitlines()) <= 20
    folder = tmp_path / "tasks"
    (folder / "capitals").mkdir(parents=True)
    (folder / "capitals.py").write_text(code)
    (folder / "capitals" / "train.jsonl").write_text('{"country": "Kenya", "capital": "Nairobi"}\n')
    monkeypatch.chdir(tmp_path)
    task = get_task("capitals")
    (row,) = task.load("train", tmp_path)
    assert task.prompt(row).endswith(task.closing)
    assert task.extract(task.target(row)) == task.gold(row) == "nairobi"
    assert task.metrics(row, "Nairobi, I think") == {"exact_match": 1.0}
    assert task.metrics(row, "") == {"exact_match": 0.0}
