"""The examples: frozen entries stay bitwise what they were, fused or not, and a run resumes exactly."""

from __future__ import annotations

import functools
import importlib
import shutil

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

import lota
from tests.runs import MODEL, same, write_mask
from tests.tolerance import assert_same_training, chain

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning"),  # TRL uses it
    pytest.mark.filterwarnings("ignore::DeprecationWarning:trl.*"),
]
LOOPS = ("plain_pytorch", "hf_trainer", "trl_sft", "trl_dpo")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run an example in this process; returns the weights and the optimizer's state after it."""
    # eps as large as the gradients are: fused and deferred steps round differently (tolerance.py)
    monkeypatch.setattr(lota, "MaskedRMSprop", functools.partial(lota.MaskedRMSprop, eps=0.1))
    mask = tmp_path / "mask.pt"
    write_mask(mask, density=0.1)

    def run_example(name: str, *more: str, steps: int = 4):
        if name.startswith("trl"):
            pytest.importorskip("trl")
        main = importlib.import_module(f"examples.{name}").main
        out = main(["--mask", str(mask), "--out", str(tmp_path / "out"), "--steps", str(steps), *more])
        model, optimizer = out if isinstance(out, tuple) else (out.model, out.optimizer)
        return {name: t.clone() for name, t in model.state_dict().items()}, optimizer.state_dict()

    return run_example


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
def test_an_example(name, run, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    base = model.state_dict()
    mask = write_mask(tmp_path / "same.pt", density=0.1)
    kept = {key: mask.dense(key) for key in mask.shapes}
    found = []
    for mode in ([], ["--fused"]):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        weights, state = run(name, *mode)
        assert frozen_are_the_bases(weights, base, kept)
        entries = state["state"].values()
        assert all(entry["step"] == 4 and entry["positions"].dtype == torch.int32 for entry in entries)
        step_back(name, run, mode, tmp_path / "out")
        resumed, resumed_state = run(name, *mode, "--resume")
        assert same(resumed, weights)
        assert tiny.same_state(resumed_state, state)
        found.append(weights)
    assert_same_training(found[1], found[0], base, terms=chain(model, tokens=400), steps=4)


def frozen_are_the_bases(weights, base, kept) -> bool:
    """Every frozen entry bitwise, while nearly all kept ones have moved."""
    changed = {key: weights[key] != base[key] for key in base}
    moved = sum(int((changed[key] & kept[key]).sum()) for key in kept)
    assert moved > 0.9 * sum(int(tensor.sum()) for tensor in kept.values())
    return not any((changed[key] & ~kept.get(key, torch.zeros_like(changed[key]))).any() for key in base)


def step_back(name, run, mode, out) -> None:
    """Leave what a run that was interrupted after its second step leaves."""
    if name == "plain_pytorch":
        shutil.rmtree(out)
        run(name, *mode, steps=2)
    else:
        shutil.rmtree(out / "checkpoint-4")
        assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
