"""Deltas on loaded models: the tuned weights, the base again, several at once; nothing else is touched."""

from __future__ import annotations

import copy
import dataclasses

import hf_models
import pytest
import torch
from delta_models import bits, change, disjoint_deltas, save_model, values
from transformers import AutoModelForCausalLM

import lota
from lota.delta import Delta, extract
from lota.masks import Mask
from lota.share.delta import attach
from lota.share.delta.format import as_integers, checksum_digits, entry_checksum


def load(folder, dtype="auto"):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def equal(model, expected):
    return all(torch.equal(bits(p), bits(expected[name])) for name, p in model.named_parameters())


@pytest.mark.parametrize("kind", list(hf_models.CONFIGS))
def test_attach_and_detach_for_every_architecture(tmp_path, kind):
    base, tuned, deltas = disjoint_deltas(tmp_path, kind, n=1)
    model = load(tmp_path / "base")
    lota.attach(model, deltas[0])
    assert equal(model, tuned[0]) and not equal(model, base)
    assert torch.equal(hf_models.logits(model), hf_models.logits(load(tmp_path / "t0")))
    lota.detach(model)
    assert equal(model, base) and lota.attached(model) == []


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_a_model_in_a_wider_dtype(tmp_path, stored):
    base, tuned, deltas = disjoint_deltas(tmp_path, dtype=stored, n=1)
    for dtype in (torch.float32, torch.float64):
        model = load(tmp_path / "base", dtype)
        for change_model, state in ((lota.attach, tuned[0]), (lota.switch, tuned[0]), (lota.detach, base)):
            change_model(model, deltas[0])
            assert equal(model, {name: value.to(dtype) for name, value in state.items()})


@pytest.mark.parametrize(
    "stored", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int16, torch.uint16, torch.bool]
)
def test_any_dtype_that_a_file_may_have(tmp_path, stored):
    base = torch.arange(-50, 50).remainder(2).to(stored)
    tuned = torch.arange(-50, 50).remainder(3).clamp(max=1).to(stored)
    for name, value in (("base", base), ("tuned", tuned)):
        hf_models.save_policy(tmp_path / f"{name}.pt", {"w": value})
    extract(tmp_path / "base.pt", tmp_path / "tuned.pt", tmp_path / "d.safetensors")
    for dtype in (stored, torch.bfloat16) if stored.is_floating_point else (stored,):
        model = torch.nn.Module()
        model.w = torch.nn.Parameter(base.to(dtype), requires_grad=False)
        lota.attach(model, tmp_path / "d.safetensors")
        assert equal(model, {"w": tuned.to(dtype)})
        lota.detach(model)
        assert equal(model, {"w": base.to(dtype)})
    with pytest.raises(ValueError, match="quantized weights have no task vector"):
        hf_models.save_policy(tmp_path / "int8.pt", {"w": tuned.to(torch.int32)})
        extract(tmp_path / "base.pt", tmp_path / "int8.pt", tmp_path / "e.safetensors")


def test_several_at_once_in_any_order(tmp_path):
    base, tuned, (a, b, c) = disjoint_deltas(tmp_path)
    model = load(tmp_path / "base")
    lota.attach(model, a, b)
    lota.attach(model, c)
    together = values(model)
    for name, start in base.items():
        expected = start.clone()
        for state in tuned:
            expected = torch.where(state[name] != start, state[name], expected)
        assert torch.equal(together[name], expected)
    assert lota.attached(model) == [a, b, c]
    lota.detach(model, b)
    assert lota.attached(model) == [a, c]
    lota.detach(model, a)
    assert equal(model, tuned[2])
    lota.attach(model, b, a)
    assert equal(model, together)
    lota.detach(model)
    assert equal(model, base)


def test_switch(tmp_path):
    base, tuned, deltas = disjoint_deltas(tmp_path)
    model = load(tmp_path / "base")
    for i in (0, 2, 1, 1, 0):
        lota.switch(model, deltas[i])
        assert equal(model, tuned[i]) and lota.attached(model) == [deltas[i]]
    lota.switch(model, tmp_path / "0.safetensors")  # the same delta from its file: it stays
    assert equal(model, tuned[0]) and lota.attached(model) == [deltas[0]]
    lota.switch(model, deltas[1], deltas[0])
    assert lota.attached(model) == [deltas[0], deltas[1]]
    lota.switch(model)
    assert equal(model, base)


def test_what_is_refused_leaves_the_model_as_it_was(tmp_path):
    base, tuned, deltas = disjoint_deltas(tmp_path)
    model = load(tmp_path / "base")
    overlapping = save_model(tmp_path / "base")
    change(overlapping, seed=9, density=0.5).save_pretrained(tmp_path / "t9")
    extract(tmp_path / "base", tmp_path / "t9", tmp_path / "9.safetensors")
    other = Delta.open(tmp_path / "9.safetensors")
    shared = sum(
        int(((overlapping.get_parameter(n) != base[n]) & (tuned[0][n] != base[n])).sum()) for n in base
    )
    lota.attach(model, deltas[0])
    for refused, wanted, match in (
        (lota.attach, [other], rf"changes {shared:,} entries of .*0\.safetensors, which is attached"),
        (lota.attach, [deltas[1], other], "entries of"),  # the first of the two is taken off again
        (lota.attach, [deltas[0]], "attached already"),
        (lota.attach, [deltas[1], deltas[1]], "attached already"),
        (lota.attach, [tmp_path / "nowhere"], "does not exist"),
        (lota.switch, [deltas[1], other], "entries of"),
        (lota.detach, [deltas[1]], r"1\.safetensors is not attached"),
    ):
        with pytest.raises(ValueError, match=match):
            refused(model, *wanted)
        assert equal(model, tuned[0]) and lota.attached(model) == [deltas[0]]
    lota.switch(model, other)
    assert equal(model, values(overlapping))


def test_another_model_or_dtype_is_refused(tmp_path):
    _, _, (delta, *_) = disjoint_deltas(tmp_path)
    cut = load(tmp_path / "base").float()
    position = int(delta.positions(delta.names[0])[0])
    cut.get_parameter(delta.names[0]).data.view(-1)[position] += 2**-20  # not a bf16 value
    scattered = load(tmp_path / "base")
    weight = scattered.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.t().contiguous().t()
    for model, match in (
        (hf_models.new_model("llama", seed=4).bfloat16(), "is not the base of"),
        (cut, "is not the base of"),
        (
            load(tmp_path / "base", torch.float16),
            r"bfloat16, which the model's torch\.float16 cannot hold: load",
        ),
        (hf_models.new_model("gpt2").bfloat16(), "has no such parameter"),
        (scattered, "does not hold as one piece of memory"),
    ):
        before = values(model)
        with pytest.raises(ValueError, match=match):
            lota.attach(model, delta)
        assert lota.attached(model) == [] and all(
            torch.equal(p, before[n]) for n, p in model.named_parameters()
        )


def test_changes_made_since_cannot_be_undone(tmp_path):
    _, tuned, (delta, *_) = disjoint_deltas(tmp_path)
    model = load(tmp_path / "base")
    lota.attach(model, delta)
    flat, positions = model.get_parameter(delta.names[0]).data.view(-1), delta.positions(delta.names[0])
    flat[~torch.isin(torch.arange(len(flat)), positions)] = 0  # none of the delta's entries
    flat[positions[0]] += 1
    before = values(model)
    with pytest.raises(ValueError, match="changed again since"):
        lota.detach(model)
    assert equal(model, before) and lota.attached(model) == [delta]
    flat[positions[0]] = tuned[0][delta.names[0]].view(-1)[positions[0]]
    lota.detach(model)
    assert lota.attached(model) == []


def test_a_delta_on_top_of_the_task_before(tmp_path):
    """As tasks are learnt one after another: the second delta's base is the first one's tuned model."""
    base, tuned, (first, *_) = disjoint_deltas(tmp_path)
    model = load(tmp_path / "t0")
    kept = {name: (tuned[0][name] == value) & (torch.rand(value.shape) < 0.2) for name, value in base.items()}
    change(model, seed=7, mask=Mask.from_dense(kept)).save_pretrained(tmp_path / "both")
    extract(tmp_path / "t0", tmp_path / "both", tmp_path / "second.safetensors")
    second = Delta.open(tmp_path / "second.safetensors")
    one, other = load(tmp_path / "base"), load(tmp_path / "base")
    lota.attach(one, first, second)
    lota.attach(other, second, first)
    assert equal(one, values(model)) and equal(other, values(model))


def test_wrapped_and_copied_models(tmp_path):
    _, tuned, deltas = disjoint_deltas(tmp_path)
    model = load(tmp_path / "base")
    lota.attach(torch.nn.DataParallel(model), deltas[0])  # names with `module.` in front
    assert equal(model, tuned[0])
    twin = copy.deepcopy(load(tmp_path / "base"))
    lota.attach(twin, deltas[1])
    assert equal(twin, tuned[1]) and equal(model, tuned[0])


def test_another_value_at_one_position_is_another_checksum():
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        numbers = torch.randn(50, generator=generator).to(dtype)
        positions = torch.randint(10**11, (50,), generator=generator)
        exact = sum(
            int.from_bytes(value.reshape(1).view(torch.uint8).numpy().tobytes(), "little") * (2 * p + 1)
            for value, p in zip(numbers, positions.tolist(), strict=True)
        )
        expected = f"{7 * exact % 2**64:016x}"
        assert checksum_digits(entry_checksum(3, positions, as_integers(numbers))) == expected
        for i in range(50):
            changed = numbers.clone()
            changed[i] = -changed[i]
            assert checksum_digits(entry_checksum(3, positions, as_integers(changed))) != expected


def test_what_is_known_of_a_delta_is_compared_bit_by_bit(tmp_path, monkeypatch):
    """After the first use nothing is decoded again, on no model; a model with one other bit is refused."""
    base, tuned, (delta, *_) = disjoint_deltas(tmp_path)
    model, twin = load(tmp_path / "base"), load(tmp_path / "base")
    lota.attach(model, delta)
    with monkeypatch.context() as patched:
        patched.setattr(Delta, "changes", None)
        lota.attach(twin, delta)
    assert equal(twin, tuned[0])
    lota.detach(twin)
    assert equal(twin, base)
    for name in delta.names:
        positions, *sides = delta.known[torch.device("cpu"), name]
        assert positions.dtype == torch.int32 and torch.equal(positions.long(), delta.positions(name))
        for side, state in zip(sides, (base, tuned[0]), strict=True):
            assert torch.equal(bits(side), bits(state[name].view(-1)[delta.positions(name)]))
    for name in (delta.names[0], delta.names[-1]):
        entry = twin.get_parameter(name).data.view(-1)[int(delta.positions(name)[-1])]
        before = entry.clone()
        entry.copy_(torch.nextafter(before, torch.tensor(torch.inf, dtype=before.dtype)))
        was = values(twin)
        with pytest.raises(ValueError, match="is not the base of"):
            lota.attach(twin, delta)
        assert equal(twin, was) and lota.attached(twin) == []
        entry.copy_(before)
    lota.attach(twin, delta)
    assert equal(twin, tuned[0])


def test_positions_are_int32_where_they_fit(tmp_path):
    _, _, (delta, *_) = disjoint_deltas(tmp_path, n=1)
    name = delta.names[0]
    known, weight = delta.parameters[name], load(tmp_path / "base").get_parameter(name).detach()
    changes = delta.changes(name)
    delta.changes = lambda name: changes
    for numel, dtype in ((1 << 31, torch.int32), ((1 << 31) + 1, torch.int64)):
        delta.parameters[name] = dataclasses.replace(known, shape=(numel,))
        exchange = attach._Exchange(delta, 0, weight, name, "base", [], False)
        assert attach._first_found(exchange, as_integers(weight))[0].positions.dtype == dtype


def test_an_interrupt_between_two_parameters_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    _, tuned, (first, second, third) = disjoint_deltas(tmp_path)
    model = load(tmp_path / "base")
    lota.attach(model, first)
    lota.attach(load(tmp_path / "base"), third)  # known from elsewhere; the second is not known
    plain, writes = attach._write, []

    def broken(exchange, *values):
        plain(exchange, *values)
        writes.append(exchange.name)
        if len(writes) == 5:
            raise KeyboardInterrupt

    for delta in (second, third):
        writes.clear()
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(attach, "_write", broken)
            lota.switch(model, delta)
        assert equal(model, tuned[0]) and lota.attached(model) == [first] and len(writes) > 5
    lota.switch(model, second)
    assert equal(model, tuned[1])


def test_a_file_that_does_not_give_what_it_names(tmp_path):
    base, _, (delta, *_) = disjoint_deltas(tmp_path)
    model = load(tmp_path / "base")
    delta.meta["tuned_fingerprint"] = "0" * 16
    with pytest.raises(ValueError, match=r"0\.safetensors does not turn .* into .*t0: it is damaged"):
        lota.attach(model, delta)
    assert equal(model, base) and not delta.known


def test_models_made_in_inference_mode(tmp_path):
    base, tuned, (delta, *_) = disjoint_deltas(tmp_path)
    with torch.inference_mode():
        model = load(tmp_path / "base")
        for _ in range(2):
            lota.attach(model, delta)
            assert equal(model, tuned[0])
            lota.detach(model)
            assert equal(model, base)
