"""Sequences of tasks by several methods and seeds: one table, and two heat maps.

    python -m lota.report.sequence_table RUN... --out FOLDER

Runs of `lotto.py` that differ in the seed only are one line: means, +- one standard error over the seeds;
what else sets runs of a method apart stands in the line's name.
Writes comparison.txt, comparison.json, final.png (the score on each task after the last one) and first.png
(the score on the first task after each).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lota.config_checks import WEIGHT_NEUTRAL
from lota.evaluate.estimates import mean_and_stderr
from lota.lotto.forgetting import NAME, Number, number
from lota.plots import heatmap
from lota.utils import aligned, atomic_path, write_json

# What runs of one line may differ in; the order of the tasks is that of their results.
_NOT_COMPARED = WEIGHT_NEUTRAL | {"seed", "tasks", "order"}


@dataclass(frozen=True)
class Group:
    """Runs of a line of the table. parts: the score's (or loss's) part of forgetting.json, one per run."""

    method: str
    tasks: tuple[str, ...]
    parts: Sequence[dict[str, Any]]

    def at(self, stage: int, task: int) -> Number:
        """The result on a task after a stage, both counted from 0."""
        return mean_and_stderr([part["matrix"][stage][task] for part in self.parts])

    def kept(self) -> Number | None:
        """Share of what the first task had after its own stage that is left after the last; None where a run
        had nothing.
        """
        if not all(part["matrix"][0][0] for part in self.parts):
            return None
        return mean_and_stderr([part["matrix"][-1][0] / part["matrix"][0][0] for part in self.parts])

    def summary(self, key: str) -> Number | None:
        """average, backward_transfer or forgetting; None for a single task."""
        if any(part[key] is None for part in self.parts):
            return None
        return mean_and_stderr([part[key]["value"] for part in self.parts])


def read_groups(runs: Sequence[Path], kind: str) -> list[Group]:
    """kind: `score` or `loss`. Raises ValueError for unfinished sequences and for other tasks."""
    parts: list[dict[str, Any]] = []
    settings: list[dict[str, Any]] = []
    orders = set()
    for run in runs:
        try:
            content = json.loads((run / f"{NAME}.json").read_text(encoding="utf-8"))
            settings.append(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")))
            parts.append(content[kind])
            orders.add(tuple(content["tasks"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{run} is no finished sequence of tasks with a {kind}: {error!r}") from error
    if len(orders) != 1:
        raise ValueError(f"sequences of other tasks: {' and '.join(map(str, sorted(orders)))}")
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line, part in zip(_lines(settings), parts, strict=True):
        found[line].append(part)
    return [Group(line, next(iter(orders)), parts) for line, parts in found.items()]


def _lines(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Line of the table that each run belongs to: its method, and what else sets runs of the method apart."""
    names = [_method(settings) for settings in runs]
    flat = [
        {k: v for k, v in _flat(settings).items() if k.split(".")[0] not in _NOT_COMPARED}
        for settings in runs
    ]
    lines = []
    for name, own in zip(names, flat, strict=True):
        same = [other for other_name, other in zip(names, flat, strict=True) if other_name == name]
        apart = sorted(key for key in {*own}.union(*same) if any(o.get(key) != own.get(key) for o in same))
        lines.append(", ".join([name, *(f"{key} = {own.get(key)}" for key in apart)]))
    return lines


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def _method(settings: dict[str, Any]) -> str:
    masked = settings["method"] not in ("fft", "lora")
    return f"{settings['method']}{', s = {:g}'.format(settings['sparsity']) if masked else ''}"


def table(groups: Sequence[Group], kind: str) -> str:
    """A line per method: results after the last stage, what is left of the first task, the summaries."""
    tasks = groups[0].tasks
    summaries = ("average", "backward_transfer", "forgetting")
    kept = [f"{tasks[0]} kept"] if kind == "score" else []  # a share of a loss says nothing
    lines = [["method", "seeds", *tasks, *kept, *(s.replace("_", " ") for s in summaries)]]
    for group in groups:
        cells = [group.at(-1, task) for task in range(len(tasks))]
        cells += [*([group.kept()] if kept else []), *(group.summary(key) for key in summaries)]
        shown = ["-" if cell is None else number(cell) for cell in cells]
        lines.append([group.method, str(len(group.parts)), *shown])
    stages = [["", *(f"after {task}" for task in tasks)]]
    stages += [[g.method, *(number(g.at(at, 0)) for at in range(len(tasks)))] for g in groups]
    blocks = [[f"after the last task, {tasks[-1]}"], aligned(lines), ["", f"on the first task, {tasks[0]}"]]
    return "\n".join(line for block in [*blocks, aligned(stages)] for line in block)


def draw(groups: Sequence[Group], folder: Path, label: str) -> None:
    """final.png and first.png."""
    tasks, methods = groups[0].tasks, [group.method for group in groups]
    stages = [f"after {task}" for task in tasks]
    last = [[group.at(-1, at) for at in range(len(tasks))] for group in groups]
    first = [[group.at(at, 0) for at in range(len(tasks))] for group in groups]
    parts = (
        ("final", last, tasks, f"After the last task, {tasks[-1]}"),
        ("first", first, stages, f"On the first task, {tasks[0]}"),
    )
    for name, cells, columns, title in parts:
        heatmap(
            [[mean for mean, _ in row] for row in cells],
            methods,
            columns,
            folder / f"{name}.png",
            title=title,
            label=label,
            errors=[[error for _, error in row] for row in cells],
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder of lotto.py")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where to write")
    parser.add_argument("--kind", choices=("score", "loss"), default="score", help="what to compare")
    args = parser.parse_args(arguments)
    try:
        groups = read_groups(args.runs, args.kind)
        text = table(groups, args.kind)
        with atomic_path(args.out / "comparison.txt") as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
        content = {group.method: {"tasks": group.tasks, "runs": group.parts} for group in groups}
        write_json(args.out / "comparison.json", content)
        draw(groups, args.out, "score" if args.kind == "score" else "held-out loss (nats per token)")
    except (ValueError, OSError) as error:
        sys.exit(f"lota.report.sequence_table: {error}")
    print(text)


if __name__ == "__main__":
    main()
