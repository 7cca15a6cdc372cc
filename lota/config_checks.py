"""What is known of a configuration before any file is read: its problems, unused keys, what a resume may
change.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any, TypeVar

from lota.config import LOSSES, MISSING, Config, LossConfig
from lota.settings import flat, keys_of, value_problems
from lota.utils import name_problem

C = TypeVar("C", bound=Config)
MASK_KEYS = ("mask_path", "snip", "flip_mask", "protect_masks", "freeze_odd_layers", "freeze_even_layers")
# Keys that cannot change the weights of a run: it may be resumed with other values.
WEIGHT_NEUTRAL = frozenset(key.name for key in keys_of(Config()) if not key.about.changes_weights)


def validated(config: C, problems: Callable[[C], Iterator[str]] | None = None) -> C:
    """The configuration itself. Raises one ValueError with every problem that `problems` finds in it."""
    found = list(dict.fromkeys((problems or problems_of)(config)))
    if found:
        raise ValueError("\n".join(["invalid settings:", *(f"  {line}" for line in found)]))
    return config


def problems_of(c: Config) -> Iterator[str]:
    """A line per problem, with key, value and remedy."""
    yield from _folder_problems(c)
    if c.model.name_or_path == MISSING:
        yield "model.name_or_path is not given: a Hugging Face folder or hub id"
    yield from value_problems(c)
    yield from _data_and_length_problems(c)
    yield from _optimizer_problems(c)
    yield from _precision_problems(c)
    yield from _pull_problems(c)
    yield from _trained_entries_problems(c)
    yield from _loss_problems(c)
    yield from _reference_problems(c)


def _folder_problems(c: Config) -> Iterator[str]:
    """Of the run's folder and name, and of the process."""
    if c.exp_name in (MISSING, "", None):
        yield "exp_name is not given: name the run, as in exp_name=my_run"
        return
    if problem := name_problem(c.exp_name):
        yield f"exp_name={c.exp_name:.60}: {problem}; the run's folder stands inside the cache folder"
        return
    inside = next((part for part in c.exp_name.split("/") if re.fullmatch(r"(epoch|step)-\d+", part)), None)
    if inside:
        yield f"exp_name={c.exp_name}: {inside} is the name of a checkpoint; name the run otherwise"
    above = next((folder for folder in (c.run_dir, *c.run_dir.parents) if os.path.lexists(folder)), None)
    if above is not None and not above.is_dir():
        places = "local_dirs" if c.local_dirs else "PROJECT_CACHE"
        key = "exp_name" if c.cache_dir in above.parents else places
        yield f"{key}: the run's folder would be {c.run_dir}, but {above} is a file; choose another {key}"
    yield from _requeue_problems(c)
    if not re.fullmatch(r"\d*", size := os.environ.get("WORLD_SIZE", "")):
        yield f"WORLD_SIZE={size}: the environment variable must be a number of processes; unset it"
    yield from process_problems(c, started_processes())


def started_processes() -> int:
    """How many processes this command has, by the variable that torchrun sets."""
    size = os.environ.get("WORLD_SIZE", "")
    return int(size) if size.isdecimal() else 1


def own_rank() -> int:
    """The number of this process among them."""
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdecimal() and started_processes() > 1 else 0


def process_problems(c: Config, count: int) -> Iterator[str]:
    """Of a run in `count` processes."""
    parts = c.gradient_accumulation_steps
    if count == 1:
        return
    if parts >= 1 and 0 < c.batch_size // parts < count:
        yield (
            f"batch_size={c.batch_size}, gradient_accumulation_steps={parts}: {count} processes share the "
            f"{c.batch_size // parts} examples of a part, so that some would never have any; start fewer "
            f"processes, or set batch_size={count * parts} or more"
        )
    if c.trainer.name == "FSDPTrainer":
        yield from _sharded_problems(c, count)


def _sharded_problems(c: Config, count: int) -> Iterator[str]:
    """Of a run whose processes hold the model together."""
    on = f"trainer=FSDPTrainer on {count} processes"
    if c.model.replicas >= 1 and count % c.model.replicas:
        yield f"model.replicas={c.model.replicas} does not divide the {count} processes: choose a divisor"
    if c.adapter.name == "lora":
        yield f"adapter=lora with {on}: A and B are too small to shard; use trainer=BasicTrainer"
    if c.compile:
        yield f"compile=true with {on}: blocks that are gathered are not compiled; use compile=false"
    if c.optimizer_state == "factored":
        yield (
            f"optimizer_state=factored with {on}: means of columns are of whole matrices; choose "
            "optimizer_state=bfloat16"
        )


def dense_problem(what: str, count: int) -> str:
    """Why replicas do not train densely, and what does."""
    return (
        f"{what} trains densely, and {count} processes would send whole gradients with "
        "trainer=BasicTrainer: use trainer=FSDPTrainer, a mask or adapter=lora"
    )


def _requeue_problems(c: Config) -> Iterator[str]:
    """Of a job that a cluster starts again after it was preempted, and that has to continue then."""
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    if "SUBMITIT_EXECUTOR" not in os.environ and restarts in ("", "0"):
        return
    if c.overwrite:
        yield "overwrite=true in a job that may be requeued: it would delete its own run then; leave it out"
    if c.resume == "never":
        yield "resume=never in a job that may be requeued: it could not continue; leave it out"


def _data_and_length_problems(c: Config) -> Iterator[str]:
    if not c.datasets:
        yield "datasets is empty: name at least one task, as in datasets=[gsm8k]"
    if len(set(c.datasets)) < len(c.datasets):
        yield f"datasets={c.datasets}: a task is named twice"
    if len(set(c.replay)) < len(c.replay):
        yield f"replay={c.replay}: a task is named twice"
    for task in (task for task in c.replay if task in c.datasets):
        yield f"replay={c.replay}: datasets={c.datasets} trains on all rows of {task} already; drop one"
    if c.max_prompt_length >= c.max_length:
        yield (
            f"max_prompt_length={c.max_prompt_length} leaves no room for a response in "
            f"max_length={c.max_length}: make it smaller"
        )
    if c.gradient_accumulation_steps >= 1 and c.batch_size % c.gradient_accumulation_steps:
        yield (
            f"batch_size={c.batch_size} is not divisible by "
            f"gradient_accumulation_steps={c.gradient_accumulation_steps}, the parts a batch is cut into"
        )
    if c.n_epochs is None and c.n_examples is None:
        yield "n_epochs and n_examples are both null: the run would never end"
    try:
        whole = c.save_interval[1] >= 1
    except ValueError:
        whole = False
    if not whole:
        yield f"save_every={c.save_every}: give epoch_N (N epochs) or N (examples), N at least 1"


def _optimizer_problems(c: Config) -> Iterator[str]:
    if len(c.betas) != 2:
        yield f"betas={c.betas}: give two numbers"
    if c.grad_norm_strategy != "none" and not c.max_grad_norm > 0:
        yield f"max_grad_norm={c.max_grad_norm}: must be above 0 (or grad_norm_strategy=none)"
    if c.model.pad_token is not None and not c.model.pad_token.strip():
        yield f"model.pad_token={c.model.pad_token!r}: give a token, such as <PAD>, or null to add none"
    if c.model.fsdp_policy_mp == "bfloat16" and c.model.policy_dtype == "float16":
        yield "model.fsdp_policy_mp=bfloat16 with model.policy_dtype=float16: choose float32 or bfloat16"


def _precision_problems(c: Config) -> Iterator[str]:
    """Of weights and optimizer state; that a mask file keeps whole matrices, preflight checks."""
    if c.stochastic_rounding and c.model.policy_dtype != "bfloat16":
        yield (
            f"stochastic_rounding=true with model.policy_dtype={c.model.policy_dtype}: it is for weights "
            "that are held in bfloat16 alone; set model.policy_dtype=bfloat16"
        )
    if c.stochastic_rounding and c.adapter.name == "lora":
        yield "stochastic_rounding=true with adapter=lora: A and B are held in float32; drop one of them"
    if c.optimizer_state != "factored":
        return
    if c.optimizer == "SGD":
        yield "optimizer_state=factored with optimizer=SGD: it has no squared-gradient average; drop it"
    if c.snip:
        yield (
            "optimizer_state=factored with snip=true: a mask keeps single entries, and means of rows and "
            "columns are of whole matrices; choose optimizer_state=bfloat16"
        )


def _pull_problems(c: Config) -> Iterator[str]:
    """Of the pull to where training started."""
    for key in ("l2_sp", "ewc") if c.adapter.name == "lora" else ():
        if getattr(c, key):
            yield (
                f"{key}={getattr(c, key)} with adapter=lora: it pulls weights of the model, which LoRA "
                f"freezes; drop {key}, or adapter=lora"
            )
    if c.ewc and c.importance_path is None:
        yield f"ewc={c.ewc} needs importance_path=FILE; l2_sp pulls all entries alike"
    if c.ewc and c.snip:
        yield (
            f"ewc={c.ewc} with snip=true: importance is listed for the entries of a mask that is there; "
            "store the mask with save_snip_mask_path in a run of its own, or use l2_sp"
        )


def _trained_entries_problems(c: Config) -> Iterator[str]:
    if c.flip_mask and c.mask_path is None and not c.snip:
        yield "flip_mask=true needs a mask_path: dense training has nothing to flip"
    if c.freeze_odd_layers and c.freeze_even_layers:
        yield "freeze_odd_layers and freeze_even_layers are both true: no layer would train"
    if c.snip and c.mask_path is not None:
        yield f"snip=true with mask_path={c.mask_path}: snip computes the mask itself; drop one of them"
    if c.snip and c.flip_mask:
        yield (
            "flip_mask=true with snip=true: store the mask with save_snip_mask_path in a run of its own, and "
            "flip it by mask_path=FILE flip_mask=true without snip"
        )
    for key in MASK_KEYS if c.adapter.name == "lora" else ():
        if getattr(c, key):
            yield (
                f"{key}={getattr(c, key)} with adapter=lora: LoRA freezes every weight of the model and "
                f"trains matrices beside them; drop {key}, or adapter=lora"
            )


def _loss_problems(c: Config) -> Iterator[str]:
    loss = c.loss
    for name in LOSSES:
        own = [key for key in keys_of(loss, "loss.") if f"loss.name={name}" in key.about.needs]
        given = [f"{key.name}={key.value}" for key in own if key.value is not None]
        if given and name != loss.name and loss.name in LOSSES:
            settings = "settings" if len(given) > 1 else "a setting"
            yield (
                f"{', '.join(given)}: {settings} of loss={name}, and this run has loss={loss.name}; leave "
                f"out, or choose loss={name} (loss=, not loss.name=)"
            )
    if loss.ipo and loss.robust_eps:
        yield (
            f"loss.robust_eps={loss.robust_eps} with loss.ipo=true: wrong labels are not defined for ipo; "
            "set one of them only"
        )


def _reference_problems(c: Config) -> Iterator[str]:
    archive = c.model.reference_archive
    if c.loss.reference_free and c.loss.importance_correction:
        yield (
            "loss.importance_correction=true with loss.reference_free=true: the correction needs a "
            "reference; set one of them only"
        )
    if c.model.reference == "swap" and archive is not None:
        yield (
            f"model.reference=swap with model.reference_archive={archive}: a swapped reference is the "
            "policy's own start; choose model.reference=model or precomputed"
        )
    if c.snip and archive is not None and c.loss.on_preferences and not c.loss.reference_free:
        yield (
            f"snip=true with model.reference_archive={archive}: the mask's gradients are those against the "
            "run's own start; compute the mask without it, and give it by mask_path"
        )


def unused_settings(c: Config) -> dict[str, str]:
    """Dotted key -> `key=value (why)` for settings that differ from their default and that nothing reads."""
    usual, unused = _defaults(c), _unused_keys(c)
    return {
        key: f"{key}={value} ({unused[key]})"
        for key, value in flat(asdict(c)).items()
        if key in unused and value != usual[key]
    }


def _defaults(c: Config) -> dict[str, Any]:
    return flat(asdict(type(c)(loss=LossConfig(c.loss.name))))


def _unused_keys(c: Config) -> dict[str, str]:
    """Dotted key -> why nothing reads it in this run."""
    keys = list(keys_of(c))
    values = {key.name: _as_given(key.value) for key in keys}
    reasons = {}
    if started_processes() == 1:
        reasons = dict.fromkeys(("fsdp_port", "compare_every", "model.replicas"), "one process")
    elif os.environ.get("MASTER_PORT"):
        reasons["fsdp_port"] = f"MASTER_PORT={os.environ['MASTER_PORT']} says where processes meet"
    if not (c.flip_mask or c.snip) and c.adapter.name == "none":
        reasons["model.scope"] = "flip_mask=false, snip=false, adapter=none; a mask file has its own scope"
    if not c.ewc:
        reasons["importance_path"] = "ewc=0"
    if not c.replay:
        reasons["replay_fraction"] = "replay=[]"
    if c.optimizer == "SGD" and not c.momentum:
        reasons["optimizer_state"] = "optimizer=SGD, momentum=0: there is none"
    if c.model.reference_archive is None and c.model.reference in ("swap", "precomputed"):
        reasons["model.reference_dtype"] = f"model.reference={c.model.reference} computes with the policy"
    for key in keys:
        for need in key.about.needs:
            name = need.partition("=")[0]
            if f"{name}={values[name]}" not in key.about.needs:
                reasons[key.name] = f"{name.removesuffix('.name')}={values[name]}"
                break
    return reasons


def _as_given(value: Any) -> str:
    """A value as it is written on the command line."""
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def differences(old: Mapping[str, Any], new: Config) -> list[str]:
    """`key: old -> new` for settings that can change weights and differ between an old run and a new one.

    A key that the old run does not have counts as its default: later versions have more keys.
    """
    usual, now, before = _defaults(new), flat(asdict(new)), flat(old)
    keys = sorted({*before, *now} - WEIGHT_NEUTRAL - {*_unused_keys(new)})
    pairs = [(key, before.get(key, usual.get(key)), now.get(key)) for key in keys]
    return [f"{key}: {a} -> {b}" for key, a, b in pairs if a != b]
