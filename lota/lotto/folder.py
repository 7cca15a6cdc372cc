"""The run folder of a sequence of tasks: whether it may be started, continued or replaced."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lota.config_checks import differences
from lota.lotto.config import LottoConfig
from lota.train.run_folder import RunFolder

_FILES = re.compile(r"config\.yaml|base|ledger\.(json|txt)|forgetting.*\.(json|txt|png)")
_STAGE = re.compile(r"\d+_.+")


class SequenceFolder(RunFolder):
    """The folder of a sequence, whose items are files of its own and a folder for each task."""

    config: LottoConfig

    def items(self) -> list[Path]:
        found = sorted(self.path.iterdir()) if self.path.is_dir() else []
        return [p for p in found if _FILES.fullmatch(p.name) or (p.is_dir() and _STAGE.fullmatch(p.name))]

    def results(self) -> list[str]:
        return [item.name for item in self.items()]

    def begun(self) -> bool:
        return any(self.path.glob("[0-9]*_*/*/*/policy.pt"))

    def changes(self, old: dict[str, Any]) -> list[str]:
        """As for one run; tasks that come after those of the old sequence are no change."""
        config = self.config
        before = list(old.get("tasks") or [])
        before = before[::-1] if old.get("order") == "reversed" else before
        if before and config.sequence[: len(before)] == before:
            ours = {task: given for task, given in config.task_overrides.items() if task in before}
            same = {"task_overrides": config.task_overrides} if old.get("task_overrides") == ours else {}
            old = {**old, "tasks": config.tasks, "order": config.order, **same}
        return differences(old, config)
