"""Sequences of tasks by several methods and seeds: one table, and two heat maps.

    python -m lota.report.sequence_table RUN... --out FOLDER

Runs of `lotto.py` that differ in the seed only are one line: means, +- one standard error over the seeds.
Other settings in which runs of a method differ are added to the line's name.
Writes comparison.txt, comparison.json, final.png (the score on each task after the last one) and first.png
(the score on the first task after each).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lota.evaluate.estimates import mean_and_stderr
from lota.lotto.forgetting import SUMMARIES, Number, number
from lota.plots import heatmap
from lota.report.reading import RunRecord, read_runs
from lota.report.replicates import Replicates, find_replicates
from lota.storage import atomic_path, write_json
from lota.utils import aligned


def read_sequences(paths: Sequence[Path], kind: str) -> list[RunRecord]:
    """kind: `score` or `loss`. Raises ValueError for unfinished sequences and for other tasks."""
    runs = read_runs(paths, with_stages=False)
    for run in runs:
        if kind not in run.forgetting:
            raise ValueError(
                f"{run.path} is no finished sequence of tasks with a {kind}: {'; '.join(run.notes)}"
            )
    orders = {tuple(run.forgetting["tasks"]) for run in runs}
    if len(orders) != 1:
        raise ValueError(f"sequences of other tasks: {' and '.join(map(str, sorted(orders)))}")
    return runs


def result(line: Replicates, kind: str, stage: int, task: int) -> Number:
    """The result on a task after a stage, both counted from 0."""
    return mean_and_stderr([run.forgetting[kind]["matrix"][stage][task] for run in line.runs])


def kept_share(line: Replicates) -> Number | None:
    """Share of the first task's score after its own stage that is left after the last; None if it was 0."""
    matrices = [run.forgetting["score"]["matrix"] for run in line.runs]
    if not all(matrix[0][0] for matrix in matrices):
        return None
    return mean_and_stderr([matrix[-1][0] / matrix[0][0] for matrix in matrices])


def summary(line: Replicates, kind: str, key: str) -> Number | None:
    """average, backward_transfer or forgetting; None for a single task."""
    found = [run.forgetting[kind][key] for run in line.runs]
    return None if None in found else mean_and_stderr([one["value"] for one in found])


def comparison_text(lines: Sequence[Replicates], tasks: Sequence[str], kind: str) -> str:
    """A line per method: results after the last stage, what is left of the first task, the summaries."""
    kept = [f"{tasks[0]} kept"] if kind == "score" else []  # a share of a loss says nothing
    final = [["method", "seeds", *tasks, *kept, *(key.replace("_", " ") for key in SUMMARIES)]]
    first = [["", *(f"after {task}" for task in tasks)]]
    for line in lines:
        cells: list[Number | None] = [result(line, kind, -1, task) for task in range(len(tasks))]
        cells += [kept_share(line)] if kept else []
        cells += [summary(line, kind, key) for key in SUMMARIES]
        shown = ["-" if cell is None else number(cell) for cell in cells]
        final.append([line.name, str(len(line.runs)), *shown])
        first.append([line.name, *(number(result(line, kind, stage, 0)) for stage in range(len(tasks)))])
    blocks = [[f"after the last task, {tasks[-1]}"], aligned(final), ["", f"on the first task, {tasks[0]}"]]
    return "\n".join(text for block in [*blocks, aligned(first)] for text in block)


def draw_comparison(lines: Sequence[Replicates], tasks: Sequence[str], kind: str, folder: Path) -> None:
    """final.png and first.png."""
    numbers = range(len(tasks))
    final = [[result(line, kind, -1, task) for task in numbers] for line in lines]
    first = [[result(line, kind, stage, 0) for stage in numbers] for line in lines]
    stages = [f"after {task}" for task in tasks]
    for name, cells, columns, title in (
        ("final", final, tasks, f"After the last task, {tasks[-1]}"),
        ("first", first, stages, f"On the first task, {tasks[0]}"),
    ):
        heatmap(
            [[mean for mean, _ in row] for row in cells],
            [line.name for line in lines],
            columns,
            folder / f"{name}.png",
            title=title,
            label="score" if kind == "score" else "held-out loss (nats per token)",
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
        runs = read_sequences(args.runs, args.kind)
        tasks, lines = runs[0].forgetting["tasks"], find_replicates(runs)
        text = comparison_text(lines, tasks, args.kind)
        with atomic_path(args.out / "comparison.txt") as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
        parts = {line.name: [run.forgetting[args.kind] for run in line.runs] for line in lines}
        content = {name: {"tasks": tasks, "runs": found} for name, found in parts.items()}
        write_json(args.out / "comparison.json", content)
        draw_comparison(lines, tasks, args.kind, args.out)
    except (ValueError, OSError) as error:
        sys.exit(f"lota.report.sequence_table: {error}")
    print(text)


if __name__ == "__main__":
    main()
