"""Figures for papers: each function draws one, and returns it.

With a path the figure is also written, whole or not at all, as PNG, PDF or SVG by the path's ending. Values
are drawn as they are given, so `label` names what they are and their unit. Methods differ by colour (the
palette of Okabe and Ito, which colour-blind readers can tell apart), marker and line style; legends stand
outside the axes, where they cover nothing. matplotlib is imported on first use, and its global settings stay
as they are.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lota.report.figures import (
    CHARACTER,
    LINES,
    WIDTH,
    add_legend,
    finish,
    legend_height,
    looks,
    new_figure,
    set_title,
    wrapped,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOWEST = 1.2  # inches of a heat map's cells together
WIDEST, HIGHEST = 11.0, 9.0  # inches that the cells of a heat map may take together
NAMED = 6.5  # inches of cells that are made wide enough for the column's name


def heatmap(
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    path: str | os.PathLike | None = None,
    *,
    title: str,
    label: str,
    row_label: str = "",
    column_label: str = "",
    errors: Sequence[Sequence[float | None]] | None = None,
    limits: tuple[float | None, float | None] = (None, None),
    fmt: str = ".2f",
) -> Figure:
    """A matrix as coloured cells, the first row on top; numbers are written into them where they fit.

    values: rows x columns; None and nan stay blank. errors: standard errors, of the same shape.
    label: what the values are, with unit, for the colour bar. limits: ends of its scale, None = the data's.
    fmt: of the numbers. Raises ValueError for sizes that do not match or a matrix without any number.
    """
    from matplotlib.colors import Normalize

    matrix = _matrix(values, len(rows), len(columns))
    if not np.isfinite(matrix).any():
        raise ValueError("a heat map without any number")
    texts = _cell_texts(matrix, None if errors is None else _matrix(errors, *matrix.shape), fmt)
    cell, written = _cell_size(texts, columns)
    with new_figure(*_heatmap_size(cell, rows, columns)) as figure:
        axes = figure.subplots()
        low = np.nanmin(matrix) if limits[0] is None else limits[0]
        high = np.nanmax(matrix) if limits[1] is None else limits[1]
        norm = Normalize(low, high if high > low else low + 1.0)
        axes.set_facecolor("#e6e6e6")  # blank cells
        image = axes.imshow(matrix, cmap="viridis", norm=norm, aspect="auto", interpolation="nearest")
        height = max(cell[1] * len(rows), LOWEST)
        bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=height / 0.15)
        bar.set_label(wrapped(label, height + 0.4))
        if written:
            for (row, column), colour in np.ndenumerate(_readable(image.to_rgba(matrix))):
                axes.text(column, row, texts[row][column], ha="center", va="center", color=colour, fontsize=8)
        _name_cells(axes, rows, columns, cell)
        axes.set_ylabel(wrapped(row_label, height))
        axes.set_xlabel(column_label)
        set_title(figure, title)
    return finish(figure, path)


def against_sparsity(
    curves: Mapping[str, Sequence[tuple[float, float, float | None]]],
    path: str | os.PathLike | None = None,
    *,
    label: str,
    title: str = "",
    levels: Mapping[str, tuple[float, float | None]] | None = None,
    limits: tuple[float | None, float | None] = (None, None),
) -> Figure:
    """A curve with error bars per method over the share of weights that train, on a log scale.

    curves: method -> (sparsity in [0, 1), mean, standard error or None) in any order.
    levels: methods without a sparsity, such as full fine-tuning -> (mean, standard error or None): level
    lines with a band of one standard error. label: of the values, with unit. limits: of their axis, None = by
    the data. Raises ValueError for a sparsity outside [0, 1), or when there is nothing to draw.
    """
    sparsities = sorted({point[0] for points in curves.values() for point in points})
    wrong = [s for s in sparsities if not 0 <= s < 1]
    if wrong:
        raise ValueError(f"sparsity={wrong[0]}: must be at least 0 and below 1")
    if not sparsities:
        raise ValueError("no curve to draw: no method has a value at a sparsity")
    styles = looks([*curves, *(levels or {})])
    dashes = itertools.cycle(LINES[1:])
    with new_figure(WIDTH, 3.6 + legend_height(styles, WIDTH)) as figure:
        axes = figure.subplots()
        for method, points in curves.items():
            points = sorted(points, key=lambda point: point[0])
            shares = [100 * (1 - s) for s, _, _ in points]
            means = [mean for _, mean, _ in points]
            bars = [error or 0.0 for _, _, error in points]
            axes.errorbar(shares, means, bars, capsize=3, markersize=5, label=method, **styles[method])
        for method, (mean, error) in (levels or {}).items():
            colour = styles[method]["color"]
            axes.axhline(mean, color=colour, linestyle=next(dashes), label=method)
            if error:
                axes.axhspan(mean - error, mean + error, color=colour, alpha=0.15, linewidth=0)
        _sparsity_axis(axes, sparsities)
        axes.set_ylim(*_with_margin(limits))
        axes.set_ylabel(wrapped(label, 2.9))
        axes.grid(alpha=0.3)
        set_title(figure, title)
        add_legend(figure, styles)
    return finish(figure, path)


def _sparsity_axis(axes: Axes, sparsities: Sequence[float]) -> None:
    """Ticks at the sparsities, the densest on the left; names only where they do not touch."""
    shares = [100 * (1 - s) for s in sparsities]
    axes.set_xscale("log")
    axes.set_xlim(max(shares) * 1.25, min(shares) / 1.25)
    width = math.log(max(shares) / min(shares) * 1.25**2)
    names, last = [], math.inf
    for sparsity, share in zip(sparsities, shares, strict=True):
        far = math.log(last / share) / width > 0.13 if math.isfinite(last) else True
        names.append(f"{sparsity:g}\n({share:.3g} %)" if far else "")
        last = share if far else last
    axes.set_xticks(shares, names)
    axes.minorticks_off()
    axes.set_xlabel("sparsity s (in brackets: share of the scope that trains; log scale)")


def _with_margin(limits: tuple[float | None, float | None]) -> tuple[float | None, float | None]:
    """Ends of an axis a little further out, so that a marker at a limit is whole."""
    low, high = limits
    if low is None or high is None:
        return limits
    return low - 0.03 * (high - low), high + 0.03 * (high - low)


def _matrix(values: Sequence[Sequence[float | None]], n_rows: int, n_columns: int) -> np.ndarray:
    """float64 with nan for what is absent."""
    lines = [[math.nan if value is None else float(value) for value in line] for line in values]
    if len(lines) != n_rows or any(len(line) != n_columns for line in lines):
        raise ValueError(f"a heat map of {n_rows} rows and {n_columns} columns needs a value for each cell")
    return np.array(lines, dtype=np.float64).reshape(n_rows, n_columns)


def _cell_texts(matrix: np.ndarray, errors: np.ndarray | None, fmt: str) -> list[list[str]]:
    texts = [[f"{value:{fmt}}" if np.isfinite(value) else "" for value in line] for line in matrix]
    if errors is not None:
        for (row, column), error in np.ndenumerate(errors):
            if texts[row][column] and np.isfinite(error):
                texts[row][column] += f"\n± {error:{fmt}}"
    return texts


def _cell_size(texts: Sequence[Sequence[str]], columns: Sequence[str]) -> tuple[tuple[float, float], bool]:
    """((width, height) of a cell in inches, whether there is room for the numbers)."""
    lines = [line for row in texts for text in row for line in text.split("\n")]
    width = CHARACTER * max(map(len, lines)) + 0.2
    height = 0.42 if any("\n" in text for row in texts for text in row) else 0.27
    n_rows, n_columns = len(texts), len(columns)
    if width * n_columns > WIDEST or height * n_rows > HIGHEST:
        return (min(width, WIDEST / n_columns), min(height, HIGHEST / n_rows)), False
    named = CHARACTER * max(map(len, columns)) + 0.15
    return (max(width, named) if named * n_columns <= NAMED else width, height), True


def _heatmap_size(
    cell: tuple[float, float], rows: Sequence[str], columns: Sequence[str]
) -> tuple[float, float]:
    """(width, height) of the figure in inches: cells, names, colour bar and title."""
    longest = max(map(len, columns))
    below = CHARACTER * longest if _turned(columns, cell) else 0.2
    width = cell[0] * len(columns) + CHARACTER * max(map(len, rows)) + 1.8
    return max(width, 3.6), max(cell[1] * len(rows), LOWEST) + below + 1.0


def _readable(colours: np.ndarray) -> np.ndarray:
    """Black or white for text on each colour (..., 4), by its relative luminance (WCAG 2)."""
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    return np.where(linear[..., :3] @ [0.2126, 0.7152, 0.0722] > 0.18, "black", "white")


def _turned(columns: Sequence[str], cell: tuple[float, float]) -> bool:
    """Whether column names are wider than their cells, so that they stand upright."""
    return CHARACTER * max(map(len, columns)) > cell[0]


def _name_cells(axes: Axes, rows: Sequence[str], columns: Sequence[str], cell: tuple[float, float]) -> None:
    """Row and column names, every second or third of them where they would touch."""
    turned = _turned(columns, cell)
    for names, axis, room in ((columns, axes.xaxis, cell[0] if turned else 1.0), (rows, axes.yaxis, cell[1])):
        every = max(1, math.ceil(0.16 / room))
        places = range(0, len(names), every)
        axis.set_ticks(places, [names[at] for at in places])
    axes.tick_params(length=0)
    axes.tick_params(axis="x", rotation=90 if turned else 0)
