"""The result of a task: what is stored of it, and how it compares with another model's on its examples."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

from lota.atomic import atomic_path, write_json
from lota.estimates import Estimate, mean_and_stderr
from lota.journal import content_key, read_journal
from lota.scoring import SCORERS, Records, Scorer

Row = dict[str, Any]


class ScoredTask(Protocol):
    """What evaluation needs to know of a task; `tasks.base.Task` is one."""

    name: str
    version: int
    metric: str | None
    more_metrics: tuple[str, ...]
    scoring: tuple[str, ...]
    closing: str
    chat: bool

    def prompt(self, row: Row) -> str: ...
    def messages(self, row: Row) -> list[dict[str, str]]: ...
    def demonstration(self, row: Row) -> str: ...
    def target(self, row: Row) -> str: ...
    def gold(self, row: Row) -> str | None: ...
    def extract(self, completion: str) -> str | None: ...
    def score(self, extracted: str | None, gold: str | None) -> float: ...
    def metrics(self, row: Row, completion: str) -> dict[str, float]: ...
    def choices(self, row: Row) -> list[str]: ...
    def choice(self, row: Row) -> int: ...


@dataclass(frozen=True)
class Result:
    """Scores of one or several runs over the same n examples.

    score: of `metric`, a mean over examples (and runs) or a perplexity; stderr: its standard error over
    examples, None for one example; seed: of the first run; settings: what the score depends on; runs: the
    score of each run; n_cut: prompts that were shortened to fit the model's context; estimates: every metric;
    predictions: of each run, by example number.
    """

    task: str
    version: int
    metric: str
    score: float
    stderr: float | None
    n: int
    seed: int
    settings: dict[str, Any]
    model: str
    date: str
    runs: tuple[float, ...]
    scoring: str
    n_cut: int
    estimates: Mapping[str, Estimate] = field(repr=False)
    predictions: Sequence[Records] = field(repr=False)

    @property
    def runs_stderr(self) -> float | None:
        """Standard error over runs: how much the draws alone move the mean; None for one run."""
        return mean_and_stderr(self.runs)[1]

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `runs` and `metrics` only where there are several, `n_cut` where there are any."""
        more = {"runs", "scoring", "n_cut", "estimates", "predictions"}
        content = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in more}
        if len(self.runs) > 1:
            content["runs"] = self.runs
            content["runs_stderr"] = self.runs_stderr
        if len(self.estimates) > 1:
            content["metrics"] = {name: found.to_dict() for name, found in self.estimates.items()}
        if self.n_cut:
            content["n_cut"] = self.n_cut
        return content


def now() -> str:
    """UTC, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def write_result(path: Path, result: Result) -> None:
    write_json(path, result.to_dict())


def write_lines(path: Path, records: Sequence[Row]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


@dataclass(frozen=True)
class Stored:
    """Predictions of an earlier evaluation, a dict per run, all of the same examples; their settings."""

    runs: list[Records]
    settings: dict[str, Any]

    def differing(self, result: Result) -> list[str]:
        """Names of settings that a result has otherwise."""
        return [name for name, value in self.settings.items() if _plain(result.settings.get(name)) != value]


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))  # as it is read back: tuples become lists


def stored_runs(
    folder: Path, task: ScoredTask, kind: type[Scorer], rows: Sequence[Row], chosen: Sequence[int]
) -> Stored:
    """Predictions of some of the chosen examples that an earlier evaluation left in <folder>/metrics.

    Errors: ValueError where there are none, or of other data or
    another version of the task: they cannot be compared.
    """
    stem = f"{task.name}{kind.suffix}_predictions"
    path = folder / "metrics" / f"{stem}.journal"
    if not path.is_file():
        raise ValueError(
            f"--compare: {folder} has no predictions of {task.name} scored by {kind.name} ({path.name}): "
            f"evaluate it first, with the same --datasets, --n_examples and --seed"
        )
    key, records = _comparable(path, task, rows)
    runs, number = [records], 1
    while (more := path.with_name(f"{stem}_run{number}.journal")).is_file():
        other, records = _comparable(more, task, rows)
        if {**other, "seed": None} == {**key, "seed": None}:  # else left by an earlier evaluation
            runs.append(records)
        number += 1
    shared = [i for i in chosen if all(i in records for records in runs)]
    if not shared:
        raise ValueError(f"--compare: {folder} has none of the chosen examples of {task.name}")
    made_with = {**key["settings"], "template": key["template"], "few_shot": key.get("few_shot")}
    made_with.setdefault("prompt_limits", None)
    return Stored([{i: records[i] for i in shared} for records in runs], made_with)


def _comparable(path: Path, task: ScoredTask, rows: Sequence[Row]) -> tuple[dict[str, Any], Records]:
    try:
        key, records, _ = read_journal(path)
        _ = key["settings"], key["template"]  # a KeyError where it is no journal of ours
        same = key["data"] == content_key(list(rows)) and key["version"] == task.version
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--compare: {path} cannot be read ({error}): evaluate that model anew") from error
    if not same:
        raise ValueError(
            f"--compare: {path} is of other rows or another version of task {task.name}: "
            "evaluate that model anew"
        )
    return key, records


@dataclass(frozen=True)
class Comparison:
    """Every metric minus that of another model, over the examples that both have, and the names of settings
    that the other was evaluated with otherwise.
    """

    differences: Mapping[str, Estimate]
    differing: list[str]


def compared(task: ScoredTask, result: Result, other: Stored) -> Comparison:
    """A result against the predictions of another model."""
    kind = SCORERS[result.scoring]
    ours = kind.estimates(task, [{i: records[i] for i in other.runs[0]} for records in result.predictions])
    theirs = kind.estimates(task, other.runs)
    differences = {name: ours[name].minus(theirs[name]) for name in ours if name in theirs}
    return Comparison(differences, other.differing(result))
