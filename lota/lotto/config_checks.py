"""What is wrong with the settings of a sequence of tasks, before any file is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from lota.config_checks import dense_problem, problems_of, started_processes
from lota.lotto.config import METHODS, LottoConfig, RetainConfig
from lota.settings import did_you_mean, value_problems

# What a task cannot have of its own: it is the sequence's, or the sequence sets it.
_SHARED = (
    "exp_name", "local_dirs", "model", "adapter", "datasets", "tasks", "order", "method", "task_overrides",
    "protect_masks", "granularity", "block", "flip_mask", "overwrite", "resume", "debug", "n_eval_examples",
    "chat_template", "validation_fraction", "retain", "replay", "replay_fraction", "l2_sp", "ewc",
    "importance_path",
)  # fmt: skip
_SET_BY_STAGES = {
    "datasets": "tasks=[...] names the tasks",
    "mask_path": "give a task a mask of yours with +task_overrides.TASK.mask_path=FILE",
    "flip_mask": "a task's mask is what it keeps",
    "snip": "masks are chosen by method=lotto, lota or random",
    "save_snip_mask_path": "the masks stand in the run folder",
    "debug": "each task starts from the checkpoint of the one before",
    "replay": "retain.replay_fraction replays rows of the earlier tasks",
    "replay_fraction": "retain.replay_fraction is the share of each earlier task",
    "l2_sp": "retain.l2_sp pulls from the second task on",
    "ewc": "retain.ewc pulls from the second task on",
    "importance_path": "retain.ewc computes what matters to earlier tasks",
}


def sequence_problems(c: LottoConfig) -> Iterator[str]:
    """A line per problem of the sequence or of one of its training runs."""
    if not c.tasks:
        yield "tasks is empty: name the tasks in their order, as in tasks=[gsm8k,sql]"
    for task in dict.fromkeys(t for t in c.tasks if c.tasks.count(t) > 1):
        yield f"tasks={c.tasks}: {task} is named twice"
    for key, remedy in _SET_BY_STAGES.items():
        if getattr(c, key) != getattr(LottoConfig(), key):
            yield f"{key}={getattr(c, key)}: not with a sequence of tasks; {remedy}"
    if c.adapter.name not in ("none", "lora" if c.method == "lora" else "none"):
        yield f"adapter={c.adapter.name} with method={c.method}: choose method=lora or adapter=none"
    if c.method == "random" and c.freeze_layers:
        yield f"method=random with freeze_{c.freeze_layers}_layers=true: its masks span all layers"
    yield from value_problems(c)
    for key in ("l2_sp", "ewc") if c.method == "lora" else ():
        if value := getattr(c.retain, key):
            yield (
                f"retain.{key}={value} with method=lora: it pulls weights of the model, which LoRA freezes; "
                "leave it out, or choose another method"
            )
    if c.retain.avoid and c.method in METHODS and c.learning.saliency is None:
        yield f"retain.avoid={c.retain.avoid} with method={c.method}: it trains without masks; leave it out"
    yield from _override_problems(c)
    dense = c.method in METHODS and (c.learning.calibrated or c.method == "fft")
    if dense and started_processes() > 1 and c.trainer.name == "BasicTrainer":
        yield dense_problem(f"method={c.method}", started_processes())
    if c.method in METHODS:
        yield from _stage_problems(c)
        yield from dict.fromkeys(_factored_problems(c))


def _override_problems(c: LottoConfig) -> Iterator[str]:
    for task, given in c.task_overrides.items():
        if task not in c.tasks:
            yield f"task_overrides.{task}: tasks={c.tasks} does not name it{did_you_mean(task, c.tasks)}"
        for key in given:
            if key in _SHARED:
                yield f"task_overrides.{task}.{key}: one for all tasks; give {key}=..."
        if given.get("mask_path") and c.method in METHODS and c.learning.saliency is None:
            yield f"task_overrides.{task}.mask_path: method={c.method} trains without masks"
        if "sparsity" in given:
            yield from value_problems(replace(c, sparsity=given["sparsity"]))


def _stage_problems(c: LottoConfig) -> Iterator[str]:
    """Of every training run; a line of the adaptation is not repeated for the calibration."""
    if any(value_problems(c.retain)):  # told under the names of the sequence
        c = replace(c, retain=RetainConfig())
    for task in dict.fromkeys(c.tasks):
        adaptation = list(problems_of(c.adaptation(task)))
        yield from adaptation
        if c.learning.calibrated:
            calibration = c.calibration(task)
            lines = problems_of(calibration)
            yield from (f"calibrate: {line}" for line in lines if line not in adaptation)
            if calibration.lr == 0 and c.own(task, "mask_path") is None:
                key = "lr" if c.own(task, "lr") == 0 else "calibrate.lr"
                yield f"{key}=0 ({task}): the calibration would change nothing, and no mask come of it"


def _factored_problems(c: LottoConfig) -> Iterator[str]:
    """Of runs under masks: those of tasks, and calibrations that leave alone what other tasks keep."""
    remedy = "means of rows and columns are of whole matrices; choose optimizer_state=bfloat16"
    together = bool(c.protect_masks) or (c.learning.protects and len(c.tasks) > 1)
    for task in c.tasks if c.learning.saliency is not None else []:
        if c.own(task, "optimizer_state") == "factored":
            yield f"optimizer_state=factored with method={c.method}: its masks keep single entries; {remedy}"
        calibrated = c.learning.calibrated and c.own(task, "mask_path") is None
        if calibrated and together and c.calibration(task).optimizer_state == "factored":
            yield (
                f"calibrate.optimizer_state=factored with method={c.method}: a calibration leaves alone "
                f"what other tasks keep; {remedy}"
            )
