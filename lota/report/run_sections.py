"""Parts of the report on runs: what they are, losses, rewards, memory and speed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from lota.plots import Line, bars, over_examples
from lota.report.groups import Group
from lota.report.page import Section
from lota.report.reading import Run

WINDOWS = 200  # points of a curve at most
SPLITS = {"training": "train", "held-out": "eval"}
NATS = "loss (nats per response token)"
GIB = 2**30
COLUMNS = [
    "run",
    "in the figures",
    "seed",
    "lr",
    "kept entries",
    "examples",
    "training loss",
    "held-out loss",
]


def overview(groups: Sequence[Group]) -> Section:
    """A line per run: the name that it has in the figures, and its last numbers."""
    table = [[*COLUMNS, "peak memory (GiB)", "tokens/s", "device"]]
    for group in groups:
        for run in group.runs:
            examples = max((line["examples"] for line in run.log), default=None)
            losses = [last(run, f"nats_per_token/{split}") for split in SPLITS.values()]
            cells = [run.name, group.name, str(run.settings["seed"]), f"{run.settings['lr']:g}", _kept(run)]
            cells += [number(examples, ",.0f"), *(number(loss, ".4f") for loss in losses)]
            table.append([*cells, number(memory(run), ".3f"), number(speed(run), ",.0f"), run.device or "-"])
    return Section("Runs", "Losses: nats per response token, the last of the log.", table=table)


def _kept(run: Run) -> str:
    if run.mask is None:
        return "-"
    return f"{run.mask.n_total - run.mask.n_kept if run.settings['flip_mask'] else run.mask.n_kept:,}"


def number(value: float | None, fmt: str) -> str:
    return "-" if value is None else f"{value:{fmt}}"


def last(run: Run, key: str) -> float | None:
    """The last value of a key of the log."""
    values = run.series(key)[1]
    return values[-1] if values else None


def memory(run: Run) -> float | None:
    """Peak memory in GiB: of the device, or of the process on a CPU."""
    values = run.series("peak_memory_bytes")[1]
    return max(values) / GIB if values else None


def speed(run: Run) -> float | None:
    """Tokens per second of training, the median of the log."""
    values = run.series("tokens_per_second")[1]
    return statistics.median(values) if values else None


def curves(groups: Sequence[Group]) -> Iterable[Section]:
    """Loss in nats per token, or the loss itself of runs that log no such number; rewards of preferences."""
    runs = [(group, run) for group in groups for run in group.runs]
    by_token = [(group, run) for group, run in runs if run.series("nats_per_token/train")[0]]
    others = [(group, run) for group, run in runs if not run.series("nats_per_token/train")[0]]
    for title, file, chosen, key, label in (
        ("Loss", "loss", by_token, "nats_per_token/{}", NATS),
        ("Loss per example", "loss_per_example", others, "loss/{}", "loss per example"),
        ("Reward margin", "reward_margins", runs, "rewards_{}/margins", "reward margin (chosen - rejected)"),
        (
            "Reward accuracy",
            "reward_accuracies",
            runs,
            "rewards_{}/accuracies",
            "reward accuracy (share of pairs)",
        ),
    ):
        panels = {
            panel: [line for group, run in chosen if (line := _line(group, run, key.format(split))).values]
            for panel, split in SPLITS.items()
        }
        if any(panels.values()):
            yield Section(title, _curve_text(panels, chosen, key), over_examples(panels, label=label), file)


def _line(group: Group, run: Run, key: str) -> Line:
    """A curve of at most WINDOWS points, each the mean of a stretch of the log."""
    examples, values = run.series(key)
    size = math.ceil(len(examples) / WINDOWS) or 1
    stretches = [slice(start, start + size) for start in range(0, len(examples), size)]
    return Line(group.name, *([statistics.fmean(part[s]) for s in stretches] for part in (examples, values)))


def _curve_text(panels: dict[str, list[Line]], chosen: Sequence[tuple[Group, Run]], key: str) -> str:
    names = [line.name for lines in panels.values() for line in lines]
    text = ["Lines that look the same are runs with other seeds."] if len(set(names)) < len(names) / 2 else []
    points = [len(run.series(key.format(split))[0]) for _, run in chosen for split in SPLITS.values()]
    if max(points) > WINDOWS:
        text.append(f"Each point is the mean of up to {math.ceil(max(points) / WINDOWS)} lines of the log.")
    return " ".join(text)


def memory_and_speed(groups: Sequence[Group]) -> Iterable[Section]:
    """Bars of the means over seeds."""
    rows = [group for group in groups if group.mean(memory) or group.mean(speed)]
    if not rows:
        return
    panels = {
        "peak memory (GiB)": [group.mean(memory) for group in rows],
        "training speed (tokens/s)": [group.mean(speed) for group in rows],
    }
    text = (
        "Memory: the peak, of the device or, on a CPU, of the whole process. Speed: the median of the log. "
    )
    devices = list(dict.fromkeys(run.device for group in rows for run in group.runs if run.device))
    text += f"Devices: {'; '.join(devices)}. " if devices else ""
    text += "Means over seeds, with standard errors where there are several."
    figure = bars(panels, [group.name for group in rows])
    yield Section("Memory and speed", text, figure, "memory_and_speed")
