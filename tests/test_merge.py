"""Each merge rule against one written entry by entry in plain Python; sparse vectors against dense ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lota.share.merge.aligned import align
from lota.share.merge.inputs import Entries
from lota.share.merge.rules import METHODS, keep_largest, keep_random, make_rule

F = np.float32


def vectors(count: int, numel: int, density: float = 1.0, seed: int = 0) -> list[torch.Tensor]:
    """Random task vectors of one tensor, 1-D, each with nonzero entries of its own; some tie."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        value = (torch.randn(numel, generator=g) * 8).round() / 64
        value += torch.randn(numel, generator=g).sign() / 256
        found.append(value * (torch.rand(numel, generator=g) < density))
    return found


def plain_trim(vector: list[float], density: float) -> list[float]:
    """The floor(d n) entries that are largest by magnitude, at least one, earlier ones first."""
    count = max(1, math.floor(density * len(vector)))
    order = sorted(range(len(vector)), key=lambda i: (-abs(vector[i]), i))
    return [value if i in set(order[:count]) else 0.0 for i, value in enumerate(vector)]


def plain_drop(vector: list[float], density: float, draws: list[bool]) -> list[F]:
    return [F(value) * F(drawn) * F(1 / density) for value, drawn in zip(vector, draws, strict=True)]


def plain_sum(columns: list[tuple], weights: list[float], normalize: bool) -> list[F]:
    divisor = sum(F(w) for w in weights) if normalize else F(1)
    return [
        sum((F(v) * F(w) for v, w in zip(column, weights, strict=True)), start=F(0)) / divisor
        for column in columns
    ]


def plain_ties(columns: list[tuple], weights: list[float], normalize: bool) -> list[F]:
    """Elect the sign with the larger weighted mass; average the entries that have it."""
    merged = []
    for column in columns:
        weighted = [F(v) * F(w) for v, w in zip(column, weights, strict=True)]
        sign = 1 if sum(weighted, start=F(0)) >= 0 else -1
        agreeing = [(v, w) for v, w in zip(weighted, weights, strict=True) if v * sign > 0]
        total, mass = sum((v for v, _ in agreeing), start=F(0)), sum((F(w) for _, w in agreeing), start=F(0))
        merged.append(total / mass if normalize and agreeing else total)
    return merged


def plain(method: str, found: list[torch.Tensor], weights, densities, normalize, seed) -> torch.Tensor:
    rows, state = [v.tolist() for v in found], torch.Generator().manual_seed(seed)
    if method in ("ties", "magnitude_prune"):
        rows = [plain_trim(row, d) for row, d in zip(rows, densities, strict=True)]
    elif method in ("dare", "dare_ties"):
        draws = [
            torch.bernoulli(torch.full_like(v, d), generator=state).bool().tolist()
            for v, d in zip(found, densities, strict=True)
        ]
        rows = [plain_drop(row, d, one) for row, d, one in zip(rows, densities, draws, strict=True)]
    add = plain_ties if method in ("ties", "dare_ties") else plain_sum
    return torch.tensor(np.array(add(list(zip(*rows, strict=True)), weights, normalize), dtype=F))


CASES = [
    (method, normalize, weights)
    for method in METHODS
    if method != "sum"
    for normalize in (False, True)
    for weights in ([1.0, 1.0, 1.0], [0.7, 0.2, 1.5])
] + [("sum", False, [1.0, 1.0, 1.0])]


@pytest.mark.parametrize(("method", "normalize", "weights"), CASES)
def test_rule_entry_by_entry(method, normalize, weights):
    found = vectors(3, 400)
    thin = METHODS[method].thin
    densities = [0.5, 0.3, 0.8] if thin else [1.0] * 3
    seed = 5 if thin == "random" else None
    rule = make_rule(method, 3, weights=weights, density=densities, normalize=normalize, seed=seed)
    merged = rule.merge(found, rule.generator())
    assert torch.equal(merged, plain(method, found, weights, densities, normalize, 5))
    assert merged.count_nonzero() > 0


@pytest.mark.parametrize("method", METHODS)
def test_listed_entries_give_what_whole_tensors_give(method):
    """The sparse path: only the entries that some vector changes, in a tensor of many more."""
    numel = 5000
    found = vectors(3, numel, density=0.05)
    rule = make_rule(method, 3, density=[0.02] if METHODS[method].thin else None)
    dense = rule.merge(found, rule.generator())
    positions = torch.stack(found).ne(0).any(dim=0).nonzero().flatten()
    assert len(positions) < numel / 5
    sparse = rule.merge([v[positions] for v in found], rule.generator(), numel, positions)
    rebuilt = torch.zeros(numel)
    rebuilt[positions] = sparse
    assert torch.equal(dense, rebuilt)


def test_lambda_scales_and_negative_weights_take_away():
    def merged(method: str, found: list[torch.Tensor], **numbers) -> torch.Tensor:
        rule = make_rule(method, len(found), **numbers)
        return rule.merge(found, rule.generator())

    a, b = vectors(2, 50)
    one, half = (merged("ties", [a, b], density=[0.5], scale=scale) for scale in (1.0, 0.5))
    assert torch.equal(half, 0.5 * one)
    assert torch.equal(merged("task_arithmetic", [a], weights=[-1.0]), -a)
    # weights that cancel do not divide by zero
    assert torch.equal(merged("task_arithmetic", [a, b], weights=[1.0, -1.0], normalize=True), a - b)


def test_largest_of_equal_magnitudes_are_the_earliest():
    values = torch.tensor([1.0, -2.0, 2.0, 0.0, 2.0, -3.0])
    assert keep_largest(values, 0.5).tolist() == [False, True, True, False, False, True]
    assert keep_largest(values, 0.01).tolist() == [False] * 5 + [True]  # never none
    assert keep_largest(values, 1.0).all()
    assert keep_largest(values[[1, 2]], 0.5, numel=6).all()  # three of six stay, two are listed


def test_draws_in_chunks_are_one_stream(monkeypatch):
    monkeypatch.setattr("lota.share.merge.rules.DRAW_CHUNK", 16)
    whole = torch.bernoulli(torch.full((100,), 0.4), generator=torch.Generator().manual_seed(3)).bool()
    assert torch.equal(keep_random(0.4, 100, torch.Generator().manual_seed(3)), whole)
    positions = torch.tensor([0, 15, 16, 17, 50, 99])
    assert torch.equal(keep_random(0.4, 100, torch.Generator().manual_seed(3), positions), whole[positions])


def test_a_tensor_that_no_vector_changes_uses_its_draws_up():
    found, rule = vectors(2, 40), make_rule("dare", 2, density=[0.5], seed=1)
    used, unchanged = rule.generator(), rule.generator()
    rule.merge(found, used)
    base = torch.arange(40.0)
    align([None, None], 40).merge_(base, rule, unchanged)
    assert torch.equal(base, torch.arange(40.0))
    assert torch.equal(rule.merge(found, used), rule.merge(found, unchanged))


def part_of(base: torch.Tensor, tuned: torch.Tensor, listed: torch.Tensor | None) -> Entries | None:
    """What changes base to tuned; listed: bool, the entries that the part lists, None: all of them."""
    changed = tuned.view(torch.int16) != base.view(torch.int16)
    positions = None if listed is None else (listed | changed).nonzero().flatten()
    where = slice(None) if positions is None else positions
    values = tuned[where].float() - base[where].float()
    return Entries(positions, values, tuned[where], changed[where])


def parts_over(base: torch.Tensor, kinds: list[str], seed: int = 0) -> tuple[list, list[torch.Tensor]]:
    """Parts of these kinds over a bf16 tensor, and the tuned tensors: `none`, `listed` or `whole`.

    Nobody changes position 0; each changes a fifth of the others, some by exactly 1 or -1, and lists some
    entries that it does not change.
    """
    g, parts, found = torch.Generator().manual_seed(seed), [], []
    for kind in kinds:
        step = torch.tensor([1.0, -1.0, 0.37, -1.71])[torch.randint(4, base.shape, generator=g)]
        own = torch.rand(base.shape, generator=g) < (0.0 if kind == "none" else 0.2)
        own[0] = False
        more = torch.rand(base.shape, generator=g) < 0.1
        more[0] = False
        tuned = torch.where(own, (base.float() + step).to(base.dtype), base)
        found.append(tuned)
        parts.append(None if kind == "none" else part_of(base, tuned, more if kind == "listed" else None))
    return parts, found


ALIGNED = [
    ["listed", "listed", "listed"],
    ["whole", "whole", "whole"],
    ["none", "listed", "none", "listed"],
    ["none", "whole", "listed", "none"],
    ["none", "none"],
]


def base_with_zeros(numel: int = 300) -> torch.Tensor:
    """bf16; every third entry is a zero of either sign, whose bits a sum with 0 could change."""
    base = torch.randn(numel, generator=torch.Generator().manual_seed(9))
    base[::6], base[3::6] = 0.0, -0.0
    return base.bfloat16()


@pytest.mark.parametrize("kinds", ALIGNED, ids="-".join)
def test_parts_are_aligned_as_whole_tensors_are(kinds):
    base = base_with_zeros()
    parts, tuned = parts_over(base, kinds)
    found = align(parts, base.numel())
    listed = torch.zeros(base.numel(), dtype=torch.bool)
    for part in parts:
        if part is not None:
            listed[slice(None) if part.positions is None else part.positions] = True
    where = listed.nonzero().flatten()
    assert (found.positions is None) == ("whole" in kinds)
    if found.positions is not None:
        assert torch.equal(found.positions, where)
    assert len(found.vectors) == len(kinds)
    for vector, one in zip(found.vectors, tuned, strict=True):
        assert torch.equal(vector, (one.float() - base.float())[where])
    changed = torch.stack([one.view(torch.int16) != base.view(torch.int16) for one in tuned])
    assert found.touches.tolist() == changed.sum(0)[where].tolist()
    assert kinds == ["none", "none"] or {0, 1, 2} & {*found.touches.tolist()} >= {1, 2}


@pytest.mark.parametrize("kinds", ALIGNED, ids="-".join)
@pytest.mark.parametrize("method", ["sum", "task_arithmetic"])
def test_a_tensor_is_merged_entry_by_entry(kinds, method):
    """With `sum` what one vector alone changes has its tuned bits; what nobody changes keeps the base's."""
    base = base_with_zeros()
    parts, tuned = parts_over(base, kinds)
    rule = make_rule(method, len(kinds))
    merged = base.clone()
    align(parts, base.numel()).merge_(merged, rule, rule.generator())
    expected = base.clone()
    for i in range(base.numel()):
        before = base[i].float()
        touching = [one[i] for one in tuned if str(one[i].item()) != str(base[i].item())]
        change = sum((one[i].float() - before for one in tuned), torch.zeros(()))
        if method == "sum" and len(touching) == 1:
            expected[i] = touching[0]
        elif change != 0:
            expected[i] = (before + change).to(base.dtype)
    assert torch.equal(merged.view(torch.int16), expected.view(torch.int16))
    assert torch.equal(merged, base) == (kinds == ["none", "none"])


def test_a_sum_takes_the_tuned_value_of_the_only_vector_that_changes_an_entry():
    """Differences of bf16 are exact in float32 unless exponents lie far apart: 1 -> 1e-20 is such a case."""
    base = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0]).bfloat16()
    first = torch.tensor([1e-20, 1e-20, 1.0, -0.0, 1.0]).bfloat16()
    second = torch.tensor([1.0, 1e-20, 1.0, 0.0, 1.0]).bfloat16()
    none = torch.zeros(5, dtype=torch.bool)
    for listed in (None, none, ~none):
        parts = [part_of(base, first, listed), part_of(base, second, listed)]
        for method, lone in (("sum", first[0].item()), ("task_arithmetic", 0.0)):
            rule, merged = make_rule(method, 2), base.clone()
            align(parts, 5).merge_(merged, rule, rule.generator())
            assert merged.tolist() == [lone, -1.0, 1.0, 0.0, 1.0]
            assert math.copysign(1, merged[3].item()) == (-1 if method == "sum" else 1)


def test_dare_keeps_the_expectation():
    found = [torch.ones(200_000)]
    rule = make_rule("dare", 1, density=[0.1])
    merged = rule.merge(found, rule.generator())
    assert set(merged.tolist()) == {0.0, 10.0}
    assert abs(merged.mean() - 1) < 5 * math.sqrt(0.9 / 0.1 / 200_000)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "tie"}, ["method=tie", "did you mean ties?"]),
        ({"method": "xyz"}, ["method=xyz", "task_arithmetic"]),
        ({"weights": [1.0]}, ["weights=1: give one each for the 2 task vectors"]),
        ({"density": [0.1, 0.2, 0.3]}, ["density=0.1 0.2 0.3: give one, or one each for the 2"]),
        ({"density": [0.0]}, ["density=0", "above 0"]),
        ({"method": "dare", "density": [1.5, 0.2]}, ["density=1.5:", "at most 1"]),
        ({"method": "dare", "density": [math.nan]}, ["density=nan"]),
        ({"method": "task_arithmetic", "density": [0.5]}, ["density=0.5", "keeps every entry"]),
        ({"method": "sum", "weights": [1.0, 2.0]}, ["method=sum adds every vector", "task_arithmetic"]),
        ({"seed": 3}, ["seed=3", "draws nothing"]),
        ({"weights": [1.0, math.inf]}, ["finite"]),
        ({"weights": [1.0], "density": [2.0], "seed": 1}, ["weights=", "density=", "seed="]),
    ],
)
def test_what_is_invalid_is_refused_at_once(arguments, words):
    with pytest.raises(ValueError) as error:
        make_rule(count=2, **{"method": "ties"} | arguments)
    assert all(word in str(error.value) for word in words), error.value
