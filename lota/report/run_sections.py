"""Parts of the page on training runs: what they are, losses and rewards, scores, masks, memory and speed."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

from lota.evaluate.estimates import mean_and_stderr
from lota.masks import Mask
from lota.masks.views import density, draw_overlap, overlap, overlap_table
from lota.plots import Line, against_sparsity, bars, over_examples
from lota.report.page import Section, cell, file_name
from lota.report.reading import RunRecord, TaskScore
from lota.report.replicates import Replicates
from lota.utils import short_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WINDOWS = 200  # points of a curve at most
SPLITS = {"training": "train", "held-out": "eval"}
NATS = "loss (nats per response token)"
MEMORY_AND_SPEED_TEXT = (
    "Memory: the peak, of the device or, on a CPU, of the whole process. Speed: the median of the log. "
    "Devices: {devices}. Means over seeds, with standard errors if there are several."
)
HELD_OUT = "held-out loss"
# endings of metrics that are shares of the examples, and drawn in per cent
SHARES = ("match", "accuracy", "rate", "acc", "acc_norm")
SCORE_TEXT = "Error bars and bands: one standard error, over seeds if there are several, else over examples."
OVERLAP_TEXT = (
    "Below the diagonal: entries that both masks keep, over those that either keeps (IoU). Above it, and as "
    "'by chance' in the table: random masks that keep as many entries of each tensor, +- their deviation."
)


def overview(replicates: Sequence[Replicates]) -> Section:
    """A line per run: the name that it has in the figures, and its last numbers."""
    lines = [
        {
            "run": run.name,
            "in the figures": found.name,
            "seed": str(run.settings["seed"]),
            "lr": f"{run.settings['lr']:g}",
            "kept entries": _kept(run),
            "examples": cell(max((line["examples"] for line in run.log), default=None), ",.0f"),
            "training loss": cell(run.last("nats_per_token/train"), ".4f"),
            "held-out loss": cell(run.last("nats_per_token/eval"), ".4f"),
            "peak memory (GiB)": cell(_memory(run), ".3f"),
            "tokens/s": cell(_speed(run), ",.0f"),
            "device": run.device or "-",
        }
        for found in replicates
        for run in found.runs
    ]
    table = [list(lines[0]), *(list(line.values()) for line in lines)]
    return Section("Runs", "Losses: nats per response token, the last of the log.", table=table)


def _kept(run: RunRecord) -> str:
    if run.mask is None:
        return "-"
    return f"{run.mask.n_total - run.mask.n_kept if run.settings['flip_mask'] else run.mask.n_kept:,}"


def _memory(run: RunRecord) -> float | None:
    """Peak memory in GiB."""
    return run.reduce("peak_memory_bytes", lambda values: max(values) / 2**30)


def _speed(run: RunRecord) -> float | None:
    """Tokens per second of training."""
    return run.reduce("tokens_per_second", statistics.median)


def curve_sections(replicates: Sequence[Replicates]) -> Iterable[Section]:
    """Loss in nats per token, or the loss itself of runs that log no such number; rewards of preferences."""
    runs = [(found.name, run) for found in replicates for run in found.runs]
    by_token = [(name, run) for name, run in runs if run.series("nats_per_token/train")[0]]
    others = [(name, run) for name, run in runs if not run.series("nats_per_token/train")[0]]
    margin, accuracy = "reward margin (chosen - rejected)", "reward accuracy (share of preferences)"
    for title, file, chosen, key, label in (
        ("Loss", "loss", by_token, "nats_per_token/{}", NATS),
        ("Loss per example", "loss_per_example", others, "loss/{}", "loss per example"),
        ("Reward margin", "reward_margins", runs, "rewards_{}/margins", margin),
        ("Reward accuracy", "reward_accuracies", runs, "rewards_{}/accuracies", accuracy),
    ):
        panels: dict[str, list[Line]] = {}
        longest = 0
        for panel, split in SPLITS.items():
            series = [(name, *run.series(key.format(split))) for name, run in chosen]
            panels[panel] = [_line(name, examples, values) for name, examples, values in series if values]
            longest = max([longest, *(len(values) for _, _, values in series)])
        if longest:
            yield Section(title, _curve_text(panels, longest), over_examples(panels, label=label), file)


def _line(name: str, examples: list[float], values: list[float]) -> Line:
    """A curve of at most WINDOWS points, each the mean of a stretch of the log."""
    size = math.ceil(len(examples) / WINDOWS)
    stretches = [slice(start, start + size) for start in range(0, len(examples), size)]
    return Line(name, *([statistics.fmean(part[s]) for s in stretches] for part in (examples, values)))


def _curve_text(panels: Mapping[str, Sequence[Line]], longest: int) -> str:
    names = [line.name for lines in panels.values() for line in lines]
    text = ["Lines that look the same are runs with other seeds."] if len(set(names)) < len(names) / 2 else []
    if longest > WINDOWS:
        text.append(f"Each point is the mean of up to {math.ceil(longest / WINDOWS)} lines of the log.")
    return " ".join(text)


class MethodScore(NamedTuple):
    """A point of the figure and a line of the table."""

    method: str
    sparsity: float | None
    mean: float
    stderr: float | None
    n_runs: int


def score_sections(replicates: Sequence[Replicates], base: Sequence[TaskScore] = ()) -> Iterable[Section]:
    """A figure and a table per task and metric. base: scores of the model that the runs started from."""
    runs = [run for found in replicates for run in found.runs]
    for task, metric in dict.fromkeys((score.task, score.metric) for run in runs for score in _scores(run)):
        rows = [
            MethodScore("base model", None, score.value, score.stderr, 1)
            for score in base
            if (score.task, score.metric) == (task, metric)
        ]
        for found in replicates:
            scores = [s for run in found.runs for s in _scores(run) if (s.task, s.metric) == (task, metric)]
            if scores:
                mean, stderr = mean_and_stderr([score.value for score in scores])
                stderr = scores[0].stderr if len(scores) == 1 else stderr
                rows.append(MethodScore(found.method, found.sparsity, mean, stderr, len(scores)))
        name = metric.replace("_", " ")
        table = [["method", "sparsity", name, "standard error", "runs"]]
        for row in rows:
            cells = [cell(row.sparsity, "g"), f"{row.mean:.4f}", cell(row.stderr, ".4f")]
            table.append([row.method, *cells, str(row.n_runs)])
        title, file = f"{name.capitalize()} on {task}", file_name(metric, task)
        yield Section(title, SCORE_TEXT, _draw_scores(rows, task, metric), file, table)


def _scores(run: RunRecord) -> list[TaskScore]:
    """Those of the evaluation, and the last held-out loss of the log."""
    loss = run.last("nats_per_token/eval")
    own = [] if loss is None else [TaskScore(", ".join(run.settings["datasets"]), HELD_OUT, loss, None, 0)]
    return [*run.scores, *own]


def _draw_scores(rows: Sequence[MethodScore], task: str, metric: str) -> Figure:
    """Over sparsity; bars if no run has one."""
    scale, unit = (100, " (%)") if metric.endswith(SHARES) else (1, "")
    unit = " (nats per response token)" if metric == HELD_OUT else unit
    label = f"{metric.replace('_', ' ')} on {task}{unit}"
    curves: dict[str, list[tuple[float, float, float | None]]] = {}
    levels: dict[str, tuple[float, float | None]] = {}
    ends: list[float] = []  # of the error bars
    for row in rows:
        mean, error = scale * row.mean, None if row.stderr is None else scale * row.stderr
        ends += [mean - (error or 0), mean + (error or 0)]
        if row.sparsity is None:
            levels[row.method] = (mean, error)
        else:
            curves.setdefault(row.method, []).append((row.sparsity, mean, error))
    if not curves:
        return bars({label: list(levels.values())}, list(levels))
    room = max(5.0, 0.1 * (max(ends) - min(ends)))
    limits = (max(0.0, min(ends) - room), min(100.0, max(ends) + room)) if scale == 100 else None
    return against_sparsity(curves, label=label, levels=levels, limits=limits)


def mask_sections(runs: Sequence[RunRecord], notes: list[str]) -> Iterable[Section]:
    """Density of each mask of the runs, and how the masks of one model overlap."""
    masks = {str(run.mask_path): run.mask for run in runs if run.mask is not None}
    short = short_names(list(masks))
    names = {path: name.removesuffix("_mask.pt") for path, name in zip(masks, short, strict=True)}
    for path, mask in masks.items():
        found = density(mask)
        text = f"{path}: {mask.n_kept:,} of {mask.n_total:,} entries kept ({100 * mask.density:.4g} %)."
        figure, file = found.draw(None, ""), file_name("density", names[path])
        yield Section(f"Density of {names[path]}", text, figure, file, found.table())
    models = _by_model(masks)
    if len(models) > 1:
        shown = "; ".join(", ".join(names[path] for path in paths) for paths in models)
        notes.append(f"masks of different models have no overlap: {shown}")
    for at, paths in enumerate(paths for paths in models if len(paths) > 1):
        pairs = combinations(range(len(paths)), 2)
        overlaps = {(i, j): overlap(masks[paths[i]], masks[paths[j]]) for i, j in pairs}
        listed = [names[path] for path in paths]
        file = "overlap" if at == 0 else f"overlap_{at + 1}"
        figure, table = draw_overlap(listed, overlaps, None), overlap_table(listed, overlaps)
        yield Section("Overlap of masks", OVERLAP_TEXT, figure, file, table)


def _by_model(masks: Mapping[str, Mask]) -> list[list[str]]:
    """Paths of the masks that belong to one model."""
    models: list[list[str]] = []
    for path, mask in masks.items():
        for paths in models:
            with contextlib.suppress(ValueError):
                masks[paths[0]].check_same_model(mask)
                paths.append(path)
                break
        else:
            models.append([path])
    return models


def memory_and_speed(replicates: Sequence[Replicates]) -> Iterable[Section]:
    """Bars of the means over seeds."""
    measured = [found for found in replicates if found.mean(_memory) or found.mean(_speed)]
    if measured:
        panels = {
            "peak memory (GiB)": [found.mean(_memory) for found in measured],
            "training speed (tokens/s)": [found.mean(_speed) for found in measured],
        }
        devices = dict.fromkeys(run.device for found in measured for run in found.runs if run.device)
        text = MEMORY_AND_SPEED_TEXT.format(devices="; ".join(devices) or "unknown")
        figure = bars(panels, [found.name for found in measured])
        yield Section("Memory and speed", text, figure, "memory_and_speed")
