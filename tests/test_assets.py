"""The embedded model: what it is, the losses written beside it, and the script that made it."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lota.evaluate.decoding import Decoding
from lota.evaluate.generation import generate
from lota.models.loading import load_model, load_tokenizer
from lota.models.scope import find_scope
from tasks import get_task

ASSETS = Path(__file__).resolve().parent.parent / "assets"
MODEL = ASSETS / "tiny-llama"
TRAINING = json.loads((MODEL / "training.json").read_text())


@pytest.fixture
def script():
    """assets/make_tiny_llama.py as a module."""
    threads = torch.get_num_threads()
    yield importlib.import_module("assets.make_tiny_llama")
    torch.set_num_threads(threads)


def greedy(model, tokenizer, prompts, task):
    """Greedy completions of a task's prompts."""
    decoding = Decoding(task.max_new_tokens, stop=task.stop)
    return generate(model, tokenizer, prompts, decoding, batch_size=100)


def test_what_it_is():
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert 500_000 <= sum(p.numel() for p in model.parameters()) == TRAINING["parameters"] <= 2_000_000
    assert sum(file.stat().st_size for file in MODEL.iterdir()) <= 4_000_000
    assert tokenizer.is_fast
    assert tokenizer.pad_token is None
    assert model.config.pad_token_id is None
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (0, 1)
    assert len(tokenizer) == model.config.vocab_size == TRAINING["vocabulary"]
    assert len(find_scope(model)) == 4 * 7


def test_tokenizer():
    tokenizer = load_tokenizer(str(MODEL))
    for text in ["Human:\nName three animals.", "naïve \u2603 \U0001f600\r\n\t  x", "a  b\n\n\nc 12345"]:
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer(" q d x b k a", add_special_tokens=False).input_ids) == 6


@pytest.mark.slow
def test_losses_are_those_written_beside_it(script):
    model, tokenizer = load_model(str(MODEL)), load_tokenizer(str(MODEL))
    settings = TRAINING["settings"]
    skills = ("copying", "facts", "counting")
    for written, seed, held_out in [("loss_train", 2, False), ("loss_held_out", 3, True)]:
        measured = script.measure(
            model, tokenizer, settings["seed"] + seed, held_out, settings["n_measured"], skills
        )
        assert measured == pytest.approx({skill: TRAINING[written][skill] for skill in skills}, abs=2e-3)


def test_held_out_documents_are_never_trained_on(script):
    world = sys.modules["assets.tiny_world"]

    def first(seed, held_out, n):
        return {"".join(document) for _, document in itertools.islice(world.documents(seed, held_out), n)}

    settings = TRAINING["settings"]
    trained = first(settings["seed"] + 1, False, 30_000)
    held_out = first(settings["seed"] + 3, True, 500)
    assert not trained & held_out
    assert first(5, False, 100) == first(5, False, 100) != first(6, False, 100)
    assert set(world.SKILLS) == set(TRAINING["loss_train"]) == set(TRAINING["loss_held_out"])


def test_it_has_its_skills():
    task = get_task("alpaca_eval")
    expected = {
        "What color is the sky?": "The sky is blue.",
        "Count from 7 to 12.": "7 8 9 10 11 12",
        "Repeat f k a m d.": "f k a m d",
        "Say the letters from c to h.": "c d e f g h",
        "What does a cow say?": "The cow says moo.",
    }
    prompts = [task.prompt({"instruction": instruction}) for instruction in expected]
    model, tokenizer = load_model(str(MODEL)), load_tokenizer(str(MODEL))
    assert greedy(model, tokenizer, prompts, task) == list(expected.values())


def test_demo_prompts():
    rows = json.loads((ASSETS / "prompts" / "demo_prompts.json").read_text())
    assert len(rows) >= 10
    for row in rows:
        get_task("alpaca_eval").check(row)


@pytest.mark.slow
def test_the_script_makes_the_same_tokenizer_and_a_model_that_loads(script, tmp_path, monkeypatch):
    settings = ["--steps", "2", "--batch", "2", "--n_measured", "1"]
    for name in ("one", "two"):
        monkeypatch.setattr(sys, "argv", ["make_tiny_llama.py", "--out", str(tmp_path / name), *settings])
        script.main()
    for name in ("tokenizer.json", "config.json", "generation_config.json"):
        assert (tmp_path / "one" / name).read_text() == (MODEL / name).read_text()
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "two"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
