"""Gradients that linear layers hand over themselves, against those that autograd forms."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from tolerance import assert_same, assert_same_training, chain, rounding
from torch import nn
from transformers.pytorch_utils import Conv1D

import lota
from lota.masks import Mask
from lota.models.loading import enable_activation_checkpointing
from lota.optim.compact_linear import _CompactLinear
from lota.optim.kept import Entries, Tiles, kept_entries
from lota.optim.products import Tiled, _blocks, products


def run(model, mask, *, compact, accumulation=1, strategy="even", checkpointing=False):
    model = copy.deepcopy(model)
    if checkpointing:
        enable_activation_checkpointing(model)
    clipping = {"grad_norm_strategy": strategy, "max_grad_norm": 0.02}
    optimizer = lota.MaskedRMSprop(model, mask, lr=1e-3, eps=1e-3, **clipping)
    unfuse = lota.fuse_in_backward(optimizer, accumulation, compact_linear=compact)
    layers = sum("forward" in vars(m) for m in model.modules())
    tiny.learn(model, optimizer, 3, accumulation)
    unfuse()
    assert not any("forward" in vars(m) for m in model.modules())
    return model, layers, optimizer.grad_norm


def assert_alike(model, got, expected, norm, expected_norm):
    """Both trained from `model` for three steps of 48 tokens, or of four times as many."""
    terms = chain(model, tokens=4 * 48)
    assert norm == pytest.approx(expected_norm, rel=rounding(torch.float32, terms))
    weights = (dict(m.named_parameters()) for m in (got, expected, model))
    assert_same_training(*weights, terms=terms, steps=3)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "gpt_neox", "mixtral"])
@pytest.mark.parametrize(
    "options", [{}, {"accumulation": 4}, {"strategy": "global"}, {"checkpointing": True}], ids=str
)
@pytest.mark.parametrize("density", [0.01, 0.3], ids=["sampled", "gathered"])
def test_equal_to_autograd(architecture, options, density):
    model = tiny.make(architecture)
    mask = tiny.random_mask(model, density)  # of which one tensor keeps all and so takes the other path
    expected, none, norm = run(model, mask, compact=False, **options)
    got, layers, compact_norm = run(model, mask, compact=True, **options)
    assert none == 0
    assert layers > 0  # mixtral's attention; its experts are no linear layers
    assert_alike(model, got, expected, compact_norm, norm)
    assert tiny.count_moved(got, model, mask) > 0.9 * mask.n_kept


@pytest.mark.parametrize("granularity", ["row", "column", "block"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "gpt_neox", "mixtral"])
def test_whole_tiles_equal_autograd(architecture, granularity, monkeypatch):
    model = tiny.make(architecture)
    mask = tiny.line_mask(model, granularity)
    expected, _, norm = run(model, mask, compact=False)
    monkeypatch.setattr("lota.optim.products.Gathered.__init__", None)  # no other product is made
    for options in ({}, {"checkpointing": True}):
        got, layers, compact_norm = run(model, mask, compact=True, **options)
        assert layers >= (4 if granularity == "block" else 8)  # of few blocks a coin can choose all or none
        assert_alike(model, got, expected, compact_norm, norm)
        assert tiny.count_moved(got, model, mask) > 0


@pytest.mark.parametrize("granularity", ["row", "column", "block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_gradients_of_lines_are_the_dense_ones_gathered(architecture, dtype, granularity):
    model = tiny.make(architecture, dtype=dtype)
    mask = tiny.line_mask(model, granularity)
    ids = tiny.batches(1)[0]
    model(input_ids=ids, labels=ids).loss.backward()
    dense = {name: p.grad.float() for name, p in model.named_parameters()}
    model.zero_grad()
    optimizer = lota.MaskedSGD(model, mask, lr=1e-3)
    got = {}
    optimizer.accumulate = lambda p, grad: got.update({p: grad})
    lota.fuse_in_backward(optimizer)
    model(input_ids=ids, labels=ids).loss.backward()
    assert {optimizer.names[p] for p in got} == {name for name in mask.names if mask.kept(name)}
    for p, grad in got.items():
        assert grad.dtype == torch.float32
        name = optimizer.names[p]
        want = dense[name].flatten()[optimizer.kept[p].positions().long()]
        if dtype == torch.float32:
            assert_same(grad, want, terms=48, name=name)  # one product over 48 tokens
        else:  # the product is summed in fp32 and rounded to bf16 once in either way: by at most 2^-8
            torch.testing.assert_close(grad, want, rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize("shape", [(64, 96), (70, 100)], ids=["even", "cut off"])
@pytest.mark.parametrize("tile", [(1, None), (None, 1), (16, 16), (32, 16)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_products_of_tiles(shape, tile, transposed, monkeypatch):
    """One after the other as on a CPU, several at once as elsewhere, and of the needed features alone."""
    generator = torch.manual_seed(0)
    tall, wide = tile[0] or shape[0], tile[1] or shape[1]
    grid = torch.rand(-(-shape[0] // tall), -(-shape[1] // wide), generator=generator) < 0.3
    grid[0] |= grid.sum() == 0
    flags = grid.repeat_interleave(tall, 0).repeat_interleave(wide, 1)[: shape[0], : shape[1]].contiguous()
    tiles = kept_entries(Mask.from_dense({"w": flags}), "w", torch.device("cpu"))
    assert isinstance(tiles, Tiles)
    a = torch.randn(50, shape[0], generator=generator, dtype=torch.float64)
    b = torch.randn(50, shape[1], generator=generator, dtype=torch.float64)
    want = (a.t() @ b).flatten()[tiles.positions()]
    product = Tiled(tiles)
    assert_same(product(a, b), want.float(), terms=50)
    starts = {"lines": torch.tensor([0, 16, 48]), "columns": torch.tensor([32, 0, 16])}
    for at_once in (True, False):
        blocks = _blocks(a, b, **starts, tall=16, wide=16, at_once=at_once)
        for block, line, column in zip(blocks, *starts.values(), strict=True):
            assert_same(block, a[:, line : line + 16].t() @ b[:, column : column + 16], terms=50)
    axis = 0 if transposed else 1
    needed = product.needed(axis)
    assert needed.tolist() == flags.any(1 - axis).nonzero().view(-1).tolist()
    few = (a[:, needed], b) if transposed else (a, b[:, needed])
    assert_same(product.narrowed(axis, needed)(*few), want.float(), terms=50)


@pytest.mark.parametrize(("tall", "wide"), [(16, 16), (16, 32), (32, 16)])
def test_blocks_at_once_take_no_more_memory_than_their_inputs(tall, wide, monkeypatch):
    """As many as that allows; one after the other, nothing is copied."""
    a, b, taken, real = torch.randn(50, 64), torch.randn(50, 96), [], torch.bmm
    starts = torch.zeros(7, dtype=torch.long)

    def bmm(left, right, **more):
        taken.append((len(left), left.numel(), right.numel()))
        return real(left, right, **more)

    monkeypatch.setattr(torch, "bmm", bmm)
    _blocks(a, b, starts, starts, tall, wide, at_once=False)
    assert not taken
    _blocks(a, b, starts, starts, tall, wide, at_once=True)
    assert sum(count for count, *_ in taken) == 7
    assert all(left <= a.numel() and right <= b.numel() for _, left, right in taken)
    count, left, right = taken[0]
    assert left // count * (count + 1) > a.numel() or right // count * (count + 1) > b.numel()


def test_on_a_cpu_blocks_are_not_copied(monkeypatch):
    """Here of blocks as tall as the weight is wide."""
    flags = torch.zeros(64, 32, dtype=torch.bool)
    flags[:32, :16] = flags[32:, 16:] = True
    tiles = kept_entries(Mask.from_dense({"w": flags}), "w", torch.device("cpu"))
    a, b = torch.randn(50, 64, dtype=torch.float64), torch.randn(50, 32, dtype=torch.float64)
    monkeypatch.setattr(torch, "bmm", None)
    assert_same(Tiled(tiles)(a, b), (a.t() @ b).flatten()[tiles.positions()].float(), terms=50)


class Saved:
    """The largest tensors that a forward pass saves for its backward pass."""

    def __init__(self) -> None:
        self.widths: list[int] = []

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.widths.append(tensor.shape[-1])
        return tensor


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("n_features", [10, 11])
def test_few_needed_features_are_saved_alone(transposed, n_features):
    linear = Conv1D(24, 40) if transposed else nn.Linear(40, 24)
    kept = torch.zeros(24, 40, dtype=torch.bool)
    kept[:, 3 : 3 + 2 * n_features : 2] = True
    kept = kept.t().contiguous() if transposed else kept
    model, few = nn.Sequential(linear), n_features <= 0.25 * 40
    optimizer = lota.MaskedSGD(model, Mask.from_dense({"0.weight": kept}), lr=1.0)
    unfuse = lota.fuse_in_backward(optimizer)
    x, saved = torch.randn(7, 40, requires_grad=True), Saved()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        loss = model(x).square().sum()
    assert (n_features in saved.widths) == few
    (gradient,) = torch.autograd.grad(loss, linear.weight, retain_graph=True)
    exact = ((2 * model(x)).t() @ x).detach()
    exact = exact.t() if transposed else exact
    assert_same(gradient[kept], exact[kept], terms=24 * 7)
    assert gradient[~kept].count_nonzero() == (0 if few else (~kept).sum())
    if few:
        with pytest.raises(RuntimeError, match="saved part of its input"):
            torch.autograd.grad(loss, linear.weight, create_graph=True)
    before = linear.weight.detach().clone()
    loss.backward()
    assert_same((before - linear.weight)[kept], exact[kept], terms=24 * 7)
    assert torch.equal(before[~kept], linear.weight[~kept])
    unfuse()


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_of_inputs_are_exact(transposed):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    weight = weight.t().contiguous() if transposed else weight
    assert torch.autograd.gradcheck(
        lambda x: _CompactLinear.apply(x, weight, bias, lambda a, b: None, transposed, None), (x,)
    )


def test_few_kept_entries_are_sampled_and_many_gathered():
    model = tiny.make("llama")
    weight = model.model.layers[0].mlp.up_proj.weight
    for density, kind in ((0.01, "Sampled"), (0.3, "Gathered")):
        optimizer = lota.MaskedRMSprop(model, tiny.random_mask(model, density))
        product = products({weight: optimizer.kept[weight]})[weight]
        assert type(product).__name__ == kind


@pytest.mark.parametrize(("n", "kind"), [(300, "Sampled"), (301, "Gathered")])
def test_up_to_fifteen_per_cent_are_sampled(n, kind):
    weight = torch.nn.Parameter(torch.zeros(40, 50))
    positions = torch.randperm(2000, generator=torch.Generator().manual_seed(0))[:n].sort().values
    product = products({weight: Entries(positions, weight.numel(), weight.device)})
    assert type(product[weight]).__name__ == kind


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 200])
def test_the_sampled_product_of_any_number_of_tokens(tokens):
    """Some lines without kept entries, one layer after the other in the same scratch memory."""
    generator = torch.manual_seed(tokens)
    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((30, 50), (50, 20))]
    kept = {}
    for weight in weights:
        flags = torch.rand(weight.shape, generator=generator) < 0.1
        flags[[0, 7, -1]] = False
        kept[weight] = Entries(flags.flatten().nonzero().view(-1), weight.numel(), weight.device)
    for weight, product in products(kept).items():
        assert type(product).__name__ == "Sampled"
        a, b = (torch.randn(tokens, side, generator=generator) for side in weight.shape)
        for _ in range(2):  # nothing is left of the first product
            want = (a.double().t() @ b.double()).flatten()[kept[weight].positions().long()]
            assert_same(product(a, b), want.float(), terms=tokens)


@pytest.mark.parametrize("compact", [False, True])
def test_bf16_weights(compact):
    model = tiny.make("llama", dtype=torch.bfloat16)
    mask = tiny.random_mask(model, 0.3)
    got, layers, _ = run(model, mask, compact=compact)
    assert (layers > 0) == compact
    expected, _, _ = run(model.float(), mask, compact=False)
    # bf16 against fp32, no two ways of one thing: weights round by 2^-8, and of three steps of up to 1e-3
    # each, bf16 gradients leave less than half to chance
    for a, b in zip(got.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a.float(), b, rtol=2**-7, atol=2e-3)


def test_a_model_that_is_moved_afterwards_forms_gradients_as_usual():
    """As a Hugging Face trainer moves it to its GPU."""
    model = torch.nn.Sequential(torch.nn.Linear(50, 40, bias=False))
    mask = Mask.from_positions({"0.weight": torch.tensor([3, 70])}, {"0.weight": (40, 50)})
    lota.fuse_in_backward(lota.MaskedSGD(model, mask, lr=0.1))
    x = torch.randn(3, 50)
    assert "_CompactLinear" in type(model(x).grad_fn).__name__
    model.to("meta")
    assert "_CompactLinear" not in type(model(x.to("meta")).grad_fn).__name__


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_deep_copy_is_a_model_of_its_own(architecture):
    model = tiny.make(architecture)
    mask = tiny.random_mask(model, 0.3)
    optimizer = lota.MaskedRMSprop(model, mask, lr=1e-2)
    lota.fuse_in_backward(optimizer)
    ids = tiny.batches(1)[0]
    reference = copy.deepcopy(model)
    before = reference(input_ids=ids).logits
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert torch.equal(reference(input_ids=ids).logits, before)
    now = model(input_ids=ids).logits
    assert not torch.equal(now, before)
    reference(input_ids=ids, labels=ids).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in reference.parameters())
    assert not optimizer._pending and torch.equal(model(input_ids=ids).logits, now)
