"""What of a sequence can be refused before anything is trained: folder, tasks, data, masks, capacity."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import reduce
from math import ceil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lota.config_checks import differences
from lota.data.task import FindTask
from lota.lotto.config import LottoConfig
from lota.lotto.held_out import HeldOut
from lota.lotto.ledger import Ledger
from lota.masks import Mask, kept_count
from lota.masks.extract.units import units_of_scope, widened
from lota.models.scope import find_scope, meta_model
from lota.places import working_in
from lota.train.checkpoint import CHECKPOINT_NAME, RESUME
from lota.train.preflight import prepare
from lota.train.run_folder import RunFolder
from lota.utils import Problems

_FILES = re.compile(r"config\.yaml|base|ledger\.(json|txt)|forgetting.*\.(json|txt|png)")
_STAGE = re.compile(r"\d+_.+")


@dataclass(frozen=True)
class Checked:
    """What a sequence works on."""

    model: PreTrainedModel  # on the meta device
    everything: Mask  # all entries that dense training may change: the scope without protect_masks
    custom: dict[str, Path]  # task -> mask file of yours
    held_out: list[HeldOut]  # rows of each task in the order of the sequence
    folder: SequenceFolder


def check(config: LottoConfig, find_task: FindTask) -> Checked:
    """Everything that a sequence starts from. Raises one ValueError with all the problems found."""
    problems = Problems()
    folder = SequenceFolder(config)
    problems.attempt(folder.look)
    held_out = [problems.attempt(_rows, config, task, find_task) for task in config.sequence]
    problems.found = [
        line for message in problems.found for line in message.splitlines()
    ]  # once for all tasks
    problems.refuse()
    model = meta_model(config.model.name_or_path)
    scope = find_scope(model, config.model.scope, config.model.block_name)
    full = Mask.from_dense({name: torch.ones(t.shape, dtype=torch.bool) for name, t in scope.items()})
    units = units_of_scope(scope, config.granularity, config.block)
    protect = {f"protect_masks {path}": Mask.load(path) for path in config.protect_masks}
    files = {task: Path(given) for task in config.sequence if (given := config.own(task, "mask_path"))}
    custom = {f"task_overrides.{task}.mask_path {path}": Mask.load(path) for task, path in files.items()}
    stages = _stage_masks(config)
    _check_overlap(config, protect, {**stages, **custom}, custom)
    taken = [widened(mask, units) for mask in (*protect.values(), *custom.values(), *stages.values())]
    _check_capacity(config, full, taken, {*files})
    everything = reduce(Mask.minus, protect.values(), full)
    rows = [found for found in held_out if found is not None]
    return Checked(model, everything, files, rows, folder)


def _rows(config: LottoConfig, name: str, find_task: FindTask) -> HeldOut:
    """Returns the task's held-out rows, and checks its training run as far as that is possible before earlier
    tasks have run.
    """
    task = find_task(name)
    run = config.adaptation(name, ewc=0.0, importance_path=None)  # which the stage will compute
    prepare(replace(run, debug=True), find_task)
    return HeldOut(config, task)


def _stage_masks(config: LottoConfig) -> dict[str, Mask]:
    """Masks of the stages that are on disk already."""
    if config.overwrite or config.learning.saliency is None:
        return {}
    entries = Ledger(config.run_dir).entries
    own = {str(config.own(entry.name, "mask_path")) for entry in entries}
    return {
        f"{e.name}'s {e.mask}": Mask.load(config.run_dir / e.mask)
        for e in entries
        if e.mask and e.mask not in own
    }


def _check_overlap(
    config: LottoConfig, protect: dict[str, Mask], tasks: dict[str, Mask], custom: dict[str, Mask]
) -> None:
    """Raise ValueError if a mask of yours keeps entries of another mask that must not be touched."""
    both = list(itertools.product(custom, protect))
    if config.learning.protects:
        both += [(a, b) for a, b in itertools.combinations(tasks, 2) if a in custom or b in custom]
    masks = {**protect, **tasks}
    lines = [
        f"{a} and {b} both keep {shared:,} entries, but what one task keeps is frozen for the others: give "
        "masks that share nothing (extract_masks.py --protect)"
        for a, b in both
        if (shared := masks[a].overlap(masks[b]))
    ]
    if lines:
        raise ValueError("\n".join(lines))


def _check_capacity(config: LottoConfig, full: Mask, taken: Iterable[Mask], with_mask: set[str]) -> None:
    """Raise ValueError if the tasks that need a mask find too few free entries; names what would fit."""
    done = set() if config.overwrite else {entry.name for entry in Ledger(config.run_dir).entries}
    open_tasks = [task for task in config.sequence if task not in with_mask | done]
    if config.learning.saliency is None or not open_tasks:
        return
    total, free = full.n_total, reduce(Mask.minus, taken, full).n_kept
    wanted = {task: kept_count(config.own(task, "sparsity"), total) for task in open_tasks}
    together = config.learning.protects
    needed = list(itertools.accumulate(wanted.values(), None if together else max))
    if needed[-1] <= free:
        return
    share = free // len(open_tasks) if together else free
    least = ceil((1 - share / total) * 1e6) / 1e6
    counted = ", ".join(f"{task} {count:,}" for task, count in wanted.items())
    raise ValueError(
        f"sparsity={config.sparsity}: the tasks need {needed[-1]:,} entries ({counted}), but {free:,} of the "
        f"scope's {total:,} are free, enough for {sum(n <= free for n in needed)} of {len(open_tasks)} "
        f"tasks: all fit at sparsity={least:g} or more, or name fewer tasks"
    )


class SequenceFolder(RunFolder):
    """The folder of a sequence, whose items are files of its own and a folder for each task."""

    config: LottoConfig

    def items(self) -> list[Path]:
        found = sorted(self.path.iterdir()) if self.path.is_dir() else []
        return [p for p in found if _FILES.fullmatch(p.name) or (p.is_dir() and _STAGE.fullmatch(p.name))]

    def settle(self) -> None:
        """As for one run; and what killed processes left half-done in the folders of the stages is undone."""
        super().settle()
        for folder in [item for item in self.items() if item.is_dir()]:
            for inside in [folder, *(path for path in sorted(folder.glob("*")) if path.is_dir())]:
                with contextlib.suppress(ValueError), working_in(inside):  # ValueError: somebody trains there
                    pass

    def _look(self) -> None:
        self.continues = self.may_continue()

    def results(self) -> list[str]:
        return [item.name for item in self.items()]

    def begun(self) -> bool:
        found = self.path.glob(f"[0-9]*_*/*/*/{RESUME}")  # also in hidden folders, half-written
        return any(CHECKPOINT_NAME.fullmatch(file.parent.name) for file in found)

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
