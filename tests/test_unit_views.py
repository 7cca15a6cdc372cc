"""Pictures and counts of kept rows, columns and blocks against the entries of the masks."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import lota
from lota.masks import Mask
from lota.masks import __main__ as mask_tools
from lota.masks.extract.units import Units
from lota.masks.unit_views import KeptUnits, draw, kept_units, unit_counts
from tests.mask_pairs import make_pair

BLOCK = 24  # divides neither 32 nor 128


@pytest.fixture(params=["llama", "gpt2", "mixtral"])
def pair(request, tmp_path):
    base, tuned, *_ = make_pair(tmp_path, request.param)
    return base, tuned


def made(pair, granularity: str) -> Mask:
    return lota.extract(*pair, [0.7], granularity=granularity, block=BLOCK)[0.7]


@pytest.mark.parametrize("size", [(40, 50), (7, 3)])
@pytest.mark.parametrize("pixels", [(20, 25), (7, 9), (1, 1), (80, 100)])
def test_a_pixel_is_the_share_of_what_lies_under_it(size, pixels):
    units = Units(2, *size, 16, 16)
    kept = np.random.default_rng(0).random(units.grid) < 0.5
    found = KeptUnits(units, kept).shares(*pixels)
    flags = np.unpackbits(units.packed(kept.reshape(-1)), count=units.size).reshape(2, *size)
    fine = flags.repeat(pixels[0], 1).repeat(pixels[1], 2)  # every pixel is as many of these as an entry has
    expected = fine.reshape(2, pixels[0], size[0], pixels[1], size[1]).mean((2, 4))
    assert found.shape == (2, *pixels)
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("granularity", ["row", "column", "block"])
def test_the_picture_has_every_kept_entry_at_its_place(pair, granularity):
    mask = made(pair, granularity)
    found = kept_units(mask)
    assert list(found) == mask.names
    assert sum(int(each.kept.sum()) for each in found.values()) == unit_counts(found).kept.sum()
    axes = draw(found, None, "t").axes[0]
    images = iter(axes.images)
    tops, seen = {}, []
    for name in sorted(mask.names, key=mask.names.index):
        dense = mask.dense(name).reshape(-1, *mask.shapes[name][-2:])
        layer = re.search(r"\.(\d+)\.", name)[1]
        for matrix in dense:
            image = next(images)
            left, right, bottom, top = image.get_extent()
            height, width = matrix.shape
            assert (round(bottom - top, 6), round(right - left, 6)) == (height, width)  # one scale for all
            drawn = np.asarray(image.get_array())
            lines = ((np.arange(drawn.shape[0]) + 0.5) / drawn.shape[0] * height).astype(int)
            columns = ((np.arange(drawn.shape[1]) + 0.5) / drawn.shape[1] * width).astype(int)
            expected = matrix.numpy()[lines][:, columns]
            # a pixel may lie over two units; those that lie over one have its value
            whole = (drawn < 1e-9) | (drawn > 1 - 1e-9)
            assert whole.mean() > 0.6 and np.array_equal(drawn[whole] > 0.5, expected[whole])
            assert drawn.mean() == pytest.approx(expected.size and matrix.double().mean().item(), abs=1e-9)
            seen.append((left, right, top, bottom))
            tops.setdefault(layer, set()).add(top)
    assert next(images, None) is None
    assert axes.get_aspect() == 1  # an entry is as wide as high
    for i, (left, right, top, bottom) in enumerate(seen):  # no two on top of each other
        for other in seen[:i]:
            apart = left >= other[1] or right <= other[0] or top >= other[3] or bottom <= other[2]
            assert apart
    assert max(tops["0"]) < min(tops["1"])


def test_kept_parts_of_blocks_are_no_blocks(pair):
    mask = made(pair, "block")
    name = next(name for name in mask.names if mask.kept(name))
    dense = {n: mask.dense(n) for n in mask.names}
    dense[name].view(-1)[int(mask.positions(name)[0])] = False
    broken = Mask.from_dense(dense, mask.meta)
    with pytest.raises(ValueError, match=rf"granularity=block, but keeps some blocks in part, in {name}"):
        kept_units(broken)
    assert kept_units(Mask.from_dense(dense)) == {}
    assert kept_units(lota.extract(*pair, [0.7])[0.7]) == {}


@pytest.mark.parametrize("granularity", ["row", "column", "block"])
def test_show_counts_and_draws(granularity, tmp_path, capsys):
    base, tuned, *_ = make_pair(tmp_path)
    mask = made((base, tuned), granularity)
    mask.save(tmp_path / "m.pt")
    mask_tools.main(["show", str(tmp_path / "m.pt"), "--png", str(tmp_path)])
    shown = capsys.readouterr().out
    kinds = f"blocks of {BLOCK} x {BLOCK}" if granularity == "block" else f"{granularity}s"
    _, found, rest = shown.partition(f"kept {kinds} by layer and module:\n")
    assert found
    kept = mask.dense("model.layers.1.mlp.up_proj.weight")
    column = rest.splitlines()[0].split().index("up_proj")
    height, width = kept.shape
    if granularity == "block":
        padded = torch.nn.functional.pad(kept.int(), (0, -width % BLOCK, 0, -height % BLOCK))
        blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).amax((1, 3))
        assert width % BLOCK  # the last blocks are smaller
        n, of = int(blocks.sum()), blocks.numel()
    else:
        n, of = int(kept.any(int(granularity == "row")).sum()), height if granularity == "row" else width
    line = next(line for line in rest.splitlines() if line.startswith("1 "))
    assert re.findall(r"(\d+) of (\d+)", line)[column - 1] == (str(n), str(of))
    picture = tmp_path / f"{granularity}s_m.png"
    assert f"picture: {picture}" in shown and picture.read_bytes().startswith(b"\x89PNG")
    picture.write_bytes(b"\x89PNG of a holiday")
    with pytest.raises(SystemExit, match="exists and is no picture of masks"):
        mask_tools.main(["show", str(tmp_path / "m.pt"), "--png", str(tmp_path)])


def test_show_says_that_a_mask_is_not_what_it_says(tmp_path, capsys):
    meta = {"scope": None, "granularity": "row"}
    Mask.from_dense({"layers.0.q.weight": torch.eye(4, dtype=torch.bool)}, meta).save(tmp_path / "m.pt")
    mask_tools.main(["show", str(tmp_path / "m.pt")])
    shown = capsys.readouterr().out
    assert "keeps some rows in part, in layers.0.q.weight" in shown and "kept entries (%)" in shown
    Mask.from_dense({"q.weight": torch.ones(4, 4).bool()}, meta | {"granularity": "block"}).save(
        tmp_path / "m.pt"
    )
    mask_tools.main(["show", str(tmp_path / "m.pt")])
    assert "block=None, which is no side of a block" in capsys.readouterr().out
    rows = torch.eye(4, dtype=torch.bool)[:, :1].expand(4, 3)  # a file of a release without blocks
    Mask.from_dense({"layers.0.q.weight": rows.clone()}, meta).save(tmp_path / "m.pt")
    mask_tools.main(["show", str(tmp_path / "m.pt")])
    assert re.search(r"kept rows by layer and module:\nlayer +q\n0 +1 of 4\n", capsys.readouterr().out)
