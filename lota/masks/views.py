"""What masks look like, as tables and pictures: density by layer and module, overlap against chance."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lota import plots
from lota.masks import Mask

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LAYER = re.compile(r"^(.*?)\.(\d+)\.(.*)$")  # stack of layers, index, module
OUTSIDE = "outside"  # of the layers


@dataclass(frozen=True)
class Density:
    """Kept and all entries of every layer and module."""

    layers: list[str]
    modules: list[str]
    kept: np.ndarray  # int64 (layers, modules)
    entries: np.ndarray  # int64 (layers, modules); 0 if a layer has no such module

    @property
    def shares(self) -> np.ndarray:
        """Kept share of the entries, fp64 (layers, modules), nan where there are none."""
        nan = np.full(self.entries.shape, math.nan)
        return np.divide(self.kept, self.entries, out=nan, where=self.entries > 0)

    def table(self) -> list[list[str]]:
        """Returns kept entries in per cent, a line per layer, with totals; the header first."""
        kept, entries = (
            np.block([[part, part.sum(1, keepdims=True)], [part.sum(0), part.sum()]])
            for part in (self.kept, self.entries)
        )
        total = Density([*self.layers, "all"], [*self.modules, "all"], kept, entries)
        lines = [["layer", *total.modules]]
        for layer, shares in zip(total.layers, total.shares, strict=True):
            lines.append([layer, *("-" if np.isnan(share) else f"{100 * share:.2f}" for share in shares)])
        return lines

    def counts(self) -> list[list[str]]:
        """Returns what is kept "of" how many, a line per layer; the header first."""
        lines = [["layer", *self.modules]]
        for layer, kept, entries in zip(self.layers, self.kept, self.entries, strict=True):
            cells = zip(kept.tolist(), entries.tolist(), strict=True)
            lines.append([layer, *(f"{part:,} of {whole:,}" if whole else "-" for part, whole in cells)])
        return lines

    def draw(self, path: plots.Target, title: str) -> Figure:
        """Heat map of the density in per cent, written to `path` if there is one."""
        return plots.heatmap(
            100 * self.shares,
            self.layers,
            self.modules,
            path,
            title=title,
            label="kept entries (%)",
            row_label="layer",
            column_label="module",
            limits=(0, None),
        )


def density(mask: Mask) -> Density:
    """Returns the density by layer and module type, read from the parameters' names."""
    return arranged({name: (mask.kept(name), mask.numel(name)) for name in mask.names})


def arranged(counts: Mapping[str, tuple[int, int]]) -> Density:
    """Parameter name -> what is kept and all of it, by layer and module type."""
    layers, modules, cells = layout(list(counts))
    kept = np.zeros((len(layers), len(modules)), np.int64)
    entries = np.zeros_like(kept)
    for name, (of_kept, of_all) in counts.items():
        kept[cells[name]] += of_kept
        entries[cells[name]] += of_all
    return Density(layers, modules, kept, entries)


def layout(names: Sequence[str]) -> tuple[list[str], list[str], dict[str, tuple[int, int]]]:
    """Returns layers, modules, and parameter name -> number of its layer and of its module.

    The layer is the first number in a name, the module what follows it (its last part only, if that is
    enough to tell the modules apart). Rows are in the order of the layers, columns in that of the names;
    what lies outside of the layers comes last.
    """
    places = {name: _place(name) for name in names}
    stacks = {stack for stack, number, _ in places.values() if number is not None}
    rows = sorted({place[:2] for place in places.values()}, key=lambda row: (row[1] is None, row[0], row[1]))
    inside_first = sorted(places.values(), key=lambda place: place[1] is None)
    columns = list(dict.fromkeys(module for *_, module in inside_first))
    cells = {
        name: (rows.index((stack, number)), columns.index(module))
        for name, (stack, number, module) in places.items()
    }
    layers = [
        OUTSIDE if number is None else f"{stack}.{number}" if len(stacks) > 1 else str(number)
        for stack, number in rows
    ]
    last_parts = [module.rpartition(".")[2] for module in columns]
    return layers, last_parts if len(set(last_parts)) == len(columns) else columns, cells


def _place(name: str) -> tuple[str, int | None, str]:
    """(stack of layers, layer, module) of a parameter's name; the layer is None outside of any stack."""
    found = _LAYER.match(name.removesuffix(".weight"))
    return (found[1], int(found[2]), found[3]) if found else ("", None, name.removesuffix(".weight"))


@dataclass(frozen=True)
class Overlap:
    """Entries that two masks keep, and what chance would give.

    Chance: two random masks that keep as many entries of each tensor as these do (hypergeometric, tensor by
    tensor; `random_like` draws such masks).
    """

    first: int  # kept by the first
    second: int
    both: int
    expected: float  # mean of `both` by chance
    deviation: float  # standard deviation of `both` by chance

    @property
    def iou(self) -> float:
        """Intersection over union, nan for two empty masks."""
        return self._over_union(self.both)

    @property
    def expected_iou(self) -> float:
        """The expected intersection over the union that goes with it."""
        return self._over_union(self.expected)

    def _over_union(self, both: float) -> float:
        union = self.first + self.second - both
        return both / union if union else math.nan


Overlaps = Mapping[tuple[int, int], Overlap]  # numbers of two masks, the smaller first -> their overlap


def overlap(first: Mask, second: Mask) -> Overlap:
    """Returns the overlap of two masks of one model, in the memory of a tensor's bits.

    Raises ValueError for masks of different models.
    """
    first.check_same_model(second)
    both, expected, variance = 0, 0.0, 0.0
    for name in (name for name in first.names if name in second):
        a, b, n = first.kept(name), second.kept(name), first.numel(name)
        if not a or not b:
            continue
        shared = np.bitwise_and(first.bits[name].numpy(), second.bits[name].numpy())
        both += int(np.bitwise_count(shared).sum(dtype=np.int64))
        # drawing b of n entries without putting back, a of which are kept: mean and variance of the hits
        expected += a * b / n
        variance += a * b * (n - a) * (n - b) / (n * n * max(n - 1, 1))
    return Overlap(first.n_kept, second.n_kept, both, expected, math.sqrt(variance))


def overlap_table(names: Sequence[str], found: Overlaps) -> list[list[str]]:
    """Returns a line per two masks: entries shared and IoU, each with what chance gives; the header first."""
    lines = [["first", "second", "shared", "by chance", "+-", "IoU", "by chance"]]
    for (i, j), two in found.items():
        chance = [f"{two.expected:,.1f}", f"{two.deviation:,.1f}"]
        shares = [f"{two.iou:.4f}", f"{two.expected_iou:.4f}"]
        lines.append([names[i], names[j], f"{two.both:,}", *chance, *shares])
    return lines


def draw_overlap(names: Sequence[str], found: Overlaps, path: plots.Target) -> Figure:
    """Heat map: IoU below the diagonal, what chance gives above it; written to `path` if there is one."""
    values = np.full((len(names), len(names)), math.nan)
    np.fill_diagonal(values, 1)
    for (i, j), two in found.items():
        values[j, i], values[i, j] = two.iou, two.expected_iou
    return plots.heatmap(
        values,
        names,
        names,
        path,
        title="Overlap of masks; above the diagonal: of random masks with the same count per tensor",
        label="intersection over union",
        limits=(0, 1),
    )
