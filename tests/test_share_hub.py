"""Push and pull deltas and masks through the hub's own client, against a hub that stands in on 127.0.0.1."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard, constants
from transformers import AutoModelForCausalLM

import lota
from lota.config import absolute
from lota.delta import Delta, apply, extract, verify
from lota.evaluate.cli import choose_results_folder, load_chosen_model, make_prompter, model_parser
from lota.lotto.config import LottoConfig
from lota.lotto.driver import Lotto
from lota.masks import Mask
from lota.masks import __main__ as masks
from lota.masks.trainable import mask_or_dense
from lota.models import hub as resolver
from lota.models.weights import open_weights
from lota.share.delta.cli import main as delta
from lota.share.merge.inputs import DeltaVector, ModelVector, open_vectors
from tests.chars import save_pair
from tests.delta_models import change, same_files, values
from tests.hub_stand_in import READ, WRITE, Hub
from tests.tiny import make, random_mask

# the hub's client uploads files by an argument that its HTTP library calls old
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that everything of this process asks, with an empty cache and no token."""
    with Hub() as server:
        patched = {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "hub_cache"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
        }
        for name, value in patched.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        monkeypatch.setattr("urllib.request.getproxies", dict)
        huggingface_hub.close_session()
        resolver._reachable.cache_clear()
        yield server
    huggingface_hub.close_session()


@pytest.fixture
def offline(hub, monkeypatch):
    """Call it, and the hub may not be asked any more."""
    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def impatient(monkeypatch):
    """The hub's client waits no seconds between its tries."""
    for module in ("file_download", "utils._http"):
        monkeypatch.setattr(f"huggingface_hub.{module}.time.sleep", lambda seconds: None)


@pytest.fixture
def writer(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", WRITE)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder with `base`, `tuned`, the run `run/epoch-1` with their delta, and `0.9_mask.pt` of the base."""
    folder = tmp_path_factory.mktemp("made")
    base = save_pair(folder / "base")
    tuned = shutil.copytree(base, folder / "tuned")
    change(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), density=0.3).save_pretrained(tuned)
    place = folder / "run" / "epoch-1"
    place.mkdir(parents=True)
    extract(base, tuned, place / "delta.safetensors", task="gsm8k")
    settings = {
        "model": {"name_or_path": str(base)},
        "adapter": {"name": "none"},
        "loss": {"name": "sft"},
        "datasets": ["gsm8k"],
        "mask_path": "masks/gsm8k/0.7_mask.pt",
        "optimizer": "RMSprop",
        "lr": 1e-4,
        "batch_size": 8,
        "seed": 3,
    }
    (folder / "run" / "config.yaml").write_text(json.dumps(settings))
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    made_of = {"scope": None, "score": "task_vector", "base": str(base), "granularity": "element"}
    mask = random_mask(model)
    Mask(mask.bits, mask.shapes, made_of).save(folder / "0.9_mask.pt")
    return folder


def scores(folder: Path, value: float = 0.5625) -> None:
    found = {"score": value, "stderr": 0.0312, "n": 250}
    content = {"tasks": [{"task": "gsm8k", "metrics": {"exact_match": found}}]}
    (folder / "metrics").mkdir(parents=True)
    (folder / "metrics" / "summary.json").write_text(json.dumps(content))


def delta_file(made: Path) -> Path:
    return made / "run" / "epoch-1" / "delta.safetensors"


def push(made: Path, *more: str, to: str = "org/sql", code: int = 0) -> None:
    assert delta(["push", "--delta", str(delta_file(made)), "--to", to, *more]) == code


# There and back


def test_a_delta_goes_there_and_back_bit_for_bit(hub, writer, made, tmp_path, capsys):
    push(made, "--message", "sql, first try")
    repo = hub.repos["org/sql"]
    assert sorted(repo.files()) == ["README.md", "delta.safetensors"]
    assert repo.messages == ["sql, first try"]  # both in one commit
    assert repo.files()["delta.safetensors"] == delta_file(made).read_bytes()
    said = capsys.readouterr().out
    assert "use it as hub:org/sql" in said and "names no license" in said
    assert delta(["pull", "org/sql", "--out", str(tmp_path / "sql.safetensors")]) == 0
    assert (tmp_path / "sql.safetensors").read_bytes() == delta_file(made).read_bytes()
    assert f"wrote {tmp_path / 'sql.safetensors'}" in capsys.readouterr().out


def test_large_files_come_from_another_host_without_the_token(hub, writer, made):
    push(made)
    assert ("PUT", f"/lfs/{next(iter(hub.objects))}", False) in hub.asked
    hub.asked.clear()
    assert Delta.open("org/sql") == Delta.open(delta_file(made))
    assert [(method, token) for method, path, token in hub.asked if path.startswith("/cdn/")] == [
        ("GET", False)
    ]
    assert ("HEAD", "/org/sql/resolve/main/delta.safetensors", True) in hub.asked


def test_whatever_takes_a_delta_takes_a_name_of_the_hub(hub, writer, made, tmp_path):
    push(made)
    base, tuned = made / "base", made / "tuned"
    apply(base, "org/sql", tmp_path / "applied")
    assert same_files(tmp_path / "applied", tuned)
    assert verify(base, "hub:org/sql")["task"] == "gsm8k"
    for line in ("show org/sql", f"verify --base {base} --delta org/sql@main"):
        assert delta(line.split()) == 0
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    lota.attach(model, "org/sql")
    expected = values(AutoModelForCausalLM.from_pretrained(tuned, dtype="auto"))
    assert all(torch.equal(value, expected[name]) for name, value in values(model).items())


def test_evaluation_on_a_delta_of_the_hub(hub, writer, made, private_cache):
    push(made)
    args = model_parser(None, "--model").parse_args(
        ["--model", str(made / "base"), "--delta", "org/sql@main"]
    )
    assert choose_results_folder(args) == private_cache / "results" / "org" / "sql"
    prompter = make_prompter(args)
    model = load_chosen_model(args, prompter.tokenizer)
    expected = values(AutoModelForCausalLM.from_pretrained(made / "tuned", dtype="auto"))
    assert all(torch.equal(value.cpu(), expected[name]) for name, value in values(model).items())


def test_merging_tells_a_model_of_the_hub_from_a_delta(hub, writer, made, offline):
    push(made)
    files = {file.name: file.read_bytes() for file in (made / "tuned").iterdir() if file.is_file()}
    hub.add("org/both", {**files, "delta.safetensors": delta_file(made).read_bytes()})
    base = open_weights(made / "base")
    for name, kind in (("org/sql", DeltaVector), ("org/both", ModelVector), ("hub:org/both", DeltaVector)):
        (vector,), _ = open_vectors([name], base)
        assert isinstance(vector, kind), name
    offline()
    (vector,), _ = open_vectors(["org/sql"], base)
    assert isinstance(vector, DeltaVector)


def test_a_mask_goes_there_and_back_and_trains(hub, writer, made, tmp_path, capsys):
    file = made / "0.9_mask.pt"
    masks.main(["push", str(file), "--to", "org/mask/0.9_mask.pt", "--license", "mit"])
    assert sorted(hub.repos["org/mask"].files()) == ["0.9_mask.pt", "README.md"]
    assert "use it as hub:org/mask/0.9_mask.pt" in capsys.readouterr().out
    masks.main(["pull", "org/mask/0.9_mask.pt", "--out", str(tmp_path / "again.pt")])
    assert (tmp_path / "again.pt").read_bytes() == file.read_bytes()
    found = mask_or_dense("hub:org/mask/0.9_mask.pt")
    assert (
        found.fingerprint()
        == Mask.load(file).fingerprint()
        == Mask.load("hub:org/mask@main/0.9_mask.pt").fingerprint()
    )
    masks.main(["show", "hub:org/mask/0.9_mask.pt"])
    assert f"{found.n_kept:,} of {found.n_total:,} entries kept" in capsys.readouterr().out


def test_a_zero_mask_of_the_hub_is_a_file_and_not_dense_training(hub):
    hub.add("org/mask", {})
    with pytest.raises(ValueError, match="no such file"):
        mask_or_dense("hub:org/mask/0.0_mask.pt")
    assert mask_or_dense("nowhere/0.0_mask.pt") is None


def test_a_delta_and_its_mask_in_one_repository(hub, writer, made, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(made / "base", dtype="auto")
    push(made, "--mask", str(made / "0.9_mask.pt"))
    assert Mask.load("hub:org/sql").fingerprint() == Mask.load(made / "0.9_mask.pt").fingerprint()
    lota.attach(model, "org/sql")
    random_mask(make("gpt2")).save(tmp_path / "other.pt")
    push(made, "--mask", str(tmp_path / "other.pt"), to="org/wrong", code=1)
    assert "org/wrong" not in hub.repos


# Revisions and tokens


def test_branches_and_commits(hub, writer, made, tmp_path, capsys):
    push(made)
    first = hub.repos["org/sql"].refs["main"]
    other = tmp_path / "other.safetensors"
    extract(made / "tuned", made / "base", other)
    assert delta(["push", "--delta", str(other), "--to", "org/sql", "--revision", "try/2"]) == 0
    assert "use it as hub:org/sql@try%2F2" in capsys.readouterr().out
    assert Delta.open("org/sql") == Delta.open(f"org/sql@{first}") == Delta.open(delta_file(made))
    assert Delta.open("org/sql@try%2F2") == Delta.open(other) != Delta.open("org/sql")
    assert (
        delta(["pull", "org/sql", "--revision", "try/2", "--out", str(tmp_path / "pulled.safetensors")]) == 0
    )
    assert (tmp_path / "pulled.safetensors").read_bytes() == other.read_bytes()
    assert delta(["pull", "org/sql@main", "--revision", "x"]) == 1
    assert "--revision x with org/sql@main: give one of them" in capsys.readouterr().err
    for absent in ("org/sql@nowhere", f"org/sql@{'1' * 40}"):
        with pytest.raises(ValueError, match="no such branch, tag or commit"):
            Delta.open(absent)


def test_a_moved_branch_is_fetched_again_and_a_commit_is_not_asked_for(hub, writer, made, tmp_path):
    push(made)
    first = hub.repos["org/sql"].refs["main"]
    assert Delta.open("org/sql") == Delta.open(delta_file(made))
    other = tmp_path / "other.safetensors"
    extract(made / "tuned", made / "base", other)
    assert delta(["push", "--delta", str(other), "--to", "org/sql"]) == 0
    assert Delta.open("org/sql") == Delta.open(other)
    hub.asked.clear()
    assert Delta.open(f"org/sql@{first}") == Delta.open(delta_file(made))
    assert hub.asked == []


def test_private_repositories_want_a_token(hub, writer, made, monkeypatch, capsys, tmp_path):
    push(made, "--private")
    assert hub.repos["org/sql"].private
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match=r"shows you no repository org/sql; .*hf auth login.*HF_TOKEN"):
        Delta.open("org/sql")
    (tmp_path / "token").write_text(READ)  # what `hf auth login` writes
    assert Delta.open("org/sql") == Delta.open(delta_file(made))
    push(made, code=1)  # this token may read only
    assert "hf auth login" in capsys.readouterr().err


def test_nothing_private_goes_into_a_public_repository(hub, writer, made, capsys):
    hub.add("org/sql", {})
    push(made, "--private", code=1)
    assert "is public" in capsys.readouterr().err
    assert hub.repos["org/sql"].files() == {}


def test_without_a_token_nothing_is_pushed(hub, made, capsys):
    push(made, code=1)
    said = capsys.readouterr().err
    assert "push to org/sql" in said and "hf auth login" in said and "Traceback" not in said
    assert hub.repos == {}


def test_gated_repositories_name_the_page_that_grants_access(hub, made):
    hub.add("org/gated", {"delta.safetensors": delta_file(made).read_bytes()}, gated=True)
    with pytest.raises(ValueError, match=rf"access on request; ask for it at {hub.url}/org/gated"):
        Delta.open("org/gated")


# What is not there


def test_offline_the_cache_serves_or_says_what_it_lacks(hub, writer, made, offline, tmp_path, capsys):
    push(made)
    Delta.open("org/sql")
    offline()
    hub.asked.clear()
    assert Delta.open("org/sql") == Delta.open("org/sql@main") == Delta.open(delta_file(made))
    with pytest.raises(
        ValueError, match=r"org/other@v1 \(file delta.safetensors\) is neither here nor in .*hub_cache"
    ):
        Delta.open("org/other@v1")
    with pytest.raises(
        ValueError, match=r"org/sql \(file mask.pt\) is neither here.*HF_HUB_OFFLINE.*lota.masks pull"
    ):
        Mask.load("hub:org/sql")
    push(made, code=1)
    assert "HF_HUB_OFFLINE" in capsys.readouterr().err
    assert hub.asked == []


def test_an_absent_file_or_repository(hub, made):
    hub.add("org/sql", {"other.safetensors": delta_file(made).read_bytes()})
    with pytest.raises(ValueError, match=r"no such file; name one with hub:org/sql/FILE"):
        Delta.open("org/sql")
    assert Delta.open("hub:org/sql/other.safetensors") == Delta.open(delta_file(made))
    with pytest.raises(ValueError, match="shows you no repository org/none"):
        Delta.open("org/none")
    with pytest.raises(ValueError, match=r"sql does not exist: give a delta file"):
        Delta.open("sql")


@pytest.mark.parametrize(
    "name", ["hub:", "hub:sql", "hub:a/b/c.txt", "hub:a/../b.pt", "hub:a/b/../../c.pt", "hub:/a"]
)
def test_what_names_no_file_of_the_hub(name):
    with pytest.raises(ValueError, match=r"names no file of the hub: give hub:org/name"):
        Mask.load(name)


def test_what_is_here_is_not_asked_for(hub, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    shutil.copyfile(delta_file(made), tmp_path / "org" / "sql")
    assert Delta.open("org/sql") == Delta.open(delta_file(made))
    assert hub.asked == []


# Failures


def test_a_hub_that_dies_in_a_download_leaves_nothing(hub, writer, made, impatient, tmp_path):
    push(made)
    hub.fail = lambda method, path: "break" if path.startswith("/cdn/") else None
    with pytest.raises(
        ValueError, match=rf"org/sql \(file delta.safetensors\): {hub.url} failed \(.*try again later"
    ):
        Delta.open("org/sql")
    assert not [
        file for file in (tmp_path / "hub_cache").rglob("*") if file.is_file() and file.stat().st_size > 200
    ]


@pytest.mark.parametrize("at", ["/lfs/", "/commit/"])
def test_a_hub_that_dies_in_an_upload_has_no_commit(hub, writer, made, impatient, at, capsys):
    hub.fail = lambda method, path: (
        "die" if at in path and method in ("PUT", "POST") and "batch" not in path else None
    )
    push(made, code=1)
    said = capsys.readouterr().err
    assert "push to org/sql" in said and "failed" in said and "Traceback" not in said
    assert hub.repos["org/sql"].files() == {}


def test_a_hub_that_answers_500_is_named_and_the_cache_stands_in(hub, writer, made, impatient):
    push(made)
    hub.fail = lambda method, path: 500 if "resolve" in path else None
    with pytest.raises(ValueError, match=rf"{hub.url} failed"):
        Delta.open("org/sql")
    hub.fail = lambda method, path: None
    Delta.open("org/sql")
    hub.fail = lambda method, path: 500 if "resolve" in path else None
    assert Delta.open("org/sql") == Delta.open(delta_file(made))


def test_files_of_strangers_are_refused_by_their_readers(hub, made, tmp_path):
    content = delta_file(made).read_bytes()
    harmful = b"\x80\x04cposix\nsystem\n\x8c\x04true\x85R."  # a pickle that runs a command
    hub.add(
        "org/bad", {"delta.safetensors": content[:-1] + b"x", "mask.pt": harmful, "notes.txt": b"x" * 5000}
    )
    with pytest.raises(ValueError, match="truncated or changed: its checksum does not fit"):
        Delta.open("org/bad")
    with pytest.raises(ValueError, match="mask file"):
        Mask.load("hub:org/bad")
    assert delta(["pull", "org/bad", "--out", str(tmp_path / "bad.safetensors")]) == 1
    assert not (tmp_path / "bad.safetensors").exists()
    assert not [path for _, path, _ in hub.asked if "notes" in path]  # only what was named


def test_what_is_no_delta_is_not_pushed_nor_overwritten(hub, writer, made, tmp_path, capsys):
    (tmp_path / "x.safetensors").write_bytes(b"no delta")
    assert delta(["push", "--delta", str(tmp_path / "x.safetensors"), "--to", "org/sql"]) == 1
    assert hub.asked == []
    push(made)
    assert delta(["pull", "org/sql", "--out", str(tmp_path / "x.safetensors")]) == 1
    assert (tmp_path / "x.safetensors").read_bytes() == b"no delta"
    push(made, to="sql", code=1)
    push(made, to="org/sql@v1", code=1)
    assert "give the branch as --revision v1" in capsys.readouterr().err


# The card


def card_of(hub: Hub, repo: str = "org/sql") -> ModelCard:
    return ModelCard(hub.repos[repo].files()["README.md"].decode())


def test_the_card_tells_what_it_is_and_how_to_use_it(hub, writer, made, tmp_path, capsys):
    scores(tmp_path / "out")
    push(made, "--scores", str(tmp_path / "out"), "--revision", "v1", "--license", "apache-2.0")
    card = ModelCard(hub.repos["org/sql"].files("v1")["README.md"].decode())
    meta = Delta.open(delta_file(made)).meta
    about = card.data.to_dict()
    assert about["library_name"] == "lota" and about["license"] == "apache-2.0"
    assert {"lota", "sparse-task-vector", "gsm8k"} <= set(about["tags"])
    assert "base_model" not in about  # a folder of this machine
    assert str(made) not in card.text  # nor where it lies
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == (
        "gsm8k",
        "exact_match",
        "0.5625 ± 0.0312",
    )
    for part in (meta["base_hash"], meta["tuned_hash"], f"{meta['changed']:,} of {meta['entries']:,}"):
        assert part in card.text
    assert (
        "| Method | LoTA, a mask: all entries outside" in card.text
        and "lr=0.0001, batch_size=8, loss=sft, seed=3" in card.text
    )
    assert "| gsm8k | exact_match | 0.5625 ± 0.0312 | 250 |" in card.text
    code = card.text.partition("```python\n")[2].partition("```")[0]
    assert len(code.splitlines()) == 3
    model_of = AutoModelForCausalLM.from_pretrained
    here = {}
    exec(code.replace('"base"', repr(str(made / "base"))), here)  # the three lines work
    expected = values(model_of(made / "tuned", dtype="auto"))
    assert all(torch.equal(value, expected[name]) for name, value in values(here["model"]).items())


def test_scores_beside_a_delta_are_found(hub, writer, made, tmp_path):
    file = tmp_path / "sql.safetensors"
    shutil.copyfile(delta_file(made), file)
    scores(tmp_path / "sql_results", 0.25)
    assert delta(["push", "--delta", str(file), "--to", "org/sql", "--run", str(made / "run")]) == 0
    assert card_of(hub).data.eval_results[0].metric_value == "0.2500 ± 0.0312"
    assert "lr=0.0001" in card_of(hub).text
    for flag in ("--scores", "--run"):
        assert delta(["push", "--delta", str(file), "--to", "org/sql", flag, str(tmp_path / "none")]) == 1


def test_the_base_of_the_hub_is_named_with_the_commit_that_has_its_weights(hub, writer, made):
    files = {file.name: file.read_bytes() for file in (made / "base").iterdir() if file.is_file()}
    repo = hub.add("org/base", files)
    wrong = {file.name: file.read_bytes() for file in (made / "tuned").iterdir() if file.is_file()}
    hub.add("org/tuned", wrong)
    push(made, "--base", "org/base")  # not in the cache: taken at its word, without a commit
    assert card_of(hub).data.base_model == "org/base" and "revision `" not in card_of(hub).text
    for name in ("org/base", "org/tuned"):
        open_weights(name)  # fetches it
    push(made, "--base", "org/base")
    assert f"revision `{repo.refs['main']}`" in card_of(hub).text
    assert f'"org/base", revision="{repo.refs["main"]}"' in card_of(hub).text
    push(made, "--base", "org/tuned", code=1)


def test_the_card_of_a_delta_under_a_mask_tells_its_sparsity(hub, made, tmp_path, capsys):
    before, after = (
        AutoModelForCausalLM.from_pretrained(made / name, dtype="auto") for name in ("base", "tuned")
    )
    tuned = dict(after.named_parameters())
    mask = Mask.from_dense({name: value != tuned[name] for name, value in before.named_parameters()})
    extract(made / "base", made / "tuned", tmp_path / "sql.safetensors", mask=mask)
    assert delta(["push", "--delta", str(tmp_path / "sql.safetensors"), "--to", "org/sql", "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert f"LoTA, a mask of sparsity {1 - mask.density:.6g}: all" in said
    assert "Training" not in said  # of no run


def test_what_the_owner_wrote_stays_when_a_file_is_pushed_again(hub, writer, made, tmp_path):
    scores(tmp_path / "out")
    push(made, "--scores", str(tmp_path / "out"))
    assert len(card_of(hub).data.eval_results) == 1
    repo = hub.repos["org/sql"]
    card = card_of(hub)
    card.data["license"], card.data["language"] = "mit", ["en"]
    card.data.tags.append("mine")
    card.text = f"My own words.\n{card.text}\nAnd more.\n"
    repo.commit("main", {"README.md": str(card).encode()}, "by hand")
    before = card_of(hub).text.count("## Use")
    push(made)
    again = card_of(hub)
    assert (again.data.license, again.data["language"]) == ("mit", ["en"])
    assert "mine" in again.data.tags and again.data.tags.count("lota") == 1
    assert again.text.count("My own words.") == again.text.count("And more.") == 1
    assert again.text.count("## Use") == before == 1
    assert again.data.eval_results is None and "## Scores" not in again.text  # those of what was there before


def test_metadata_that_the_owner_changed_stay_and_the_base_of_the_last_push_does_not(hub, writer, made):
    push(made, "--base", "org/base", "--license", "mit")
    repo, card = hub.repos["org/sql"], card_of(hub)
    card.data["pipeline_tag"], card.data["library_name"] = "text2text-generation", "transformers"
    repo.commit("main", {"README.md": str(card).encode()}, "by hand")
    push(made, "--base", "org/other", "--license", "apache-2.0")
    again = card_of(hub)
    assert (again.data.pipeline_tag, again.data.library_name) == ("text2text-generation", "transformers")
    assert (again.data.base_model, again.data.license) == ("org/other", "apache-2.0")
    again.data["base_model"] = ["org/mine", "org/second"]
    repo.commit("main", {"README.md": str(again).encode()}, "by hand")
    push(made, "--base", "org/base")
    assert card_of(hub).data.base_model == ["org/mine", "org/second"]
    assert "[org/base](" in card_of(hub).text


def test_a_card_of_the_owners_gets_ours_behind_it(hub, writer, made):
    hub.add("org/sql", {"README.md": b"---\nlicense: mit\n---\nOnly mine.\n"})
    push(made)
    assert card_of(hub).text.lstrip().startswith("Only mine.") and "## Use" in card_of(hub).text
    assert card_of(hub).data.license == "mit"


def test_dry_run_prints_the_card_and_sends_nothing(hub, made, capsys):
    push(made, "--dry_run")
    said = capsys.readouterr().out
    assert "library_name: lota" in said and "not sent: delta.safetensors, README.md to org/sql" in said
    assert hub.asked == []


def test_the_card_of_a_mask(hub, writer, made):
    masks.main(["push", str(made / "0.9_mask.pt"), "--to", "org/mask"])
    card = card_of(hub, "org/mask")
    mask = Mask.load(made / "0.9_mask.pt")
    assert "lottery-ticket-mask" in card.data.tags
    assert (
        f"{mask.n_kept:,} of {mask.n_total:,} entries train" in card.text
        and "| Chosen by | task_vector |" in card.text
    )
    assert 'lota.Mask.load("hub:org/mask")' in card.text and "mask_path=hub:org/mask " in card.text


# Settings


def test_a_mask_of_the_hub_keeps_its_name_in_settings(hub, writer, made, workplace):
    from runs import MODEL, settings, train

    assert absolute("hub:org/mask@v1/0.9_mask.pt") == "hub:org/mask@v1/0.9_mask.pt"
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    random_mask(model).save(workplace / "own.pt")
    masks.main(["push", str(workplace / "own.pt"), "--to", "org/own"])
    config = settings("mask_path=hub:org/own@main", "protect_masks=[hub:org/other]")
    config.resolve_paths()
    assert (config.mask_path, config.protect_masks) == ("hub:org/own@main", ["hub:org/other"])
    trainer, _ = train("mask_path=hub:org/own", "exp_name=from_hub", "n_examples=8", "do_first_eval=false")
    assert trainer.data.mask.fingerprint() == Mask.load(workplace / "own.pt").fingerprint()
    with pytest.raises(ValueError, match="shows you no repository org/none"):
        train("mask_path=hub:org/none", "exp_name=none")


def test_a_sequence_keeps_the_names_of_masks_of_the_hub(tmp_path):
    given = {"gsm8k": {"mask_path": "hub:org/own@v1"}, "sql": {"mask_path": "own.pt"}}
    config = LottoConfig(task_overrides=given)
    config.resolve_paths()
    assert config.mask_files == [None, "hub:org/own@v1", "own.pt"]
    sequence = SimpleNamespace(folder=tmp_path)
    assert Lotto.mask_file(sequence, "hub:org/own@v1") == "hub:org/own@v1"
    assert Lotto.mask_file(sequence, "1_sql/0.9_mask.pt") == str(tmp_path / "1_sql/0.9_mask.pt")


@pytest.mark.slow
def test_the_commands_as_a_user_starts_them(made, tmp_path):
    """With the hub's own variables, each command in a process of its own."""
    with Hub() as hub:
        own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": WRITE, "NO_PROXY": "*"}
        own |= {"HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}
        env = {**{k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}, **own}

        def run(line: str) -> None:
            command = [sys.executable, "-m", *line.split()]
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr

        run(f"lota.delta push --delta {delta_file(made)} --to org/sql --private")
        run(f"lota.delta apply --model {made / 'base'} --delta org/sql --out {tmp_path / 'applied'}")
        assert same_files(tmp_path / "applied", made / "tuned")
