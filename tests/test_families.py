"""The whole method on families that differ in kind; `make families` runs all of them."""

from __future__ import annotations

import importlib
import re
import time

import pytest

from scripts import families

# What each is here for; the same chain and checks as in docs/MODELS.md.
KINDS = {
    "llama": "dense",
    "gpt2": "Conv1D and a tied head",
    "mixtral": "experts apart on disk, one stack in memory",
    "falcon_h1": "attention beside a state space model",
    "gpt_neox": "query, key and value in one matrix",
    "gptj": "attention and MLP in parallel",
    "cohere2": "tied, in parallel, sliding windows",
    "gpt_oss": "stacks of transposed experts with biases",
    "deepseek_v3": "latent attention, shared experts",
    "qwen3_next": "linear attention, gated shared expert",
    "mamba2": "no attention",
    "gemma3": "a text model with a vision tower",
}
FAST = list(KINDS)[:3]


def run(family: str, **more) -> families.Result:
    (result,) = families.run([family], **more)
    return result


@pytest.mark.parametrize(
    "family", [pytest.param(k, marks=() if k in FAST else pytest.mark.slow, id=k) for k in KINDS]
)
def test_a_family_comes_through_whole(family):
    result = run(family)
    assert (result.verdict, result.reason) == ("whole", "")
    assert result.share is not None and 0 < result.share <= 1


def test_a_model_that_cannot_be_trained_is_refused_in_a_sentence():
    result = run("cpmant")
    assert result.verdict == "refused"
    assert result.reason.startswith(
        "calibration: base: CpmAntForCausalLM lets a token depend on what comes after it"
    )


def one_off(value):
    """A tensor whose first entry is another one."""
    value = value.clone()
    value.view(-1)[0] += 1e-3
    return value


def one_entry_off(name_part):
    """A function that a fault calls: it changes the first entry of the first tensor of that name."""

    def spoil(state):
        if callable(state):  # that gives a tensor of a name
            return lambda name: one_off(state(name)) if name_part in name else state(name)
        for name in [name for name in state if name_part in name][:1]:
            state[name] = one_off(state[name])
        return state

    return spoil


FAULTS = {
    "a norm is trained": (
        "lota.train.saved_model.trained_values",
        "layernorm",
        "failed",
        "changed outside the mask",
    ),
    "the converter changes a weight": (
        "lota.share.hf_weights._as_stored",
        "q_proj",
        "wrong",
        "converted: .*q_proj.weight is not what training wrote",
    ),
}


@pytest.mark.parametrize("fault", [pytest.param(f, marks=pytest.mark.slow) for f in FAULTS])
def test_a_fault_is_found(fault, monkeypatch):
    place, tensor, verdict, message = FAULTS[fault]
    module, _, name = place.rpartition(".")
    right = getattr(importlib.import_module(module), name)
    monkeypatch.setattr(place, lambda *given, **more: one_entry_off(tensor)(right(*given, **more)))
    result = run("llama")
    assert result.verdict == verdict, result
    assert re.search(message, result.reason), result.reason


@pytest.mark.slow
def test_a_traceback_and_an_endless_command_fail(monkeypatch):
    def crash(*given, **more):
        raise AttributeError("no such key")

    monkeypatch.setattr("lota.train.trainer.Trainer.load", crash)
    result = run("llama")
    assert (result.verdict, result.share) == ("failed", None)
    assert "AttributeError: no such key" in result.reason
    monkeypatch.setattr("lota.train.trainer.Trainer.load", lambda *given: time.sleep(60))
    result = run("llama", limit=3.0)
    assert (result.verdict, result.reason) == ("failed", "calibration: not done after 3 s")
