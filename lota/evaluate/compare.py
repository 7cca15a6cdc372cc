"""Results of two models on the same rows, and their difference with its standard error."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lota.data.task import Row, Task
from lota.evaluate.estimates import Estimate
from lota.evaluate.journal import read_journal
from lota.evaluate.results import Result
from lota.evaluate.scorers import SCORERS, Records, Scorer
from lota.utils import content_key


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
    folder: Path, task: Task, kind: type[Scorer], rows: Sequence[Row], chosen: Sequence[int]
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


def _comparable(path: Path, task: Task, rows: Sequence[Row]) -> tuple[dict[str, Any], Records]:
    try:
        key, (records, _) = read_journal(path)
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


def compared(task: Task, result: Result, other: Stored) -> Comparison:
    """A result against the predictions of another model."""
    kind = SCORERS[result.scoring]
    ours = kind.estimates(task, [{i: records[i] for i in other.runs[0]} for records in result.predictions])
    theirs = kind.estimates(task, other.runs)
    differences = {name: ours[name].minus(theirs[name]) for name in ours if name in theirs}
    return Comparison(differences, other.differing(result))
