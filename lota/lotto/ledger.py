"""What each task of a sequence keeps, and whether later tasks left it alone: ledger.json and ledger.txt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from lota.masks import Mask
from lota.models.weights import WeightSource
from lota.storage import atomic_path, write_json

LEDGER = "ledger.json"
SHOWN_DIGITS = 12  # of a hash in the text table


@dataclass(frozen=True)
class Entry:
    """A task after its stage. The dicts map the name of a task to its value."""

    name: str
    mask: str | None  # file, relative to the run folder if it lies inside; None: dense training
    kept: int  # entries of the scope that the task may change
    free_after: int  # entries of the scope that no task so far keeps
    overlap: dict[str, int]  # entries that an earlier task keeps too
    hash_before: dict[
        str, str
    ]  # SHA-256 of what an earlier task keeps, in the model that the stage started from
    hash_after: dict[str, str]  # and in the result of the stage
    scores: dict[str, float]  # in the task's metric; empty until the stage is evaluated
    losses: dict[str, float]  # nats per token of the held-out rows' targets

    @property
    def changed(self) -> list[str]:
        """Earlier tasks some of whose kept values the stage changed."""
        return [task for task, before in self.hash_before.items() if self.hash_after[task] != before]


class Ledger:
    """The entries of a sequence in their order, on disk after each change."""

    def __init__(self, folder: Path):
        """Raises ValueError for a damaged ledger.json."""
        self.path = folder / LEDGER
        self.entries: list[Entry] = []
        if self.path.is_file():
            try:
                rows = json.loads(self.path.read_text(encoding="utf-8"))["tasks"]
                self.entries = [Entry(**{f.name: row[f.name] for f in fields(Entry)}) for row in rows]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path} is no ledger of a sequence of tasks: {error!r}") from error

    def add(self, entry: Entry) -> None:
        self.entries.append(entry)
        self._write()

    def measured(self, at: int, scores: Mapping[str, float], losses: Mapping[str, float]) -> None:
        """Replace the results of entry number `at` if they differ."""
        entry = replace(self.entries[at], scores=dict(scores), losses=dict(losses))
        if entry != self.entries[at]:
            self.entries[at] = entry
            self._write()

    def write_table(self) -> None:
        """Write ledger.txt, the entries as text, if that is not what it holds."""
        path, text = self.path.with_suffix(".txt"), self.table() + "\n"
        if not path.is_file() or path.read_text(encoding="utf-8", errors="replace") != text:
            with atomic_path(path) as temporary:
                temporary.write_text(text, encoding="utf-8")

    def _write(self) -> None:
        write_json(self.path, {"tasks": [asdict(entry) for entry in self.entries]})
        self.write_table()

    def table(self) -> str:
        """A block per task: its mask and capacity, then a line per task that it was compared with."""
        lines = []
        for number, entry in enumerate(self.entries, start=1):
            capacity = f"{entry.kept:,} entries kept, {entry.free_after:,} free after it"
            lines.append(f"{number}. {entry.name}: {capacity}")
            lines.append(f"   mask {entry.mask or 'none: dense training'}")
            for task, before in entry.hash_before.items():
                after, shown = entry.hash_after[task], before[:SHOWN_DIGITS]
                shown += " unchanged" if after == before else f" -> {after[:SHOWN_DIGITS]} changed"
                lines.append(f"   kept values of {task}: {shown}; {entry.overlap[task]:,} entries shared")
            for task, loss in entry.losses.items():
                score = f"score {entry.scores[task]:.4f}, " if task in entry.scores else ""
                lines.append(f"   {task}: {score}{loss:.4f} nats per token")
        return "\n".join(lines)


def values_hash(source: WeightSource, mask: Mask) -> str:
    """Hex SHA-256 over the values that a mask keeps, with their tensors' names and dtypes."""
    digest = hashlib.sha256()
    for name in mask.names:
        if not mask.kept(name):
            continue
        values = source.read(name).flatten()[mask.positions(name)]
        dtype = str(values.dtype).removeprefix("torch.")
        digest.update(f"{name}\0{dtype}\0{values.numel()}\0".encode())
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()
