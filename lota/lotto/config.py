"""Settings of a sequence of tasks, and the training run that each stage of it is."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from typing import Any

from lota.config import GRANULARITIES, OPTIMIZER_STATES, Config, absolute
from lota.config_checks import unused_settings
from lota.settings import setting

IMPORTANCE = "importance.pt"  # in a stage's folder
ADAPT_FACTOR = 10  # a mask wants about ten times the learning rate of dense training


@dataclass(frozen=True)
class Method:
    """How a task is learnt."""

    saliency: str | None = None  # what rates entries for its mask; None: dense training
    protects: bool = False  # what earlier tasks keep is frozen and not available
    adapter: str = "none"  # of dense training

    @property
    def calibrated(self) -> bool:
        return self.saliency == "task_vector"


METHODS = {
    "lotto": Method("task_vector", protects=True),
    "lota": Method("task_vector"),
    "random": Method("random", protects=True),
    "fft": Method(),
    "lora": Method(adapter="lora"),
}
_CALIBRATED = tuple(f"method={name}" for name, method in METHODS.items() if method.calibrated)
_MASKED = tuple(f"method={name}" for name, method in METHODS.items() if method.saliency is not None)
_calibrated = partial(setting, None, needs=_CALIBRATED)


@dataclass
class CalibrateConfig:
    """The dense run before each mask. What its values may be, the keys of a training run say."""

    lr: float | None = _calibrated("peak learning rate; null = a tenth of the task's")
    data_fraction: float | None = _calibrated(
        "share of the task's training rows, a seeded sample; null = the task's"
    )
    n_steps: int | None = _calibrated(
        "to train; null = as long as the task's own run", "optimizer steps", at_least=1
    )
    warmup_steps: int | None = _calibrated(
        "of linear warm-up from 0 to lr; null = the task's", "optimizer steps"
    )
    optimizer_state: str | None = _calibrated(
        "of the averages that the optimizer holds; null = the task's", choices=(None, *OPTIMIZER_STATES)
    )
    stochastic_rounding: bool | None = _calibrated("hold the weights in bfloat16 alone; null = the task's")


@dataclass
class RetainConfig:
    """What keeps the behaviour of earlier tasks, from the second task on; all off by default."""

    replay_fraction: float = setting(
        0.0,
        "share of each earlier task's training rows, a seeded sample, that joins those of a task; 0 = none",
        at_least=0,
        at_most=1,
    )
    l2_sp: float = setting(0.0, "as l2_sp of a training run, in all runs but calibrations", at_least=0)
    ewc: float = setting(
        0.0, "as ewc of a training run, by what matters to the earlier tasks together", at_least=0
    )
    avoid: float = setting(
        0.0,
        "divide each score of a mask by sqrt(1 + avoid x importance to the earlier tasks)",
        at_least=0,
        needs=_MASKED,
    )
    n_examples: int = setting(
        64,
        "of each earlier task, whose squared gradients are an entry's importance; for ewc and avoid",
        "training rows",
        at_least=1,
    )

    @property
    def by_importance(self) -> bool:
        """Whether anything needs to know what matters to earlier tasks."""
        return bool(self.ewc or self.avoid)


@dataclass
class LottoConfig(Config):
    """The keys of a training run, which every stage takes over, and those of the sequence."""

    tasks: list[str] = setting([], "tasks in the order in which they are learnt, names of tasks/")
    sparsity: float = setting(
        0.9,
        "frozen share of the scope: a task keeps round((1 - s) * N) of its N entries, of those still free",
        at_least=0,
        below=1,
        needs=_MASKED,
    )
    granularity: str = setting(
        "element",
        "what a mask keeps as wholes: single entries, output neurons (row), inputs (column) or blocks",
        choices=GRANULARITIES,
        needs=_MASKED,
    )
    block: int = setting(
        64,
        "side of a block, in entries",
        at_least=16,
        at_most=256,
        needs=(*_MASKED, "granularity=block"),
    )
    method: str = setting(
        "lotto",
        "lotto: a mask of its own for each task; lota: masks that may overlap; random: random masks that do "
        "not; fft: every weight; lora: low-rank matrices, merged after each task",
        choices=tuple(METHODS),
    )
    order: str = setting("given", "given, or reversed: the last task first", choices=("given", "reversed"))
    calibrate: CalibrateConfig = field(default_factory=CalibrateConfig)
    retain: RetainConfig = field(default_factory=RetainConfig)
    task_overrides: dict[str, Any] = setting(
        {}, "task -> keys and values of its own, in place of those above"
    )

    @property
    def sequence(self) -> list[str]:
        """The tasks in the order in which they are learnt."""
        return self.tasks[::-1] if self.order == "reversed" else list(self.tasks)

    @property
    def task_names(self) -> list[str]:
        return self.tasks

    @property
    def mask_files(self) -> list[str | None]:
        own = [given.get("mask_path") for given in self.task_overrides.values()]
        return [*super().mask_files, *own]

    @property
    def learning(self) -> Method:
        """What `method` names."""
        return METHODS[self.method]

    def resolve_paths(self) -> None:
        super().resolve_paths()
        for given in self.task_overrides.values():
            if given.get("mask_path") is not None:
                given["mask_path"] = absolute(given["mask_path"])

    def own(self, task: str, key: str) -> Any:
        """A setting of the sequence or, if the task has one of its own, the task's."""
        return self.task_overrides.get(task, {}).get(key, getattr(self, key))

    def earlier(self, task: str) -> list[str]:
        """The tasks that are learnt before a task."""
        return self.sequence[: self.sequence.index(task)]

    def adaptation(self, task: str, **changes: Any) -> Config:
        """The training run of a task. changes: fields that the stage sets."""
        values = {f.name: copy.deepcopy(getattr(self, f.name)) for f in fields(Config)}
        own = {key: value for key, value in self.task_overrides.get(task, {}).items() if key in values}
        fixed = {"datasets": [task], "overwrite": False, "adapter": {"name": self.learning.adapter}}
        if self.earlier(task):
            fixed |= self._retained(task)
        # a mask of yours is not of the weights that the tasks before have left
        fixed["mask_of_other_base"] = self.mask_of_other_base or "model" in changes
        for key, value in {**own, **fixed, **changes}.items():
            values[key] = replace(values[key], **value) if is_dataclass(values[key]) else value
        return Config(**values)

    def _retained(self, task: str) -> dict[str, Any]:
        """What keeps the behaviour of the tasks before a task."""
        retain, found = self.retain, dict[str, Any]()
        if retain.replay_fraction:
            found |= {"replay": self.earlier(task), "replay_fraction": retain.replay_fraction}
        if self.learning.adapter == "none":
            found |= {"l2_sp": retain.l2_sp, "ewc": retain.ewc}
            if retain.ewc:
                stage = f"{self.sequence.index(task) + 1}_{task}"
                found["importance_path"] = str(self.run_dir.absolute() / stage / IMPORTANCE)
        return found

    def calibration(self, task: str, **changes: Any) -> Config:
        """The dense run before it, from which the mask is extracted."""
        given = {**vars(self.calibrate), **self.task_overrides.get(task, {}).get("calibrate", {})}
        chosen = {key: value for key, value in given.items() if value is not None}
        chosen.setdefault("lr", self.own(task, "lr") / ADAPT_FACTOR)
        if "n_steps" in chosen:
            n_examples = chosen.pop("n_steps") * self.own(task, "batch_size")
            chosen |= {"n_examples": n_examples, "n_epochs": None}
        free = {"l2_sp": 0.0, "ewc": 0.0, "importance_path": None}  # it only finds out what changes most
        return self.adaptation(task, mask_path=None, **free, **chosen, **changes)

    def unused(self) -> list[str]:
        """Keys of the sequence that nothing reads, as `key=value (why)`; each run lists those of its own."""
        own = {f.name for f in fields(self)} - {f.name for f in fields(Config)}
        lines = [line for key, line in unused_settings(self).items() if key.split(".")[0] in own]
        usual, idle = vars(RetainConfig()), self._idle_retain()
        given = {key: value for key, value in vars(self.retain).items() if value != usual[key]}
        return lines + [f"retain.{key}={given[key]} ({idle[key]})" for key in given if key in idle]

    def _idle_retain(self) -> dict[str, str]:
        """Key of `retain` -> why nothing reads it; what a method cannot use, the key's own `needs` says."""
        later = self.sequence[1:]
        if not later:
            return dict.fromkeys(vars(self.retain), "one task: none comes before it")
        idle = {} if self.retain.by_importance else {"n_examples": "retain.ewc=0, retain.avoid=0"}
        if self.learning.saliency is not None and all(self.own(task, "mask_path") for task in later):
            idle["avoid"] = "the later tasks have masks of yours"
        return idle
