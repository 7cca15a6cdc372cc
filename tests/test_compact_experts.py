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
from lota.optim import compact_experts
from lota.optim.kept import Tiles, kept_entries
from lota.optim.products import SAMPLED_TOKENS, stack_products
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
    hidden = module.down_proj.shape[2 if module.is_transposed else 1]
    x = torch.randn(20, hidden, generator=generator, dtype=module.down_proj.dtype)
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


@pytest.mark.parametrize("tile", [(1, 100), (70, 1), (16, 32)], ids=str)
def test_tiles_that_are_cut_off_at_the_edges_stand_in_their_places(tile):
    """Tiles of four sizes in each matrix; the second matrix keeps nothing, the third has no tokens."""
    generator = torch.Generator().manual_seed(0)
    grid = torch.rand(4, -(-70 // tile[0]), -(-100 // tile[1]), generator=generator) < 0.5
    grid[1] = False
    flags = grid.repeat_interleave(tile[0], 1).repeat_interleave(tile[1], 2)[:, :70, :100].contiguous()
    stack = nn.Parameter(torch.zeros(4, 70, 100))
    kept = kept_entries(Mask.from_dense({"w": flags}), "w", stack.device)
    assert isinstance(kept, Tiles) and len(kept.parts) == (4 if tile == (16, 32) else 1)
    a, b = torch.randn(30, 70, generator=generator), torch.randn(30, 100, generator=generator)
    sizes = [9, 8, 0, 11, 2]  # the last two rows are no expert's
    rows = [x.split(sizes)[:4] for x in (a, b)]
    whole = torch.stack([of_a.t() @ of_b for of_a, of_b in zip(*rows, strict=True)])
    got = stack_products({stack: kept})[stack](a, b, sizes)
    assert_same(got, whole.flatten()[kept.positions()], terms=11)


# What else is done with a module


@pytest.fixture
def fused():
    """A module of experts under column masks of few features, an optimizer fused into it, and its inputs."""
    module = experts()
    optimizer = lota.MaskedSGD(module, mask_of(module, "entry"), lr=0.5)
    lota.fuse_in_backward(optimizer)
    return module, optimizer, routed(module)


def is_compact(out: Tensor) -> bool:
    return "_CompactStack" in names_of(out)


def plain(module: nn.Module) -> nn.Module:
    """A copy that autograd alone serves."""
    made = copy.deepcopy(module)
    del made.forward
    return made


def test_implementations_of_transformers_that_are_another_thing_are_left_alone(fused):
    module, _, inputs = fused
    for name in ("eager", "batched_mm", "grouped_mm"):
        module.config._experts_implementation_internal = name
        assert is_compact(module(*inputs))
        assert_same(module(*inputs), plain(module)(*inputs), terms=200)
    module.config._experts_implementation_internal = "sonicmoe"
    with pytest.raises(Exception, match=r"(?i)sonic|kernel|cuda"):
        module(*inputs)


@pytest.mark.parametrize("changed", ["no gradients", "parallel", "dtype", "autocast", "weight"])
def test_falls_back_to_the_class(fused, changed):
    module, _, inputs = fused
    assert is_compact(module(*inputs))
    if changed == "no gradients":
        with torch.no_grad():
            assert torch.equal(module(*inputs), type(module).forward(module, *inputs))
        return
    if changed == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            assert not is_compact(module(*inputs))
        return
    if changed == "weight":
        other = {"down_proj": torch.zeros_like(module.down_proj)}
        out = torch.func.functional_call(module, other, inputs)
        assert not is_compact(out) and not out.any()
        return
    if changed == "parallel":
        module._is_expert_parallel = True
    else:
        module.bfloat16()
        inputs = (inputs[0].detach().bfloat16(), *inputs[1:])
    assert not is_compact(module(*inputs))


def test_arguments_by_name(fused):
    module, _, (x, chosen, weights) = fused
    out = module(hidden_states=x, top_k_index=chosen, top_k_weights=weights)
    assert is_compact(out) and torch.equal(out, module(x, chosen, weights))


def test_a_deep_copy_is_a_module_of_its_own(fused):
    module, optimizer, inputs = fused
    other = copy.deepcopy(module)
    module(*inputs).square().sum().backward()
    with torch.no_grad():
        assert not torch.equal(module(*inputs), other(*inputs))
    out = other(*inputs)
    assert not is_compact(out)
    out.sum().backward()
    assert other.down_proj.grad is not None and not optimizer._pending and not optimizer._aside


def test_asking_for_gradients_trains_nothing(fused):
    module, optimizer, inputs = fused
    before = copy.deepcopy(module.state_dict())
    for create_graph in (False, True):
        found, want = (
            torch.autograd.grad(
                made(*inputs).square().mean(),
                [inputs[0], made.gate_up_proj, made.down_proj],
                create_graph=create_graph,
            )
            for made in (module, plain(module))
        )
        for got, expected in zip(found, want, strict=True):
            assert_same(got, expected, terms=400)
    second = (
        torch.autograd.grad(sum(g.square().sum() for g in gradient), inputs[0])[0]
        for gradient in (found, want)
    )
    assert_same(*second, terms=4000)
    module(*inputs).sum().backward(inputs=[inputs[0]])
    optimizer.step()
    assert all(torch.equal(now, before[name]) for name, now in module.state_dict().items())
    module(*inputs).sum().backward(inputs=[module.down_proj])
    assert torch.equal(module.gate_up_proj, before["gate_up_proj"])
    assert not torch.equal(module.down_proj, before["down_proj"])


def test_a_stack_used_twice_and_in_a_penalty_is_updated_once(fused):
    module, optimizer, inputs = fused
    reference, more = plain(module), routed(module, seed=1)
    for made in (reference, module):
        loss = made(*inputs).sum() + made(*more).square().sum() + made.down_proj.square().sum()
        loss.backward()
    for name in ("gate_up_proj", "down_proj"):
        p, start = getattr(module, name), getattr(reference, name)
        kept = torch.zeros(p.numel(), dtype=torch.bool)
        kept[optimizer.kept[p].positions().long()] = True
        want = start - 0.5 * start.grad * kept.view(p.shape)
        assert optimizer.state[p]["step"] == 1
        assert_same(p - start, want - start, terms=800)
        assert torch.equal(p[~kept.view(p.shape)], start[~kept.view(p.shape)])


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("n", [16, 17])
def test_few_needed_features_are_saved_alone(family, n):
    """Of 32, or twice as many of 64, each expert's own; the whole gradient then has zeros in the others."""
    module, kept = experts(family), {}
    for name in ("gate_up_proj", "down_proj"):
        flags = torch.zeros(getattr(module, name).shape, dtype=torch.bool)
        for number, matrix in enumerate(flags.transpose(1, 2) if module.is_transposed else flags):
            matrix[:, : (n - number) * matrix.shape[1] // 32] = True
        kept[name] = flags
    assert flags.shape[1 if module.is_transposed else 2] == 64
    reference, widths = copy.deepcopy(module), []
    optimizer = lota.MaskedSGD(module, Mask.from_dense(kept), lr=1.0)
    lota.fuse_in_backward(optimizer)
    inputs = routed(module)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: widths.append(t.shape) or t, lambda t: t):
        loss = module(*inputs).square().sum()
    assert [width for width in ((40, n), (40, 2 * n)) if width in widths] == (
        [(40, 16), (40, 32)] if n == 16 else []
    )
    (got,) = torch.autograd.grad(loss, module.gate_up_proj, retain_graph=True)
    (want,) = torch.autograd.grad(reference(*inputs).square().sum(), reference.gate_up_proj)
    flags = kept["gate_up_proj"]
    assert_same(got[flags], want[flags], terms=400)
    assert got[~flags].any() == (n == 17)
    if n == 16:
        with pytest.raises(RuntimeError, match="saved part of its input"):
            torch.autograd.grad(loss, module.gate_up_proj, create_graph=True)
    loss.backward()
    assert_same((reference.gate_up_proj - module.gate_up_proj)[flags], want[flags], terms=400)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_norm_behind_each_expert(family, monkeypatch):
    module = experts(family)
    module.has_post_expert_norm, module.post_expert_norm = True, nn.LayerNorm(routed(module)[0].shape[1])
    module.config._experts_implementation_internal = "batched_mm"
    lota.fuse_in_backward(lota.MaskedSGD(module, mask_of(module, "entry"), lr=0.5))
    inputs = routed(module)
    with torch.no_grad():
        want = module(*inputs)
    out = module(*inputs)
    assert is_compact(out)
    assert_same(out, want, terms=400)


def test_rows_of_no_expert_count_nothing(fused):
    """Some routers choose a number behind the last expert for 'none'."""
    module, _, (x, chosen, weights) = fused
    chosen[3:9, 1] = module.num_experts
    with torch.no_grad():
        weights[3:9, 1] = 0
    expected = plain(module)
    expected.config._experts_implementation_internal = "eager"
    out, want = module(x, chosen, weights), expected(x, chosen, weights)
    assert is_compact(out)
    assert_same(out, want, terms=200)
    (got,), (gradient,) = (torch.autograd.grad(y.square().sum(), x) for y in (out, want))
    assert_same(got, gradient, terms=400)


def test_kinds_of_newer_releases_are_left_alone(monkeypatch):
    module = experts()
    monkeypatch.setattr(compact_experts, "_UNDERSTOOD", compact_experts._UNDERSTOOD - {"has_bias"})
    lota.fuse_in_backward(lota.MaskedSGD(module, mask_of(module, "entry"), lr=0.5))
    assert "forward" not in vars(module)


@pytest.mark.parametrize("kind", ["entry", "row", "column"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_the_grouped_product_of_other_devices(family, kind, monkeypatch):
    """torch has it on CPUs too, where the loop is as fast."""
    module = experts(family)
    lota.fuse_in_backward(lota.MaskedSGD(module, mask_of(module, kind), lr=0.5))
    inputs, found, called = routed(module), [], []
    real = nn.functional.grouped_mm
    monkeypatch.setattr(nn.functional, "grouped_mm", lambda *a, **b: called.append(1) or real(*a, **b))
    for has_kernel in (False, True):
        monkeypatch.setattr(compact_experts, "_has_grouped_kernel", lambda stack, found=has_kernel: found)
        out = module(*inputs)
        wanted = [inputs[0], module.gate_up_proj, module.down_proj]
        found.append([out, *torch.autograd.grad(out.square().sum(), wanted)])
    assert len(called) == 4  # two products forward, two backward for their inputs
    for got, want in zip(*found, strict=True):
        assert_same(got, want, terms=400)
