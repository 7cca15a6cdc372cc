"""What `python -m scripts.granularity_study` shows: granularities and step times, then ways to choose units.

Means over seeds ± standard error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from lota.evaluate.estimates import mean_and_stderr
from lota.plots import MARKERS, PALETTE, ValueAndError, figure_at
from lota.report.page import Section
from scripts.cells import Record, read_cells
from scripts.granularity_study import (
    CHOICES,
    CHOSEN_KINDS,
    CHOSEN_SPARSITIES,
    KINDS,
    SPARSITIES,
    TIMES,
    USUAL,
    WORKLOADS,
    named,
)
from scripts.methods import DENSE
from scripts.study_report import SIZE, Table, about_sections, facts, study_sections, write_report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Measure:
    """What is reported of a task's runs: a number of their records."""

    task: str
    key: str  # `nats` or `score`
    label: str
    factor: float = 1.0
    digits: int = 2

    def of(self, record: Record) -> float | None:
        """None for a run that diverged, or was not scored."""
        value = record.get(self.key)
        return None if value is None else self.factor * float(value)


MEASURES = (
    Measure("toy_sort", "score", "toy_sort, exact match (%)", 100, 1),
    Measure("toy_sort", "nats", "toy_sort, nats per token", digits=3),
    Measure("sql", "nats", "sql, nats per token", digits=3),
    Measure("sql", "score", "sql, ROUGE-1 (%)", 100, 1),
    Measure("gsm8k", "nats", "gsm8k, nats per token", digits=3),
)


class Found:
    """The records of a study, by workload."""

    def __init__(self, records: Mapping[str, Sequence[Record]]):
        self.records = records

    def runs(self, task: str, kind: str, sparsity: float | None, choice: str = USUAL) -> list[Record]:
        """The records of what is reported."""
        wanted = {"part": "main", "method": named(kind, choice), "sparsity": sparsity}
        return [
            record
            for record in self.records.get(task, ())
            if {key: record["cell"].get(key) for key in wanted} == wanted
        ]

    def base(self, task: str) -> list[Record]:
        return [r for r in self.records.get(task, ()) if r["cell"]["part"] == "base"]

    def time(self, kind: str, sparsity: float) -> float | None:
        """Median step time as a multiple of the dense baseline's in the same minutes."""
        for record in self.records.get(Path(TIMES).stem, ()):
            if record["cell"]["sparsity"] == sparsity:
                return float(record["seconds"][kind] / record["seconds"][DENSE.name])
        return None


def estimate(measure: Measure, runs: Sequence[Record]) -> ValueAndError | None:
    """Mean and standard error over seeds; a run that diverged counts as infinite loss."""
    values = [measure.of(run) for run in runs]
    if measure.key == "nats":
        values = [math.inf if value is None else value for value in values]
    known = [value for value in values if value is not None]
    return mean_and_stderr(known) if known else None


def shown(measure: Measure, runs: Sequence[Record]) -> str:
    found = estimate(measure, runs)
    if found is None:
        return "-"
    mean, error = found
    text = f"{mean:.{measure.digits}f}"
    return text if error is None else f"{text} ± {error:.{measure.digits}f}"


def granularity_table(found: Found) -> Table:
    """A line per kind of mask and sparsity, with the dense run and the base."""
    tasks = list(dict.fromkeys(measure.task for measure in MEASURES))
    seeds = {t: len({r["cell"]["seed"] for r in found.runs(t, "element", 0.9, USUAL)}) for t in tasks}
    header = ["mask", "sparsity", "step time, dense = 1", *(measure.label for measure in MEASURES)]
    lines = [[*header, "share of the squared change kept (%)", "learning rates"]]

    def add(name: str, sparsity: object, time: float | None, runs: dict[str, list[Record]]) -> None:
        cells = [name, str(sparsity), "-" if time is None else f"{time:.2f}"]
        cells += [shown(measure, runs[measure.task]) for measure in MEASURES]
        energies = [[r["mask"]["energy"] for r in runs[t] if r.get("mask")] for t in tasks]
        rates = [f"{runs[t][0]['cell']['lr']:g}" if runs[t] and name != "base" else "-" for t in tasks]
        means = (f"{100 * sum(part) / len(part):.0f}" if part else "-" for part in energies)
        lines.append([*cells, ", ".join(means), ", ".join(rates)])

    for kind in KINDS:
        for sparsity in SPARSITIES:
            runs = {task: found.runs(task, kind, sparsity, USUAL) for task in tasks}
            add(kind, sparsity, found.time(kind, sparsity), runs)
    add(DENSE.name, "-", 1.0, {task: found.runs(task, DENSE.name, None) for task in tasks})
    add("base", "-", None, {task: found.base(task) for task in tasks})
    said = ", ".join(f"{task} {n}" for task, n in seeds.items())
    text = f"Seeds: {said}. Lists in the last two columns: {', '.join(tasks)}."
    return Table("Granularities", lines, text)


def choice_table(found: Found) -> Table:
    """A line per kind of units, sparsity and way to choose them."""
    measures = [measure for measure in MEASURES if measure.task in ("toy_sort", "sql")]
    header = ["mask", "sparsity", "units chosen by", *(measure.label for measure in measures)]
    header += ["share of the squared change kept (%)", "entries that the sum of squares keeps too (%)"]
    lines = [header]
    for kind in CHOSEN_KINDS:
        for sparsity in CHOSEN_SPARSITIES:
            for choice in CHOICES:
                runs = {m.task: found.runs(m.task, kind, sparsity, choice) for m in measures}
                toy = runs["toy_sort"]
                if not toy:
                    continue
                cells = [shown(measure, runs[measure.task]) for measure in measures]
                means = (
                    f"{100 * fmean(run['mask'][key] for run in toy):.0f}" for key in ("energy", "shared")
                )
                lines.append([kind, str(sparsity), choice, *cells, *means])
    return Table("Ways to choose units", lines)


PANELS = [m for m in MEASURES if (m.task == "toy_sort") == (m.key == "score")]


def draw(found: Found, measures: Sequence[Measure] = PANELS) -> Figure:
    """Score or loss of each task against step time: a line per kind of mask, a marker per sparsity."""
    with figure_at(None, SIZE[0] * len(measures), SIZE[1], "") as figure:
        for axes, measure in zip(figure.subplots(1, len(measures), squeeze=False)[0], measures, strict=True):
            _panel(axes, found, measure)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3 * len(measures))
    return figure


def _panel(axes: Axes, found: Found, measure: Measure) -> None:
    for kind, colour in zip(KINDS, PALETTE, strict=False):
        points = []
        for sparsity, marker in zip(SPARSITIES, MARKERS, strict=False):
            value = estimate(measure, found.runs(measure.task, kind, sparsity, USUAL))
            time = found.time(kind, sparsity)
            if value is None or time is None or not math.isfinite(value[0]):
                continue
            points.append((time, value[0]))
            axes.errorbar(time, value[0], value[1] or 0.0, color=colour, marker=marker, capsize=3)
        axes.plot(*zip(*points, strict=True), color=colour, label=kind) if points else None
    dense = estimate(measure, found.runs(measure.task, DENSE.name, None))
    if dense is not None:
        axes.errorbar(1.0, dense[0], dense[1] or 0.0, color=PALETTE[6], marker="*", capsize=3)
        axes.plot([], [], color=PALETTE[6], marker="*", linestyle="", label="dense")
    for sparsity, marker in zip(SPARSITIES, MARKERS, strict=False):
        axes.plot([], [], color="#888888", marker=marker, linestyle="", label=f"sparsity {sparsity:g}")
    axes.set(xlabel="step time of a 124M model, dense = 1", ylabel=measure.label)
    axes.grid(alpha=0.3)


ASKED = """A mask of single entries is hard to make fast use of. What does it cost to choose whole rows or \
columns of a matrix, or square blocks, and how much faster is a step of training? And by what should such \
units be chosen: by the sum, the mean, the largest of their entries' changes, or by lot?"""
MEASURED = """All masks of a seed are read off one calibration of that seed. Rates are chosen for each kind \
of mask and sparsity; the ways to choose units share the rates of the sum of squares. The share of the \
squared change that a mask keeps: of the squares of the calibration's changes, how much lies in the mask's \
entries. "inf": the run diverged.

Step time is measured on another model, of 124 million weights with random masks, on one core, in turns \
with full training (dense) of the same model, whose time is 1; it is the median of several rounds."""


def write(out: Path) -> str:
    """Write tables, figure and page of what is there; returns the tables in Markdown."""
    records = read_cells(out)
    found = Found(records)
    results = []
    for name, own in records.items():
        if name != Path(TIMES).stem:
            results.append(Section(name, items=list(facts(name, own, "main", WORKLOADS))))
            for measure in (m for m in PANELS if m.task == name):
                alt = f"{measure.label} against step time"
                results.append(Section("", figure=draw(found, [measure]), alt=alt))
    results.append(Section("All workloads"))
    results += study_sections([granularity_table(found), choice_table(found)])
    about = about_sections(ASKED, MEASURED)
    title = "Single entries against rows, columns and blocks"
    return write_report(out, "granularity", title, about, results, draw(found))
