"""Methods compared over seeds: scored runs -> one table as Markdown, JSON and CSV."""

from __future__ import annotations

import csv
import logging
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lota.evaluate.estimates import mean_and_stderr
from lota.report.page import cell, markdown
from lota.report.reading import TaskScore, read_runs
from lota.report.replicates import Replicates, find_replicates
from lota.storage import atomic_path, write_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MethodSummary:
    """A method over its seeds."""

    method: str
    sparsity: float | None
    trained: int  # entries, mean over the seeds
    lr: float
    mean: float  # score, over the seeds
    stderr: float | None  # of that mean; None for one seed
    scores: tuple[float, ...]  # by seed
    seeds: tuple[int, ...]
    examples_per_second: float | None  # median of the log's lines, then the mean over the seeds
    peak_memory_bytes: int  # the largest


def summarize_methods(root: str | Path, task: str) -> list[MethodSummary]:
    """Every method of the runs below `root`, at any depth, best first.

    Runs that were not evaluated on `task` are left out, and named in the log. Raises ValueError if no run was
    evaluated on it, or if a method has a seed twice.
    """
    scored = []
    for run in read_runs([path.parent for path in sorted(Path(root).rglob("config.yaml"))]):
        if score_on(task, run.scores) is None:
            logger.warning("left out, as it has no score on %s: %s", task, run.path)
        else:
            scored.append(run)
    if not scored:
        raise ValueError(
            f"no run below {root} has a score on {task}: train, then score_runs.py {root} --task {task}"
        )
    return sorted((_summarize(found, task) for found in find_replicates(scored)), key=lambda row: -row.mean)


def score_on(task: str, scores: Sequence[TaskScore]) -> float | None:
    """The task's own metric."""
    return next((score.value for score in scores if score.task == task), None)


def _summarize(replicates: Replicates, task: str) -> MethodSummary:
    runs = sorted(replicates.runs, key=lambda run: run.settings["seed"])
    seeds = tuple(run.settings["seed"] for run in runs)
    if len(set(seeds)) < len(seeds):
        paths = ", ".join(str(run.path) for run in runs)
        raise ValueError(f"{replicates.name}: more than one run has the same seed: {paths}")
    scores = tuple(score for run in runs if (score := score_on(task, run.scores)) is not None)
    mean, stderr = mean_and_stderr(scores)
    speed = replicates.mean(lambda run: run.reduce("examples_per_second", statistics.median))
    return MethodSummary(
        method=replicates.method,
        sparsity=replicates.sparsity,
        trained=round(statistics.fmean(run.series("trained_entries")[1][-1] for run in runs)),
        lr=runs[0].settings["lr"],
        mean=mean,
        stderr=stderr,
        scores=scores,
        seeds=seeds,
        examples_per_second=speed[0] if speed else None,
        peak_memory_bytes=max(int(max(run.series("peak_memory_bytes")[1])) for run in runs),
    )


def summary_text(rows: Sequence[MethodSummary], task: str, base: float | None = None) -> str:
    """The rows as a table. base: the score of the model that training started from."""
    lines = [
        {
            "method": row.method,
            "sparsity": cell(row.sparsity, "g"),
            "trained entries": f"{row.trained:,}",
            "lr": f"{row.lr:g}",
            "score": cell(row.mean, ".3f", row.stderr),
            "seeds": str(len(row.seeds)),
            "examples/s": cell(row.examples_per_second, ".1f"),
            "peak MiB": f"{row.peak_memory_bytes / 2**20:,.0f}",
        }
        for row in rows
    ]
    header = list(lines[0])
    if base is not None:
        lines.append({"method": "base model", "trained entries": "0", "score": f"{base:.3f}"})
    table = [header, *([line.get(key, "-") for key in header] for line in lines)]
    return "\n".join([markdown(table), "", f"score: on {task}, mean ± standard error over seeds"])


def write_table(folder: Path, rows: Sequence[MethodSummary], task: str, base: float | None = None) -> None:
    """summary.md, summary.json and summary.csv; the CSV has a line per method and seed."""
    with atomic_path(folder / "summary.md") as temporary:
        temporary.write_text(summary_text(rows, task, base) + "\n", encoding="utf-8")
    methods = [asdict(row) for row in rows]
    write_json(folder / "summary.json", {"task": task, "base": base, "methods": methods})
    with atomic_path(folder / "summary.csv") as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("method", "sparsity", "trained_entries", "lr", "seed", "score"))
        for row in rows:
            for seed, score in zip(row.seeds, row.scores, strict=True):
                writer.writerow((row.method, row.sparsity, row.trained, row.lr, seed, score))
