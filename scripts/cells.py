"""Results of a study: a file of lines that grows, and cells of tables."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lota.evaluate.estimates import mean_and_stderr
from lota.storage import cut, whole_lines

logger = logging.getLogger("study")
UNTOLD = ("base", "sizes", "mask", "folder", "cpu_seconds")  # of a result that is shown while a study runs
Record = dict[str, Any]  # plain values, as in the files of results


class Cells:
    """Results by what they are results of, in a file of one line each."""

    def __init__(self, path: Path):
        self.path, self.found = path, dict[str, Record]()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        lines = list(whole_lines(path))
        cut(path, lines[-1][0] if lines else 0)  # what an interrupted process left of a line
        for _, line in lines:
            record = json.loads(line)
            self.found[self._name(record["cell"])] = record

    @staticmethod
    def _name(cell: Record) -> str:
        return json.dumps(cell, sort_keys=True)

    def get(self, **cell: Any) -> Record | None:
        return self.found.get(self._name(cell))

    def add(self, result: Record, **cell: Any) -> Record:
        record = {"cell": cell, **result}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.found[self._name(cell)] = record
        told = {key: value for key, value in {**cell, **result}.items() if key not in UNTOLD}
        logger.info("%s", ", ".join(f"{key} {value}" for key, value in told.items()))
        return record


def read_cells(folder: Path) -> dict[str, list[Record]]:
    """Workload -> its results, of all files of a study; those of the newest sizes and base only."""
    found = {}
    for path in sorted(folder.glob("*.jsonl")):
        records = [json.loads(line) for _, line in whole_lines(path)]
        newest = records[-1]["cell"].get("sizes") if records else None
        found[path.stem] = [record for record in records if record["cell"].get("sizes") == newest]
    return found


def shown(values: Sequence[float | None], factor: float = 1, digits: int = 3) -> str:
    """Mean ± standard error; a value that is not known: a run that diverged."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return "diverged" if values else "-"
    mean, error = mean_and_stderr(known)
    text = f"{factor * mean:.{digits}f}"
    return text if error is None else f"{text} ± {factor * error:.{digits}f}"


COLUMNS = {  # key of a result -> heading, factor and digits
    "score": ("score (%)", 100, 1),
    "nats": ("nats per token", 1, 3),
    "own": ("own text, nats per byte", 1, 4),
}
LABELS = {"score": "score", "nats": "test loss, nats per token"}  # of axes


def results(runs: Sequence[Record]) -> list[str]:
    """A cell per column: means over runs, "-" for what the task does not have."""
    return [shown([run[key] for run in runs if key in run], *how) for key, (_, *how) in COLUMNS.items()]
