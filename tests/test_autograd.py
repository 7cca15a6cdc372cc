"""Whatever a user does with autograd, a step is that of a dense optimizer on masked gradients.

The reference is a deep copy of the model, trained by torch.optim.SGD after the gradients of the frozen
entries were set to zero. Values are of order 1 and each gradient entry is a sum of at most 60 products, so
both ways agree to a few units of fp32's last place: 60 * 2^-24 = 4e-6.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import lota
from lota.masks import Mask
from lota.optim import compact_linear

CLOSE = {"rtol": 1e-5, "atol": 4e-6}
LR = 0.1
SIZE = 12


class Net(nn.Module):
    """Three square layers; the first and the last have a bias."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE, False), nn.Linear(SIZE, SIZE)

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def make_mask(model: nn.Module, kind: str) -> Mask:
    """Half of each matrix (`gathered`), a few entries (`sampled`) or whole rows, and half of a's bias."""
    generator = torch.Generator().manual_seed(1)
    kept = {}
    for name, p in model.named_parameters():
        if kind == "rows" and p.ndim == 2:
            kept[name] = (torch.rand(len(p), 1, generator=generator) < 0.5).expand_as(p).contiguous()
        else:
            share = 0.015 if kind == "sampled" and p.ndim == 2 else 0.5
            kept[name] = torch.rand(p.shape, generator=generator) < share
        kept[name].view(-1)[0] |= kind != "rows"
    kept["c.bias"][:] = False
    return Mask.from_dense(kept)


@pytest.fixture(params=["gathered", "sampled", "rows"])
def fused(request):
    """(model, optimizer, unfuse): SGD with compact gradients."""
    torch.manual_seed(0)
    model = Net()
    model.mask = make_mask(model, request.param)
    optimizer = lota.MaskedSGD(model, model.mask, lr=LR)
    unfuse = lota.fuse_in_backward(optimizer)
    assert sum("forward" in vars(m) for m in model.modules()) == 3
    return model, optimizer, unfuse


def inputs(n: int = 5) -> torch.Tensor:
    return torch.randn(n, SIZE, generator=torch.Generator().manual_seed(2))


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def dense_step(model: nn.Module, loss_of) -> dict[str, torch.Tensor]:
    """The parameters after one step of the reference from where `model` is."""
    plain = Net()
    plain.load_state_dict(model.state_dict())
    for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
        p.requires_grad_(q.requires_grad and model.mask.kept(name) > 0)
    optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=LR)
    loss_of(plain).backward()
    for name, p in plain.named_parameters():
        if p.grad is not None:
            p.grad *= model.mask.dense(name)
    optimizer.step()
    return values(plain)


def assert_steps_alike(model, optimizer, loss_of, moves: bool = True):
    """Two steps, so that nothing left over from the first spoils the second."""
    for _ in range(2):
        before, expected = values(model), dense_step(model, loss_of)
        loss_of(model).backward()
        optimizer.step()
        got = values(model)
        for name in got:
            torch.testing.assert_close(got[name], expected[name], **CLOSE)
            frozen = ~model.mask.dense(name)
            assert torch.equal(got[name][frozen], before[name][frozen])
        assert any(not torch.equal(got[name], before[name]) for name in got) == moves
        assert all(p.grad is None for p in model.parameters())


START = {}


def penalty(model):
    """L2-SP: the distance of the kept weights from where training began."""
    start = START.setdefault("model", values(Net()))
    return sum((p - start[name]).square().sum() for name, p in model.named_parameters())


def twice(model, x):
    return model.b(torch.tanh(model.b(model.a(x))))


def in_autocast(model, x):
    """Products in bf16; both ways round alike, since the layers then compute as they would without a mask."""
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
    assert found.dtype == torch.bfloat16
    return found


LOSSES = {
    "plain": lambda m: m(inputs()).square().mean(),
    "a layer run twice": lambda m: twice(m, inputs()).square().mean(),
    "checkpointing": lambda m: checkpoint(m, inputs(), use_reentrant=False).square().mean(),
    "checkpointing, twice": lambda m: checkpoint(twice, m, inputs(), use_reentrant=False).square().mean(),
    "penalty": lambda m: m(inputs()).square().mean() + 0.1 * penalty(m),
    "penalty alone": lambda m: 0.1 * penalty(m),
    "penalty and twice": lambda m: twice(m, inputs()).square().mean() + 0.1 * penalty(m),
    "another use": lambda m: F.linear(m(inputs()), m.b.weight).square().mean(),
    "input by name": lambda m: m.c(input=m.a(input=inputs())).square().mean(),
    "one layer": lambda m: m.b(inputs()).square().mean(),
    "a vector": lambda m: m(inputs()[0]).square().mean(),
    "autocast": lambda m: in_autocast(m, inputs()).float().square().mean(),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_is_the_dense_one(fused, loss):
    assert_steps_alike(*fused[:2], LOSSES[loss])


@pytest.mark.parametrize("strategy", ["even", "proportional", "none"])
def test_weights_move_and_gradients_go_while_backward_runs(fused, strategy):
    """Memory holds one gradient at a time only if each is used before that of the layer in front is made."""
    model, optimizer, _ = fused
    optimizer.grad_norm_strategy, optimizer.max_grad_norm = strategy, 1e6  # clips nothing
    before, expected = values(model), dense_step(model, LOSSES["plain"])
    moved_at_a = {}

    def look(grad):
        for name in ("b.weight", "c.weight"):
            p = model.get_parameter(name)
            moved_at_a[name] = p.grad is None and not torch.equal(p, before[name])

    hidden = model.a(inputs())
    hidden.register_hook(look)  # runs once the gradients of b and c are complete, before a's is made
    model.c(torch.tanh(model.b(torch.tanh(hidden)))).square().mean().backward()
    assert moved_at_a == {"b.weight": True, "c.weight": True}
    assert not optimizer._pending and not optimizer._aside
    for name, got in values(model).items():  # step() has not been called
        torch.testing.assert_close(got, expected[name], **CLOSE)
    assert all(p.grad is None for p in model.parameters())


def test_gradient_penalty(fused):
    """The loss holds a gradient itself (create_graph=True)."""

    def loss_of(model):
        x = inputs().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return model(x).square().mean() + 0.01 * slope.square().sum()

    assert_steps_alike(*fused[:2], loss_of)


def test_retained_graph(fused):
    """Two losses of one graph: parts of a batch, summed before the update."""
    model = fused[0]
    fused[2]()
    lota.fuse_in_backward(fused[1], gradient_accumulation_steps=2)
    before, expected = values(model), dense_step(model, lambda m: 2 * m(inputs()).square().mean())
    loss = model(inputs()).square().mean()
    loss.backward(retain_graph=True)
    assert all(torch.equal(now, before[name]) for name, now in values(model).items())
    loss.backward()
    for name, got in values(model).items():
        torch.testing.assert_close(got, expected[name], **CLOSE)


def test_asking_for_gradients_trains_nothing(fused):
    model, optimizer, _ = fused
    before, x = values(model), inputs().requires_grad_()
    wanted = [x, model.b.weight]
    found = torch.autograd.grad(model(x).square().mean(), wanted, retain_graph=True)
    plain = Net()
    plain.load_state_dict(model.state_dict())
    expected = torch.autograd.grad(plain(x).square().mean(), [x, plain.b.weight])
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, **CLOSE)
    model(x).square().mean().backward(inputs=[x])
    torch.testing.assert_close(x.grad, expected[0], **CLOSE)
    optimizer.step()
    assert all(torch.equal(now, before[name]) for name, now in values(model).items())
    assert not optimizer._aside and not optimizer._pending
    assert_steps_alike(model, optimizer, LOSSES["plain"])


def test_gradients_of_weights_that_nobody_asks_for_are_not_computed(fused, monkeypatch):
    made, real = [], compact_linear.weight_gradient
    monkeypatch.setattr(
        compact_linear, "weight_gradient", lambda *given: made.append(real(*given)) or made[-1]
    )
    x = inputs().requires_grad_()
    fused[0](x).square().mean().backward(inputs=[x])
    assert made == [None] * 3


def test_backward_into_some_parameters_trains_only_those(fused):
    model, optimizer, _ = fused
    before, expected = values(model), dense_step(model, LOSSES["plain"])
    LOSSES["plain"](model).backward(inputs=[model.b.weight])
    optimizer.step()
    got = values(model)
    torch.testing.assert_close(got["b.weight"], expected["b.weight"], **CLOSE)
    assert all(torch.equal(got[name], before[name]) for name in got if name != "b.weight")
    assert not torch.equal(got["b.weight"], before["b.weight"])


def test_freezing_later(fused):
    model, optimizer, _ = fused
    model.a.requires_grad_(False)
    before = values(model)
    assert_steps_alike(model, optimizer, LOSSES["plain"])
    assert torch.equal(model.a.weight, before["a.weight"]) and torch.equal(model.a.bias, before["a.bias"])


def test_a_pass_that_dies_leaves_nothing(fused):
    model, optimizer, _ = fused

    def failing(grad):
        raise ValueError("died")

    hidden = model.a(inputs())
    hidden.register_hook(failing)  # c and b are done by then, and updated; a is not
    with pytest.raises(ValueError, match="died"):
        model.c(model.b(hidden)).sum().backward()
    optimizer.step()
    assert_steps_alike(model, optimizer, LOSSES["plain"])


def test_the_weight_in_place_is_the_one_that_computes(fused):
    model = fused[0]
    other = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    plain = Net()
    plain.load_state_dict(other)
    x = inputs()
    assert torch.equal(torch.func.functional_call(model, other, (x,)), plain(x))
    tied = copy.deepcopy(plain)
    tied.a.weight = tied.b.weight
    model.load_state_dict(other, assign=True)
    assert torch.equal(model(x), plain(x))
    model.a.weight = model.b.weight
    assert torch.equal(model(x), tied(x))
    half = copy.deepcopy(tied)
    for each in (model, half):
        prune.l1_unstructured(each.b, "weight", amount=0.5)
    assert torch.equal(model(x), half(x)) and not torch.equal(half(x), tied(x))


def test_transforms_of_functorch_and_forward_mode(fused):
    model = fused[0]
    plain, x = Net(), inputs()
    plain.load_state_dict(model.state_dict())
    for transform in (torch.func.grad, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))[1]):
        got, want = (transform(lambda x, m=m: m(x).square().mean())(x) for m in (model, plain))
        torch.testing.assert_close(got, want, **CLOSE)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangents = [torch.autograd.forward_ad.unpack_dual(m(dual)).tangent for m in (model, plain)]
    torch.testing.assert_close(*tangents, **CLOSE)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel_is_refused_before_anything_changes(fused, one_process):
    model = fused[0]
    before = values(model)
    parallel = nn.parallel.DistributedDataParallel(model)
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        parallel(inputs()).sum().backward()
    assert all(torch.equal(now, before[name]) for name, now in values(model).items())
    model(inputs()).sum().backward()  # outside of it


def test_a_grad_scaler_is_refused(fused):
    model, optimizer, _ = fused
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(inputs()).sum()).backward()
    with pytest.raises(RuntimeError, match="GradScaler"):
        scaler.step(optimizer)


def test_masters_follow_changes_that_others_make_to_the_weight():
    """Under bf16: a moving average or a loaded state must not be undone by the next update."""
    torch.manual_seed(0)
    model = Net().bfloat16()
    mask = make_mask(model, "gathered")
    optimizer = lota.MaskedSGD(model, mask, lr=1e-4)  # steps that bf16 alone would lose
    lota.fuse_in_backward(optimizer)
    loss = lambda: model(inputs().bfloat16()).float().square().mean()  # noqa: E731
    loss().backward()
    name, p = "b.weight", model.b.weight
    kept = mask.dense(name)
    masters = {name: values.clone() for name, _, values in optimizer.kept_values()}
    assert not torch.equal(masters[name], p[kept].float())  # finer than the weight
    changed = torch.zeros_like(kept)
    changed[:4] = kept[:4]
    with torch.no_grad():
        p.data[changed] += 1.0
    optimizer.param_groups[0]["lr"] = 0.0
    loss().backward()
    after = {name: values for name, _, values in optimizer.kept_values()}[name]
    assert torch.equal(after[changed[kept]], p[changed].float())
    assert torch.equal(after[~changed[kept]], masters[name][~changed[kept]])


def test_a_model_cast_after_the_optimizer_was_made_is_refused(fused):
    model = fused[0]
    model.bfloat16()
    before = values(model)
    with pytest.raises(RuntimeError, match="cast the model first"):
        model(inputs().bfloat16()).sum().backward()
    assert all(torch.equal(now, before[name]) for name, now in values(model).items())


def test_gradients_of_frozen_entries_are_zero_in_an_ordinary_loop():
    """A trainer's own clipping then clips by the norm of what trains."""
    torch.manual_seed(0)
    model = Net()
    mask = make_mask(model, "gathered")
    optimizer = lota.MaskedSGD(model, mask, lr=LR)
    plain = copy.deepcopy(model)
    for each in (model, plain):
        for _ in range(2):  # accumulated
            each(inputs()).square().mean().backward()
    kept = {name: mask.dense(name) * p.grad for name, p in plain.named_parameters() if p.grad is not None}
    for name, p in model.named_parameters():
        assert p.grad is None if name not in kept else torch.equal(p.grad, kept[name])
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    assert norm.item() == pytest.approx(sum(g.square().sum().item() for g in kept.values()) ** 0.5, rel=1e-5)
    optimizer.step()
    assert optimizer.grad_norm == pytest.approx(0.01, rel=1e-3)


def test_two_optimizers_of_one_model_keep_what_either_trains():
    torch.manual_seed(0)
    model = Net()
    first = make_mask(model, "gathered")
    rest = Mask.from_dense({name: ~first.dense(name) for name in ("a.weight", "b.weight", "c.weight")})
    optimizers = [lota.MaskedSGD(model, mask, lr=LR) for mask in (first, rest)]
    plain = copy.deepcopy(model)
    for each in (model, plain):
        each(inputs()).square().mean().backward()
    assert torch.equal(model.b.weight.grad, plain.b.weight.grad)
    before = values(model)
    optimizers[1].step()
    moved = {name: now != before[name] for name, now in values(model).items()}
    for name in rest.names:
        assert not moved[name][first.dense(name)].any() and moved[name].any()
    optimizers.pop(0)  # its mask no longer counts
    model.zero_grad()
    model(inputs()).square().mean().backward()
    assert not model.b.weight.grad[first.dense("b.weight")].any()


@pytest.mark.parametrize("dense", ["first", "last"])
@pytest.mark.parametrize("keeps_all", [False, True], ids=["no mask", "a mask that keeps all"])
def test_an_optimizer_that_trains_all_beside_one_with_a_mask_gets_the_whole_gradient(dense, keeps_all):
    torch.manual_seed(0)
    model = Net()
    mask = make_mask(model, "gathered")
    every = Mask.from_dense({name: torch.ones_like(p, dtype=torch.bool) for name, p in values(model).items()})
    every = every if keeps_all else None
    optimizers = [
        lota.MaskedSGD(model, m, lr=LR) for m in ((every, mask) if dense == "first" else (mask, every))
    ]
    plain = copy.deepcopy(model)
    for each in (model, plain):
        each(inputs()).square().mean().backward()
    for name in ("a.weight", "b.weight", "c.weight"):
        assert torch.equal(model.get_parameter(name).grad, plain.get_parameter(name).grad)
    optimizers.pop(0 if dense == "first" else 1)  # then the mask decides again
    model.zero_grad()
    model(inputs()).square().mean().backward()
    assert not model.b.weight.grad[~mask.dense("b.weight")].any()
    assert model.b.weight.grad.any()


@pytest.mark.parametrize("strategy", ["even", "global"])
def test_clipping_sees_the_whole_gradient(strategy):
    """The norm is that of all uses of a weight together."""
    torch.manual_seed(0)
    model, loss_of = Net(), LOSSES["penalty and twice"]
    mask = make_mask(model, "gathered")
    norms = []
    for fuse, compact in itertools.product((False, True), repeat=2):
        own = copy.deepcopy(model)
        optimizer = lota.MaskedSGD(own, mask, lr=LR, grad_norm_strategy=strategy, max_grad_norm=0.5)
        if fuse:
            lota.fuse_in_backward(optimizer, compact_linear=compact)
        loss_of(own).backward()
        optimizer.step()
        norms.append((optimizer.grad_norm, *(p.detach() for p in own.parameters())))
    for other in norms[1:]:
        torch.testing.assert_close(other, norms[0], **CLOSE)
