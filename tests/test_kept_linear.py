"""The sampled weight gradient against the dense one, wherever a layer could take the other path."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch

import lota
from lota.kept_linear import _KeptGradientLinear
from lota.masks import Mask
from lota.models import enable_activation_checkpointing


def sparse_mask(model, density=0.01):
    """Few entries of every scoped tensor but one, which keeps all and so takes the dense path."""
    return tiny.random_mask(model, density)


def run(model, mask, *, max_density, accumulation=1, strategy="even", checkpointing=False):
    model = copy.deepcopy(model)
    if checkpointing:
        enable_activation_checkpointing(model)
    clipping = {"grad_norm_strategy": strategy, "max_grad_norm": 0.02}
    optimizer = lota.MaskedRMSprop(model, mask, lr=1e-3, eps=1e-3, **clipping)
    unfuse = lota.fuse_in_backward(optimizer, accumulation, max_density=max_density)
    sampled = sum("forward" in vars(m) for m in model.modules())
    for i, ids in enumerate(tiny.batches(3 * accumulation)):
        (model(input_ids=ids, labels=ids).loss / accumulation).backward()
        if (i + 1) % accumulation == 0:
            optimizer.step()
    unfuse()
    assert not any("forward" in vars(m) for m in model.modules())
    return model, sampled, optimizer.grad_norm


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2_tied", "gpt_neox", "mixtral"])
@pytest.mark.parametrize(
    "options", [{}, {"accumulation": 4}, {"strategy": "global"}, {"checkpointing": True}], ids=str
)
def test_equal_to_the_dense_gradient(architecture, options):
    model = tiny.make(architecture)
    mask = sparse_mask(model)
    expected, none, norm = run(model, mask, max_density=0.0, **options)
    got, sampled, sampled_norm = run(model, mask, max_density=0.05, **options)
    assert none == 0
    assert (sampled > 0) == (architecture != "gpt2")  # GPT-2 has Conv1D instead of nn.Linear
    assert sampled_norm == pytest.approx(norm, rel=1e-4)
    moved = 0
    for (name, a), b in zip(got.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        start = dict(model.named_parameters())[name]
        frozen = ~mask.dense(name) if name in mask else torch.ones_like(a, dtype=torch.bool)
        assert torch.equal(a[frozen], start[frozen])
        moved += (a != start).sum().item()
    assert moved > 0.9 * mask.n_kept


def test_gradients_of_inputs_are_exact():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: _KeptGradientLinear.apply(x, weight, bias, lambda g, x: None), (x,)
    )


def test_only_sparse_unshared_fp32_layers_take_part():
    dense = tiny.make("llama")
    assert run(dense, tiny.random_mask(dense, 0.5), max_density=0.02)[1] == 0
    narrow = tiny.make("llama", dtype=torch.bfloat16)
    assert run(narrow, sparse_mask(narrow), max_density=0.05)[1] == 0


def test_a_layer_that_runs_twice_is_refused():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(50, 50, bias=False)

        def forward(self, x):
            return self.layer(self.layer(x))

    model = Twice()
    mask = Mask.from_positions({"layer.weight": torch.tensor([3, 70])}, {"layer.weight": (50, 50)})
    optimizer = lota.MaskedSGD(model, mask, lr=0.1)
    unfuse = lota.fuse_in_backward(optimizer, gradient_accumulation_steps=2)
    with pytest.raises(RuntimeError, match="max_density=0"):
        model(torch.randn(3, 50)).sum().backward()
    unfuse()
    lota.fuse_in_backward(optimizer, max_density=0)
    model(torch.randn(3, 50)).sum().backward()
