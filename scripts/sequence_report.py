"""What the study of sequences reports: what is learnt, what is left of it, and what that costs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import StatisticsError, fmean
from typing import TYPE_CHECKING, Any

from lota.plots import MARKERS, PALETTE, figure_at
from lota.report.page import Section
from lota.storage import content_key
from scripts.cells import Record, read_cells, shown
from scripts.study_report import TRAINING, Table, about_sections, study_sections, write_report
from scripts.workloads import BASES, GROUPS, WORKLOADS, Workload, sizes_key

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PART = "sequence"
SIZES = {"n_validation": 60, "n_test": 100, "n_scored": 60}  # of each task


def members(group: str, sizes: Mapping[str, Any]) -> dict[str, Workload]:
    """Name -> a task of the group in the sizes of a sequence: two thirds of its steps, unless `sizes` tells
    how many examples; one without a score stays without.
    """
    found = {}
    for name in GROUPS[group]:
        one = WORKLOADS[name]
        n_examples = one.steps * 2 // 3 * one.batch_size
        found[name] = replace(
            one, **{"n_examples": n_examples, **sizes, "n_scored": min(one.n_scored, sizes["n_scored"])}
        )
    return found


def group_key(workloads: Mapping[str, Workload], base_hash: str) -> str:
    """A key of the tasks' sizes and the base."""
    return content_key([sizes_key(one, base_hash) for one in workloads.values()])[:12]


def final(run: Record, key: str) -> float:
    """Mean over the tasks that have it, after the last stage. key: `validation`, `test` or `score`."""
    return fmean(values[key] for values in run["stages"][-1]["tasks"].values() if key in values)


def learnt(run: Record, key: str) -> float:
    """Mean over the tasks that have it, each after its own stage."""
    own = (stage["tasks"][task] for task, stage in zip(run["tasks"], run["stages"], strict=True))
    return fmean(values[key] for values in own if key in values)


def forgotten(run: Record, key: str) -> float:
    """Mean over all tasks but the last: after the last stage, minus after its own."""
    own = zip(run["tasks"][:-1], run["stages"], strict=False)
    return fmean(run["stages"][-1]["tasks"][task][key] - stage["tasks"][task][key] for task, stage in own)


@dataclass(frozen=True)
class Setting:
    """A way in one order at one rate: its runs with several seeds, none of which diverged."""

    way: str
    order: str
    lr: float
    runs: Sequence[Record]

    def values(self, what: Callable[[Record, str], float], key: str) -> list[float]:
        """One per run; none if no task has it."""
        try:
            return [what(run, key) for run in self.runs]
        except StatisticsError:
            return []


def settings(records: Sequence[Record]) -> dict[tuple[str, str], list[Setting]]:
    """(order, way) -> its settings."""
    runs: dict[tuple[str, str, float], list[Record]] = {}
    for record in records:
        cell = record["cell"]
        if cell["part"] == PART:
            runs.setdefault((cell["order"], cell["way"], cell["lr"]), []).append(record)
    found: dict[tuple[str, str], list[Setting]] = {}
    for (order, way, lr), own in runs.items():
        if all(run["stages"] for run in own):
            found.setdefault((order, way), []).append(Setting(way, order, lr, own))
    return found


def best(found: Sequence[Setting]) -> Setting:
    """By validation loss of all tasks after the last stage, of those with the most seeds."""
    most = max(len(setting.runs) for setting in found)
    full = [setting for setting in found if len(setting.runs) == most]
    return min(full, key=lambda setting: fmean(setting.values(final, "validation")))


MEASURES = (  # heading, what of a run, which result, factor and digits
    ("loss after its own stage", learnt, "test", 1, 3),
    ("loss after the last stage", final, "test", 1, 3),
    ("growth of earlier tasks' loss", forgotten, "test", 1, 3),
    ("score after its own stage (%)", learnt, "score", 100, 1),
    ("score after the last stage (%)", final, "score", 100, 1),
)
Lines = list[list[str]]


def summary(records: Sequence[Record], order: str) -> Lines:
    """Every way at its best rate: means over tasks and seeds, losses in nats per token."""
    lines = [["way", "lr", *(name for name, *_ in MEASURES), "own text, nats per byte", "seeds"]]
    for way, setting in bests(records, order).items():
        cells = [shown(setting.values(what, key), *how) for _, what, key, *how in MEASURES]
        own = shown([run["stages"][-1]["own"] for run in setting.runs], 1, 4)
        lines.append([way, f"{setting.lr:g}", *cells, own, str(len(setting.runs))])
    return lines


def by_task(records: Sequence[Record], order: str) -> Lines:
    """Loss, and in brackets the score, of every task after its own stage and after the last."""
    lines: Lines = []
    for way, setting in bests(records, order).items():
        tasks = setting.runs[0]["tasks"]
        lines = lines or [
            ["way", *(f"{task}, {when}" for task in tasks for when in ("own stage", "last stage"))]
        ]
        places = [(at, task) for own, task in enumerate(tasks) for at in (own, -1)]
        lines.append([way, *(_both(setting.runs, at, task) for at, task in places)])
    return lines


def _both(runs: Sequence[Record], stage: int, task: str) -> str:
    """A cell: test loss and score of a task after a stage."""
    found = [run["stages"][stage]["tasks"][task] for run in runs]
    loss = shown([one["test"] for one in found])
    return f"{loss} ({shown([one['score'] for one in found], 100, 1)})" if "score" in found[0] else loss


def every_rate(records: Sequence[Record], order: str) -> Lines:
    """Every way at every rate: the points of the figure."""
    lines = [["way", "lr", *(name for name, *_ in MEASURES[:3])]]
    for (own, way), found in settings(records).items():
        if own == order and len(found) > 1:
            for setting in sorted(found, key=lambda one: one.lr):
                cells = [shown(setting.values(what, key), *how) for _, what, key, *how in MEASURES[:3]]
                lines.append([way, f"{setting.lr:g}", *cells])
    return lines


def bests(records: Sequence[Record], order: str) -> dict[str, Setting]:
    """Way -> its setting with the least validation loss of all tasks after the last stage."""
    return {way: best(found) for (own, way), found in settings(records).items() if own == order}


def orders(records: Sequence[Record]) -> list[str]:
    """Those that there are results of."""
    return list(dict.fromkeys(order for order, _ in settings(records)))


def draw(found: Mapping[str, Sequence[Record]]) -> Figure:
    """A panel per group and order: what earlier tasks lose against what is learnt, over learning rates."""
    panels = [(name, order) for name, records in found.items() for order in orders(records)]
    with figure_at(None, 6.4, 5.2 * len(panels), "") as figure:
        for axes, (name, order) in zip(
            figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True
        ):
            _panel(axes, {way: own for (one, way), own in settings(found[name]).items() if one == order})
            axes.set(title=f"{name}, {order} order", xlabel="loss after its own stage, mean over tasks")
            axes.set_ylabel("growth of earlier tasks' loss")
            axes.grid(alpha=0.3)
            axes.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def _panel(axes: Axes, ways: Mapping[str, Sequence[Setting]]) -> None:
    for number, (way, found) in enumerate(ways.items()):
        ordered = sorted(found, key=lambda setting: setting.lr)
        points = [
            (fmean(one.values(learnt, "test")), fmean(one.values(forgotten, "test"))) for one in ordered
        ]
        looks: dict[str, Any] = {
            "color": PALETTE[number % len(PALETTE)],
            "marker": MARKERS[number // len(PALETTE)],
        }
        axes.plot(*zip(*points, strict=True), markersize=5, label=way, **looks)


ASKED = """A model learns three tasks one after the other. How much of the earlier ones is lost, against how
well the later ones are learnt? LoTTO gives every task entries of its own, so that what a task has changed is
never changed again; but the model reads all its weights, and its behaviour can change all the same. What
keeps it, and what does that cost?"""
MEASURED = """In the way "LoTA, overlapping" each mask is drawn without regard to the others; "random
masks" share no entry; LoRA is merged after each task. Masks keep a tenth of the entries each, LoRA has
about as many. "full fine-tuning of attention and MLP" changes what masks choose from, and leaves
embeddings and head as they are. Of each way the rate is chosen that has the least loss on validation
rows, over all tasks after the last stage, means over the seeds that are reported. Ways named "LoTTO, ..."
(or after another way) add to that way what they name, at its rate: replay of a share of the earlier
tasks' training rows; L2-SP, a pull of each trained entry to the value that it starts from, of that
strength; EWC, the same weighted by how much the entry matters to earlier tasks (squared gradients of 64
rows of each); "avoid", masks that pass over such entries; fewer entries for later tasks. Calibrations
have a tenth of the rate. The reversed order was run at the rates of the given one. The first run of a
sequence starts from the base, each later one from what the one before it left."""


def report(out: Path) -> str:
    """Write table, figure and page of what is there; return the Markdown."""
    found = {name: records for name, records in read_cells(out).items() if settings(records)}
    if not found:
        sys.exit(f"{out} has no result of this study: run it first")
    results = [
        section
        for name, records in found.items()
        for order in orders(records)
        for section in (
            Section(f"{name}, {order} order", items=list(facts(name, records, order))),
            *study_sections(
                [
                    Table(
                        "Every way at its best rate",
                        summary(records, order),
                        "Scores: means over the tasks that have one.",
                    ),
                    Table(
                        "Task by task",
                        by_task(records, order),
                        "Test loss in nats per token, score in brackets.",
                    ),
                    Table("Every rate", every_rate(records, order), "The points of the figure."),
                ]
            ),
        )
    ]
    figure = draw(found)
    pictures = [
        Section("Learning against forgetting", figure=figure, alt="earlier tasks' loss against learning")
    ]
    about = about_sections(ASKED, MEASURED, TRAINING)
    return write_report(out, "sequences", "Tasks one after the other", about, [*pictures, *results], figure)


def facts(group: str, records: Sequence[Record], order: str) -> Iterator[str]:
    """What the results are of: a reader of the page may not have the project."""
    own = [
        record for record in records if record["cell"]["part"] == PART and record["cell"]["order"] == order
    ]
    run, workloads = own[0], members(group, SIZES)
    yield f"Tasks in their order: {', '.join(run['tasks'])}."
    first = next(iter(workloads.values()))
    if group_key(workloads, run["base"]) == run["cell"]["sizes"]:
        yield f"Base: {first.base}, {BASES[first.base].about}; SHA-256 of its weights {run['base']}."
        longest = ", ".join(f"{one.task} {one.max_length}" for one in workloads.values())
        yield (
            f"Each task: {first.steps} steps of {first.batch_size} rows, a calibration as long; at most "
            f"{first.n_validation} validation and {first.n_test} test rows, the first {first.n_scored} of "
            f"them for the score of a task that has one. Longer rows are left out, tokens: {longest}."
        )
    else:
        yield f"SHA-256 of the base's weights: {run['base']}; sizes of another version of this study."
    yield f"Seeds: {', '.join(map(str, sorted({record['cell']['seed'] for record in own})))}."
