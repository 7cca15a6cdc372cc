"""The examples: frozen entries stay bitwise what they were, fused or not, and a run resumes exactly."""

from __future__ import annotations

import importlib
import shutil
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.runs import MODEL, same, write_mask

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning"),  # TRL uses it
    pytest.mark.filterwarnings("ignore::DeprecationWarning:trl.*"),
]
LOOPS = ("plain_pytorch", "hf_trainer", "trl_sft", "trl_dpo")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run an example in this process; returns the weights and the optimizer's state after it."""
    monkeypatch.setattr(sys, "path", [*sys.path])  # which the scripts extend
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


def same_state(a: dict, b: dict) -> bool:
    """Of two optimizers: the same entries, dtypes and bits."""
    return a["state"].keys() == b["state"].keys() and all(
        type(value) is type(other)
        and (
            torch.equal(value, other) and value.dtype == other.dtype
            if torch.is_tensor(value)
            else value == other
        )
        for index, entry in a["state"].items()
        for (value, other) in ((entry[key], b["state"][index][key]) for key in entry | b["state"][index])
    )


@pytest.mark.parametrize("name", LOOPS)
def test_frozen_entries_and_the_two_modes(name, run, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).state_dict()
    mask = write_mask(tmp_path / "same.pt", density=0.1)
    kept = {key: mask.dense(key) for key in mask.shapes}
    deferred, _ = run(name)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    fused, state = run(name, "--fused")
    assert all(entry["step"] == 4 for entry in state["state"].values())
    trained = 0
    for weights in (deferred, fused):
        for key, tensor in weights.items():
            changed = tensor != base[key]
            allowed = kept.get(key, torch.zeros_like(changed))
            assert not (changed & ~allowed).any(), key
            trained += int(changed.sum())
    assert trained > 0.9 * 2 * sum(int(tensor.sum()) for tensor in kept.values())
    for key, tensor in fused.items():
        torch.testing.assert_close(tensor, deferred[key], rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("mode", [[], ["--fused"]])
@pytest.mark.parametrize("name", LOOPS)
def test_a_run_resumes_exactly(name, mode, run, tmp_path):
    whole, state = run(name, *mode)
    out = tmp_path / "out"
    if name == "plain_pytorch":
        shutil.rmtree(out)
        run(name, *mode, steps=2)
    else:  # as if it had been interrupted after its second step
        shutil.rmtree(out / "checkpoint-4")
        assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    resumed, resumed_state = run(name, *mode, "--resume")
    assert same(resumed, whole)
    assert same_state(resumed_state, state)
    positions = [entry["positions"] for entry in state["state"].values()]
    assert all(p.dtype == torch.int32 for p in positions) and max(int(p.max()) for p in positions) > 257
