"""Methods compared over seeds: scored runs -> one table as Markdown, JSON and CSV."""

from __future__ import annotations

import csv
import logging
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lota.evaluate.estimates import mean_and_stderr
from lota.report.groups import Group, groups
from lota.report.reading import Run, read_runs
from lota.utils import atomic_path, write_json

COLUMNS = ("method", "sparsity", "trained entries", "lr", "score", "seeds", "examples/s", "peak MiB")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """A method over its seeds. stderr: of the mean over seeds, None for one seed; trained: mean over them;
    examples_per_second: median of the log's lines, then the mean; peak_memory_bytes: the largest.
    """

    method: str
    sparsity: float | None
    trained: int
    lr: float
    mean: float
    stderr: float | None
    scores: tuple[float, ...]
    seeds: tuple[int, ...]
    examples_per_second: float | None
    peak_memory_bytes: int


def compare(root: str | Path, task: str) -> list[Row]:
    """A row per method of the runs below `root`, at any depth, best first.

    Runs that were not evaluated on `task` are left out, and named in the log. Raises ValueError when no run
    was, or when a seed is there twice.
    """
    folders = [str(path.parent) for path in sorted(Path(root).rglob("config.yaml"))]
    runs = read_runs(folders)
    for run in runs:
        if score_of(run, task) is None:
            logger.warning("left out, as it has no score on %s: %s", task, run.path)
    scored = [run for run in runs if score_of(run, task) is not None]
    if not scored:
        raise ValueError(
            f"no run below {root} has a score on {task}: train, then score_runs.py {root} --task {task}"
        )
    return sorted((_row(group, task) for group in groups(scored)), key=lambda row: -row.mean)


def score_of(run: Run, task: str) -> float | None:
    """The task's own metric, at the newest evaluated checkpoint."""
    return next((score.value for score in run.scores if score.task == task), None)


def _row(group: Group, task: str) -> Row:
    runs = sorted(group.runs, key=lambda run: run.settings["seed"])
    seeds = tuple(run.settings["seed"] for run in runs)
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{group.name}: a seed is there twice: {', '.join(str(run.path) for run in runs)}")
    scores = tuple(score_of(run, task) for run in runs)
    mean, stderr = mean_and_stderr(scores)
    speeds = [statistics.median(rates) for run in runs if (rates := run.series("examples_per_second")[1])]
    return Row(
        method=group.method,
        sparsity=group.sparsity,
        trained=round(statistics.fmean(run.series("trained_entries")[1][-1] for run in runs)),
        lr=runs[0].settings["lr"],
        mean=mean,
        stderr=stderr,
        scores=scores,
        seeds=seeds,
        examples_per_second=statistics.fmean(speeds) if speeds else None,
        peak_memory_bytes=max(int(max(run.series("peak_memory_bytes")[1])) for run in runs),
    )


def text_table(rows: Sequence[Row], task: str, base: float | None = None) -> str:
    """The rows in Markdown. base: the score of the model that training started from."""
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    for row in rows:
        sparsity = "-" if row.sparsity is None else f"{row.sparsity:g}"
        error = "" if row.stderr is None else f" ± {row.stderr:.3f}"
        speed = "-" if row.examples_per_second is None else f"{row.examples_per_second:.1f}"
        cells = [row.method, sparsity, f"{row.trained:,}", f"{row.lr:g}", f"{row.mean:.3f}{error}"]
        lines.append([*cells, str(len(row.seeds)), speed, f"{row.peak_memory_bytes / 2**20:,.0f}"])
    if base is not None:
        lines.append(["base model", "-", "0", "-", f"{base:.3f}", "-", "-", "-"])
    text = [f"| {' | '.join(cells)} |" for cells in lines]
    return "\n".join([*text, "", f"score: on {task}, mean ± standard error over seeds"])


def write_table(folder: Path, rows: Sequence[Row], task: str, base: float | None = None) -> None:
    """summary.md, summary.json and summary.csv; the CSV has a line per method and seed."""
    with atomic_path(folder / "summary.md") as temporary:
        temporary.write_text(text_table(rows, task, base) + "\n", encoding="utf-8")
    methods = [asdict(row) for row in rows]
    write_json(folder / "summary.json", {"task": task, "base": base, "methods": methods})
    with atomic_path(folder / "summary.csv") as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("method", "sparsity", "trained_entries", "lr", "seed", "score"))
        for row in rows:
            for seed, score in zip(row.seeds, row.scores, strict=True):
                writer.writerow((row.method, row.sparsity, row.trained, row.lr, seed, score))
