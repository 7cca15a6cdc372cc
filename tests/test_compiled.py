"""Compiled blocks: the same steps as uncompiled ones, few graphs for many lengths, and a sentence on failure.

Most tests let torch trace and differentiate the graphs and then run them operation by operation
(`aot_eager`), which takes no C++ compiler and little time; those with the fixture `compiler` compile.
"""

from __future__ import annotations

import copy
import gc
import logging
import os
import subprocess
import sys
import weakref

import pytest
import torch
import torch._dynamo
from torch import nn
from torch._dynamo.utils import counters

import lota
from lota.models.loading import enable_activation_checkpointing
from lota.models.packed import pack_attention, packed_inputs
from lota.optim import compiled
from lota.optim.compiled import CompiledBlocks, compile_blocks
from tests.runs import ROOT, metrics, stopped_after, train
from tests.test_autograd import LOSSES, LR, SIZE, Net, assert_steps_alike, inputs, make_mask, values
from tests.tiny import line_mask, make, random_mask

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*", "ignore::UserWarning:torch.*")


@pytest.fixture(autouse=True)
def traced(monkeypatch, request):
    """Graphs run operation by operation unless the test compiles; none is left over from another test."""
    if "compiler" not in request.fixturenames:
        monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """The real one, with a cache of its own."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


class Twice(Net):
    """Runs a layer twice, and uses its weight once more."""

    def forward(self, x):
        x = self.b(torch.tanh(self.b(torch.tanh(self.a(x)))))
        return self.c(torch.tanh(x)) + nn.functional.linear(x, self.b.weight)


def fused(kind: str, net: type[Net] = Net):
    """(model, optimizer, its compiled forward): SGD, compact gradients, a block that is the whole model."""
    torch.manual_seed(0)
    model = net()
    model.mask = make_mask(model, kind)
    optimizer = lota.MaskedSGD(model, model.mask, lr=LR)
    lota.fuse_in_backward(optimizer)
    return model, optimizer, CompiledBlocks([model])


# The contract with autograd (tests/test_autograd.py)


@pytest.mark.slow
def test_compiled_code_makes_the_dense_step(compiler):
    model, optimizer, blocks = fused("rows")
    assert_steps_alike(model, optimizer, LOSSES["plain"])
    assert blocks.reason is None and graphs() == 1


@pytest.mark.parametrize("kind", ["gathered", "sampled", "rows"])
def test_a_step_is_the_dense_one(kind):
    model, optimizer, blocks = fused(kind)
    for loss in ("plain", "checkpointing", "penalty", "another use", "a vector", "autocast"):
        assert_steps_alike(model, optimizer, LOSSES[loss])
    assert blocks.reason is None and graphs() >= 2


def test_a_layer_that_is_used_twice_in_a_block(monkeypatch):
    monkeypatch.setattr("tests.test_autograd.Net", Twice)
    model, optimizer, blocks = fused("gathered", Twice)
    assert_steps_alike(model, optimizer, LOSSES["plain"])
    assert blocks.reason is None and graphs() == 1


def test_the_kept_gradient_is_all_that_is_computed_of_a_weight(monkeypatch):
    """The weight itself gets no dense gradient: what its hook sees is empty."""
    model, optimizer, _ = fused("rows")
    seen, receive = [], optimizer._gathered
    monkeypatch.setattr(optimizer, "_gathered", lambda p, whole: seen.append(p) or receive(p, whole))
    LOSSES["plain"](model).backward()
    assert [optimizer.names[p] for p in seen] == ["a.bias"]


def test_asking_for_gradients_trains_nothing():
    model, optimizer, _ = fused("gathered")
    before, x = values(model), inputs().requires_grad_()
    plain = Net()
    plain.load_state_dict(model.state_dict())
    found = torch.autograd.grad(model(x).square().mean(), x)
    expected = torch.autograd.grad(plain(x).square().mean(), x)
    torch.testing.assert_close(found, expected)
    with pytest.raises(RuntimeError, match="kept entries only"):
        torch.autograd.grad(model(x).square().mean(), [model.b.weight])
    model(x).square().mean().backward(inputs=[x])
    optimizer.step()
    assert all(torch.equal(now, before[name]) for name, now in values(model).items())
    assert not optimizer._aside and not optimizer._pending
    assert_steps_alike(model, optimizer, LOSSES["plain"])


def test_freezing_later_and_another_weight_in_place():
    model, optimizer, _ = fused("gathered")
    assert_steps_alike(model, optimizer, LOSSES["plain"])
    model.a.requires_grad_(False)
    before = values(model)
    assert_steps_alike(model, optimizer, LOSSES["plain"])
    assert torch.equal(model.a.weight, before["a.weight"])
    other = nn.Parameter(torch.randn(SIZE, SIZE))
    plain = Net()
    plain.load_state_dict(model.state_dict() | {"b.weight": other})
    model.b.weight = other
    torch.testing.assert_close(model(inputs()), plain(inputs()))


def test_undone_and_unfused_it_is_the_model_of_before():
    model, optimizer, blocks = fused("rows")
    names = set(model.state_dict())
    twin = copy.deepcopy(model)
    twin(inputs()).sum().backward()  # its own weights, uncompiled
    assert twin.b.weight.grad.any() and graphs() == 0
    blocks.undo()
    assert_steps_alike(model, optimizer, LOSSES["plain"])
    assert graphs() == 0 and set(model.state_dict()) == names == set(Net().state_dict())


def test_a_compiled_model_can_go():
    model = Net()
    blocks, gone = CompiledBlocks([model]), weakref.ref(model)
    model(inputs()).sum().backward()
    assert graphs() == 1
    del model, blocks
    gc.collect()
    assert gone() is None


# Models


def steps(model, mask, lengths, checkpointing=False, compile=False, fuse=True, lr=1e-3):
    """(grad norms, blocks) of a step per length, with padding in each batch and a falling learning rate."""
    if checkpointing:
        enable_activation_checkpointing(model)
    optimizer = lota.MaskedAdamW(model, mask, lr=lr, grad_norm_strategy="global", max_grad_norm=1.0)
    if fuse:
        lota.fuse_in_backward(optimizer)
    blocks = compile_blocks(model) if compile else None
    norms, generator = [], torch.Generator().manual_seed(0)
    for number, (rows, length) in enumerate(lengths):
        optimizer.param_groups[0]["lr"] = lr / (1 + number)
        ids = torch.randint(3, 61, (rows, length), generator=generator)
        attended = torch.ones_like(ids)
        attended[0, -3:] = 0
        model(input_ids=ids, attention_mask=attended, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        norms.append(optimizer.grad_norm)
    return norms, blocks


MANY = [(4, 12), (4, 17), (3, 21), (5, 9), (4, 30), (2, 7), (6, 40)]
MASKS = {
    "element": random_mask,
    "row": lambda model: line_mask(model, "row"),
    "column": lambda model: line_mask(model, "column"),
    "dense": lambda model: None,
}
MODELS = [
    ("llama", "row", True),
    ("gpt2", "column", False),
    ("llama", "dense", True),
    ("mixtral", "element", False),
]


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "kind", "checkpointing"), MODELS)
def test_steps_of_many_lengths_are_the_uncompiled_ones(architecture, kind, checkpointing):
    start, plain, model = (make(architecture) for _ in range(3))
    mask = MASKS[kind](start)
    expected, _ = steps(plain, mask, MANY, checkpointing)
    norms, blocks = steps(model, mask, MANY, checkpointing, compile=True)
    assert blocks.reason is None
    # the first block's input requires no gradient if the embedding is frozen; nothing else differs. Around
    # compact experts a block is three graphs, and the first one's last two have the second one's inputs.
    assert graphs() == (5 if architecture == "mixtral" else 1 if kind == "dense" else 2)
    torch.testing.assert_close(norms, expected, rtol=1e-4, atol=0.0)
    others = zip(plain.parameters(), start.parameters(), strict=True)
    for (name, p), (q, before) in zip(model.named_parameters(), others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=name)
        frozen = (
            torch.zeros_like(p, dtype=torch.bool) if mask is None else torch.ones_like(p, dtype=torch.bool)
        )
        frozen = ~mask.dense(name) if mask is not None and name in mask else frozen
        assert torch.equal(p[frozen], before[frozen]), name


@pytest.mark.slow
def test_packed_examples_of_many_lengths():
    """Attention to each example by itself stays outside of the graphs, also where they are recomputed."""
    models = [make("llama", seed=1) for _ in range(2)]
    blocks = None
    for number, model in enumerate(models):
        pack_attention(model, "tiny")
        model.train()
        enable_activation_checkpointing(model)
        optimizer = lota.MaskedSGD(model, line_mask(model, "row"), lr=LR)
        lota.fuse_in_backward(optimizer)
        if number == 1:
            blocks = compile_blocks(model)
        generator = torch.Generator().manual_seed(0)
        for lengths in [(7, 9, 5), (12, 4), (20, 3, 3, 8), (5, 5)]:
            ids = torch.randint(3, 61, (1, sum(lengths)), generator=generator)
            places = torch.cat([torch.arange(length) for length in lengths])[None]
            model(**packed_inputs(ids, places), labels=ids).loss.backward()
            optimizer.step()
    assert blocks.reason is None and 0 < graphs() <= 6
    start = make("llama", seed=1)
    for p, q, before in zip(*(model.parameters() for model in [*models, start]), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-5)
        assert p.requires_grad != torch.equal(p, before)


def test_without_fusing_hooks_see_the_weights_gradients():
    plain, model = make("llama", seed=1), make("llama", seed=1)
    mask = random_mask(plain)
    expected, _ = steps(plain, mask, MANY[:1], fuse=False)
    norms, blocks = steps(model, mask, MANY[:1], fuse=False, compile=True)
    assert blocks.reason is None and graphs() >= 1
    torch.testing.assert_close(norms, expected, rtol=1e-4, atol=0.0)


def test_generation_and_evaluation_in_inference_mode_compile_nothing():
    model = make("llama").eval()
    ids = torch.randint(3, 61, (2, 6), generator=torch.Generator().manual_seed(0))
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    compile_blocks(model)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), expected)
    with torch.inference_mode():
        model(ids, use_cache=False)
    assert graphs() == 0


# Where it fails


class Untraceable(Net):
    def forward(self, x):
        torch._dynamo.graph_break()
        return super().forward(x)


def test_a_block_that_cannot_be_traced_runs_as_it_is(caplog, monkeypatch):
    monkeypatch.setattr("tests.test_autograd.Net", Untraceable)
    model, optimizer, blocks = fused("rows", Untraceable)
    with caplog.at_level(logging.WARNING):
        assert_steps_alike(model, optimizer, LOSSES["plain"])
    assert "cannot compile Untraceable: " in blocks.reason
    assert [r.getMessage() for r in caplog.records] == [
        f"the transformer blocks run uncompiled: {blocks.reason}"
    ]
    assert graphs() == 0


def test_too_many_graphs_end_it(caplog, monkeypatch):
    monkeypatch.setattr(compiled, "MOST_GRAPHS", 1)
    model, optimizer, blocks = fused("rows")
    assert_steps_alike(model, optimizer, LOSSES["plain"])
    assert blocks.reason is None
    model.a.requires_grad_(False)  # another graph
    assert_steps_alike(model, optimizer, LOSSES["plain"])
    assert "limit" in blocks.reason


WITHOUT = """
from tests.test_compiled import LOSSES, assert_steps_alike, fused
model, optimizer, blocks = fused("rows")
assert_steps_alike(model, optimizer, LOSSES["plain"])
print(blocks.reason)
"""


@pytest.mark.slow
def test_without_a_compiler_blocks_run_as_they_are(tmp_path):
    nowhere = {"CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT],
        cwd=ROOT,
        env=os.environ | nowhere,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "C++ compiler" in done.stdout
    assert done.stderr.count("the transformer blocks run uncompiled: ") == 1


# Runs


def policies_differ_by(a, b) -> float:
    first, second = (torch.load(folder / "policy.pt", weights_only=True)["state"] for folder in (a, b))
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


RUN = ("n_examples=48", "mask_path=0.9_mask.pt", "lr_scheduler=linear", "eval_every=24", "n_eval_examples=8",
       "sample_during_eval=true", "n_eval_model_samples=2", "save_every=24")  # fmt: skip


@pytest.mark.slow
def test_a_run_is_that_of_an_uncompiled_one_and_resumes_bit_for_bit(mask):
    plain, _ = train("exp_name=plain", *RUN)
    trainer, folder = train("exp_name=compiled", "compile=true", *RUN)
    losses = [
        [line["loss/train"] for line in metrics(each) if "loss/train" in line] for each in (plain, trainer)
    ]
    # RMSprop divides by the gradient's own size: where that is all rounding, a step is as large as any other
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-3, atol=0.0)
    made = graphs()
    assert 0 < made <= 4  # first block, the others, both without gradients
    with stopped_after(2):
        train("exp_name=resumed", "compile=true", *RUN)
    _, resumed = train("exp_name=resumed", "compile=true", *RUN)
    assert policies_differ_by(resumed, folder) == 0


@pytest.mark.slow
def test_preferences_with_a_swapped_reference_and_lora(mask):
    more = ("datasets=[pairs]", "loss=dpo", "n_examples=24", "do_first_eval=false")
    for name, setting in (("masked", "mask_path=0.9_mask.pt"), ("lora", "adapter=lora")):
        _, plain = train(f"exp_name={name}_plain", setting, *more)
        torch._dynamo.reset()
        counters.clear()
        _, folder = train(f"exp_name={name}", setting, "compile=true", *more)
        assert policies_differ_by(plain, folder) < 1e-5
        assert 0 < graphs() <= 6
