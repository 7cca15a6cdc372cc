"""What all figures share: size, style, title, legend, and how they are written.

Figures belong to no pyplot list, so that nothing stays open; matplotlib is imported on first use, and its
global settings stay as they are.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import textwrap
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lota.utils import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure


FORMATS = (".png", ".pdf", ".svg")
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":")
WIDTH = 5.6  # inches of a figure of curves
CHARACTER = 0.075  # inches that a character of the small print takes
STYLE = {"font.size": 9, "axes.titlesize": 10, "figure.dpi": 100, "savefig.dpi": 200, "axes.axisbelow": True}


@contextlib.contextmanager
def new_figure(width: float, height: float) -> Iterator[Figure]:
    """A figure of this size in inches, outside pyplot's list: nothing stays open."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def finish(figure: Figure, path: str | os.PathLike | None) -> Figure:
    """Write the figure if there is a path; returns it. Raises ValueError for another ending than FORMATS."""
    if path is None:
        return figure
    ending = Path(path).suffix.lower()
    if ending not in FORMATS:
        raise ValueError(f"{path}: a picture's name ends in {', '.join(FORMATS)}")
    import matplotlib

    with matplotlib.rc_context(STYLE), atomic_path(path) as temporary:
        figure.savefig(temporary, format=ending[1:])
    return figure


def png(figure: Figure) -> bytes:
    """The figure as the content of a PNG file."""
    import matplotlib

    content = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(content, format="png")
    return content.getvalue()


def looks(names: Collection[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line style of each method: all differ up to the palette's size."""
    found = {}
    for at, name in enumerate(dict.fromkeys(names)):
        turn = at // len(PALETTE)
        style = {"color": PALETTE[at % len(PALETTE)], "marker": MARKERS[(at + turn) % len(MARKERS)]}
        found[name] = style | {"linestyle": LINES[(at + turn) % len(LINES)]}
    return found


def set_title(figure: Figure, title: str) -> None:
    """Above the axes, broken into lines; the figure grows by those after the first."""
    if title:
        width, height = figure.get_size_inches()
        lines = textwrap.wrap(title, int(width / 0.085))
        figure.set_size_inches(width, height + 0.17 * (len(lines) - 1))
        figure.suptitle("\n".join(lines), fontsize=10)


def wrapped(text: str, room: float) -> str:
    """The text in lines that fit into so many inches; words stay whole."""
    return "\n".join(textwrap.wrap(text, max(8, int(room / CHARACTER)), break_long_words=False))


def legend_columns(names: Collection[str], width: float) -> int:
    """How many names, with their samples of a line, fit beside each other."""
    room = int(width / (CHARACTER * max(map(len, names)) + 0.6))
    return max(1, min(len(names), room))


def legend_height(names: Collection[str], width: float) -> float:
    return 0.1 + 0.2 * math.ceil(len(names) / legend_columns(names, width))


def add_legend(figure: Figure, names: Collection[str]) -> None:
    """Below all axes, in this order; a name that stands for several lines once."""
    handles = {}
    for axes in figure.axes:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(
        [handles[name] for name in names],
        names,
        loc="outside lower center",
        ncols=legend_columns(names, figure.get_size_inches()[0]),
        frameon=False,
        handlelength=3,
    )


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


FEW_POINTS = 25  # of a panel's longest curve, up to which points are marked


class Line(NamedTuple):
    """A curve: its name, training examples seen, values there."""

    name: str
    examples: Sequence[float]
    values: Sequence[float]


def over_examples(
    panels: Mapping[str, Sequence[Line]],
    path: str | os.PathLike | None = None,
    *,
    label: str,
    title: str = "",
) -> Figure:
    """Curves over the training examples seen, panels side by side, such as training and held-out loss.

    panels: what a panel shows -> its lines. Lines of one name, such as the seeds of a method, look the same
    and stand in the legend once. label: of the values, with unit. Raises ValueError when there is no line.
    """
    shown = {panel: [line for line in lines if len(line.examples)] for panel, lines in panels.items()}
    shown = {panel: lines for panel, lines in shown.items() if lines}
    if not shown:
        raise ValueError("no curve to draw: no line has a point")
    styles = looks(dict.fromkeys(line.name for lines in shown.values() for line in lines))
    width = WIDTH if len(shown) == 1 else 4.0 * len(shown)
    with new_figure(width, 3.0 + legend_height(styles, width)) as figure:
        for axes, (panel, lines) in zip(
            figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True
        ):
            few = max(len(line.examples) for line in lines) <= FEW_POINTS
            for line in lines:
                look = styles[line.name] if few else {**styles[line.name], "marker": ""}
                axes.plot(line.examples, line.values, label=line.name, linewidth=1.2, markersize=4, **look)
            axes.set_title(panel)
            axes.set_xlabel("training examples")
            axes.set_ylabel(wrapped(label, 2.3))
            axes.grid(alpha=0.3)
        set_title(figure, title)
        add_legend(figure, styles)
    return finish(figure, path)


def bars(
    panels: Mapping[str, Sequence[tuple[float, float | None] | None]],
    rows: Sequence[str],
    path: str | os.PathLike | None = None,
    *,
    title: str = "",
) -> Figure:
    """Horizontal bars, panels side by side over the same rows, such as memory and speed of each run.

    panels: quantity with unit -> (value, standard error or None) per row, None where it is not known.
    Raises ValueError for sizes that do not match, or when there is no value.
    """
    if any(len(values) != len(rows) for values in panels.values()):
        raise ValueError(f"bars of {len(rows)} rows need a value, or None, for each")
    if not any(value for values in panels.values() for value in values):
        raise ValueError("no bar to draw: no row has a value")
    width = min(4.0, CHARACTER * max(map(len, rows))) + 3.0 * len(panels)
    with new_figure(width, 1.0 + 0.27 * len(rows)) as figure:
        for axes, (label, values) in zip(
            figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels.items(), strict=True
        ):
            for at, value in enumerate(values):
                mean, error = value or (0.0, None)
                axes.barh(at, mean, xerr=error, capsize=3, color=PALETTE[5], height=0.65)
                text = "-" if value is None else f"{mean:.3g}" if mean < 1000 else f"{mean:,.0f}"
                axes.annotate(
                    text,
                    (mean + (error or 0.0), at),
                    (4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                )
            axes.set_xlabel(wrapped(label, 2.5))
            axes.margins(x=0.25)
            axes.set_xlim(left=0)
            axes.grid(axis="x", alpha=0.3)
        axes.set_yticks(range(len(rows)), rows)
        axes.invert_yaxis()
        set_title(figure, title)
    return finish(figure, path)
