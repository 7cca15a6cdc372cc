"""Masks as text and as pictures: density by layer and module, overlap against chance."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lota import plots
from lota.masks.statistics import Density, Overlap
from lota.utils import aligned

if TYPE_CHECKING:
    from matplotlib.figure import Figure


Overlaps = Mapping[tuple[int, int], Overlap]  # numbers of two masks, the smaller first


def density_table(table: Density) -> list[list[str]]:
    """Kept entries in per cent, a line per layer, with totals; the header first."""
    table = table.with_totals()
    lines = [["layer", *table.modules]]
    for layer, shares in zip(table.layers, table.shares, strict=True):
        lines.append([layer, *("-" if np.isnan(share) else f"{100 * share:.2f}" for share in shares)])
    return lines


def density_text(table: Density) -> list[str]:
    return ["kept entries (%) by layer and module:", *aligned(density_table(table))]


def draw_density(table: Density, path: str | os.PathLike | None, title: str) -> Figure:
    """Heat map of the density in per cent."""
    return plots.heatmap(
        100 * table.shares,
        table.layers,
        table.modules,
        path,
        title=title,
        label="kept entries (%)",
        row_label="layer",
        column_label="module",
        limits=(0, None),
        fmt=".2f",
    )


def overlap_table(names: Sequence[str], found: Overlaps) -> list[list[str]]:
    """A line per pair of masks: entries shared and IoU, each with what chance would give; a header first."""
    lines = [["first", "second", "shared", "by chance", "+-", "IoU", "by chance"]]
    for (i, j), pair in found.items():
        chance = [f"{pair.expected:,.1f}", f"{pair.deviation:,.1f}"]
        shares = [f"{pair.iou:.4f}", f"{pair.expected_iou:.4f}"]
        lines.append([names[i], names[j], f"{pair.both:,}", *chance, *shares])
    return lines


def overlap_text(names: Sequence[str], found: Overlaps) -> list[str]:
    return [
        *aligned(overlap_table(names, found), left=2),
        "shared: entries that both keep; by chance: random masks that keep as many entries of each tensor,",
        "+- standard deviation; IoU: shared entries over those that either keeps",
    ]


def draw_overlap(names: Sequence[str], found: Overlaps, path: str | os.PathLike | None) -> Figure:
    """Heat map: IoU below the diagonal, what chance would give above it."""
    values = [[1.0 if i == j else None for j in range(len(names))] for i in range(len(names))]
    for (i, j), pair in found.items():
        values[j][i], values[i][j] = pair.iou, pair.expected_iou
    return plots.heatmap(
        values,
        names,
        names,
        path,
        title="Overlap of masks; above the diagonal: of random masks with the same count per tensor",
        label="intersection over union",
        limits=(0, 1),
    )
