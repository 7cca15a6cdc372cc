"""How kept entries are addressed, against flat positions of dense masks."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch

import lota
from lota.masks import Mask
from lota.optim.kept import Entries, Everything, Tiles, kept_entries, tile_shape

CPU = torch.device("cpu")
# shape of the parameter, lines and entries of a tile, whether tiles are found
SHAPES = {
    "rows": ((6, 10), (1, 10), True),
    "pairs of rows": ((6, 10), (2, 10), True),
    "columns": ((6, 10), (6, 1), True),
    "blocks": ((64, 96), (16, 16), True),
    "blocks that are cut off": ((70, 100), (16, 32), True),
    "blocks of a stack": ((3, 40, 35), (16, 16), True),
    "rows of a stack": ((3, 5, 7), (1, 7), True),
    "columns of a stack": ((3, 5, 7), (5, 1), True),
    "small blocks": ((64, 96), (8, 8), False),
    "blocks a little too small": ((60, 90), (15, 15), False),
    "a line of entries": ((64, 96), (1, 16), False),
}


def flags_of(shape: tuple[int, ...], tile: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """Tiles that a coin chose, with at least one line and one column that ends where each tile can."""
    *stacks, height, width = shape
    grid = (
        torch.rand(*stacks, -(-height // tile[0]), -(-width // tile[1]), generator=torch.manual_seed(seed))
        < 0.4
    )
    flags = grid.repeat_interleave(tile[0], -2).repeat_interleave(tile[1], -1)[..., :height, :width]
    assert flags.any() and not flags.all()
    return flags.contiguous()


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_values_are_those_at_the_positions(kind, seed):
    shape, tile, found = SHAPES[kind]
    flags = flags_of(shape, tile, seed)
    kept = kept_entries(Mask.from_dense({"w": flags}), "w", CPU)
    assert isinstance(kept, Tiles if found else Entries)
    assert kept.count == int(flags.sum())
    positions = kept.positions()
    assert torch.equal(positions.sort().values.long(), flags.view(-1).nonzero().view(-1))
    if found:  # checkpoints know tiles by their numbers, counted line by line over all matrices
        lines, entries = kept.state["tile_shape"]
        grid = flags.view(-1, *shape[-2:])[:, ::lines, ::entries]
        assert kept.state["tiles"].sort().values.tolist() == grid.flatten().nonzero().view(-1).tolist()
    weight = torch.randn(shape)
    assert torch.equal(kept.gather(weight), weight.view(-1)[positions.long()])
    values = torch.randn(kept.count)
    written = weight.to(torch.bfloat16)
    expected = written.clone()
    expected.view(-1)[positions.long()] = values.to(torch.bfloat16)
    kept.write(written, values)
    assert torch.equal(written, expected)


@pytest.mark.parametrize(
    ("shape", "chosen", "expected"),
    [
        ((4, 6), [[1], slice(None)], (1, 6)),
        ((4, 6), [slice(2, 4), slice(None)], (2, 6)),
        ((4, 6), [slice(None), [0, 5]], (4, 1)),
        ((4, 6), [slice(None), slice(0, 3)], (4, 3)),
        ((64, 64), [slice(16, 32), slice(32, 64)], (16, 32)),
        ((64, 64), [slice(15, 32), slice(32, 64)], None),
        ((64, 64), [slice(16, 32), slice(33, 48)], None),
        ((64, 64), [slice(16, 32), slice(33, 64)], (16, 33)),
        ((200, 64), [slice(150, 151), slice(3, 9)], None),  # beyond the lines that are looked at first
        ((200, 64), [slice(128, 192), slice(0, 32)], (64, 32)),
    ],
)
def test_the_largest_tiles_are_found(shape, chosen, expected):
    flags = torch.zeros(1, *shape, dtype=torch.bool)
    flags[0][tuple(chosen)] = True
    assert tile_shape(flags) == expected
    stack = torch.stack([torch.zeros_like(flags[0]), flags[0]])
    assert tile_shape(stack) == expected


def test_all_entries_and_vectors():
    weight = torch.randn(3, 4)
    kept = kept_entries(Mask.from_dense({"w": torch.ones(3, 4, dtype=torch.bool)}), "w", CPU)
    assert isinstance(kept, Everything) and kept.count == 12 and kept.state == {}
    assert kept.gather(weight).data_ptr() == weight.data_ptr()
    vector = kept_entries(Mask.from_dense({"w": torch.tensor([True, True, False])}), "w", CPU)
    assert isinstance(vector, Entries) and vector.positions().tolist() == [0, 1]


@pytest.mark.parametrize("granularity", ["row", "column", "block"])
def test_a_tile_costs_four_bytes_in_a_checkpoint(granularity):
    model = tiny.make("llama")
    optimizer = lota.MaskedRMSprop(model, tiny.line_mask(model, granularity))
    for p, name in optimizer.names.items():
        state, kept = optimizer.state[p], optimizer.kept[p]
        if isinstance(kept, Everything):
            continue
        assert isinstance(kept, Tiles), name
        assert "positions" not in state
        tall, wide = state["tile_shape"]
        assert state["tiles"].dtype == torch.int32
        assert state["tiles"].numel() <= -(-p.shape[0] // tall) * -(-p.shape[1] // wide)
        assert state["tiles"].numel() * tall * wide >= kept.count == state["square_avg"].numel()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("granularity", ["row", "column", "block"])
def test_state_by_positions_of_earlier_releases_is_continued(architecture, granularity):
    model = tiny.make(architecture)
    mask = tiny.line_mask(model, granularity)
    optimizer = lota.MaskedRMSprop(model, mask, lr=1e-3)
    tiny.learn(model, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    for entry, (p, name) in zip(saved["state"].values(), optimizer.names.items(), strict=True):
        if "tiles" in entry:
            del entry["tiles"], entry["tile_shape"]
            entry["positions"] = mask.positions(name).to(torch.int32)
            whole = torch.zeros_like(p)
            optimizer.kept[p].write(whole, entry["square_avg"])
            entry["square_avg"] = whole.view(-1)[entry["positions"]]
    other = lota.MaskedRMSprop(copy.deepcopy(model), mask, lr=1e-3)
    other.load_state_dict(saved)
    for one, two in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(torch.as_tensor(one[key]), torch.as_tensor(two[key])) for key in one)
    for p, state in other.state.items():  # the addresses are held once
        assert all(state[key] is value for key, value in other.kept[p].state.items())
    entry = next(entry for entry in saved["state"].values() if "positions" in entry)
    entry["positions"] += 1
    with pytest.raises(ValueError, match="optimizer state of"):
        other.load_state_dict(saved)


def test_state_of_other_tiles_is_refused():
    model = tiny.make("llama")
    masks = [tiny.line_mask(model, granularity) for granularity in ("row", "column")]
    states = [lota.MaskedRMSprop(copy.deepcopy(model), mask).state_dict() for mask in masks]
    with pytest.raises(ValueError, match="optimizer state of"):
        lota.MaskedRMSprop(model, masks[0]).load_state_dict(states[1])
    entry = states[0]["state"][0]
    entry["tile_shape"] = (entry["tile_shape"][0] * 2, entry["tile_shape"][1])
    with pytest.raises(ValueError, match="belongs to another mask: the kept tile_shape differ"):
        lota.MaskedRMSprop(model, masks[0]).load_state_dict(states[0])
