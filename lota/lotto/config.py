"""Settings of a sequence of tasks, and the training run that each stage of it is."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from lota.config import MISSING, Config, absolute
from lota.masks import kept_count

ORDERS = ("given", "reversed")
ADAPT_FACTOR = 10  # a mask wants about ten times the learning rate of dense training


@dataclass(frozen=True)
class Method:
    """How a task is learnt.

    score: what rates entries for its mask, None for dense training; protects: what earlier tasks keep is
    frozen and not available; adapter: of dense training.
    """

    score: str | None = None
    protects: bool = False
    adapter: str = "none"

    @property
    def calibrated(self) -> bool:
        return self.score == "task_vector"


METHODS = {
    "lotto": Method("task_vector", protects=True),
    "lota": Method("task_vector"),
    "random": Method("random", protects=True),
    "fft": Method(),
    "lora": Method(adapter="lora"),
}
# What a task cannot have of its own: it is the sequence's, or the sequence sets it.
_SHARED = (
    "exp_name", "local_dirs", "model", "adapter", "datasets", "tasks", "order", "method", "task_overrides",
    "protect_masks", "flip_mask", "overwrite", "resume", "debug", "n_eval_examples", "chat_template",
)  # fmt: skip
_SET_BY_STAGES = {
    "datasets": "tasks=[...] names the tasks",
    "mask_path": "give a task a mask of yours with +task_overrides.TASK.mask_path=FILE",
    "flip_mask": "a task's mask is what it keeps",
    "snip": "masks are chosen by method=lotto, lota or random",
    "save_snip_mask_path": "the masks stand in the run folder",
    "debug": "each task starts from the checkpoint of the one before",
}


@dataclass
class CalibrateConfig:
    lr: float | None = None
    data_fraction: float | None = None
    n_steps: int | None = None  # optimizer steps
    warmup_steps: int | None = None  # optimizer steps


@dataclass
class LottoConfig(Config):
    """The keys of a training run, which every stage takes over, and those of the sequence."""

    tasks: list[str] = field(default_factory=list)
    sparsity: float = 0.9
    method: str = "lotto"
    order: str = "given"
    calibrate: CalibrateConfig = field(default_factory=CalibrateConfig)
    task_overrides: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = list(dict.fromkeys(self._problems()))
        if problems:
            raise ValueError("\n".join(["these settings cannot be honoured:", *(f"  {p}" for p in problems)]))

    @property
    def sequence(self) -> list[str]:
        """The tasks in the order in which they are learnt."""
        return self.tasks[::-1] if self.order == "reversed" else list(self.tasks)

    @property
    def how(self) -> Method:
        return METHODS[self.method]

    def resolve_paths(self) -> None:
        super().resolve_paths()
        for given in self.task_overrides.values():
            if given.get("mask_path") is not None:
                given["mask_path"] = absolute(given["mask_path"])

    def own(self, task: str, key: str) -> Any:
        """A setting of the sequence or, where the task has one of its own, the task's."""
        return self.task_overrides.get(task, {}).get(key, getattr(self, key))

    def kept_count(self, task: str, n_entries: int) -> int:
        """Entries that the task's mask keeps out of a scope of n_entries."""
        return kept_count(self.own(task, "sparsity"), n_entries)

    def adaptation(self, task: str, **changes: Any) -> Config:
        """The training run of a task. changes: fields that the stage sets."""
        values = {f.name: copy.deepcopy(getattr(self, f.name)) for f in fields(Config)}
        own = {key: v for key, v in self.task_overrides.get(task, {}).items() if key in values}
        for key, value in {**own, **self._fixed(task), **changes}.items():
            values[key] = replace(values[key], **value) if is_dataclass(values[key]) else value
        return Config(**values)

    def _fixed(self, task: str) -> dict[str, Any]:
        return {"datasets": [task], "overwrite": False, "adapter": {"name": self.how.adapter}}

    def calibration(self, task: str, **changes: Any) -> Config:
        """The dense run before it, from which the mask is extracted."""
        given = {**vars(self.calibrate), **self.task_overrides.get(task, {}).get("calibrate", {})}
        chosen = {key: value for key, value in given.items() if value is not None}
        chosen.setdefault("lr", self.own(task, "lr") / ADAPT_FACTOR)
        if "n_steps" in chosen:
            n_examples = chosen.pop("n_steps") * self.own(task, "batch_size")
            chosen |= {"n_examples": n_examples, "n_epochs": None}
        return self.adaptation(task, mask_path=None, **chosen, **changes)

    # problems

    def _problems(self) -> Iterator[str]:
        if not self.tasks:
            yield "tasks is empty: name the tasks in their order, as in tasks=[gsm8k,sql]"
        for task in dict.fromkeys(t for t in self.tasks if self.tasks.count(t) > 1):
            yield f"tasks={self.tasks}: {task} is named twice"
        for key, choices in (("method", METHODS), ("order", ORDERS)):
            if getattr(self, key) not in choices:
                yield f"{key}={getattr(self, key)}: choose one of {', '.join(choices)}"
        for key, remedy in _SET_BY_STAGES.items():
            if getattr(self, key):
                yield f"{key}={getattr(self, key)}: not with a sequence of tasks; {remedy}"
        if self.adapter.name not in ("none", "lora" if self.method == "lora" else "none"):
            yield f"adapter={self.adapter.name} with method={self.method}: choose method=lora or adapter=none"
        if self.method == "random" and self.freeze_layers:
            yield f"method=random with freeze_{self.freeze_layers}_layers=true: its masks span all layers"
        yield from self._override_problems()
        yield from self._stage_problems()

    def _override_problems(self) -> Iterator[str]:
        for task, given in self.task_overrides.items():
            if task not in self.tasks:
                near = difflib.get_close_matches(task, self.tasks, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                yield f"task_overrides.{task}: tasks={self.tasks} does not name it{hint}"
            for key in given:
                if key in _SHARED:
                    yield f"task_overrides.{task}.{key}: one for all tasks; give {key}=..."
            if given.get("mask_path") and self.method in METHODS and self.how.score is None:
                yield f"task_overrides.{task}.mask_path: method={self.method} trains without masks"

    def _stage_problems(self) -> Iterator[str]:
        """Of every training run, each told once."""
        if self.calibrate.n_steps is not None and self.calibrate.n_steps < 1:
            yield f"calibrate.n_steps={self.calibrate.n_steps}: must be at least 1, or null"
        if self.exp_name == MISSING:
            yield "exp_name is not given: name the run, as in exp_name=my_run"
            return
        for task in dict.fromkeys(self.tasks):
            try:
                self.kept_count(task, 0)
            except ValueError as error:
                yield str(error)
        if self.method not in METHODS:
            return
        told: set[str] = set()
        for task in dict.fromkeys(self.tasks):
            for build, key in ((self.adaptation, ""), (self.calibration, "calibrate: "))[
                : 1 + self.how.calibrated
            ]:
                try:
                    build(task)
                except ValueError as error:
                    lines = [line.strip() for line in str(error).splitlines()]
                    new = [line for line in (lines[1:] or lines) if line not in told]
                    told.update(new)
                    yield from (key + line for line in new)

    def unused(self) -> list[str]:
        """Keys of the sequence that nothing reads in this run, as `key=value (why)`."""
        default, told = CalibrateConfig(), []
        if not (self.method in METHODS and self.how.calibrated):
            changed = {k: v for k, v in vars(self.calibrate).items() if v != getattr(default, k)}
            told += [f"calibrate.{k}={v} (method={self.method})" for k, v in changed.items()]
        if self.how.score is None and self.sparsity != LottoConfig.sparsity:
            told.append(f"sparsity={self.sparsity} (method={self.method})")
        return told
