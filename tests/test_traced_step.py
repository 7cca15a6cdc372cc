"""Recorded steps give the tokens of the model itself, for every architecture they are used for."""

from __future__ import annotations

import pytest
import torch
import transformers

import lota.evaluate.traced_step as traced_step
from lota.evaluate.generation import generate
from lota.evaluate.kv_cache import RoomyLayer, give_room
from lota.evaluate.traced_step import ARCHITECTURES, TracedStep
from tests import tiny
from tests.chars import char_model, char_tokenizer

TEXTS = ["Hello", "a", "The longest of these prompts, by far", "x = 3;", "Why?", "12 + 30 ="]


@pytest.fixture(scope="module")
def tokenizer():
    return char_tokenizer()


@pytest.fixture
def steppers(monkeypatch) -> list[TracedStep]:
    """Record from the third step on; every stepper that is made."""
    made = []

    class Spy(TracedStep):
        def __init__(self, model) -> None:
            super().__init__(model)
            made.append(self)

    monkeypatch.setattr(traced_step, "TRACE_AFTER", 2)
    monkeypatch.setattr("lota.evaluate.generation.TracedStep", Spy)
    return made


def make(architecture: str):
    torch.manual_seed(0)
    sizes = {"max_position_embeddings": 128, "n_positions": 128, "initializer_range": 0.3}
    small = {**tiny._SMALL, **sizes, "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 98, "head_dim": 8}
    small |= {"sliding_window": None} if architecture == "mistral" else {}
    if architecture == "gpt_neox":
        small.pop("num_key_value_heads")
    config = transformers.AutoConfig.for_model(architecture, **small)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tokens_are_those_of_transformers(architecture: str, tokenizer, steppers):
    """In batches that rows leave, over lengths that make the cache grow twice."""
    model = make(architecture)
    prompts = [tokenizer(text).input_ids for text in TEXTS]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=90, pad_token_id=0
        )
        expected.append(tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True))
    assert len(set(expected)) > 1
    for stop in ((), (expected[0][20:22],)):
        wanted = [text[: text.find(stop[0])] if stop and stop[0] in text else text for text in expected]
        got = generate(model, tokenizer, TEXTS, max_new_tokens=90, batch_size=4, stop=stop)
        assert got == wanted
        assert steppers.pop().replay is not None


def test_weights_may_change_between_calls(tokenizer, steppers):
    model = char_model()
    before = generate(model, tokenizer, TEXTS, max_new_tokens=20, batch_size=6)
    model.load_state_dict(char_model(seed=1).state_dict())
    after = generate(model, tokenizer, TEXTS, max_new_tokens=20, batch_size=6)
    assert after == generate(char_model(seed=1), tokenizer, TEXTS, max_new_tokens=20, batch_size=2) != before
    assert all(stepper.replay is not None for stepper in steppers)


def test_draws_are_those_of_steps_that_are_not_recorded(tokenizer, steppers, monkeypatch):
    model = char_model()
    settings = {"max_new_tokens": 40, "temperature": 1.0, "top_p": 0.9, "seed": 7}
    recorded = generate(model, tokenizer, TEXTS, batch_size=4, **settings)
    assert steppers[-1].replay is not None
    monkeypatch.setattr(traced_step, "TRACE_AFTER", 10**9)
    assert generate(model, tokenizer, TEXTS, batch_size=6, **settings) == recorded
    assert steppers[-1].replay is None


class ByRows(torch.nn.Module):
    """An MLP that decides by the number of rows, which a recording would fix."""

    def forward(self, x):
        return x if x.shape[0] == 1 else x.flip(-1)


@pytest.mark.parametrize("known", [False, True])
def test_what_cannot_be_recorded_is_not(known: bool, tokenizer, steppers, monkeypatch):
    """Modules that are not transformers' own; where one goes unnoticed, the check at other sizes fails."""
    model = char_model()
    model.model.layers[1].mlp = ByRows()
    monkeypatch.setattr(traced_step, "TRACE_AFTER", 10**9)
    expected = generate(model, tokenizer, TEXTS, max_new_tokens=20, batch_size=6, stop=["q"])
    monkeypatch.setattr(traced_step, "TRACE_AFTER", 2)
    if known:
        monkeypatch.setattr(traced_step, "_untouched", lambda module: True)
    assert generate(model, tokenizer, TEXTS, max_new_tokens=20, batch_size=6, stop=["q"]) == expected
    assert steppers[-1].replay is None


def test_other_architectures_hooks_and_ropes_are_left_alone():
    assert TracedStep(char_model()).possible
    assert not TracedStep(tiny.make("mixtral").eval()).possible
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    assert not TracedStep(char_model(rope_parameters=rope)).possible
    hooked = char_model()
    hooked.model.layers[0].register_forward_hook(lambda *a: None)
    assert not TracedStep(hooked).possible


def test_the_cache_grows_in_place():
    """Same keys as joining gives, in a buffer that is replaced only when it is full."""
    layer = transformers.cache_utils.DynamicLayer()
    parts = torch.randn(200, 3, 2, 1, 4)
    layer.update(parts[0], -parts[0])
    cache = transformers.DynamicCache()
    cache.layers = [layer]
    give_room(cache)
    roomy = cache.layers[0]
    assert type(roomy) is RoomyLayer
    places = set()
    for part in parts[1:100]:
        keys, _ = roomy.update(part, -part)
        places.add(keys.data_ptr())
    assert len(places) == 2
    rows = torch.tensor([0, 2])
    roomy.batch_select_indices(rows)
    for part in parts[100:]:
        keys, values = roomy.update(part[rows], -part[rows])
    joined = torch.cat(list(parts), dim=-2)[rows]
    assert torch.equal(keys, joined)
    assert torch.equal(values, -joined)
    assert roomy.get_seq_length() == 200
