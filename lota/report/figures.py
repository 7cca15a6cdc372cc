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

from lota.atomic import atomic_path

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
