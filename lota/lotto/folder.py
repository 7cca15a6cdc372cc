"""The run folder of a sequence of tasks: whether it may be started, continued or replaced."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import TracebackType

import yaml

from lota.config_checks import differences
from lota.lotto.config import LottoConfig
from lota.train.run_folder import REPLACED, lock_folder, move, recover, write_settings
from lota.utils import TEMPORARY_SUFFIX, remove

_STAGE = re.compile(r"\d+_.+")
_FILES = re.compile(r"config\.yaml|base|ledger\.(json|txt)|forgetting.*\.(json|txt|png)")


def check_folder(config: LottoConfig) -> None:
    """Raise ValueError where the run folder holds another run, or one that may not be continued."""
    run = config.run_dir
    recover(run, _items(run), _begun(run))
    if config.overwrite:
        return
    settings = run / "config.yaml"
    if not settings.is_file():
        found = ", ".join(path.name for path in _items(run))
        if found:
            raise ValueError(
                f"{run} holds {found}, which cannot be continued (config.yaml is missing): use another "
                "exp_name, or overwrite=true to replace them"
            )
        return
    if config.resume == "never":
        raise ValueError(f"resume=never, but {run} holds a run: use another exp_name, or overwrite=true")
    changed = _differences(yaml.safe_load(settings.read_text(encoding="utf-8")), config)
    if changed:
        raise ValueError(
            f"{run} holds a run with other settings ({'; '.join(changed)}): use another exp_name, "
            "overwrite=true to start anew, or the old settings to continue it"
        )


def _differences(old: dict, config: LottoConfig) -> list[str]:
    """Settings that changed; tasks that come after those of the old run are no change."""
    before = list(old.get("tasks") or [])
    before = before[::-1] if old.get("order") == "reversed" else before
    if before and config.sequence[: len(before)] == before:
        ours = {task: given for task, given in config.task_overrides.items() if task in before}
        same = {"task_overrides": config.task_overrides} if old.get("task_overrides") == ours else {}
        old = {**old, "tasks": config.tasks, "order": config.order, **same}
    return differences(old, config)


class OpenSequence:
    """Context manager: the run's folder, locked, cleared of what overwrite=true replaces.

    That is kept aside until the new run has a checkpoint, and is put back if it never gets one.
    Raises ValueError when another process works in this folder.
    """

    def __init__(self, config: LottoConfig):
        self.config, self.path = config, config.run_dir

    def __enter__(self) -> OpenSequence:
        self.path.mkdir(parents=True, exist_ok=True)
        self._handle = lock_folder(self.path)
        for item in self.path.glob(f".*{TEMPORARY_SUFFIX}"):
            remove(item)
        if self.config.overwrite:
            move(_items(self.path), self.path / REPLACED)
        write_settings(self.path, self.config)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        recover(self.path, _items(self.path), error is None or _begun(self.path))
        os.close(self._handle)

    def keep(self) -> None:
        """The new run has a checkpoint: what it replaced can go."""
        remove(self.path / REPLACED)


def _items(run: Path) -> list[Path]:
    """What a sequence wrote into its folder, and nothing else that lies there."""
    found = sorted(run.iterdir()) if run.is_dir() else []
    return [p for p in found if _FILES.fullmatch(p.name) or (p.is_dir() and _STAGE.fullmatch(p.name))]


def _begun(run: Path) -> bool:
    return any(run.glob("[0-9]*_*/*/*/policy.pt"))
