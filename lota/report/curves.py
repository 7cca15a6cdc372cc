"""Figures of training runs: curves over the examples seen, bars of memory and speed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from lota.report.figures import (
    CHARACTER,
    PALETTE,
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
    from matplotlib.figure import Figure

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
