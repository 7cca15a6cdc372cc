"""Stacks of experts' matrices that hand over the gradient of their kept entries, against autograd's."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from tolerance import assert_same, assert_same_training, chain, rounding
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lota
from lota.masks import Mask
from lota.models.loading import enable_activation_checkpointing, turn_dropout_off
from lota.models.scope import find_scope
from lota.optim.products import SAMPLED_TOKENS
from scripts.family_models import tiny_model

# gpt_oss: stored transposed, with biases and a gate of its own; nemotron_h: no gate; llama4_text, jetmoe and
# step3p7 do not go through transformers' interface
FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "nemotron_h", "llama4_text", "jetmoe", "step3p7")
MASKS = ("sampled", "gathered", "row", "column", "block")
TOKENS = 48


def make(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = tiny_model(family)
    turn_dropout_off(model)
    return model.to(dtype).train()


def make_mask(model: nn.Module, kind: str) -> Mask:
    if kind in ("row", "column", "block"):
        return tiny.line_mask(model, kind, density=0.2)
    generator, density = torch.Generator().manual_seed(0), 0.01 if kind == "sampled" else 0.3
    scope = find_scope(model)
    return Mask.from_dense({n: torch.rand(t.shape, generator=generator) < density for n, t in scope.items()})


def batch(seed: int = 0) -> Tensor:
    return torch.randint(5, 30, (4, TOKENS // 4), generator=torch.Generator().manual_seed(seed))


def stacks(model: nn.Module) -> dict[nn.Module, list[nn.Parameter]]:
    """The modules of experts and their stacks."""
    found = {m: [p for p in m.parameters(recurse=False) if p.ndim == 3] for m in model.modules()}
    return {m: weights for m, weights in found.items() if weights and type(m).__name__.endswith("Experts")}


def gradients(model: nn.Module, mask: Mask, *, compact: bool) -> dict[str, Tensor]:
    """Kept gradients by name, as an optimizer receives them."""
    model = copy.deepcopy(model)
    optimizer, got = lota.MaskedSGD(model, mask, lr=1e-3), {}
    optimizer.accumulate = lambda p, grad: got.update({optimizer.names[p]: grad})
    lota.fuse_in_backward(optimizer, compact_linear=compact)
    assert all(("forward" in vars(module)) == compact for module in stacks(model))
    model(input_ids=batch(), labels=batch()).loss.backward()
    return got


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_whole_ones_gathered(family, kind):
    model = make(family)
    mask = make_mask(model, kind)
    want, got = (gradients(model, mask, compact=compact) for compact in (False, True))
    assert got.keys() == want.keys()
    for name, grad in got.items():
        assert grad.dtype == torch.float32
        assert_same(grad, want[name], terms=chain(model, TOKENS), name=name)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_bf16(family, kind):
    model = make(family, torch.bfloat16)
    mask = make_mask(model, kind)
    want, got = (gradients(model, mask, compact=compact) for compact in (False, True))
    assert got.keys() == want.keys()
    for name, grad in got.items():  # activations of bf16, rounded at other places by either way
        scale = want[name].abs().max().item()
        torch.testing.assert_close(grad, want[name], rtol=0, atol=2**-4 * scale, msg=name)


def train(
    model: nn.Module, mask: Mask, *, compact: bool, accumulation=1, strategy="even", checkpointing=False
):
    model = copy.deepcopy(model)
    if checkpointing:
        enable_activation_checkpointing(model)
    clipping = {"grad_norm_strategy": strategy, "max_grad_norm": 0.02}
    optimizer = lota.MaskedRMSprop(model, mask, lr=1e-3, eps=1e-3, **clipping)
    if compact:
        unfuse = lota.fuse_in_backward(optimizer, accumulation)
    for i in range(3 * accumulation):
        ids = batch(i)
        (model(input_ids=ids, labels=ids).loss / accumulation).backward()
        if (i + 1) % accumulation == 0:
            optimizer.step()
            optimizer.zero_grad()
    if compact:
        unfuse()
        assert not any("forward" in vars(module) for module in model.modules())
    return model, optimizer.grad_norm


@pytest.mark.parametrize(
    "options", [{}, {"accumulation": 4}, {"strategy": "global"}, {"checkpointing": True}], ids=str
)
@pytest.mark.parametrize("kind", ["gathered", "row", "column"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_steps_are_those_of_the_deferred_optimizer(family, kind, options):
    model = make(family)
    mask = make_mask(model, kind)
    (want, norm), (got, compact_norm) = (train(model, mask, compact=c, **options) for c in (False, True))
    terms = chain(model, tokens=4 * TOKENS)
    assert compact_norm == pytest.approx(norm, rel=rounding(torch.float32, terms))
    weights = (dict(m.named_parameters()) for m in (got, want, model))
    assert_same_training(*weights, terms=terms, steps=3)
    assert tiny.count_moved(got, model, mask) > 0.5 * mask.n_kept  # and frozen entries keep their bits


# One module


def experts(family: str = "mixtral") -> nn.Module:
    """A module of four experts, up: (4, 2 x inner, hidden), down: (4, hidden, inner)."""
    return copy.deepcopy(next(iter(stacks(make(family)))))


def routed(module: nn.Module, seed: int = 0, without: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of a module: tokens, two experts for each, never the one left out, and their weights."""
    generator = torch.Generator().manual_seed(seed)
    others = torch.tensor([n for n in range(module.num_experts) if n != without])
    x = torch.randn(20, module.down_proj.shape[1], generator=generator, dtype=module.down_proj.dtype)
    chosen = torch.stack([others[torch.randperm(len(others), generator=generator)[:2]] for _ in range(20)])
    weights = torch.rand(20, 2, generator=generator, dtype=module.down_proj.dtype)
    return x.requires_grad_(), chosen, weights.requires_grad_()


def mask_of(module: nn.Module, kind: str, density: float = 0.3) -> Mask:
    generator, kept = torch.Generator().manual_seed(0), {}
    for name in ("gate_up_proj", "down_proj"):
        n, height, width = getattr(module, name).shape
        shape = {"row": (n, height, 1), "column": (n, 1, width), "entry": (n, height, width)}[kind]
        kept[name] = (torch.rand(shape, generator=generator) < density).expand(n, height, width).contiguous()
    return Mask.from_dense(kept)


def written_out(module: nn.Module, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Mixtral's experts by their definition, token after token."""
    rows = []
    for token, numbers, shares in zip(x, chosen, weights, strict=True):
        row = torch.zeros_like(token)
        for n, share in zip(numbers, shares, strict=True):
            gate, up = (module.gate_up_proj[n] @ token).chunk(2)
            row = row + share * (module.down_proj[n] @ (nn.functional.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["row", "column", "entry"])
def test_against_the_definition(kind):
    module = experts().double()
    inputs, mask = routed(module, without=1), mask_of(module, kind)
    wanted = [inputs[0], inputs[2], module.gate_up_proj, module.down_proj]
    expected = written_out(module, *inputs)
    of_x, of_weights, *of_stacks = torch.autograd.grad(expected.square().sum(), wanted)
    optimizer, got = lota.MaskedSGD(module, mask, lr=1e-3), {}
    optimizer.accumulate = lambda p, grad: got.update({p: grad})
    lota.fuse_in_backward(optimizer)
    out = module(*inputs)
    assert "_CompactStack" in names_of(out)
    assert_same(out, expected, terms=200)
    out.square().sum().backward()
    assert_same(inputs[0].grad, of_x, terms=400)
    assert_same(inputs[2].grad, of_weights, terms=400)
    for p, whole in zip(wanted[2:], of_stacks, strict=True):
        want = whole.flatten()[optimizer.kept[p].positions().long()].float()
        assert_same(got[p], want, terms=400)
        number = optimizer.kept[p].positions() // p[0].numel()
        assert (number == 1).any() and not got[p][number == 1].any()  # the expert without tokens


def names_of(out: Tensor) -> str:
    """Names of all functions that made a tensor."""
    seen, left = [], [out.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.append(node)
            left += [before for before, _ in node.next_functions]
    return " ".join(type(node).__name__ for node in seen)


class Largest(TorchDispatchMode):
    """The most entries of a tensor that an operation allocates."""

    def __init__(self, model: nn.Module):
        self.numel, self.own = 0, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.own:
                    self.numel = max(self.numel, storage.nbytes() // tensor.itemsize)
        return out


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_no_tensor_as_large_as_a_stack_is_allocated(family, kind):
    """Not even as large as one of its eight matrices, of which the scratch buffer is there before.

    That of sampled products holds 64 tokens, however small the matrices are.
    """
    model = nn.ModuleList([wide_experts(family)])[0]
    x, chosen, weights = routed(model, without=99)
    largest = {}
    for compact in (True, False):
        module = copy.deepcopy(model)
        optimizer = lota.MaskedSGD(module, wide_mask(module, kind), lr=1e-3)
        lota.fuse_in_backward(optimizer, compact_linear=compact)
        with Largest(module) as mode:
            module(x, chosen, weights).sum().backward()
        largest[compact] = mode.numel
    assert largest[False] >= model.gate_up_proj.numel()
    matrix = model.gate_up_proj[0]
    assert largest[True] <= max(matrix.numel(), SAMPLED_TOKENS * sum(matrix.shape))


def wide_experts(family: str) -> nn.Module:
    """Of many more weights than 40 rows have activations."""
    module = experts(family)
    n = 8
    module.num_experts = n
    for name, shape in {"gate_up_proj": (n, 128, 64), "down_proj": (n, 64, 64)}.items():
        shape = (n, 64, 128) if family == "gpt_oss" and name == "gate_up_proj" else shape
        module.register_parameter(name, nn.Parameter(torch.randn(shape) / 8))
        if module.has_bias:
            outputs = shape[2] if module.is_transposed else shape[1]
            module.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(n, outputs)))
    return module


def wide_mask(module: nn.Module, kind: str) -> Mask:
    generator, kept = torch.Generator().manual_seed(0), {}
    for name in ("gate_up_proj", "down_proj"):
        n, height, width = getattr(module, name).shape
        tall, wide = {"row": (1, width), "column": (height, 1), "block": (16, 16)}.get(kind, (1, 1))
        density = 0.01 if kind == "sampled" else 0.1
        grid = torch.rand(n, height // tall, width // wide, generator=generator) < density
        kept[name] = grid.repeat_interleave(tall, 1).repeat_interleave(wide, 2)
    return Mask.from_dense(kept)
