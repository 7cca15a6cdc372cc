"""Masked optimizers against torch.optim on masked gradients."""

from __future__ import annotations

import copy
import gc
import math

import pytest
import tiny
import torch
from tolerance import assert_same_training, chain, rounding

import lota
from lota.masks import Mask
from lota.models.scope import find_scope
from lota.optim.optimizers import OPTIMIZERS, adamw_update_, learning_rate, rmsprop_update_

# eps as large as clipped gradients are, so that rounding of one near zero makes no full-size step
SETTINGS = {
    "RMSprop": {"lr": 1e-3, "alpha": 0.9, "eps": 1e-3, "weight_decay": 0.01, "momentum": 0.5},
    "AdamW": {"lr": 1e-3, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1},
    "SGD": {"lr": 1e-1, "momentum": 0.9, "weight_decay": 0.01},
}
CLIP = 0.02  # small enough that every strategy really clips


def reference(model, mask, batches, *, rule, strategy, accumulation, lrs, settings):
    """Plain loop: torch.optim on a dense copy whose gradients and updates are masked by hand, in fp32."""
    model = copy.deepcopy(model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    kept = {name: mask.dense(name) for name in mask.names if mask.kept(name)}
    parameters = {name: p for name, p in model.named_parameters() if name in kept}
    optimizer = getattr(torch.optim, rule)(parameters.values(), foreach=False, **settings)
    norms = []
    for step, lr in enumerate(lrs):
        optimizer.zero_grad()
        for ids in batches[step * accumulation : (step + 1) * accumulation]:
            (model(input_ids=ids, labels=ids).loss / accumulation).backward()
        for name, p in parameters.items():
            p.grad = p.grad * kept[name]
        each = {name: p.grad.norm().item() for name, p in parameters.items()}
        total = math.sqrt(sum(n**2 for n in each.values()))
        norms.append(total)
        for name, p in parameters.items():
            limits = {  # the small number is that of torch.nn.utils.clip_grad_norm_
                "even": CLIP / (each[name] + 1e-6),
                "proportional": CLIP / math.sqrt(len(each)) / (each[name] + 1e-6),
                "global": CLIP / (total + 1e-6),
                "none": 1.0,
            }
            p.grad *= min(1.0, limits[strategy])
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(torch.where(kept[name], p, start[name]))
    return model, norms


def train(model, mask, batches, *, rule, strategy, accumulation, lrs, settings, fused, compact=True):
    model = copy.deepcopy(model)
    optimizer = OPTIMIZERS[rule](model, mask, grad_norm_strategy=strategy, max_grad_norm=CLIP, **settings)
    if fused:
        lota.fuse_in_backward(optimizer, accumulation, compact_linear=compact)
    norms = []
    for step, lr in enumerate(lrs):
        optimizer.param_groups[0]["lr"] = lr
        for ids in batches[step * accumulation : (step + 1) * accumulation]:
            (model(input_ids=ids, labels=ids).loss / accumulation).backward()
        if fused:
            assert all(p.grad is None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        norms.append(optimizer.grad_norm)
    return model, norms


def compare(architecture, rule, strategy, accumulation):
    model = tiny.make(architecture)
    mask = tiny.random_mask(model)
    data = tiny.batches(3 * accumulation)
    lr = SETTINGS[rule]["lr"]
    run = {
        "rule": rule,
        "strategy": strategy,
        "accumulation": accumulation,
        "settings": SETTINGS[rule],
        "lrs": [lr / 3, lr * 2 / 3, lr],
    }
    expected, expected_norms = reference(model, mask, data, **run)
    deferred, _ = train(model, mask, data, fused=False, **run)
    plain, _ = train(model, mask, data, fused=True, compact=False, **run)
    fused, norms = train(model, mask, data, fused=True, **run)
    terms = chain(model, tokens=48 * accumulation)
    assert norms == pytest.approx(expected_norms, rel=rounding(torch.float32, terms))
    start = dict(model.named_parameters())
    for found in (deferred, fused):
        weights = (dict(m.named_parameters()) for m in (found, expected))
        assert_same_training(*weights, start, terms=terms, steps=3)
    for same, one in zip(plain.parameters(), deferred.parameters(), strict=True):
        assert torch.equal(one, same)  # autograd's gradient, used earlier or later
    for found in (plain, fused):
        assert tiny.count_moved(found, model, mask) > 0.9 * mask.n_kept


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_every_architecture(architecture):
    compare(architecture, "RMSprop", "even", 1)


@pytest.mark.parametrize("rule", OPTIMIZERS)
@pytest.mark.parametrize("strategy", ["even", "proportional", "global", "none"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_every_rule_strategy_and_accumulation(rule, strategy, accumulation):
    compare("llama", rule, strategy, accumulation)


@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_dense_equals_torch(rule):
    model = tiny.make("gpt2")
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = OPTIMIZERS[rule](ours, None, **SETTINGS[rule])
    lota.fuse_in_backward(optimizer)
    tiny.learn(ours, optimizer)
    tiny.learn(theirs, getattr(torch.optim, rule)(theirs.parameters(), foreach=False, **SETTINGS[rule]))
    weights = (dict(m.named_parameters()) for m in (ours, theirs, model))
    assert_same_training(*weights, terms=chain(model, tokens=48), steps=3)


@pytest.mark.parametrize("rule", ["RMSprop", "AdamW"])
def test_rules_equal_torch_at_the_smallest_gradients(rule):
    """In float64 and on given gradients, from 1 down to 1e-12, under the default eps of 1e-8: no gradient
    there is rounding alone, as those of a model are.
    """
    generator = torch.Generator().manual_seed(0)
    exponents = torch.linspace(0, -12, 200, dtype=torch.float64)
    start = torch.randn(200, dtype=torch.float64, generator=generator)
    ours, theirs = start.clone(), start.clone().requires_grad_()
    settings = {"lr": 1e-2, "eps": 1e-8, "weight_decay": 0.0}
    settings |= {"alpha": 0.9, "momentum": 0.5} if rule == "RMSprop" else {"betas": (0.8, 0.95)}
    optimizer = getattr(torch.optim, rule)([theirs], foreach=False, **settings)
    buffers = torch.zeros(200, dtype=torch.float64), torch.zeros(200, dtype=torch.float64)
    for step in range(1, 5):
        theirs.grad = torch.randn(200, dtype=torch.float64, generator=generator) * 10**exponents
        optimizer.step()
        if rule == "RMSprop":
            rmsprop_update_(ours, theirs.grad, *buffers, **settings)
        else:
            adamw_update_(ours, theirs.grad, *buffers, step=step, **settings)
    moved = (theirs.detach() - start).abs()
    assert moved[-20:].max() < 1e-3 < moved[:100].min() * 100  # eps holds the smallest back
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("strategy", ["even", "global"])
def test_bf16_keeps_fp32_masters(strategy):
    model = tiny.make("llama", dtype=torch.bfloat16)
    mask = tiny.random_mask(model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = lota.MaskedRMSprop(
        model, mask, lr=1e-5, weight_decay=0.1, grad_norm_strategy=strategy, max_grad_norm=1.0
    )
    lota.fuse_in_backward(optimizer)
    tiny.learn(model, optimizer, 4)
    masters = {name: (positions, values) for name, positions, values in optimizer.kept_values()}
    changed = 0
    for name, p in model.named_parameters():
        kept = mask.dense(name) if name in mask else torch.zeros_like(p, dtype=torch.bool)
        assert torch.equal(p[~kept], start[name][~kept])
        if name in masters:
            assert masters[name][1].dtype == torch.float32
            assert torch.equal(p[kept], masters[name][1].to(torch.bfloat16))
            changed += (masters[name][1] != start[name][kept].float()).sum().item()
    assert changed > 0.9 * mask.n_kept  # steps too small for bf16 add up in the masters


def test_memory_per_kept_entry():
    model = tiny.make("llama", dtype=torch.bfloat16)
    mask = tiny.random_mask(model)
    plain = lota.MaskedRMSprop(model, mask)
    assert plain.state_bytes() <= 12 * mask.n_kept
    with_momentum = lota.MaskedRMSprop(model, mask, momentum=0.9)
    assert with_momentum.state_bytes() - plain.state_bytes() == 4 * mask.n_kept


def test_parameters_without_kept_entries_need_no_gradient():
    model = tiny.make("llama")
    mask = tiny.random_mask(model)
    lota.MaskedRMSprop(model, mask)
    for name, p in model.named_parameters():
        assert p.requires_grad == (mask.kept(name) > 0), name


def test_learning_rate_zero_moves_nothing():
    model = tiny.make("llama")
    start = copy.deepcopy(model)
    optimizer = lota.MaskedRMSprop(model, tiny.random_mask(model), lr=0.0, weight_decay=0.1)
    lota.fuse_in_backward(optimizer)
    tiny.learn(model, optimizer, 1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True))
    assert optimizer.grad_norm > 0


def test_activation_checkpointing_changes_nothing():
    from lota.models.loading import enable_activation_checkpointing

    results = []
    for checkpointing in (False, True):
        model = tiny.make("qwen2")
        if checkpointing:
            enable_activation_checkpointing(model)
        model.config.use_cache = False  # as checkpointing has it: the same code, keys not stored anew
        optimizer = lota.MaskedRMSprop(model, tiny.random_mask(model), lr=1e-3, eps=1e-2)
        lota.fuse_in_backward(optimizer)
        tiny.learn(model, optimizer, 2)
        results.append(dict(model.named_parameters()))
    start = dict(tiny.make("qwen2").named_parameters())
    assert_same_training(*results, start, terms=chain(model, tokens=48), steps=2)


def test_state_reloads_unchanged_under_bf16(tmp_path):
    """torch's own load_state_dict would cast positions 257 and 999 to bf16, that is to 256 and 1000."""
    p = torch.nn.Parameter(torch.randn(40, 50, dtype=torch.bfloat16))
    mask = Mask.from_positions({"w": torch.tensor([257, 999, 1511])}, {"w": (40, 50)})
    optimizer = lota.MaskedAdamW([("w", p)], mask, lr=1e-3)
    for _ in range(3):
        p.grad = torch.randn_like(p)
        optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    fresh = lota.MaskedAdamW([("w", torch.nn.Parameter(p.detach().clone()))], mask, lr=1.0)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    (restored,) = fresh.state.values()
    assert restored["positions"].tolist() == [257, 999, 1511]
    assert restored["positions"].dtype == torch.int32
    assert tiny.same_state(fresh.state_dict(), optimizer.state_dict())
    assert fresh.param_groups[0]["lr"] == 1e-3


def test_state_of_another_mask_is_refused():
    model = tiny.make("llama")
    optimizer = lota.MaskedRMSprop(model, tiny.random_mask(model, seed=1))
    other = lota.MaskedRMSprop(model, tiny.random_mask(model, seed=2))
    with pytest.raises(ValueError, match="another mask"):
        other.load_state_dict(optimizer.state_dict())


def test_unfused_again_steps_as_usual():
    model = tiny.make("llama")
    optimizer = lota.MaskedRMSprop(model, tiny.random_mask(model), lr=1e-3)
    unfuse = lota.fuse_in_backward(optimizer)
    with pytest.raises(ValueError, match="already"):
        lota.fuse_in_backward(optimizer)
    unfuse()
    model(input_ids=tiny.batches(1)[0], labels=tiny.batches(1)[0]).loss.backward()
    assert any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grad_norm_strategy": "evenly", "max_grad_norm": 1.0}, "grad_norm_strategy='evenly'"),
        ({"grad_norm_strategy": "even"}, "max_grad_norm=None"),
        ({"grad_norm_strategy": "even", "max_grad_norm": 0.0}, "max_grad_norm=0.0"),
        ({"lr": -1.0}, "lr=-1.0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        lota.MaskedRMSprop(tiny.make("llama"), None, **settings)


def test_an_empty_mask_is_an_error():
    model = tiny.make("llama")
    kept = {name: torch.zeros(t.shape, dtype=torch.bool) for name, t in find_scope(model).items()}
    with pytest.raises(ValueError, match="nothing would train"):
        lota.MaskedRMSprop(model, Mask.from_dense(kept))


def two_layers(dtype=torch.float32):
    """(model, mask): six of a's twelve entries, all four of b's, nothing of the biases."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 3), "b": torch.nn.Linear(2, 2)}).to(dtype)
    positions = {"a.weight": torch.tensor([0, 3, 4, 7, 10, 11]), "b.weight": torch.arange(4)}
    return model, Mask.from_positions(positions, {"a.weight": (3, 4), "b.weight": (2, 2)})


def with_gradients(model, factor=1.0):
    """Entry i of the n-th trained parameter has the gradient factor * (i + 1 + 100 n)."""
    for n, name in enumerate(("a.weight", "b.weight")):
        p = model.get_parameter(name)
        p.grad = (
            (factor * (torch.arange(p.numel(), dtype=torch.float32) + 1 + 100 * n)).view_as(p).to(p.dtype)
        )


A, B = (1.0, 4.0, 5.0, 8.0, 11.0, 12.0), (101.0, 102.0, 103.0, 104.0)  # the gradients that train
NORMS = math.sqrt(sum(g * g for g in A)), math.sqrt(sum(g * g for g in B))


def test_what_an_optimizer_tells_of_itself():
    for dtype, per_entry in ((torch.float32, 4), (torch.bfloat16, 8)):  # a buffer, and a master
        model, mask = two_layers(dtype)
        optimizer = lota.MaskedRMSprop(model, mask)
        assert optimizer.n_trained == 10
        assert optimizer.state_bytes() == 6 * 4 + 10 * per_entry  # six positions
        assert math.isnan(optimizer.grad_norm)
        assert optimizer.gradient_accumulation_steps == 1 and not optimizer.fused
        assert optimizer.positions(model.b.weight) is None
        assert optimizer.positions(model.a.weight).tolist() == [0, 3, 4, 7, 10, 11]
        found = {name: (positions, values) for name, positions, values in optimizer.kept_values()}
        assert list(found) == ["a.weight", "b.weight"] == list(optimizer.names.values())
        assert torch.equal(found["a.weight"][1], model.a.weight.flatten()[[0, 3, 4, 7, 10, 11]].float())
        assert torch.equal(found["b.weight"][1], model.b.weight.flatten().float())
        unfuse = lota.fuse_in_backward(optimizer, 3)
        assert optimizer.gradient_accumulation_steps == 3 and optimizer.fused
        unfuse()
        assert optimizer.gradient_accumulation_steps == 1 and not optimizer.fused


@pytest.mark.parametrize("strategy", ["even", "proportional", "global", "none"])
@pytest.mark.parametrize("limit", [1.0, 50.0, 1e4])
def test_clipping_by_hand(strategy, limit):
    """The norms of the two tensors are 19 and 205."""
    model, mask = two_layers()
    start = copy.deepcopy(model)
    optimizer = lota.MaskedSGD(model, mask, lr=0.5, grad_norm_strategy=strategy, max_grad_norm=limit)
    both = math.hypot(*NORMS)
    for _ in range(2):  # the second step's norm is its own
        model.load_state_dict(start.state_dict())
        with_gradients(model)
        optimizer.step()
        assert optimizer.grad_norm == pytest.approx(both, rel=1e-6)
    for p, before, gradient, norm in (
        (
            model.a.weight.flatten()[[0, 3, 4, 7, 10, 11]],
            start.a.weight.flatten()[[0, 3, 4, 7, 10, 11]],
            A,
            NORMS[0],
        ),
        (model.b.weight.flatten(), start.b.weight.flatten(), B, NORMS[1]),
    ):
        factors = {
            "even": limit / (norm + 1e-6),
            "proportional": limit / math.sqrt(2) / (norm + 1e-6),
            "global": limit / (both + 1e-6),
            "none": 1.0,
        }
        expected = before - 0.5 * min(1.0, factors[strategy]) * torch.tensor(gradient)
        torch.testing.assert_close(p, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(model.a.bias, start.a.bias)


@pytest.mark.parametrize("strategy", ["even", "global"])
def test_a_gradient_near_zero_is_neither_raised_nor_divided_by_zero(strategy):
    model, mask = two_layers()
    start = copy.deepcopy(model)
    optimizer = lota.MaskedSGD(model, mask, lr=1.0, grad_norm_strategy=strategy, max_grad_norm=1e-6)
    with_gradients(model, 0.0)
    optimizer.step()
    assert optimizer.grad_norm == 0.0
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), start.parameters(), strict=True))
    model.b.weight.grad = torch.tensor(
        [[1e-6, 0.0], [0.0, 0.0]]
    )  # as large as the limit: 1e-6 is added to it
    model.a.weight.grad = None
    model.b.weight.data.zero_()
    optimizer.step()
    assert model.b.weight[0, 0].item() == pytest.approx(-0.5e-6, rel=1e-5)


def test_each_group_has_settings_of_its_own():
    model, mask = two_layers()
    start = copy.deepcopy(model)
    optimizer = lota.MaskedSGD(model, mask, lr=0.1)
    (group,) = optimizer.param_groups
    optimizer.param_groups = [
        {**group, "params": [p], "lr": lr} for p, lr in zip(group["params"], (0.1, 0.3), strict=True)
    ]
    with_gradients(model)
    optimizer.step()
    torch.testing.assert_close(start.a.weight[0, 0] - model.a.weight[0, 0], torch.tensor(0.1 * A[0]))
    torch.testing.assert_close(start.b.weight[0, 0] - model.b.weight[0, 0], torch.tensor(0.3 * B[0]))
    fresh = lota.MaskedSGD(two_layers()[0], mask, lr=1.0)
    fresh.param_groups = [{**fresh.param_groups[0], "params": [p]} for p in fresh.names]
    fresh.load_state_dict(optimizer.state_dict())
    assert [group["lr"] for group in fresh.param_groups] == [0.1, 0.3]


def test_a_closure_gives_gradients_and_loss():
    model, mask = two_layers()
    before = model.b.weight.detach().clone()
    optimizer = lota.MaskedSGD(model, mask, lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = 3 * model.b.weight.sum() + model.a.weight.sum()
        loss.backward()
        return loss.item()

    expected = (3 * before.sum() + model.a.weight.sum()).item()
    assert optimizer.step(closure) == pytest.approx(expected)
    torch.testing.assert_close(model.b.weight.detach(), before - 0.3)
    assert optimizer.step() is None


@pytest.mark.parametrize("strategy", ["none", "global"])
def test_step_without_gradients_moves_nothing_and_keeps_the_norm(strategy):
    model, mask = two_layers()
    optimizer = lota.MaskedSGD(model, mask, lr=0.1, grad_norm_strategy=strategy, max_grad_norm=9.0)
    model.b.weight.grad = torch.ones(2, 2)  # a took no part
    start = copy.deepcopy(model)
    optimizer.step()
    assert optimizer.grad_norm == pytest.approx(2.0)
    assert torch.equal(model.a.weight, start.a.weight) and not torch.equal(model.b.weight, start.b.weight)
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.grad_norm == pytest.approx(2.0)


def test_a_step_leaves_the_gradient_as_it_was():
    """Whoever reads p.grad after the step, such as a log, finds what backward put there."""
    model, mask = two_layers()
    optimizer = lota.MaskedSGD(model, mask, lr=0.1, grad_norm_strategy="even", max_grad_norm=0.1)
    with_gradients(model)
    optimizer.step()
    assert model.b.weight.grad.flatten().tolist() == list(B)
    assert model.a.weight.grad.flatten().tolist() == list(range(1, 13))


def test_sparse_gradients_train_an_embedding():
    torch.manual_seed(0)
    model = torch.nn.Embedding(5, 2, sparse=True)
    before = model.weight.detach().clone()
    optimizer = lota.MaskedSGD(
        model, Mask.from_positions({"weight": torch.tensor([2, 3, 7])}, {"weight": (5, 2)}), lr=1.0
    )
    model(torch.tensor([1, 1, 4])).sum().backward()
    optimizer.step()
    expected = before.clone()
    expected[1] -= 2.0  # position 7 belongs to row 3, which took no part
    torch.testing.assert_close(model.weight.detach(), expected)


def test_a_grad_scaler_works_as_long_as_nothing_is_fused():
    model, mask = two_layers()
    before = model.b.weight.detach().clone()
    optimizer = lota.MaskedSGD(model, mask, lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(model.b.weight.sum()).backward()
    scaler.step(optimizer)
    torch.testing.assert_close(model.b.weight.detach(), before - 0.5)


def test_masks_of_other_models_are_refused():
    model, _ = two_layers()
    other = Mask.from_positions({"a.weight": torch.tensor([0])}, {"a.weight": (4, 4)})
    with pytest.raises(ValueError, match=r"a\.weight"):
        lota.MaskedSGD(model, other)
    with pytest.raises(ValueError, match=r"c\.weight"):
        lota.MaskedSGD(model, Mask.from_positions({"c.weight": torch.tensor([0])}, {"c.weight": (3, 4)}))
    model.a.weight = torch.nn.Parameter(model.a.weight.detach().t().contiguous().t())
    with pytest.raises(ValueError, match=r"a\.weight is not contiguous"):
        lota.MaskedSGD(model, two_layers()[1])


def test_without_a_mask_frozen_parameters_stay_frozen():
    model, _ = two_layers()
    model.a.requires_grad_(False)
    optimizer = lota.MaskedSGD(model, lr=0.1)
    assert set(optimizer.names.values()) == {"b.weight", "b.bias"}
    assert not model.a.weight.requires_grad and model.b.bias.requires_grad
    assert optimizer.n_trained == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["param_groups"][0]["params"].pop(), "state of 1 parameters, but 2 train here"),
        (lambda s: s["state"].pop(0), r"a\.weight: expected \['exp_avg', .*, found nothing"),
        (lambda s: s["state"][1].pop("exp_avg"), r"b\.weight: expected .*, found \['exp_avg_sq', 'step'\]"),
        (lambda s: s["state"][0].update(more=1), r"a\.weight: expected .*, found \[.*'more'"),
        (
            lambda s: s["state"][0].update(exp_avg=torch.zeros(5)),
            r"exp_avg is \(5,\) torch.float32, expected \(6,\)",
        ),
        (lambda s: s["state"][0].update(exp_avg=torch.zeros(6).half()), r"exp_avg is \(6,\) torch.float16"),
        (lambda s: s["state"][0]["positions"].add_(1), r"a\.weight belongs to another mask: the kept pos"),
    ],
)
def test_states_that_do_not_fit_are_refused_and_change_nothing(change, message):
    model, mask = two_layers()
    optimizer = lota.MaskedAdamW(model, mask, lr=0.1)
    with_gradients(model)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert tiny.same_state(optimizer.state_dict(), before)


def test_a_loaded_state_is_a_copy():
    model, mask = two_layers()
    optimizer = lota.MaskedAdamW(model, mask, lr=0.1)
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    with_gradients(model)
    optimizer.step()
    other = lota.MaskedAdamW(two_layers()[0], mask)
    other.load_state_dict(optimizer.state_dict())
    assert tiny.same_state(other.state_dict(), optimizer.state_dict())
    with_gradients(model)
    optimizer.step()
    assert other.state_dict()["state"][0]["step"] == 1
    assert not tiny.same_state(other.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("key", ["lr", "eps", "weight_decay", "momentum", "alpha"])
def test_settings_below_0_are_refused_and_0_is_not(key):
    model, mask = two_layers()
    lota.MaskedRMSprop(model, mask, **{key: 0.0})
    with pytest.raises(ValueError, match=rf"^{key}=-0\.1: must be 0 or more$"):
        lota.MaskedRMSprop(model, mask, **{key: -0.1})
    with pytest.raises(ValueError, match=rf"{key}=nan"):
        lota.MaskedRMSprop(model, mask, **{key: math.nan})


def test_all_problems_of_the_settings_are_told_together():
    model, mask = two_layers()
    with pytest.raises(ValueError, match=r"max_grad_norm=-1: must be above 0 .*; lr=-1: .*; eps=-2: must"):
        lota.MaskedAdamW(model, mask, lr=-1, eps=-2, grad_norm_strategy="global", max_grad_norm=-1)
    lota.MaskedAdamW(model, mask, max_grad_norm=-1)  # with the strategy `none` it is not used


@pytest.mark.parametrize("rule", OPTIMIZERS)
@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_settings_and_defaults_are_those_of_torch(rule, momentum, weight_decay):
    """Four steps of both, also without momentum, and with the settings that are not given."""
    settings = {"lr": 0.01, "weight_decay": weight_decay} | (
        {} if rule == "AdamW" else {"momentum": momentum}
    )
    model, _ = two_layers()
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    optimizers = (
        OPTIMIZERS[rule](ours, None, **settings),
        getattr(torch.optim, rule)(theirs.parameters(), **settings),
    )
    for step in range(1, 5):
        for each, optimizer in zip((ours, theirs), optimizers, strict=True):
            for n, p in enumerate(each.parameters()):
                p.grad = torch.arange(p.numel()).view_as(p).float().sub(n).mul(0.1 * step).cos()
            optimizer.step()
    for p, q, start in zip(ours.parameters(), theirs.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        assert not torch.equal(p, start)


def test_rates_that_are_not_given():
    """The method's own: 1e-5, and 1e-3 for SGD; no weight decay and no momentum."""
    for rule, lr in (("RMSprop", 1e-5), ("AdamW", 1e-5), ("SGD", 1e-3)):
        (group,) = OPTIMIZERS[rule](*two_layers()).param_groups
        assert group["lr"] == lr and group["weight_decay"] == 0.0 and group.get("momentum", 0.0) == 0.0
    assert OPTIMIZERS["RMSprop"](*two_layers()).param_groups[0]["alpha"] == 0.99


def test_learning_rates():
    def rates(scheduler, warmup, total, steps):
        settings = {"peak": 2.0, "scheduler": scheduler, "warmup_steps": warmup, "total_steps": total}
        return [learning_rate(step, **settings) for step in steps]

    assert rates("constant", 4, 10, (0, 1, 3, 4, 9, 50)) == [0.5, 1.0, 2.0, 2.0, 2.0, 2.0]
    assert rates("constant", 0, 10, (0, 9)) == [2.0, 2.0]
    assert rates("linear", 4, 12, (3, 4, 6, 8, 12, 14)) == [2.0, 2.0, 1.5, 1.0, 0.0, 0.0]
    assert rates("linear", 3, 3, (2, 3, 4)) == [2.0, 2.0, 0.0]  # nothing is left after the warm-up
    half = [2.0 * math.cos(math.pi * x / 2) ** 2 for x in (0, 0.25, 0.5, 1, 1)]
    assert rates("cosine", 4, 12, (4, 6, 8, 12, 14)) == pytest.approx(half, abs=1e-12)
    assert rates("cosine", 4, 12, (0, 3)) == [0.5, 2.0]
    assert rates("linear", 2, 3, (1, 2, 3)) == [2.0, 2.0, 0.0]


@pytest.mark.parametrize("strategy", ["none", "even", "global"])
def test_an_accumulation_that_step_ends_early(strategy):
    """What came is used: clipped as the strategy says, over what there is."""
    model, mask = two_layers()
    start = copy.deepcopy(model)
    optimizer = lota.MaskedSGD(model, mask, lr=0.5, grad_norm_strategy=strategy, max_grad_norm=2.0)
    lota.fuse_in_backward(optimizer, 3, compact_linear=False)
    (3 * model.a.weight.sum() + 4 * model.b.weight.sum()).backward()
    assert torch.equal(model.b.weight, start.b.weight) and model.b.weight.grad is None
    optimizer.step()
    factor = {"none": 1.0, "even": 2 / 8, "global": 2 / math.sqrt(6 * 9 + 4 * 16)}[strategy]
    torch.testing.assert_close(model.b.weight.detach(), start.b.weight - 0.5 * 4 * factor)
    before = model.b.weight.detach().clone()
    optimizer.step()
    assert torch.equal(model.b.weight, before)


def test_unfusing_drops_what_was_accumulated():
    model, mask = two_layers()
    start = copy.deepcopy(model)
    optimizer = lota.MaskedSGD(model, mask, lr=0.5)
    with pytest.raises(ValueError, match="gradient_accumulation_steps=0: must be at least 1"):
        lota.fuse_in_backward(optimizer, 0)
    unfuse = lota.fuse_in_backward(optimizer, 2)
    model.b.weight.sum().backward()
    unfuse()
    optimizer.step()
    assert torch.equal(model.b.weight, start.b.weight)


def test_groups_of_several_parameters():
    model, _ = two_layers()
    start = copy.deepcopy(model)
    optimizer = lota.MaskedSGD(model, lr=0.1)
    (group,) = optimizer.param_groups
    first, second = [model.a.weight, model.b.weight], [model.a.bias, model.b.bias]
    optimizer.param_groups = [{**group, "params": first, "lr": 0.1}, {**group, "params": second, "lr": 0.3}]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        moved = start.get_parameter(name) - p
        torch.testing.assert_close(moved.detach(), torch.full_like(p, 0.3 if "bias" in name else 0.1))


def test_bf16_gradients_are_clipped_in_fp32():
    model, mask = two_layers(torch.bfloat16)
    before = model.b.weight.detach().float().flatten()
    optimizer = lota.MaskedSGD(model, mask, lr=0.5, grad_norm_strategy="even", max_grad_norm=1.0)
    with_gradients(model)
    optimizer.step()
    master = {name: values for name, _, values in optimizer.kept_values()}["b.weight"]
    expected = before - 0.5 / (NORMS[1] + 1e-6) * torch.tensor(B)
    torch.testing.assert_close(master, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("fused", [False, True])
def test_no_graph_is_kept_by_the_state(fused):
    """A gradient that could be differentiated again would keep its graph alive in every buffer."""
    model, mask = two_layers()
    optimizer = lota.MaskedRMSprop(model, mask, lr=0.1, momentum=0.5)
    if fused:
        lota.fuse_in_backward(optimizer)
    loss = (model.a.weight**3).sum() + (model.b.weight**3).sum()
    loss.backward(create_graph=True)
    optimizer.step()
    values = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
    assert not any(v.requires_grad for v in values)
    optimizer.zero_grad()


def test_once_no_optimizer_is_left_gradients_are_whole():
    model, mask = two_layers()
    optimizer = lota.MaskedSGD(model, mask, lr=0.1)
    model.a.weight.sum().backward()
    assert model.a.weight.grad.sum() == 6
    del optimizer
    gc.collect()
    model.a.weight.grad = None
    model.a.weight.sum().backward()
    assert model.a.weight.grad.sum() == 12
