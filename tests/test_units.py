"""Rows, columns and blocks against sums and sorts of dense matrices."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
import transformers

import lota
from lota.config import Config
from lota.lotto.config import LottoConfig
from lota.masks import Mask, kept_count
from lota.masks.extract.select import Quota, Rule, select
from lota.masks.extract.units import (
    AGGREGATES,
    DEFAULT_BLOCK,
    Units,
    choose,
    units_of,
    units_of_scope,
    widened,
)
from lota.models.pair import open_pair
from lota.models.scope import ScopedTensor, find_scope
from tests.hf_models import save_policy
from tests.mask_pairs import make_pair, saliencies_of, small_chunks, sorted_masks  # noqa: F401

OUTPUT_AXIS = {"Conv1D": 1}  # of a two-dimensional weight as stored
BLOCK = 24  # divides neither 32 nor 128


def unit_numbers(shape: torch.Size, output_axis: int, granularity: str) -> torch.Tensor:
    """The number of the row (one output neuron), column or block that each entry belongs to."""
    *stacks, height, width = shape
    line, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    if granularity == "block":
        across = -(-width // BLOCK)
        numbers, count = line // BLOCK * across + column // BLOCK, -(-height // BLOCK) * across
    elif (granularity == "row") == (output_axis == 0):
        numbers, count = line, height
    else:
        numbers, count = column, width
    matrices = torch.arange(math.prod(stacks)).view(*stacks, 1, 1)
    return (numbers + count * matrices).expand(shape)


def unit_sums(score: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Sums of squares, fp64 (units,)."""
    return (
        torch.zeros(int(numbers.max()) + 1)
        .double()
        .index_add_(0, numbers.flatten(), score.flatten().double() ** 2)
    )


def unit_saliencies(score: torch.Tensor, numbers: torch.Tensor, aggregate: str) -> torch.Tensor:
    """Of each unit by sorting its entries together, fp64 (units,)."""
    order = numbers.flatten().argsort(stable=True)
    parts = score.flatten().double()[order].split(numbers.flatten().bincount().tolist())
    how = {
        "sum_squares": lambda part: part.square().sum(),
        "mean_squares": lambda part: part.square().mean(),
        "sum": lambda part: part.sum(),
        "max": lambda part: part.max(),
    }[aggregate]
    return torch.stack([how(part) for part in parts])


def expected_mask(scores, axis, granularity, k, smallest=False, saliencies=unit_sums):
    """A loop over all units in the order of their saliencies, each taken while it fits."""
    numbers = {n: unit_numbers(value.shape, axis[n], granularity) for n, value in scores.items()}
    ranked = [
        (total if smallest else -total, position, index, name)
        for position, name in enumerate(scores)
        for index, total in enumerate(saliencies(scores[name], numbers[name]).tolist())
        if total > 0
    ]
    kept: dict[str, list[int]] = {name: [] for name in scores}
    left = k
    lengths = {name: value.flatten().bincount() for name, value in numbers.items()}
    for _, _, index, name in sorted(ranked):
        if lengths[name][index] <= left:
            kept[name].append(index)
            left -= int(lengths[name][index])
    return {n: torch.isin(numbers[n], torch.tensor(found)) for n, found in kept.items()}, left


def axes_of(model) -> dict[str, int]:
    modules = dict(model.named_modules())
    return {n: OUTPUT_AXIS.get(type(modules[n.rpartition(".")[0]]).__name__, 0) for n in find_scope(model)}


@pytest.mark.parametrize("granularity", ["row", "column", "block"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_whole_units_of_every_architecture(kind, granularity, tmp_path):
    base_path, tuned_path, base, changed = make_pair(tmp_path, kind)
    scores, axis = saliencies_of(base, changed), axes_of(base)
    masks = lota.extract(base_path, tuned_path, [0.5, 0.9], granularity=granularity, block=BLOCK)
    numbers = {n: unit_numbers(value.shape, axis[n], granularity) for n, value in scores.items()}
    for sparsity, mask in masks.items():
        k = kept_count(sparsity, mask.n_total)
        expected, left = expected_mask(scores, axis, granularity, k)
        for name, flags in expected.items():
            assert torch.equal(mask.dense(name), flags), name
        assert mask.meta["shortfall"] == left == k - mask.n_kept
        assert 0 <= left < max(int(value.flatten().bincount().min()) for value in numbers.values())
        assert mask.meta["granularity"] == granularity and mask.meta["kept"] == mask.n_kept
        assert mask.meta["block"] == (BLOCK if granularity == "block" else None)
        sums = {n: unit_sums(v, numbers[n])[numbers[n]] for n, v in scores.items()}
        kept = torch.cat([sums[n][mask.dense(n)] for n in scores])
        assert mask.meta["threshold"] == pytest.approx(kept.min().item(), rel=1e-12)


@pytest.mark.parametrize("granularity", ["row", "column", "block"])
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_aggregates(aggregate, granularity, tmp_path):
    """Of units of several sizes, read in pieces that end within them."""
    base_path, tuned_path, base, changed = make_pair(tmp_path, "gpt2", ties=False)
    scores, axis = saliencies_of(base, changed), axes_of(base)
    rule = Rule(granularity=granularity, block=BLOCK, aggregate=aggregate)
    mask = select(Quota(open_pair(base_path, tuned_path), [0.8], rule))[0.8]
    how = partial(unit_saliencies, aggregate=aggregate)
    expected, left = expected_mask(scores, axis, granularity, kept_count(0.8, mask.n_total), saliencies=how)
    assert all(torch.equal(mask.dense(name), flags) for name, flags in expected.items())
    assert mask.meta["shortfall"] == left
    with pytest.raises(ValueError, match=r"aggregate='median'.* choose one of sum_squares, mean_squares"):
        Rule(aggregate="median")


@pytest.mark.parametrize("per", ["tensor", "layer"])
def test_per_tensor_and_layer(per, tmp_path):
    base_path, tuned_path, base, changed = make_pair(tmp_path, "gpt2")
    scores, axis = saliencies_of(base, changed), axes_of(base)
    for granularity in ("element", "row"):
        mask = lota.extract(base_path, tuned_path, [0.8], per=per, granularity=granularity)[0.8]
        label = {"tensor": lambda name: name, "layer": lambda name: name.split(".")[2]}[per]
        groups = {label(name): [n for n in scores if label(n) == label(name)] for name in scores}
        assert set(mask.meta["threshold"]) == set(groups)
        for names in groups.values():
            part = {name: scores[name] for name in names}
            k = kept_count(0.8, sum(value.numel() for value in part.values()))
            if granularity == "row":
                expected, left = expected_mask(part, axis, "row", k)
            else:
                expected, left = sorted_masks(part, k), 0
            assert sum(mask.kept(name) for name in names) == k - left
            assert all(torch.equal(mask.dense(name), expected[name]) for name in names)


def test_smallest_random_and_protected_rows(tmp_path):
    base_path, tuned_path, base, changed = make_pair(tmp_path, ties=False)
    scores = saliencies_of(base, changed)
    axis = dict.fromkeys(scores, 0)
    common = {"granularity": "row", "sparsities": [0.7]}
    mask = lota.extract(base_path, tuned_path, smallest=True, **common)[0.7]
    expected, _ = expected_mask(scores, axis, "row", kept_count(0.7, mask.n_total), smallest=True)
    assert all(torch.equal(mask.dense(name), flags) for name, flags in expected.items())

    first = lota.extract(base_path, score="random", seed=1, **common)[0.7]
    other = lota.extract(base_path, score="random", seed=2, **common)[0.7]
    again = lota.extract(base_path, score="random", seed=1, **common)[0.7]
    assert all(torch.equal(first.bits[n], again.bits[n]) for n in first.names)
    assert first.overlap(other) < 0.6 * first.n_kept
    for name in first.names:  # no preference for long rows: 0.3 of each tensor's, by chance
        rows = first.shapes[name][0]
        assert abs(first.kept(name) / first.numel(name) - 0.3) < 4.5 * (0.21 / rows) ** 0.5

    second = lota.extract(base_path, tuned_path, protect=[first], **common)[0.7]
    assert second.overlap(first) == 0
    assert kept_count(0.7, second.n_total) - second.n_kept < 32
    scattered = lota.extract(base_path, score="random", sparsities=[0.9])[0.9]
    with pytest.raises(ValueError, match=r"protected masks leave .* free"):
        lota.extract(base_path, tuned_path, protect=[scattered], **common)


def test_a_row_without_change_is_never_kept(tmp_path, caplog):
    base_path, _, base, _ = make_pair(tmp_path)
    state = {name: value.clone() for name, value in base.state_dict().items()}
    state["model.layers.1.mlp.up_proj.weight"][3, 5] += 1
    save_policy(tmp_path / "few.pt", state)
    mask = lota.extract(base_path, tmp_path / "few.pt", [0.9], granularity="row")[0.9]
    assert mask.positions("model.layers.1.mlp.up_proj.weight").tolist() == list(range(96, 128))
    assert mask.n_kept == 32 and mask.meta["threshold"] == 0.0
    assert mask.meta["shortfall"] == kept_count(0.9, mask.n_total) - 32
    assert "saliency is 0" in caplog.text


def test_masks_into_which_no_block_fits(tmp_path):
    base_path, tuned_path, _, _ = make_pair(tmp_path)
    with pytest.raises(
        ValueError, match=r"no whole block fits into .*per=tensor keeps at sparsities=\[0.99\]"
    ):
        lota.extract(base_path, tuned_path, [0.99], granularity="block", block=BLOCK, per="tensor")


def test_vectors_have_no_rows(tmp_path):
    base_path, tuned_path, _, _ = make_pair(tmp_path)
    with pytest.raises(ValueError, match=r"granularity=row .*norm\.weight has the shape \(32,\)"):
        lota.extract(base_path, tuned_path, [0.5], granularity="row", scope="norm")
    with pytest.raises(ValueError, match=r"conv1d\.weight has the shape \(8, 1, 4\)"):
        units_of("conv1d.weight", ScopedTensor((8, 1, 4), "other", 0, "Conv1d"), "row")
    with pytest.raises(ValueError, match=r"granularity='rows'.*mean row"):
        lota.extract(base_path, tuned_path, [0.5], granularity="rows")
    for block in (16, 256):
        assert Rule(granularity="block", block=block).block == block
    for block in (15, 257):
        with pytest.raises(ValueError, match=f"block={block}: the side of a block is 16 to 256 entries"):
            lota.extract(base_path, tuned_path, [0.5], granularity="block", block=block)


def test_a_unit_that_does_not_fit_is_passed_over():
    scores, lengths = np.array([5.0, 4.0, 3.0, 3.0, 0.0]), np.array([6, 6, 2, 2, 1])
    kept_of = {6: [0], 7: [0], 8: [0, 2], 11: [0, 2, 3], 12: [0, 1], 13: [0, 1], 99: range(4)}
    for budget, kept in kept_of.items():
        chosen, cut = choose(scores, lengths, budget, smallest=False)
        assert np.flatnonzero(chosen).tolist() == list(kept)
        assert cut.shortfall == budget - lengths[chosen].sum()
        assert cut.by_size == (budget != 99 and cut.shortfall > 0)
    assert choose(scores, lengths, 0, smallest=False)[1].threshold is None


@pytest.mark.parametrize(
    "config, transposed",
    [
        (transformers.MixtralConfig, False),
        (transformers.Qwen3MoeConfig, False),
        (transformers.GptOssConfig, True),
        (transformers.Llama4TextConfig, True),
    ],
)
def test_outputs_of_expert_matrices(config, transposed):
    """gate_up_proj has 2 x 24 outputs, down_proj has 32, on the axis that the flag says."""
    made = config(
        hidden_size=32, intermediate_size=24, moe_intermediate_size=24, num_hidden_layers=1, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts=4, vocab_size=61,
        intermediate_size_mlp=24, interleave_moe_layer_step=1, pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(made)
    stacks = {name: t for name, t in find_scope(model).items() if len(t.shape) == 3}
    assert {name.rpartition(".")[2] for name in stacks} == {"gate_up_proj", "down_proj"}
    for name, tensor in stacks.items():
        assert tensor.transposed is transposed
        outputs = 48 if "gate_up" in name else 32
        assert tensor.shape[1 if not transposed else 2] == outputs
        # the fifth row of the third expert is its fifth output, the fifth column its fifth input
        for granularity, axis in (("row", 1 + transposed), ("column", 2 - transposed)):
            units, n = units_of(name, tensor, granularity), tensor.shape[axis]
            assert units.count == 4 * n
            chosen = np.arange(units.count) == 2 * n + 4
            flags = np.unpackbits(units.packed(chosen), count=units.size).reshape(tensor.shape)
            expected = np.zeros(tensor.shape, np.uint8)
            np.moveaxis(expected, axis, 1)[2, 4] = 1
            assert np.array_equal(flags, expected)
    assert not any(t.transposed for t in find_scope(model).values() if len(t.shape) == 2)


def test_one_row_of_gpt2_is_one_output(tmp_path):
    """Changing what feeds one output of a Conv1D keeps exactly that output's weights."""
    base_path, _, base, _ = make_pair(tmp_path, "gpt2")
    state = {name: value.clone() for name, value in base.state_dict().items()}
    name = "transformer.h.0.mlp.c_fc.weight"  # (32 inputs, 128 outputs)
    state[name][:, 17] += 1
    save_policy(tmp_path / "few.pt", state)
    mask = lota.extract(base_path, tmp_path / "few.pt", [0.9], granularity="row")[0.9]
    assert mask.positions(name).tolist() == [128 * i + 17 for i in range(32)] and mask.n_kept == 32
    x = torch.randn(5, 32)
    before, after = base.transformer.h[0].mlp.c_fc(x), x @ state[name] + base.transformer.h[0].mlp.c_fc.bias
    moved = (
        before - after
    ).abs() > 1e-3  # the change is a sum of 32 normal numbers; rounding stays below 1e-5
    assert moved.any(0).nonzero().flatten().tolist() == [17]


@pytest.mark.parametrize("smallest", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_that_of_a_loop(seed, smallest):
    generator = np.random.default_rng(seed)
    saliencies = generator.integers(0, 6, 12).astype(float)
    lengths = generator.integers(2, 7, 12)
    order = sorted(range(12), key=lambda i: saliencies[i] if smallest else -saliencies[i])
    for budget in range(int(lengths.sum()) + 3):
        left, kept = budget, []
        for i in order:
            if saliencies[i] > 0 and lengths[i] <= left:
                left -= lengths[i]
                kept.append(i)
        by_size = left > 0 and any(saliencies[i] > 0 for i in set(order) - set(kept))
        threshold = saliencies[kept[-1]] if kept and (by_size or left == 0) else 0.0
        chosen, cut = choose(saliencies, lengths, budget, smallest)
        assert np.flatnonzero(chosen).tolist() == sorted(kept)
        assert cut == ((None, 0, False) if budget == 0 else (threshold, left, by_size))


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 5), (2, 1, 7), (3, 4, 1), (2, 5, 3)])
@pytest.mark.parametrize("tall, wide", [(1, 99), (99, 1), (2, 2), (3, 2), (1, 1), (99, 99)])
def test_sums_of_every_stretch(shape, tall, wide):
    stacks, height, width = shape
    tall, wide = min(tall, height), min(wide, width)
    units, n = Units(*shape, tall, wide), math.prod(shape)
    values = np.random.default_rng(1).integers(1, 50, n).astype(np.float32)
    matrix, line, column = np.indices(shape)
    down, across = -(-height // tall), -(-width // wide)
    unit_of = ((matrix * down + line // tall) * across + column // wide).reshape(-1)
    for start in range(n):
        for stop in range(start + 1, n + 1):
            first, found = units.joined(start, values[start:stop])
            expected = np.bincount(unit_of[start:stop], values[start:stop], minlength=units.count)
            assert found.dtype == np.float64 and first + len(found) <= units.count
            assert np.array_equal(expected[first : first + len(found)], found)
            assert expected.sum() == found.sum()
            largest = np.zeros(units.count)
            np.maximum.at(largest, unit_of[start:stop], values[start:stop])
            first, found = units.joined(start, values[start:stop], np.maximum)
            assert np.array_equal(largest[first : first + len(found)], found)
            assert largest.max() == found.max()
    assert units.count == stacks * down * across == unit_of[-1] + 1
    assert units.size == n
    assert units.lengths.tolist() == np.bincount(unit_of).tolist()
    for chosen in (np.arange(units.count) % 2 == 0, np.arange(units.count) == units.count - 1):
        packed = units.packed(chosen)
        assert np.array_equal(packed, np.packbits(chosen[unit_of]))
        assert np.array_equal(units.touched(packed), chosen)
    single = np.zeros(n, bool)
    single[n // 2] = True
    assert np.flatnonzero(units.touched(np.packbits(single))).tolist() == [unit_of[n // 2]]


def test_sums_of_many_are_exact():
    """In fp64: in fp32 the later ones would be lost."""
    values = np.ones(3 * 40_000, np.float32) / 3
    values[0] = 2**24
    for units in (
        Units(1, 3, 40_000, 1, 40_000),
        Units(1, 40_000, 3, 40_000, 1),
        Units(1, 400, 300, 400, 300),
    ):
        first, found = units.joined(0, values)
        assert first == 0 and found[0] == 2.0**24 + (units.lengths[0] - 1) * float(np.float32(1) / 3)


def test_random_rows_leave_protected_ones_alone(tmp_path):
    base_path, _, _, _ = make_pair(tmp_path)
    common = {"granularity": "row", "score": "random"}
    first = lota.extract(base_path, sparsities=[0.5], seed=1, **common)[0.5]
    second = lota.extract(base_path, sparsities=[0.6], seed=2, protect=[first], **common)[0.6]
    assert second.overlap(first) == 0 < second.n_kept


def test_progress_counts_twice_all_entries(tmp_path):
    base_path, tuned_path, _, _ = make_pair(tmp_path)
    quota = Quota(open_pair(base_path, tuned_path), [0.5, 0.9], Rule(granularity="row", per="layer"))
    done = []
    select(quota, progress=done.append)
    assert sum(done) == 2 * sum(quota.sizes.values())


def test_a_mask_is_widened_to_the_units_that_it_touches():
    flags = {"a": torch.zeros(40, 50, dtype=torch.bool), "b": torch.zeros(4, dtype=torch.bool)}
    flags["a"][17, 3] = flags["a"][39, 49] = flags["b"][1] = True
    mask = Mask.from_dense(flags, {"score": "task_vector"})
    assert widened(mask, {}) is mask
    wide = widened(mask, {"a": Units(1, 40, 50, 16, 16)})
    expected = torch.zeros(40, 50, dtype=torch.bool)
    expected[16:32, :16] = expected[32:, 48:] = True
    assert torch.equal(wide.dense("a"), expected) and torch.equal(wide.dense("b"), flags["b"])
    assert wide.meta["score"] == "task_vector"
    assert units_of_scope({"a": ScopedTensor((40, 50), "mlp", 0, "Linear")}, "element", 16) == {}


def test_the_default_side_of_a_block_is_one_everywhere():
    assert Rule().block == DEFAULT_BLOCK == Config().snip_block == LottoConfig().block == 64
