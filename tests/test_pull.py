"""The pull to where training started, against torch.optim on a loss that has it as a term."""

from __future__ import annotations

import contextlib
import copy

import pytest
import tiny
import torch
from runs import base, policy, same, settings, stopped_after, train, write_mask
from tolerance import assert_same_training, chain

import lota
from lota.data.batches import Encoded, collate
from lota.data.packed import pack
from lota.masks import Mask
from lota.masks.extract.gradients import Collected
from lota.masks.extract.importance import save_importance
from lota.models.packed import pack_attention
from lota.optim import compiled
from lota.optim.compiled import compile_blocks
from lota.optim.kept import Tiles
from lota.optim.optimizers import OPTIMIZERS
from lota.optim.pull import pull_to_start
from lota.train.losses import response_logps
from lota.train.preflight import prepare
from tasks import get_task

# eps as large as gradients are, so that rounding of one near zero makes no full-size step
SETTINGS = {
    "RMSprop": {"lr": 1e-3, "alpha": 0.9, "eps": 1e-2, "weight_decay": 0.01, "momentum": 0.5},
    "AdamW": {"lr": 1e-3, "betas": (0.8, 0.95), "eps": 1e-2, "weight_decay": 0.1},
    "SGD": {"lr": 1e-1, "momentum": 0.9, "weight_decay": 0.01},
}
L2_SP, EWC, STEPS = 3.0, 2.0, 4  # strong enough that the pull is as large as the gradients are


def whole_importance(model) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {n: torch.rand(p.shape, generator=generator) * 2 for n, p in model.named_parameters()}


def compact(whole: dict[str, torch.Tensor], mask: Mask | None) -> dict[str, torch.Tensor]:
    if mask is None:
        return {name: value.view(-1) for name, value in whole.items()}
    return {n: whole[n].view(-1)[mask.positions(n)] for n in mask.names if mask.kept(n)}


def reference(model, mask, rule, accumulation, l2_sp, ewc):
    """Dense: autograd of loss and penalty in one, torch.optim, masked by hand."""
    whole, start = whole_importance(model), dict(model.named_parameters())
    model = copy.deepcopy(model)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters()}
    kept = {n: mask.dense(n) if mask else torch.ones_like(p, dtype=torch.bool) for n, p in frozen.items()
            if mask is None or (n in mask and mask.kept(n))}  # fmt: skip
    parameters = {n: p for n, p in model.named_parameters() if n in kept}
    optimizer = getattr(torch.optim, rule)(parameters.values(), foreach=False, **SETTINGS[rule])
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = sum(
            model(input_ids=ids, labels=ids).loss / accumulation
            for ids in tiny.batches(STEPS * accumulation)[step * accumulation : (step + 1) * accumulation]
        )
        for n, p in parameters.items():
            strength = l2_sp + ewc * whole[n]
            loss = loss + (strength / 2 * (p - start[n].detach()).square()).sum()
        loss.backward()
        for n, p in parameters.items():
            p.grad *= kept[n]
        optimizer.step()
        with torch.no_grad():
            for n, p in parameters.items():
                p.copy_(torch.where(kept[n], p, frozen[n]))
    return model


def ours(model, mask, rule, accumulation, l2_sp, ewc, *, fused, dtype=torch.float32, **options):
    model = copy.deepcopy(model).to(dtype)
    optimizer = OPTIMIZERS[rule](model, mask, **SETTINGS[rule], **options)
    if fused:
        lota.fuse_in_backward(optimizer, accumulation)
    if l2_sp or ewc:
        pull_to_start(optimizer, l2_sp, ewc, compact(whole_importance(model), mask))
    tiny.learn(model, optimizer, STEPS, accumulation)
    return model, optimizer


def assert_near(found, expected, model, accumulation=1):
    weights = (dict(m.named_parameters()) for m in (found, expected, model))
    assert_same_training(*weights, terms=chain(model, tokens=48 * accumulation), steps=STEPS)


@pytest.mark.parametrize("rule", OPTIMIZERS)
@pytest.mark.parametrize(("l2_sp", "ewc"), [(L2_SP, 0.0), (0.0, EWC), (L2_SP, EWC)])
@pytest.mark.parametrize("fused", [False, True])
def test_the_penalty_is_a_term_of_the_loss(rule, l2_sp, ewc, fused):
    model = tiny.make("llama")
    mask = tiny.random_mask(model)
    expected = reference(model, mask, rule, 1, l2_sp, ewc)
    found, _ = ours(model, mask, rule, 1, l2_sp, ewc, fused=fused)
    assert_near(found, expected, model)
    assert tiny.count_moved(found, model, mask) > 0.9 * mask.n_kept
    free, _ = ours(model, mask, rule, 1, 0.0, 0.0, fused=fused)
    with pytest.raises(AssertionError):
        assert_near(free, expected, model)


@pytest.mark.parametrize("rule", OPTIMIZERS)
@pytest.mark.parametrize("fused", [False, True])
def test_it_is_added_once_to_an_accumulated_gradient(rule, fused):
    model = tiny.make("llama")
    mask = tiny.random_mask(model)
    expected = reference(model, mask, rule, 3, L2_SP, EWC)
    found, _ = ours(model, mask, rule, 3, L2_SP, EWC, fused=fused)
    assert_near(found, expected, model, 3)


@pytest.mark.parametrize("granularity", ["row", "column", "block"])
def test_importance_is_listed_by_position_and_tiles_have_their_own_order(granularity):
    model = tiny.make("llama")
    mask = tiny.line_mask(model, granularity)
    found, optimizer = ours(model, mask, "SGD", 1, 0.0, EWC, fused=True)
    assert any(isinstance(kept, Tiles) for kept in optimizer.kept.values())
    assert_near(found, reference(model, mask, "SGD", 1, 0.0, EWC), model)


@pytest.mark.parametrize("rule", ["RMSprop", "AdamW"])
@pytest.mark.parametrize("state", ["bfloat16", "factored"])
def test_updates_in_pieces_pull_too(rule, state, monkeypatch):
    """As the same optimizer does if the penalty is a term of the loss; the averages are of the sum."""
    monkeypatch.setattr("lota.rounding.CPU_PIECE", 100)
    model = tiny.make("llama")
    mask = None if state == "factored" else tiny.random_mask(model)
    options = {"fused": True, "optimizer_state": state}
    found, _ = ours(model, mask, rule, 1, L2_SP, EWC, **options)
    free, _ = ours(model, mask, rule, 1, 0.0, 0.0, **options)
    expected, whole = copy.deepcopy(model), whole_importance(model)
    optimizer = OPTIMIZERS[rule](expected, mask, **SETTINGS[rule], optimizer_state=state)
    start = dict(model.named_parameters())
    for ids in tiny.batches(STEPS):
        loss = expected(input_ids=ids, labels=ids).loss
        for n, p in expected.named_parameters():
            loss = loss + ((L2_SP + EWC * whole[n]) / 2 * (p - start[n].detach()).square()).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def distance(a, b):
        pairs = zip(a.parameters(), b.parameters(), strict=True)
        return sum((x - y).square().sum() for x, y in pairs).sqrt().item()

    assert distance(found, expected) < 0.01 * distance(free, expected)


EVERYTHING = {"rule": "AdamW", "accumulation": 2, "dtype": torch.bfloat16, "packed": True}
WAYS = {  # how the fused optimizer gets its gradients
    "accumulation": {"accumulation": 3},
    "AdamW": {"rule": "AdamW"},
    "bf16 with masters": {"dtype": torch.bfloat16},
    "packing": {"packed": True},
    "compiled": {"compiled": True},
    "all at once": {**EVERYTHING, "compiled": True},
}


def examples(count: int) -> list[Encoded]:
    """Rows of 4 to 11 tokens, of which the first two are the prompt."""
    generator = torch.Generator().manual_seed(2)
    sizes = torch.randint(4, 12, (count,), generator=generator).tolist()
    return [Encoded(torch.randint(3, tiny.VOCAB, (n,), generator=generator).tolist(), 2) for n in sizes]


def moved_away(model, mask: Mask):
    """A copy whose kept entries stand away from the model's, so that the first step is pulled already."""
    moved, generator = copy.deepcopy(model), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name in mask.names:
            p, kept = moved.get_parameter(name), mask.dense(name)
            p.add_(0.005 * torch.randn(p.shape, generator=generator) * kept)
    return moved


def dense_steps(start, mask: Mask, batches: list[list[Encoded]], rule: str) -> dict[str, torch.Tensor]:
    """fp32 weights after a step per batch: autograd of loss and penalty in one, row by row, torch.optim.

    The model computes with the weights rounded to its dtype.
    """
    model, whole, anchors = moved_away(start, mask), whole_importance(start), dict(start.named_parameters())
    names = [name for name in mask.names if mask.kept(name)]
    weights = {n: p.detach().float().requires_grad_(n in names) for n, p in model.named_parameters()}
    trained = [weights[n] for n in names]
    optimizer = getattr(torch.optim, rule)(trained, foreach=False, **SETTINGS[rule])
    for rows in batches:
        frozen = {n: weights[n].detach().clone() for n in names}
        used, losses = {n: w.to(model.dtype) for n, w in weights.items()}, []
        for row in rows:
            ids = torch.tensor([row.input_ids])
            logits = torch.func.functional_call(model, used, kwargs={"input_ids": ids}).logits[0].float()
            own = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
            losses.append(own[row.prompt_length - 1 :].sum())
        penalty = sum(
            ((L2_SP + EWC * whole[n]) / 2 * (weights[n] - anchors[n].detach().float()).square()).sum()
            for n in names
        )
        optimizer.zero_grad()
        (sum(losses) / len(losses) + penalty).backward()
        for n in names:
            weights[n].grad *= mask.dense(n)
        optimizer.step()
        with torch.no_grad():  # weight decay is of kept entries only
            for n in names:
                weights[n].copy_(torch.where(mask.dense(n), weights[n], frozen[n]))
    return {n: weights[n].detach() for n in names}


def fused_steps(
    start, mask: Mask, batches, rule, *, accumulation: int, packed: bool, compiles=False, pulls=True
) -> dict[str, torch.Tensor]:
    """The same by the fused optimizer, as a run sets it up; masters where there are any."""
    model, anchors = moved_away(start, mask), dict(start.named_parameters())
    if packed:
        pack_attention(model.eval(), "tiny")
        model.train()
    optimizer = OPTIMIZERS[rule](model, mask, **SETTINGS[rule])
    lota.fuse_in_backward(optimizer, accumulation)
    if pulls:
        pull_to_start(optimizer, L2_SP, EWC, compact(whole_importance(start), mask))
        for p, name in optimizer.names.items():
            optimizer.state[p]["anchor"].copy_(optimizer.kept[p].gather(anchors[name].detach()))
    blocks = compile_blocks(model) if compiles else None
    for rows in batches:
        for part in range(accumulation):
            own = rows[part::accumulation]
            batch = pack(own) if packed else collate(own, 0)
            (-response_logps(model, batch, contextlib.nullcontext())[0].sum() / len(rows)).backward()
        optimizer.step()
    assert blocks is None or blocks.reason is None
    weights = {n: p.detach().float() for n, p in model.named_parameters() if n in optimizer.names.values()}
    for p, name in optimizer.names.items():
        if "master" in optimizer.state[p]:
            optimizer.kept[p].write(weights[name], optimizer.state[p]["master"])
    tiny.count_moved(model, start, mask)  # what is frozen has the bits of the start
    return weights


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*", "ignore::UserWarning:torch.*")
@pytest.mark.parametrize(
    "way", [pytest.param(w, marks=pytest.mark.slow if "compiled" in WAYS[w] else ()) for w in WAYS]
)
def test_a_pulled_step_is_the_dense_one_however_gradients_come(way, monkeypatch, tmp_path):
    given = {"rule": "SGD", "accumulation": 1, "dtype": torch.float32, "packed": False, "compiled": False}
    given |= WAYS[way]
    dtype, rule, compiles = (given.pop(key) for key in ("dtype", "rule", "compiled"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    if way == "all at once":  # traced and run operation by operation: the compiler has its turn above
        monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    start = tiny.make("llama").to(dtype)
    mask, rows = tiny.random_mask(start), examples(12)
    batches = [rows[:6], rows[6:]]
    expected = dense_steps(start, mask, batches, rule)
    found = fused_steps(start, mask, batches, rule, **given, compiles=compiles)
    free = fused_steps(start, mask, batches, rule, **given, pulls=False)

    def distance(weights) -> float:
        return sum((weights[n] - value).square().sum() for n, value in expected.items()).sqrt().item()

    assert found.keys() == expected.keys()
    assert distance(found) < (0.03 if dtype == torch.bfloat16 else 1e-4) * distance(free)


def test_a_bf16_model_is_pulled_to_its_exact_start():
    """The anchors are the masters as they are filled, not the rounded weights."""
    start = tiny.make("llama")
    model, mask = copy.deepcopy(start).bfloat16(), tiny.random_mask(start)
    optimizer = OPTIMIZERS["SGD"](model, mask, lr=0.1)
    weights = dict(start.named_parameters())
    for p, name in optimizer.names.items():
        optimizer.state[p]["master"].copy_(optimizer.kept[p].gather(weights[name].detach()))
    pull_to_start(optimizer, l2_sp=1.0)
    for p, name in optimizer.names.items():
        exact = optimizer.kept[p].gather(weights[name].detach())
        assert torch.equal(optimizer.state[p]["anchor"], exact)
        assert optimizer.state[p]["anchor"].data_ptr() != optimizer.state[p]["master"].data_ptr()
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, name in optimizer.names.items():  # at the start there is no pull
        assert torch.equal(optimizer.state[p]["master"], optimizer.kept[p].gather(weights[name].detach()))


def test_without_masters_weights_are_pulled_back_by_lot():
    """Zero gradients: a bf16 weight that stands away from its start goes back by lr l2_sp, on average."""
    model = torch.nn.Linear(4000, 1, bias=False).bfloat16()
    with torch.no_grad():
        model.weight.fill_(1.0)
    optimizer = OPTIMIZERS["SGD"](model, None, lr=0.5, stochastic_rounding=True)
    pull_to_start(optimizer, l2_sp=0.01)
    with torch.no_grad():
        model.weight.fill_(1.5)
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    assert model.weight.float().mean().item() == pytest.approx(1.5 - 0.5 * 0.01 * 0.5, abs=3e-4)


@pytest.mark.parametrize("strategy", ["even", "global"])
def test_clipping_is_of_the_gradient_without_the_pull(strategy):
    """One step of SGD from weights that stand away from their start; gradients are 100 times the limit."""
    model = torch.nn.Linear(8, 4, bias=False)
    optimizer = OPTIMIZERS["SGD"](model, None, lr=0.1, grad_norm_strategy=strategy, max_grad_norm=0.01)
    start = model.weight.detach().clone()
    pull_to_start(optimizer, l2_sp=5.0)
    with torch.no_grad():
        model.weight.add_(1.0)
    grad = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    model.weight.grad = grad / grad.norm()
    optimizer.step()
    expected = start + 1.0 - 0.1 * (0.01 * grad / grad.norm() + 5.0)
    torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-5, atol=1e-6)
    assert optimizer.grad_norm == pytest.approx(1.0)


def test_state_is_four_bytes_an_entry_and_eight_with_importance():
    model = tiny.make("llama")
    mask = tiny.random_mask(model)
    sizes = []
    for l2_sp, ewc in [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0)]:
        optimizer = OPTIMIZERS["SGD"](copy.deepcopy(model), mask)
        if l2_sp:
            pull_to_start(optimizer, l2_sp, ewc, compact(whole_importance(model), mask))
        sizes.append(optimizer.state_bytes())
    assert [size - sizes[0] for size in sizes] == [0, 4 * mask.n_kept, 8 * mask.n_kept]


@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_a_restored_pull_goes_on_bit_for_bit(rule, tmp_path):
    model = tiny.make("llama")
    mask = tiny.random_mask(model)
    whole, one = ours(model, mask, rule, 1, L2_SP, EWC, fused=True)
    torch.save(one.state_dict(), tmp_path / "state.pt")
    again = copy.deepcopy(whole)
    two = OPTIMIZERS[rule](again, mask, **SETTINGS[rule])
    lota.fuse_in_backward(two)
    pull_to_start(two, L2_SP, EWC, compact(whole_importance(model), mask))  # of where it stands now
    two.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for trained, optimizer in ((whole, one), (again, two)):
        tiny.learn(trained, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    plain = OPTIMIZERS[rule](copy.deepcopy(model), mask, **SETTINGS[rule])
    with pytest.raises(ValueError, match=r"expected .* found .*anchor"):
        plain.load_state_dict(one.state_dict())


def test_what_is_not_given_does_not_pull():
    model = torch.nn.Linear(3, 2, bias=False)
    listed = torch.arange(6.0)
    for given, pull in (({"l2_sp": 2.0}, 2.0), ({"ewc": 2.0}, 2 * listed)):
        optimizer = OPTIMIZERS["SGD"](model)
        pull_to_start(optimizer, **given, importance={"weight": listed})
        torch.testing.assert_close(optimizer.state[model.weight]["pull"], pull, rtol=0, atol=0)


def test_importance_that_does_not_fit_is_refused():
    model = tiny.make("llama")
    mask = tiny.random_mask(model)
    found = compact(whole_importance(model), mask)
    optimizer = OPTIMIZERS["SGD"](model, mask)
    name = next(iter(optimizer.names.values()))
    with pytest.raises(ValueError, match=f"ewc=1 needs the importance of {name}"):
        pull_to_start(optimizer, ewc=1.0, importance={n: v for n, v in found.items() if n != name})
    with pytest.raises(ValueError, match=rf"importance of {name}: 3 entries"):
        pull_to_start(optimizer, ewc=1.0, importance={**found, name: torch.ones(3)})


# A training run


def importance_file(folder, mask: Mask | None) -> str:
    """Random importances of what the mask keeps in the embedded model."""
    path = folder / "importance.pt"
    save_importance(path, Collected(whole_importance(base()), "importance"), mask)
    return f"importance_path={path}"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["null", "bfloat16"])
def test_a_run_that_was_stopped_keeps_its_anchors(mask, workplace, precision):
    """The base's exact values, also under bf16 weights; stopped and continued it ends with the same bits."""
    options = (f"mask_path={workplace}/0.9_mask.pt", importance_file(workplace, mask), "l2_sp=0.5", "ewc=2",
               "n_epochs=2", "save_every=16", f"model.fsdp_policy_mp={precision}")  # fmt: skip
    with stopped_after(7):
        train("exp_name=stopped", *options)
    trainer, folder = train("exp_name=stopped", *options)
    _, reference = train("exp_name=whole", *options)
    assert same(policy(folder), policy(reference))
    weights = base().state_dict()
    for p, name in trainer.optimizer.names.items():
        kept, state = trainer.optimizer.kept[p], trainer.optimizer.state[p]
        assert torch.equal(state["anchor"], kept.gather(weights[name]))
        assert torch.equal(state["pull"], 0.5 + 2 * kept.gather(whole_importance(base())[name]))
    _, free = train("exp_name=free", *options, "l2_sp=0", "ewc=0")
    moved = [
        sum((policy(f)[name] - weights[name]).square().sum() for name in mask.names) for f in (folder, free)
    ]
    assert 0 < moved[0] < 0.9 * moved[1]


@pytest.mark.slow
def test_a_dense_run_lists_all_entries(workplace):
    trainer, _ = train(importance_file(workplace, None), "ewc=1", "n_examples=16")
    assert all("pull" in state for state in trainer.optimizer.state.values())


@pytest.mark.usefixtures("mask")
def test_importances_that_a_run_cannot_use_are_refused_before_a_model_loads(workplace):
    def refused(*overrides: str) -> str:
        with pytest.raises(ValueError) as error:
            prepare(settings(f"mask_path={workplace}/0.9_mask.pt", "ewc=1", *overrides), get_task)
        return str(error.value)

    other = importance_file(workplace, write_mask(workplace / "other.pt", seed=9))
    assert "importance_path=" in refused(other) and "other entries than those that train" in refused(other)
    assert "nothing.pt does not exist" in refused("importance_path=nothing.pt")
    values = {n: v for n, v in whole_importance(base()).items() if n != "lm_head.weight"}
    values.pop("model.norm.weight")
    save_importance(workplace / "few.pt", Collected(values, "importance"), None)
    message = refused("mask_path=null", f"importance_path={workplace}/few.pt")
    assert "it lacks model.norm.weight, which trains" in message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("adapter=lora l2_sp=1", "l2_sp=1.0 with adapter=lora: it pulls weights of the model"),
        ("adapter=lora ewc=1 importance_path=a", "ewc=1.0 with adapter=lora"),
        ("ewc=1", "ewc=1.0 needs importance_path=FILE"),
        ("ewc=1 importance_path=a snip=true", "ewc=1.0 with snip=true: importance is listed"),
        ("l2_sp=-1", "l2_sp=-1.0: must be at least 0"),
    ],
)
def test_settings_that_cannot_be_had(overrides, words):
    with pytest.raises(ValueError, match=words):
        settings(*overrides.split())
