"""Runs read back from their folders: settings, log, scores, mask, and the ledger of a sequence of tasks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from lota.config import Config
from lota.config_checks import WEIGHT_NEUTRAL
from lota.lotto.config import METHODS, LottoConfig
from lota.lotto.forgetting import NAME as FORGETTING_NAME
from lota.lotto.forgetting import SUMMARIES
from lota.lotto.ledger import LEDGER, Entry, Ledger
from lota.masks import Mask
from lota.masks.trainable import mask_or_dense
from lota.models.hub import is_hub_reference
from lota.settings import check_types, flat, has_type, stored_settings
from lota.train.checkpoint import CHECKPOINT_NAME
from lota.utils import short_names

FORGETTING = f"{FORGETTING_NAME}.json"
SUMMARY = "metrics/summary.json"


class TaskScore(NamedTuple):
    """A result of an evaluation."""

    task: str
    metric: str
    value: float  # mean over the examples
    stderr: float | None  # None for one example
    n: int  # examples


@dataclass
class RunRecord:
    """What a run folder holds; what it does not have is empty, and `notes` says so."""

    path: Path
    settings: dict[str, Any]  # flat: model.name_or_path; keys that the run did not know have their defaults
    log: list[dict[str, Any]] = field(default_factory=list)  # lines of metrics.jsonl
    mask: Mask | None = None  # before it is flipped; None for dense training, or if the file is lost
    lost_mask: bool = False
    scores: list[TaskScore] = field(default_factory=list)  # of the newest evaluated checkpoint
    stages: list[Entry] = field(default_factory=list)  # of ledger.json
    forgetting: dict[str, Any] = field(default_factory=dict)  # content of forgetting.json
    device: str | None = None
    name: str = ""  # the last parts of the path, as many as tell it from the other runs
    notes: list[str] = field(default_factory=list)

    @property
    def is_sequence(self) -> bool:
        """Whether it is a sequence of tasks, of lotto.py."""
        return "tasks" in self.settings or bool(self.stages)

    @property
    def mask_path(self) -> str | None:
        """The file of its mask: named by the settings, or where snip=true stores the one it computes."""
        if not self.settings["snip"]:
            return self.settings["mask_path"]
        return self.settings["save_snip_mask_path"] or str(self.path / "snip_mask.pt")

    @property
    def sparsity(self) -> float | None:
        """Frozen share of the scope under its masks, as extracted; None for dense training."""
        if "method" in self.settings:  # of a sequence
            return self.settings["sparsity"] if METHODS[self.settings["method"]].saliency else None
        if self.mask is None:
            return None
        extracted = self.mask.meta.get("sparsity", 1 - self.mask.density)
        return round(1 - extracted if self.settings["flip_mask"] else extracted, 6)

    @property
    def weight_settings(self) -> dict[str, Any]:
        """The settings that can change weights."""
        return {k: value for k, value in self.settings.items() if k not in WEIGHT_NEUTRAL}

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """(training examples, values) of a key of the log, wherever it has a number."""
        points = [(line["examples"], line[key]) for line in self.log if is_number(line.get(key))]
        return [examples for examples, _ in points], [value for _, value in points]

    def reduce(self, key: str, reduction: Callable[[list[float]], float]) -> float | None:
        """A number made of all values of a key of the log, None if it has none."""
        _, values = self.series(key)
        return reduction(values) if values else None

    def last(self, key: str) -> float | None:
        """The last value of a key of the log."""
        return self.reduce(key, lambda values: values[-1])


def read_runs(paths: Iterable[str | Path], with_stages: bool = True) -> list[RunRecord]:
    """Every run of the folders given; a sequence of tasks is followed by the runs of its stages.

    Raises ValueError naming all folders that hold no run.
    """
    runs, problems = [], []
    for path in dict.fromkeys(Path(path).expanduser().resolve() for path in paths):
        try:
            runs.append(read_run(path))
            stages = sorted(path.glob("*/*/config.yaml")) if with_stages and runs[-1].is_sequence else []
            runs += [read_run(stage.parent, of_sequence=True) for stage in stages]
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    for run, name in zip(runs, short_names([run.path for run in runs], alike=False), strict=True):
        run.name = name
    return runs


def read_run(path: Path, of_sequence: bool = False) -> RunRecord:
    """The run in a folder. Raises ValueError if it is no run folder or its config.yaml cannot be read.

    of_sequence: it is a stage, whose scores are in the ledger of the sequence.
    """
    run = RunRecord(path, _read_settings(path))
    if run.is_sequence or (path / LEDGER).is_file():
        run.stages = _read_stages(path)
        run.notes += [] if run.stages else [f"{LEDGER} has no finished stage"]
        run.forgetting = _read_forgetting(path / FORGETTING, run.notes)
    else:
        run.log = _read_log(path / "metrics.jsonl", run.notes)
        run.scores = [] if of_sequence else _newest_scores(path, run.notes)
        _read_mask(run)
        versions = _read_json(path / "versions.json", run.notes)
        device = versions.get("device") if isinstance(versions, dict) else None
        run.device = device if isinstance(device, str) else None
    return run


def _read_settings(path: Path) -> dict[str, Any]:
    file = path / "config.yaml"
    if not file.is_file():
        below = [run.parent for depth in ("*", "*/*") for run in sorted(path.glob(f"{depth}/config.yaml"))]
        hint = f"; it holds runs: give {below[0]} and so on" if below else ""
        missing = "there is no config.yaml" if path.is_dir() else "there is no such folder"
        missing = "it is a file; give the folder that holds config.yaml" if path.is_file() else missing
        raise ValueError(f"{path} is not a run folder: {missing}{hint}")
    content = stored_settings(file, Config())
    schema = LottoConfig if "tasks" in content else Config
    check_types(content, schema(), file)
    return flat(asdict(schema())) | flat(content)


def _read_json(file: Path, notes: list[str]) -> Any:
    """The content of a file; None, with a note, if it is absent or no JSON."""
    try:
        return json.loads(file.read_bytes())
    except FileNotFoundError:
        notes.append(f"no {file.name}")
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{file} cannot be read: {error}")
    return None


def _read_log(file: Path, notes: list[str]) -> list[dict[str, Any]]:
    lines, unreadable = [], 0
    # Not str.splitlines, which cuts at U+2028 too. What follows the last line end was being written when the
    # run was killed.
    for text in file.read_bytes().split(b"\n")[:-1] if file.is_file() else []:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict) and is_number(line.get("examples")):
            lines.append(line)
        else:
            unreadable += 1
    if unreadable:
        notes.append(f"{unreadable} lines of {file.name} are no lines of a log: left out")
    if not lines:
        notes.append(f"{file.name} is {'empty' if file.is_file() else 'absent'}: no curves")
    return lines


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value of JSON is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _newest_scores(path: Path, notes: list[str]) -> list[TaskScore]:
    """Those of the newest checkpoint that was evaluated."""

    def written(checkpoint: Path) -> tuple[float, str]:
        files = [file for name in ("policy.pt", "resume.pt") if (file := checkpoint / name).is_file()]
        return files[0].stat().st_mtime if files else 0, checkpoint.name

    checkpoints = sorted((p for p in path.iterdir() if CHECKPOINT_NAME.fullmatch(p.name)), key=written)
    evaluated = [checkpoint for checkpoint in checkpoints if (checkpoint / SUMMARY).is_file()]
    if not evaluated:
        notes.append("no evaluated checkpoint: no scores")
        return []
    if evaluated[-1] != checkpoints[-1]:
        notes.append(f"scores are of {evaluated[-1].name}, {checkpoints[-1].name} is not evaluated")
    return _read_scores(evaluated[-1], notes)


def read_base(folder: str) -> list[TaskScore]:
    """Scores of a model that is no run. Raises ValueError if its folder has no evaluation."""
    notes: list[str] = []
    scores = _read_scores(Path(folder), notes)
    if not scores:
        raise ValueError(
            f"{folder} holds no scores of a base model: {', '.join(notes)}; "
            "evaluate it first (eval_model_all.py --model ... --out)"
        )
    return scores


def _read_scores(folder: Path, notes: list[str]) -> list[TaskScore]:
    """What eval_model_all.py left in a model's folder."""
    content = _read_json(folder / SUMMARY, notes)
    try:
        found = [TaskScore(t["task"], t["metric"], t["score"], t["stderr"], t["n"]) for t in content["tasks"]]
        for score in found:
            if not (isinstance(score.task, str) and isinstance(score.metric, str) and is_number(score.value)):
                raise TypeError("a task, a metric and a number each")
            if not _is_cell(score.stderr):
                raise TypeError("a standard error is a number or null")
        return found
    except (KeyError, TypeError):
        if content is not None:
            notes.append(f"{folder / SUMMARY} is no summary of an evaluation")
        return []


def _is_cell(value: Any) -> bool:
    """Whether a value is a number, or null for one that does not exist."""
    return value is None or is_number(value)


def _read_mask(run: RunRecord) -> None:
    path = run.mask_path
    try:
        run.mask = mask_or_dense(path, mapped=True)
    except (ValueError, OSError) as error:
        there = is_hub_reference(str(path)) or Path(str(path)).exists()
        reason = f"cannot be read: {error}" if there else "is not there any more"
        run.lost_mask = True
        run.notes.append(f"its mask {path} {reason}: its density, overlap and sparsity are left out")


def _read_stages(path: Path) -> list[Entry]:
    """The entries of ledger.json. Raises ValueError naming the file for one with a value of another type."""
    entries = Ledger(path).entries
    for entry in entries:
        for key in fields(entry):
            value = getattr(entry, key.name)
            if not has_type(value, str(key.type)):
                raise ValueError(f"{path / LEDGER} is no ledger: {key.name}={value!r:.60} is no {key.type}")
    return entries


def _read_forgetting(file: Path, notes: list[str]) -> dict[str, Any]:
    content = _read_json(file, notes)
    if content is None:
        return {}
    try:
        n = len(content["tasks"])
        for part in (content[key] for key in ("score", "loss") if key in content):
            lines = [*part["matrix"], *part["stderr"]]
            lines += [part["base"], part["base_stderr"]] if "base" in part else []
            if len(part["matrix"]) != len(part["stderr"]) or any(len(line) != n for line in lines):
                raise ValueError("rows of another length than its tasks")
            summaries = [part[name] for name in SUMMARIES if part.get(name) is not None]
            cells = [cell for found in summaries for cell in (found["value"], found["stderr"])]
            if not all(map(_is_cell, (*cells, *(cell for line in lines for cell in line)))):
                raise TypeError("its cells are numbers or null")
        if not isinstance(content.get("metrics", {}), dict):
            raise TypeError("metrics are task -> metric")
        return content
    except (KeyError, TypeError, ValueError):
        notes.append(f"{file} holds no forgetting matrix: no standard errors of it")
        return {}
