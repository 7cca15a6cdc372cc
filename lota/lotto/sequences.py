"""Sequences of tasks by several methods and seeds: one table, and two heat maps.

    python -m lota.lotto.sequences RUN... --out FOLDER

Runs of `lotto.py` that differ in the seed only are one line: means, +- one standard error over the seeds.
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

from lota.atomic import atomic_path, write_json
from lota.estimates import mean_and_stderr
from lota.lotto.continual import NAME, Number, number
from lota.report.plots import heatmap
from lota.tables import aligned


@dataclass(frozen=True)
class Group:
    """Runs of a method. parts: the score's (or loss's) part of forgetting.json, one per run."""

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
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    orders = set()
    for run in runs:
        try:
            content = json.loads((run / f"{NAME}.json").read_text(encoding="utf-8"))
            settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
            found[_method(settings)].append(content[kind])
            orders.add(tuple(content["tasks"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{run} is no finished sequence of tasks with a {kind}: {error!r}") from error
    if len(orders) != 1:
        raise ValueError(f"sequences of other tasks: {' and '.join(map(str, sorted(orders)))}")
    return [Group(method, next(iter(orders)), parts) for method, parts in found.items()]


def _method(settings: dict[str, Any]) -> str:
    """Name of a line of the table."""
    masked = settings["method"] not in ("fft", "lora")
    return f"{settings['method']}{', s = {:g}'.format(settings['sparsity']) if masked else ''}"


def table(groups: Sequence[Group]) -> str:
    """A line per method: results after the last stage, what is left of the first task, the summaries."""
    tasks = groups[0].tasks
    summaries = ("average", "backward_transfer", "forgetting")
    lines = [["method", "seeds", *tasks, f"{tasks[0]} kept", *(s.replace("_", " ") for s in summaries)]]
    for group in groups:
        cells = [group.at(-1, task) for task in range(len(tasks))]
        cells += [group.kept(), *(group.summary(key) for key in summaries)]
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
        text = table(groups)
        with atomic_path(args.out / "comparison.txt") as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
        content = {group.method: {"tasks": group.tasks, "runs": group.parts} for group in groups}
        write_json(args.out / "comparison.json", content)
        draw(groups, args.out, "score" if args.kind == "score" else "held-out loss (nats per token)")
    except (ValueError, OSError) as error:
        sys.exit(f"lota.lotto.sequences: {error}")
    print(text)


if __name__ == "__main__":
    main()
