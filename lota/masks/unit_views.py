"""Masks of whole rows, columns or blocks: how many are kept, and a picture of where they lie."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lota import plots
from lota.masks import Mask
from lota.masks.extract.units import Units
from lota.masks.views import Density, arranged, layout
from lota.utils import first_few

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of the picture, in inches
WIDE, HIGH = 11.0, 9.0  # of all matrices together, unless their units are then too small to be seen
WIDEST, HIGHEST = 30.0, 60.0  # whatever their units are
DPI = plots.STYLE["savefig.dpi"]
SEEN = 2.0  # pixels of a unit's shorter side that a larger picture is worth
GAP = 0.06  # between matrices, as a share of the longest side of all
KEPT, FROZEN, EDGE = plots.PALETTE[0], "#e6e6e6", "#888888"


@dataclass(frozen=True)
class KeptUnits:
    """The units of one parameter that a mask keeps."""

    units: Units
    kept: np.ndarray  # bool (matrices, units below each other, units beside each other)

    def shares(self, height: int, width: int) -> np.ndarray:
        """Returns the kept share of the entries under each pixel, fp64 (matrices, height, width).

        Pixels divide each matrix evenly; its last units, which may be smaller, are drawn smaller.
        """
        lines = _coverage(self.units.height, self.units.tall, height)  # (height, units down)
        columns = _coverage(self.units.width, self.units.wide, width)  # (width, units across)
        return lines @ self.kept.astype(np.float64) @ columns.T


def _coverage(size: int, side: int, pixels: int) -> np.ndarray:
    """Share of each pixel over each unit, fp64 (pixels, units): of `size` entries, cut every `side`."""
    edges = np.append(np.arange(0, size, side), size)
    bounds = np.linspace(0, size, pixels + 1)[:, None]
    ends = np.minimum(bounds[1:], edges[1:])
    return np.maximum(ends - np.maximum(bounds[:-1], edges[:-1]), 0) * pixels / size


def kept_units(mask: Mask) -> dict[str, KeptUnits]:
    """Parameter name -> its kept units, of a mask that says it keeps whole ones; else empty.

    Whether a row lies along the lines of the stored matrix or across them, the kept entries tell.
    Raises ValueError if entries of a unit are kept without the others, or the side of a block is not known.
    """
    granularity = mask.meta.get("granularity")
    if granularity not in ("row", "column", "block"):
        return {}
    side: Any = mask.meta.get("block")
    if granularity == "block" and not (isinstance(side, int) and side > 0):
        raise ValueError(f"the mask says granularity=block and block={side}, which is no side of a block")
    found, broken = {}, []
    for name in mask.names:
        *stacks, height, width = mask.shapes[name]
        tried = [(side, side)] if granularity == "block" else [(1, width), (height, 1)]
        if granularity == "column":
            tried.reverse()
        packed = mask.bits[name].numpy()
        for tall, wide in tried:
            units = Units(math.prod(stacks), height, width, tall, wide)
            kept = units.touched(packed)
            if np.array_equal(units.packed(kept), packed):
                found[name] = KeptUnits(units, kept.reshape(units.grid))
                break
        else:
            broken.append(name)
    if broken:
        raise ValueError(
            f"the mask says granularity={granularity}, but keeps some {granularity}s in part, in "
            f"{first_few(broken)}"
        )
    return found


def unit_counts(found: Mapping[str, KeptUnits]) -> Density:
    """Kept and all units by layer and module."""
    return arranged({name: (int(each.kept.sum()), each.kept.size) for name, each in found.items()})


def draw(found: Mapping[str, KeptUnits], path: plots.Target, title: str) -> Figure:
    """All matrices at one scale, a layer per line, kept units in blue; written to `path` if there is one.

    The matrices of a stack of experts are laid side by side and below each other, in their order. Where units
    are smaller than pixels the shade tells the kept share.
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    layers, modules, cells = layout(list(found))
    shapes = {name: _stack_shape(each.units) for name, each in found.items()}
    gap = GAP * max(max(each.units.height, each.units.width) for each in found.values())
    heights, widths = np.zeros(len(layers)), np.zeros(len(modules))
    for name, (row, column) in cells.items():
        down, across = shapes[name]
        heights[row] = max(heights[row], down * found[name].units.height)
        widths[column] = max(widths[column], across * found[name].units.width)
    tops = np.concatenate([[0], np.cumsum(heights + gap)])  # of the layers, in entries; likewise:
    lefts = np.concatenate([[0], np.cumsum(widths + gap)])
    scale = _scale(found, tops[-1], lefts[-1])  # inches per entry
    names_width = plots.CHARACTER * max(map(len, layers)) + 0.4
    with plots.figure_at(path, lefts[-1] * scale + names_width, tops[-1] * scale + 0.8, title) as figure:
        axes = figure.subplots()
        colours = LinearSegmentedColormap.from_list("kept", [FROZEN, KEPT])
        for name, (row, column) in cells.items():
            units, across = found[name].units, shapes[name][1]
            pixels = (max(1, round(side * scale * DPI)) for side in (units.height, units.width))
            for i, shares in enumerate(found[name].shares(*pixels)):
                top = tops[row] + i // across * units.height
                left = lefts[column] + i % across * units.width
                extent = (left, left + units.width, top + units.height, top)
                axes.imshow(shares, colours, vmin=0, vmax=1, extent=extent)
                frame = Rectangle((left, top), units.width, units.height, fill=False, ec=EDGE, lw=0.4)
                axes.add_patch(frame)
        axes.set_xlim(-gap / 2, lefts[-1] - gap / 2)
        axes.set_ylim(tops[-1] - gap / 2, -gap / 2)
        crowded = any(
            plots.CHARACTER * len(name) > wide * scale for name, wide in zip(modules, widths, strict=True)
        )
        axes.set_xticks(lefts[:-1] + widths / 2, modules, rotation=90 if crowded else 0)
        axes.set_yticks(tops[:-1] + heights / 2, layers)
        axes.set_ylabel("layer")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return figure


def _stack_shape(units: Units) -> tuple[int, int]:
    """How many matrices of a stack are drawn below and beside each other: nearly a square."""
    across = max(1, round(math.sqrt(units.stacks * units.height / units.width)))
    across = min(across, units.stacks)
    return math.ceil(units.stacks / across), across


def _scale(found: Mapping[str, KeptUnits], height: float, width: float) -> float:
    """Inches per entry, of matrices that are (height, width) entries together."""
    side = min(min(each.units.tall, each.units.wide) for each in found.values())
    visible = min(SEEN / DPI / side, HIGHEST / height, WIDEST / width)
    return max(visible, min(HIGH / height, WIDE / width))
