"""Models that are no local folder: asked of the hub's cache, and of the hub only if it can be reached."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from pathlib import Path

import pytest
from huggingface_hub import constants
from runs import MODEL

import convert_policy_to_hf_resize
import eval_model_all
import extract_masks
import generate_samples
import merge_models
from lota.models import hub
from lota.models.loading import load_model, load_tokenizer
from lota.models.weights import open_weights
from lota.share.delta.cli import main as delta


@pytest.fixture
def no_hub(tmp_path, monkeypatch) -> Path:
    """A hub where nothing listens; returns its cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("urllib.request.getproxies", dict)
    hub._reachable.cache_clear()
    return tmp_path / "hub"


ABSENT = "no_such_folder"
COMMANDS = {
    "eval": (eval_model_all.main, f"--model {ABSENT} --datasets toy_sort"),
    "samples": (
        generate_samples.main,
        f"--model_path {ABSENT} --model_name x --prompt_set {{}}/prompts.json",
    ),
    "base": (extract_masks.main, f"--base {ABSENT} --tuned {MODEL} --sparsities 0.9 --name x --out {{}}"),
    "tuned": (extract_masks.main, f"--base {MODEL} --tuned {ABSENT} --sparsities 0.9 --name x --out {{}}"),
    "convert": (
        convert_policy_to_hf_resize.main,
        f"--model_path {ABSENT} --policy_path {{}}/policy.pt --save_path {{}}/out",
    ),
    "merge": (merge_models.main, f"--base {ABSENT} --deltas {MODEL} --method sum --out {{}}/out"),
    "merged": (merge_models.main, f"--base {MODEL} --deltas {ABSENT} --method sum --out {{}}/out"),
    "delta": (delta, f"extract --base {ABSENT} --tuned {MODEL} --out {{}}/d.safetensors"),
    "tokenizer": (eval_model_all.main, f"--model {MODEL} --tokenizer_path {ABSENT} --datasets toy_sort"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_at_once_that_there_is_no_such_model(command, no_hub, tmp_path, capfd):
    """The hub's library alone would try it for 50 seconds."""
    main, line = COMMANDS[command]
    (tmp_path / "prompts.json").write_text('["Hi"]')
    shutil.copy(MODEL / "config.json", tmp_path / "policy.pt")
    start = time.monotonic()
    try:
        code = main(line.format(*[tmp_path] * line.count("{}")).split())
    except SystemExit as stop:
        code = stop.code
    assert code not in (0, None)
    said = f"{capfd.readouterr().err}{code}"
    assert f"{ABSENT} does not exist: it is no folder or file here" in said and "127.0.0.1:9" in said
    assert "Retrying" not in said and "Traceback" not in said
    assert time.monotonic() - start < 15  # a busy machine takes seconds as well
    assert not (tmp_path / "out").exists()


def test_training_says_so_too(no_hub, workplace):
    from runs import train

    with pytest.raises(ValueError, match=f"{ABSENT} does not exist: it is no folder or file here"):
        train(f"model.name_or_path={ABSENT}")


def test_a_cached_model_needs_no_hub(no_hub, caplog):
    snapshot = no_hub / "models--somebody--tiny" / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(MODEL, snapshot)
    (no_hub / "models--somebody--tiny" / "refs").mkdir()
    (no_hub / "models--somebody--tiny" / "refs" / "main").write_text(snapshot.name)
    start = time.monotonic()
    assert len(load_tokenizer("somebody/tiny")) == len(load_tokenizer(MODEL))
    assert load_model("somebody/tiny").num_parameters() == load_model(MODEL).num_parameters()
    assert open_weights("somebody/tiny").n_entries == open_weights(MODEL).n_entries
    assert time.monotonic() - start < 15
    with pytest.raises(ValueError, match="somebody/other does not exist"):
        load_model("somebody/other")


@pytest.mark.parametrize("name", ["no such folder", "a/b/c", "/nowhere", "./x", "x.pt", "a--b", "x/"])
def test_what_can_be_no_hub_id_is_never_asked_for(name, monkeypatch):
    monkeypatch.setattr(hub, "hub_is_used", lambda: pytest.fail("asked"))
    with pytest.raises(
        ValueError, match=r"does not exist: give a Hugging Face folder, a hub id or a policy\.pt"
    ):
        hub.refuse_absent(name)


def test_a_hub_that_answers_is_asked(no_hub, monkeypatch):
    """What it says of a model, its own library tells."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        hub.refuse_absent("gpt2")
    assert not constants.HF_HUB_OFFLINE


def test_a_firewall_is_waited_for_only_once(no_hub, monkeypatch):
    tried, over = [], threading.Event()

    def silent(*address):
        tried.append(address)
        over.wait(10)
        raise OSError("timed out")

    monkeypatch.setattr(hub, "_SECONDS", 0.1)
    monkeypatch.setattr(socket, "create_connection", silent)
    start = time.monotonic()
    for _ in range(3):
        with pytest.raises(ValueError, match="gpt2 does not exist"):
            hub.refuse_absent("gpt2")
    assert len(tried) == 1 and time.monotonic() - start < 3
    over.set()


def test_offline_mode_asks_nothing(no_hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_reachable", lambda url: pytest.fail("asked"))
    with pytest.raises(ValueError, match=r"gpt2 does not exist.*HF_HUB_OFFLINE"):
        hub.refuse_absent("gpt2")


def test_behind_a_proxy_the_library_decides(no_hub, monkeypatch):
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "http://proxy"})
    hub.refuse_absent("gpt2")
    assert not constants.HF_HUB_OFFLINE


def test_an_empty_name_is_not_the_working_directory():
    with pytest.raises(ValueError, match="name is empty"):
        hub.refuse_absent("")
