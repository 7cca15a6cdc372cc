"""Results of tasks: one task's, its difference from another model's, and the summary over all tasks."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lota.data.task import Task
from lota.evaluate.estimates import Estimate, mean_and_stderr, mean_of
from lota.evaluate.journal import read_journal
from lota.evaluate.scorers import SCORERS, Records, TaskRequest
from lota.storage import content_key, write_json
from lota.utils import aligned

# One task


@dataclass(frozen=True)
class Result:
    """Scores of one or several runs over the same examples."""

    task: str
    version: int
    scoring: str
    seed: int  # of the first run
    settings: dict[str, Any]  # what the scores depend on
    model: str
    date: str
    n_cut: int  # prompts that were shortened to fit the model's context
    runs: tuple[float, ...]  # the score of each run
    estimates: Mapping[str, Estimate] = field(repr=False)  # every metric, the score first
    predictions: Sequence[Records] = field(repr=False)  # of each run

    @property
    def metric(self) -> str:
        """The name of the metric that is the score."""
        return next(iter(self.estimates))

    @property
    def score(self) -> float:
        """A mean over examples (and runs), or a perplexity."""
        return self.estimates[self.metric].value

    @property
    def stderr(self) -> float | None:
        """Standard error of the score over examples; None for one example."""
        return self.estimates[self.metric].stderr

    @property
    def n(self) -> int:
        return self.estimates[self.metric].n

    @property
    def runs_stderr(self) -> float | None:
        """Standard error over runs: how much the draws alone move the mean; None for one run."""
        return mean_and_stderr(self.runs)[1]

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `runs` and `metrics` only if there are several, `n_cut` only if there are any."""
        names = ("task", "version", "metric", "score", "stderr", "n", "seed", "settings", "model", "date")
        content = {name: getattr(self, name) for name in names}
        if len(self.runs) > 1:
            content |= {"runs": self.runs, "runs_stderr": self.runs_stderr}
        if len(self.estimates) > 1:
            content["metrics"] = {name: found.to_dict() for name, found in self.estimates.items()}
        return content | ({"n_cut": self.n_cut} if self.n_cut else {})


def now() -> str:
    """UTC, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


# Another model's predictions of the same examples


@dataclass(frozen=True)
class StoredRuns:
    """Predictions of an earlier evaluation."""

    runs: list[Records]  # all of the same examples
    settings: dict[str, Any]  # that they were made with


@dataclass(frozen=True)
class Comparison:
    """A result next to another model's."""

    differences: Mapping[str, Estimate]  # every metric minus the other's, over the examples that both have
    differing: list[str]  # settings that the other was evaluated with otherwise


def read_stored_runs(folder: Path, request: TaskRequest) -> StoredRuns:
    """Predictions of some of the request's examples that an earlier evaluation left in <folder>/metrics.

    Raises ValueError if there are none, or if they are of other data or another version of the task.
    """
    task, scorer = request.task, request.scorer
    stem = f"{task.name}{scorer.suffix}_predictions"
    path = folder / "metrics" / f"{stem}.journal"
    if not path.is_file():
        raise ValueError(
            f"cannot compare: {folder} has no predictions of {task.name} scored by {scorer.name} "
            f"({path.name}); evaluate that model first, on the same tasks, examples and seed"
        )
    key, records = _read_comparable(path, request)
    runs, number = [records], 1
    while (more := path.with_name(f"{stem}_run{number}.journal")).is_file():
        other, records = _read_comparable(more, request)
        if {**other, "seed": None} == {**key, "seed": None}:  # else left by an earlier evaluation
            runs.append(records)
        number += 1
    shared = [i for i in request.numbers if all(i in records for records in runs)]
    if not shared:
        raise ValueError(f"cannot compare: {folder} has none of the chosen examples of {task.name}")
    settings = {"prompt_limits": None, **key["settings"]}
    settings |= {"template": key["template"], "few_shot": key.get("few_shot")}
    settings["engine"] = key.get("engine")  # None: transformers
    return StoredRuns([{i: records[i] for i in shared} for records in runs], settings)


def _read_comparable(path: Path, request: TaskRequest) -> tuple[dict[str, Any], Records]:
    task = request.task
    try:
        key, (records, _) = read_journal(path)
        _ = key["settings"], key["template"]  # a KeyError if it is no journal of ours
        same = key["data"] == content_key(list(request.rows)) and key["version"] == task.version
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"cannot compare: {path} cannot be read ({error}); evaluate that model anew"
        ) from error
    if not same:
        raise ValueError(
            f"cannot compare: {path} is of other rows or another version of task {task.name}; "
            "evaluate that model anew"
        )
    return key, records


def compare(task: Task, result: Result, other: StoredRuns) -> Comparison:
    """A result against the predictions of another model."""
    scorer = SCORERS[result.scoring]
    ours = scorer.estimates(task, [{i: records[i] for i in other.runs[0]} for records in result.predictions])
    theirs = scorer.estimates(task, other.runs)
    settings = json.loads(json.dumps(result.settings))  # as they are read back: tuples become lists
    return Comparison(
        {name: ours[name].minus(theirs[name]) for name in ours if name in theirs},
        [name for name, value in other.settings.items() if settings.get(name) != value],
    )


# All tasks


def summarize(
    results: Sequence[Result],
    *,
    groups: Mapping[str, Sequence[str]] | None = None,
    compared_with: str | None = None,
    comparisons: Mapping[str, Comparison] | None = None,
) -> dict[str, Any]:
    """Plain values: one entry per task, with every metric, the number of prompts cut, and the differences.

    groups: names of tasks whose mean is wanted -> those tasks; a task counts the same whatever its size.
    comparisons: by task, with the model compared_with.
    """
    names = ("task", "version", "scoring", "metric", "score", "stderr", "n", "seed", "runs", "runs_stderr")
    tasks = []
    for result in results:
        entry = {name: getattr(result, name) for name in (*names, "n_cut")}
        entry["metrics"] = {name: found.to_dict() for name, found in result.estimates.items()}
        if comparisons:
            found = comparisons[result.task]
            entry["difference"] = {name: value.to_dict() for name, value in found.differences.items()}
            entry["differing_settings"] = found.differing
        tasks.append(entry)
    content: dict[str, Any] = {"model": results[0].model, "date": results[-1].date, "tasks": tasks}
    content["means"] = _means(results, groups or {})
    return content | ({} if compared_with is None else {"compared_with": compared_with})


def _means(results: Sequence[Result], groups: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    found = []
    for group, names in groups.items():
        members = [result.estimates for result in results if result.task in names]
        for metric in dict.fromkeys(metric for estimates in members for metric in estimates):
            shared = [estimates[metric] for estimates in members if metric in estimates]
            if len(shared) == len(members) > 1:
                score, stderr = mean_of(shared)
                entry = {"group": group, "metric": metric, "score": score, "stderr": stderr}
                found.append({**entry, "n_tasks": len(members)})
    return found


def write_summary(folder: Path, content: Mapping[str, Any]) -> None:
    """Write <folder>/metrics/summary.json."""
    write_json(folder / "metrics" / "summary.json", content)


def summary_table(content: Mapping[str, Any]) -> str:
    """The summary as text, a line per task and metric; scores in their own unit, +- one standard error."""
    compared = "compared_with" in content
    lines = [["task", "metric", "score", "+-", "n", "cut", *(["difference", "+-"] if compared else [])]]
    for entry in content["tasks"]:
        for at, (metric, found) in enumerate(entry["metrics"].items()):
            first = [entry["task"] if at == 0 else "", metric]
            line = [*first, *_numbers(found), str(found["n"]), str(entry["n_cut"]) if at == 0 else ""]
            if compared:
                line += _numbers(entry["difference"].get(metric), sign="+")
            lines.append(line)
    for entry in content["means"]:
        name = f"{entry['group']} (mean of {entry['n_tasks']})"
        lines.append([name, entry["metric"], *_numbers(entry), "", "", *([""] * 2 if compared else [])])
    shown = aligned(lines, left=2)
    shown.insert(1, "-" * max(map(len, shown)))
    shown += [
        f"{entry['task']}: {len(entry['runs'])} runs, {', '.join(f'{run:.4f}' for run in entry['runs'])}; "
        f"standard error over runs {entry['runs_stderr']:.4f}"
        for entry in content["tasks"]
        if len(entry["runs"]) > 1
    ]
    if compared:
        shown.append(f"difference: paired, over the examples shared with {content['compared_with']}")
        shown += [
            f"{entry['task']}: not the same {', '.join(entry['differing_settings'])} there"
            for entry in content["tasks"]
            if entry["differing_settings"]
        ]
    return "\n".join(shown)


def _numbers(found: Mapping[str, Any] | None, sign: str = "") -> list[str]:
    """Score and standard error, with four digits after the point (one for large numbers)."""
    if found is None:
        return ["", ""]
    digits = 4 if abs(found["score"]) < 100 else 1
    error = "" if found["stderr"] is None else f"{found['stderr']:.{digits}f}"
    return [f"{found['score']:{sign}.{digits}f}", error]
