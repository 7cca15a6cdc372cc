"""Figures: what is given reaches the axes, names do not touch, files are whole or absent."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest

from lota import plots
from lota.plots import Line, bars, over_examples

SIGNATURES = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}


def check_legible(figure) -> None:
    """No text of the drawn figure touches another one or is cut off by its edge."""
    figure.draw_without_rendering()
    texts = [text for legend in figure.legends for text in legend.get_texts()]
    texts += [figure._suptitle] if figure._suptitle else []
    for axes in figure.axes:
        texts += [*axes.texts, axes.title, axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())  # ticks outside are not drawn
            labels = zip(
                axis.get_ticklocs(), axis.get_ticklabels(), strict=False
            )  # shared ones stand elsewhere
            texts += [label for place, label in labels if low <= place <= high]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
    pairs = itertools.combinations(boxes, 2)
    assert [(a, b) for (a, first), (b, second) in pairs if first.overlaps(second)] == []
    edge = figure.bbox
    inside = [b.x0 >= edge.x0 and b.y0 >= edge.y0 and b.x1 <= edge.x1 and b.y1 <= edge.y1 for _, b in boxes]
    assert all(inside), [text for (text, _), within in zip(boxes, inside, strict=True) if not within]


@pytest.mark.parametrize("ending", list(SIGNATURES))
def test_heatmap_shows_its_numbers(tmp_path, ending):
    values = [[12.34, None], [float("nan"), 50.0]]
    figure = plots.heatmap(
        values,
        ["0", "1"],
        ["q_proj", "down_proj"],
        tmp_path / f"h{ending}",
        title="Density",
        label="kept entries (%)",
        row_label="layer",
        column_label="module",
        errors=[[1.25, None], [None, None]],
        fmt=".1f",
    )
    axes, bar = figure.axes
    image = axes.images[0].get_array()
    assert image[0, 0] == 12.34 and image[1, 1] == 50.0
    assert image.mask.tolist() == [[False, True], [True, False]]
    assert [text.get_text() for text in axes.texts] == ["12.3\n± 1.2", "50.0"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("module", "layer")
    assert bar.get_ylabel() == "kept entries (%)"
    assert figure.get_suptitle() == "Density"
    assert (tmp_path / f"h{ending}").read_bytes().startswith(SIGNATURES[ending])
    assert [path.name for path in tmp_path.iterdir()] == [f"h{ending}"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n_rows", "n_columns"), [(1, 1), (3, 3), (4, 7), (12, 7), (80, 7), (40, 40), (7, 130)]
)
def test_names_and_numbers_of_a_heatmap_neither_touch_nor_leave_it(n_rows, n_columns):
    values = np.linspace(0, 100, n_rows * n_columns).reshape(n_rows, n_columns)
    rows = [f"run_{i}_lota_0.9" for i in range(n_rows)]
    columns = [f"self_attn.q_proj_{i}" for i in range(n_columns)]
    figure = plots.heatmap(values, rows, columns, title="Overlap " * 10, label="IoU", fmt=".1f")
    check_legible(figure)
    axes = figure.axes[0]
    assert len(axes.texts) in (0, n_rows * n_columns)
    assert bool(axes.texts) == (n_rows <= 12 and n_columns <= 7)
    named = [label.get_text() for label in axes.get_yticklabels()]
    assert named == rows[:: rows.index(named[1]) if len(named) > 1 else 1]


def test_limits_of_a_heatmap_and_one_value_everywhere():
    figure = plots.heatmap([[5, 5]], ["a"], ["b", "c"], title="", label="%")
    assert figure.axes[0].images[0].get_clim() == (5, 6)
    figure = plots.heatmap([[5, 7]], ["a"], ["b", "c"], title="", label="%", limits=(0, None))
    assert figure.axes[0].images[0].get_clim() == (0, 7)


def test_against_sparsity_shows_means_errors_and_levels():
    figure = plots.against_sparsity(
        {"LoTA": [(0.9, 80.0, 2.0), (0.5, 90.0, 1.0), (0.99, 60.0, None)], "random mask": [(0.9, 70.0, 3.0)]},
        label="accuracy (%)",
        title="toy_sort",
        levels={"full fine-tuning": (95.0, 1.5), "base model": (1.0, None)},
        limits=(0, 100),
    )
    axes = figure.axes[0]
    lota, chance = axes.containers
    assert lota.lines[0].get_xdata().tolist() == pytest.approx([50, 10, 1])
    assert lota.lines[0].get_ydata().tolist() == [90, 80, 60]
    bars = [segment[:, 1].tolist() for segment in lota.lines[2][0].get_segments()]
    assert bars == [[89, 91], [78, 82], [60, 60]]
    assert chance.lines[0].get_ydata().tolist() == [70]
    dense, base = (line for line in axes.lines if line.get_label() in ("full fine-tuning", "base model"))
    assert (dense.get_ydata()[0], base.get_ydata()[0]) == (95, 1)
    (band,) = axes.patches  # none for a level without an error
    assert (band.get_y(), band.get_height()) == (93.5, 3)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["LoTA", "random mask", "full fine-tuning", "base model"]
    names = {
        round(place): label.get_text()
        for place, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
    }
    assert names == {50: "0.5\n(50 %)", 10: "0.9\n(10 %)", 1: "0.99\n(1 %)"}
    left, right = axes.get_xlim()
    assert left > 50 and right < 1  # the densest on the left
    assert axes.get_ylim()[0] < 0 < 100 < axes.get_ylim()[1]


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 3, 9, 20])
def test_many_methods_and_sparsities_stay_legible(n):
    sparsities = [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999]
    curves = {
        f"method {'of a long name ' * 2}{i}": [(s, 90 - i * s, 1.0) for s in sparsities] for i in range(n)
    }
    figure = plots.against_sparsity(curves, label="accuracy (%)", title="Accuracy against sparsity")
    check_legible(figure)
    axes = figure.axes[0]
    looks = {
        (c.lines[0].get_color(), c.lines[0].get_marker(), c.lines[0].get_linestyle()) for c in axes.containers
    }
    assert len(looks) == n
    assert axes.get_window_extent().height > 250


TWO = (["a", "b"], ["c"])  # rows and columns of a heat map


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda p: plots.heatmap([[1.0]], *TWO, p, title="", label=""), "2 rows and 1 columns"),
        (lambda p: plots.heatmap([[1.0], [1.0, 2.0]], *TWO, p, title="", label=""), "needs a value"),
        (lambda p: plots.heatmap([[None], [math.nan]], *TWO, p, title="", label=""), "no number to draw"),
        (lambda p: plots.against_sparsity({"a": [(1.0, 1.0, None)]}, p, label=""), r"sparsity=1\.0"),
        (lambda p: plots.against_sparsity({"a": []}, p, label="", levels={"b": (1, None)}), "no curve"),
        (
            lambda p: plots.against_sparsity({"a": [(0.5, 1.0, None)]}, p.with_suffix(".jpeg"), label=""),
            r"h\.jpeg: a picture's name ends in \.png, \.pdf, \.svg",
        ),
        (lambda p: plots.over_examples({"empty": [Line("a", [], [])]}, p, label=""), "no line has a point"),
        (lambda p: plots.bars({"x": [(1.0, None)]}, ["a", "b"], p), "2 rows"),
        (lambda p: plots.bars({"x": [None]}, ["a"], p), "no row has a value"),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path, draw, message: str):
    with pytest.raises(ValueError, match=message):
        draw(tmp_path / "h.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_matplotlib_comes_on_first_use_and_keeps_its_settings():
    code = (
        "import sys, lota.plots as p; assert 'matplotlib' not in sys.modules;"
        "p.heatmap([[1]], ['a'], ['b'], title='', label='');"
        "import matplotlib; assert 'matplotlib.pyplot' not in sys.modules;"
        "assert matplotlib.rcParams['font.size'] == matplotlib.rcParamsDefault['font.size']"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_lines_of_one_name_look_the_same_and_stand_in_the_legend_once():
    panels = {
        "training": [
            Line("LoTA", [1, 2], [3.0, 2.0]),
            Line("dense", [1], [4.0]),
            Line("LoTA", [1, 2], [3.5, 1.0]),
        ],
        "held-out": [Line("LoTA", range(100), [float(i) for i in range(100)])],
        "empty": [Line("nobody", [], [])],
    }
    figure = over_examples(panels, label="loss (nats per response token)", title="Loss")
    training, held_out = figure.axes
    first, dense, again = training.lines
    assert first.get_color() == again.get_color() == held_out.lines[0].get_color() != dense.get_color()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["LoTA", "dense"]
    assert first.get_marker() == "o" and held_out.lines[0].get_marker() == ""  # too many points to mark


def test_bars_have_values_errors_and_gaps(tmp_path):
    panels = {"peak memory (GiB)": [(2.0, 0.5), None], "speed (tokens/s)": [(1234.5, None), (10.0, 0.0)]}
    figure = bars(panels, ["a", "b"], tmp_path / "b.pdf")
    memory, speed = figure.axes
    assert [bar.get_width() for bar in memory.patches] == [2.0, 0.0]
    assert [text.get_text() for text in memory.texts] == ["2", "-"]
    assert [text.get_text() for text in speed.texts] == ["1,234", "10"]
    assert memory.containers[0].lines[2][0].get_segments()[0][:, 0].tolist() == [1.5, 2.5]
    assert (tmp_path / "b.pdf").read_bytes().startswith(b"%PDF")
