"""Runs read back from their folders: settings, log, scores, mask, and the ledger of a sequence of tasks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lota.config import Config
from lota.config_checks import WEIGHT_NEUTRAL
from lota.lotto.forgetting import NAME as FORGETTING_NAME
from lota.lotto.ledger import LEDGER, Entry, Ledger
from lota.masks import Mask
from lota.masks.trainable import mask_or_dense
from lota.train.checkpoint import CHECKPOINT_NAME
from lota.utils import short_names

FORGETTING = f"{FORGETTING_NAME}.json"
SUMMARY = "metrics/summary.json"


class Score(NamedTuple):
    """A result of an evaluation: mean of a metric over n examples, standard error None for one."""

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int


@dataclass
class Run:
    """What a run folder holds; what it does not have is empty, and said in `notes`.

    settings: flat, `model.name_or_path` and so on; settings that the run did not know have their defaults.
    log: lines of metrics.jsonl. mask: what is in mask_path, before it is flipped; None for dense training, or
    where the file is lost. scores: of the newest evaluated checkpoint. stages: tasks of ledger.json.
    forgetting: content of forgetting.json.
    name: as short as tells it from the other runs.
    """

    path: Path
    settings: dict[str, Any]
    log: list[dict[str, Any]] = field(default_factory=list)
    mask: Mask | None = None
    scores: list[Score] = field(default_factory=list)
    stages: list[Entry] = field(default_factory=list)
    forgetting: dict[str, Any] = field(default_factory=dict)
    device: str | None = None
    lost_mask: bool = False
    name: str = ""
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
        """Frozen share of the scope under the mask, as extracted; None for dense training."""
        if self.mask is None:
            return None
        extracted = self.mask.meta.get("sparsity", 1 - self.mask.density)
        return round(1 - extracted if self.settings["flip_mask"] else extracted, 6)

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """(training examples, values) of a key of the log, where it has a number."""
        points = [
            (line["examples"], line[key]) for line in self.log if isinstance(line.get(key), int | float)
        ]
        return [at for at, _ in points], [value for _, value in points]


def read_runs(paths: list[str]) -> list[Run]:
    """Every run of the folders given; a sequence of tasks stands for its stages' runs, too.

    Raises ValueError naming all folders that are none of a run.
    """
    runs, problems = [], []
    for path in dict.fromkeys(Path(path).expanduser().resolve() for path in paths):
        try:
            runs.append(read_run(path))
            stages = sorted(path.glob("*/*/config.yaml")) if runs[-1].is_sequence else []
            runs += [read_run(stage.parent, of_sequence=True) for stage in stages]
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    for run, name in zip(runs, short_names([run.path for run in runs], alike=False), strict=True):
        run.name = name
    return runs


def read_run(path: Path, of_sequence: bool = False) -> Run:
    """The run in a folder. Raises ValueError when it is no run folder or its config.yaml cannot be read.

    of_sequence: the run of a stage, whose scores the sequence's ledger has.
    """
    run = Run(path, _settings(path))
    if run.is_sequence or (path / LEDGER).is_file():
        run.stages = Ledger(path).entries
        run.notes += [] if run.stages else [f"{LEDGER} has no finished stage"]
        run.forgetting = _forgetting(path / FORGETTING, run.notes)
    else:
        run.log = _log(path / "metrics.jsonl", run.notes)
        run.scores = [] if of_sequence else _scores(path, run.notes)
        run.mask = _mask(run)
        versions = _json(path / "versions.json", run.notes)
        run.device = versions.get("device") if isinstance(versions, dict) else None
    return run


def _settings(path: Path) -> dict[str, Any]:
    file = path / "config.yaml"
    if not file.is_file():
        below = [found.parent.relative_to(path) for found in sorted(path.glob("*/config.yaml"))]
        below += [found.parent.relative_to(path) for found in sorted(path.glob("*/*/config.yaml"))]
        hint = f"; it holds runs: give {path / below[0]} and so on" if below else ""
        missing = "there is no config.yaml" if path.is_dir() else "there is no such folder"
        raise ValueError(f"{path} is not a run folder: {missing}{hint}")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError(f"{path} is not a run folder: config.yaml holds no settings of a run")
    return _defaults(Config) | _flat(content)


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in content.items():
        nested = isinstance(value, dict) and key != "task_overrides"
        found |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return found


def _defaults(kind: type, prefix: str = "") -> dict[str, Any]:
    found = {}
    for item in fields(kind):
        value = item.default if item.default is not MISSING else item.default_factory()
        nested = is_dataclass(value)
        found |= (
            _defaults(type(value), f"{prefix}{item.name}.") if nested else {f"{prefix}{item.name}": value}
        )
    return found


def weight_settings(run: Run) -> dict[str, Any]:
    """The settings that can change weights."""
    return {key: value for key, value in run.settings.items() if key.split(".")[0] not in WEIGHT_NEUTRAL}


def _json(file: Path, notes: list[str]) -> Any:
    """The content of a file; None, with a note, where it is absent or no JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        notes.append(f"no {file.name}")
    except ValueError as error:
        notes.append(f"{file} cannot be read: {error}")
    return None


def _log(file: Path, notes: list[str]) -> list[dict[str, Any]]:
    lines = []
    for text in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue  # the line that was being written when the run was killed
        if isinstance(line, dict) and "examples" in line:
            lines.append(line)
    if not lines:
        notes.append(f"{file.name} is {'empty' if file.is_file() else 'absent'}: no curves")
    return lines


def _scores(path: Path, notes: list[str]) -> list[Score]:
    checkpoints = [p for p in path.iterdir() if CHECKPOINT_NAME.fullmatch(p.name)]
    checkpoints.sort(
        key=lambda p: ((p / "policy.pt").stat().st_mtime if (p / "policy.pt").is_file() else 0, p.name)
    )
    for checkpoint in reversed(checkpoints):
        if not (checkpoint / SUMMARY).is_file():
            continue
        if checkpoint != checkpoints[-1]:
            notes.append(f"scores are of {checkpoint.name}, {checkpoints[-1].name} is not evaluated")
        return read_scores(checkpoint, notes)
    notes.append("no evaluated checkpoint: no scores")
    return []


def read_base(folder: str) -> list[Score]:
    """Scores of a model that is no run. Raises ValueError where its folder has no evaluation."""
    notes: list[str] = []
    found = read_scores(Path(folder), notes)
    if not found:
        raise ValueError(
            f"--base {folder}: {', '.join(notes)}: evaluate it first (eval_model_all.py --model ... --out)"
        )
    return found


def read_scores(folder: Path, notes: list[str]) -> list[Score]:
    """What eval_model_all.py left in a model's folder; tasks without a score have none here."""
    content = _json(folder / SUMMARY, notes)
    try:
        return [Score(t["task"], t["metric"], t["score"], t["stderr"], t["n"]) for t in content["tasks"]]
    except (KeyError, TypeError):
        if content is not None:
            notes.append(f"{folder / SUMMARY} is no summary of an evaluation")
        return []


def _mask(run: Run) -> Mask | None:
    path = run.mask_path
    try:
        return mask_or_dense(path, mapped=True)
    except (ValueError, OSError) as error:
        where = "is not there any more" if not Path(str(path)).exists() else f"cannot be read: {error}"
        run.lost_mask = True
        run.notes.append(f"its mask {path} {where}: its density, overlap and sparsity are left out")
        return None


def _forgetting(file: Path, notes: list[str]) -> dict[str, Any]:
    content = _json(file, notes)
    if content is None:
        return {}
    try:
        n = len(content["tasks"])
        for part in (content[key] for key in ("score", "loss") if key in content):
            lines = [*part["stderr"], *(part[key] for key in ("base", "base_stderr") if key in part)]
            if any(len(line) != n for line in lines) or ("base" in part) != ("base_stderr" in part):
                raise ValueError("rows of another length than its tasks")
        return content
    except (KeyError, TypeError, ValueError):
        notes.append(f"{file} holds no forgetting matrix: no standard errors of it")
        return {}
