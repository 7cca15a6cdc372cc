"""Figures: heat maps, curves over sparsity and over training, and bars.

Each function returns its figure, and writes it if a path is given. Figures belong to no pyplot list, so that
nothing stays open; matplotlib is imported on first use, and its global settings stay as they are.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import os
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lota.storage import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

SOFTWARE = "LoTA"  # in the metadata of a PNG file that `png` made
FORMATS = (".png", ".pdf", ".svg")
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":")
# Sizes in inches
WIDTH = 5.6  # of a figure with one panel of curves
CHARACTER = 0.075  # width of a character of the small print
CELL_WIDTH = 0.9  # of a heat map
CELL_HEIGHT, CELL_HEIGHT_WITH_ERROR = 0.27, 0.42
WIDEST, HIGHEST = 11.0, 9.0  # of all cells together; if they need more they shrink and show no numbers
LOWEST = 1.2  # of all cells together, for the sake of the colour bar

FEW_POINTS = 25  # of a panel's longest curve: up to here each point is marked
Target = str | os.PathLike[str] | None  # where a figure is written, if anywhere
ValueAndError = tuple[float, float | None]  # a value and its standard error
Matrix = Sequence[Sequence[float | None]] | NDArray[np.float64]
STYLE: dict[RcKeyType, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.axisbelow": True,
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "legend.frameon": False,
    "legend.handlelength": 3,
}


@contextlib.contextmanager
def figure_at(path: Target, width: float, height: float, title: str) -> Iterator[Figure]:
    """A figure of this size in inches, and of more for its title; what the block drew is written to `path`.

    Raises ValueError if the path does not end in one of FORMATS.
    """
    import matplotlib
    from matplotlib.figure import Figure

    if path is not None and Path(path).suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: a picture's name ends in {', '.join(FORMATS)}")
    lines = textwrap.wrap(title, int(width / 0.085))
    with matplotlib.rc_context(STYLE):
        figure = Figure((width, height + 0.17 * len(lines)), layout="constrained")
        if lines:
            figure.suptitle("\n".join(lines), fontsize=10)
        yield figure
        if path is not None:
            suffix = Path(path).suffix[1:].lower()
            metadata = {"Software": SOFTWARE} if suffix == "png" else None
            with atomic_path(path) as temporary:
                figure.savefig(temporary, format=suffix, metadata=metadata)


def is_drawn_here(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a PNG that this module drew."""
    with open(path, "rb") as file:
        return f"Software\0{SOFTWARE}".encode() in file.read(1000)


def png(figure: Figure) -> bytes:
    """Returns the figure as the content of a PNG file."""
    import matplotlib

    content = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(content, format="png", metadata={"Software": SOFTWARE})
    return content.getvalue()


def heatmap(
    values: Matrix,
    rows: Sequence[str],
    columns: Sequence[str],
    path: Target = None,
    *,
    title: str,
    label: str,
    row_label: str = "",
    column_label: str = "",
    errors: Matrix | None = None,
    limits: tuple[float | None, float | None] = (None, None),
    fmt: str = ".2f",
) -> Figure:
    """A matrix as coloured cells, the first row on top; numbers are written into them if there is room.

    values: rows x columns; None and nan stay blank. errors: standard errors, of the same shape.
    label: what the values are, with unit, for the colour bar. limits: ends of its scale, None = the data's.
    fmt: of the numbers. Raises ValueError if sizes do not match or the matrix has no number.
    """
    matrix = _matrix(values, len(rows), len(columns))
    if not np.isfinite(matrix).any():
        raise ValueError("the heat map has no number to draw")
    stderrs = None if errors is None else _matrix(errors, *matrix.shape)
    tallest = CELL_HEIGHT if errors is None else CELL_HEIGHT_WITH_ERROR
    cell_width = min(CELL_WIDTH, WIDEST / len(columns))
    cell_height = min(tallest, HIGHEST / len(rows))
    height = max(cell_height * len(rows), LOWEST)
    longest_row, longest_column = (CHARACTER * max(map(len, names)) for names in (rows, columns))
    upright = longest_column > cell_width  # column names that are wider than their cells
    width = cell_width * len(columns) + longest_row + 1.8
    with figure_at(path, width, height + 0.8 + (longest_column if upright else 0.2), title) as figure:
        axes = figure.subplots()
        axes.set_facecolor("#e6e6e6")  # of blank cells
        low = np.nanmin(matrix) if limits[0] is None else limits[0]
        high = np.nanmax(matrix) if limits[1] is None else limits[1]
        high = high if high > low else low + 1.0
        image = axes.imshow(matrix, "viridis", vmin=low, vmax=high, aspect="auto", interpolation="nearest")
        label = textwrap.fill(label, int((height + 0.4) / CHARACTER))
        figure.colorbar(image, ax=axes, pad=0.02, aspect=height / 0.15, label=label)
        if (cell_width, cell_height) == (CELL_WIDTH, tallest):
            _write_numbers(axes, matrix, stderrs, fmt, dark_below=low + 0.45 * (high - low))
        rooms = ((axes.xaxis, columns, cell_width if upright else 1.0), (axes.yaxis, rows, cell_height))
        for axis, names, room in rooms:
            places = range(0, len(names), math.ceil(0.16 / room))  # all of them, or as many as do not touch
            axis.set_ticks(places, [names[place] for place in places])
        axes.tick_params(length=0)
        axes.tick_params(axis="x", rotation=90 if upright else 0)
        axes.set(xlabel=column_label, ylabel=row_label)
    return figure


def _matrix(values: Matrix, n_rows: int, n_columns: int) -> NDArray[np.float64]:
    """float64 (n_rows, n_columns), nan for None."""
    if len(values) != n_rows or any(len(line) != n_columns for line in values):
        raise ValueError(f"a heat map of {n_rows} rows and {n_columns} columns needs a value for each cell")
    return np.array(values, dtype=np.float64)


def _write_numbers(
    axes: Axes, matrix: NDArray[np.float64], errors: NDArray[np.float64] | None, fmt: str, dark_below: float
) -> None:
    """Each number into its cell, white where the cell is dark: in the lower part of viridis."""
    for (row, column), value in np.ndenumerate(matrix):
        if np.isfinite(value):
            error = math.nan if errors is None else errors[row, column]
            text = f"{value:{fmt}}" + (f"\n± {error:{fmt}}" if np.isfinite(error) else "")
            colour = "white" if value < dark_below else "black"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)


def against_sparsity(
    curves: Mapping[str, Sequence[tuple[float, float, float | None]]],
    path: Target = None,
    *,
    label: str,
    title: str = "",
    levels: Mapping[str, ValueAndError] | None = None,
    limits: tuple[float, float] | None = None,
) -> Figure:
    """A curve with error bars per method over the share of weights that train, on a log scale.

    curves: method -> (sparsity in [0, 1), mean, standard error or None) in any order.
    levels: methods without a sparsity, such as full fine-tuning: level lines, with a band of one standard
    error. label: of the values, with unit. limits: of their axis, None = by the data.
    Raises ValueError for a sparsity outside [0, 1), or if there is nothing to draw.
    """
    levels = levels or {}
    sparsities = sorted({sparsity for points in curves.values() for sparsity, _, _ in points})
    if not sparsities:
        raise ValueError("no curve to draw: no method has a value at a sparsity")
    for sparsity in sparsities:
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity={sparsity}: must be at least 0 and below 1")
    looks = _looks([*curves, *levels])
    dashes = itertools.cycle(LINES[1:])
    with figure_at(path, WIDTH, 3.6, title) as figure:
        axes = figure.subplots()
        for method, points in curves.items():
            points = sorted(points, key=lambda point: point[0])
            shares = [100 * (1 - sparsity) for sparsity, _, _ in points]
            means = [mean for _, mean, _ in points]
            errors = [error or 0.0 for _, _, error in points]
            axes.errorbar(shares, means, errors, capsize=3, markersize=5, label=method, **looks[method])
        for method, (mean, error) in levels.items():
            colour = looks[method]["color"]
            axes.axhline(mean, color=colour, linestyle=next(dashes), label=method)
            if error:
                axes.axhspan(mean - error, mean + error, color=colour, alpha=0.15, linewidth=0)
        _name_sparsities(axes, sparsities)
        if limits is not None:
            margin = 0.03 * (limits[1] - limits[0])  # so that a marker at a limit is whole
            axes.set_ylim(limits[0] - margin, limits[1] + margin)
        axes.set_ylabel(textwrap.fill(label, 38))
        axes.grid(alpha=0.3)
        _add_legend(figure, looks)
    return figure


def _name_sparsities(axes: Axes, sparsities: Sequence[float]) -> None:
    """Ticks at the (ascending) sparsities, the densest on the left; names only where they do not touch."""
    shares = [100 * (1 - sparsity) for sparsity in sparsities]
    axes.set_xscale("log")
    axes.set_xlim(shares[0] * 1.25, shares[-1] / 1.25)
    name_width = (shares[0] / shares[-1] * 1.25**2) ** 0.13  # a ratio of shares: 13 % of the axis
    names, last = [], math.inf
    for sparsity, share in zip(sparsities, shares, strict=True):
        named = share * name_width < last
        names.append(f"{sparsity:g}\n({share:.3g} %)" if named else "")
        last = share if named else last
    axes.set_xticks(shares, names)
    axes.minorticks_off()
    axes.set_xlabel("sparsity s (in brackets: share of the scope that trains; log scale)")


class Line(NamedTuple):
    """A curve over training."""

    name: str
    examples: Sequence[float]  # training examples seen
    values: Sequence[float]  # the value there


def over_examples(
    panels: Mapping[str, Sequence[Line]],
    path: Target = None,
    *,
    label: str,
    title: str = "",
) -> Figure:
    """Curves over the training examples seen, panels side by side, such as training and held-out loss.

    panels: what a panel shows -> its lines. Lines of one name, such as the seeds of a method, look the same
    and stand in the legend once. label: of the values, with unit. Raises ValueError if there is no line.
    """
    shown = {panel: [line for line in lines if len(line.examples)] for panel, lines in panels.items()}
    shown = {panel: lines for panel, lines in shown.items() if lines}
    if not shown:
        raise ValueError("no curve to draw: no line has a point")
    looks = _looks([line.name for lines in shown.values() for line in lines])
    with figure_at(path, WIDTH if len(shown) == 1 else 4.0 * len(shown), 3.0, title) as figure:
        every_axes = figure.subplots(1, len(shown), squeeze=False)[0]
        for axes, (panel, lines) in zip(every_axes, shown.items(), strict=True):
            few = max(len(line.examples) for line in lines) <= FEW_POINTS
            for line in lines:
                look = looks[line.name] if few else {**looks[line.name], "marker": ""}
                axes.plot(line.examples, line.values, label=line.name, linewidth=1.2, markersize=4, **look)
            axes.set(title=panel, xlabel="training examples", ylabel=textwrap.fill(label, 30))
            axes.grid(alpha=0.3)
        _add_legend(figure, looks)
    return figure


def bars(
    panels: Mapping[str, Sequence[ValueAndError | None]],
    rows: Sequence[str],
    path: Target = None,
    *,
    title: str = "",
) -> Figure:
    """Horizontal bars, panels side by side over the same rows, such as memory and speed of each run.

    panels: quantity with unit -> its estimate per row, None if it is not known.
    Raises ValueError if sizes do not match, or if there is no value.
    """
    if any(len(values) != len(rows) for values in panels.values()):
        raise ValueError(f"bars of {len(rows)} rows need a value, or None, for each")
    if not any(value for values in panels.values() for value in values):
        raise ValueError("no bar to draw: no row has a value")
    width = min(4.0, CHARACTER * max(map(len, rows))) + 3.0 * len(panels)
    with figure_at(path, width, 1.0 + 0.27 * len(rows), title) as figure:
        every_axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axes, (label, values) in zip(every_axes, panels.items(), strict=True):
            for row, value in enumerate(values):
                mean, error = value or (0.0, None)
                axes.barh(row, mean, xerr=error, capsize=3, color=PALETTE[5], height=0.65)
                text = "-" if value is None else f"{mean:.3g}" if mean < 1000 else f"{mean:,.0f}"
                end = (mean + (error or 0.0), row)
                axes.annotate(text, end, (4, 0), textcoords="offset points", va="center", fontsize=8)
            axes.set_xlabel(textwrap.fill(label, 33))
            axes.margins(x=0.25)
            axes.set_xlim(left=0)
            axes.grid(axis="x", alpha=0.3)
        axes.set_yticks(range(len(rows)), rows)
        axes.invert_yaxis()
    return figure


def _looks(names: Collection[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line style of each method; two methods differ in at least one of them."""
    looks = {}
    for at, name in enumerate(dict.fromkeys(names)):
        shift = at + at // len(PALETTE)  # colours that come again have another marker and line
        marker, line = MARKERS[shift % len(MARKERS)], LINES[shift % len(LINES)]
        looks[name] = {"color": PALETTE[at % len(PALETTE)], "marker": marker, "linestyle": line}
    return looks


def _add_legend(figure: Figure, names: Collection[str]) -> None:
    """Below all axes, in this order, each name once; the figure grows by it."""
    found = [axes.get_legend_handles_labels() for axes in figure.axes]
    lines = {name: line for handles, labels in found for line, name in zip(handles, labels, strict=True)}
    width, height = figure.get_size_inches()
    n_columns = max(1, int(width / (CHARACTER * max(map(len, names)) + 0.6)))  # 0.6 for the sample of a line
    figure.set_size_inches(width, height + 0.1 + 0.2 * math.ceil(len(names) / n_columns))
    figure.legend([lines[name] for name in names], names, loc="outside lower center", ncols=n_columns)
