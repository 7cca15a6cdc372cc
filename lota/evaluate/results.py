"""The result of a task: what is stored of it, and how it compares with another model's on its examples."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lota.data.task import Row
from lota.evaluate.estimates import Estimate, mean_and_stderr
from lota.evaluate.scorers import Records
from lota.utils import atomic_path, write_json


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
