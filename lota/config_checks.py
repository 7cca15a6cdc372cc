"""What a configuration can be told without any file: its problems, its unused keys, what a resume allows."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from lota.optim.masked import GRAD_NORM_STRATEGIES
from lota.optim.optimizers import OPTIMIZERS
from lota.optim.schedule import SCHEDULERS

if TYPE_CHECKING:
    from lota.config import Config
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lota.config import Config


DTYPE_NAMES = ("float32", "bfloat16", "float16")
TRAINERS = ("BasicTrainer", "FSDPTrainer")
ADAPTERS = ("none", "lora")
RESUME = ("auto", "never")
CHAT_TEMPLATES = ("auto", "never", "always")
MASK_KEYS = ("mask_path", "snip", "flip_mask", "protect_masks", "freeze_odd_layers", "freeze_even_layers")
OPTIMIZER_KEYS = {
    "RMSprop": ("alpha", "eps", "weight_decay", "momentum"),
    "AdamW": ("betas", "eps", "weight_decay"),
    "SGD": ("weight_decay", "momentum"),
}
AT_LEAST_1 = (
    "batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "max_prompt_length",
    "eval_every",
    "eval_batch_size",
    "n_eval_examples",
    "n_eval_model_samples",
    "num_turns",
    "lora_rank",
    "snip_batches",
)
AT_LEAST_0 = (
    "lr",
    "eps",
    "weight_decay",
    "warmup_steps",
    "fast_forward",
    "minimum_log_interval_secs",
    "seed",
)
# Keys that cannot change the weights of a run: a run may be continued with other values.
WEIGHT_NEUTRAL = frozenset(
    {
        "exp_name",
        "local_dirs",
        "resume",
        "overwrite",
        "debug",
        "wandb",
        "minimum_log_interval_secs",
        "save_every",
        "save_delta",
        "do_first_eval",
        "eval_every",
        "eval_batch_size",
        "n_eval_examples",
        "sample_during_eval",
        "n_eval_model_samples",
        "fsdp_port",
        "save_snip_mask_path",
    }
)


def _choice(key: str, value: Any, choices) -> Iterator[str]:
    if value not in choices:
        names = ["null" if choice is None else str(choice) for choice in choices]
        near = difflib.get_close_matches(str(value), names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        yield f"{key}={value}: choose one of {', '.join(names)}{hint}"


def problems_of(c: Config) -> Iterator[str]:
    if c.exp_name in ("???", "", None):
        yield "exp_name is not given: name the run, as in exp_name=my_run"
    elif Path(c.exp_name).is_absolute() or ".." in Path(c.exp_name).parts:
        yield f"exp_name={c.exp_name}: must be a name inside the cache folder"
    if c.model.name_or_path == "???":
        yield "model.name_or_path is not given: a Hugging Face folder or hub id"
    yield from _choice("optimizer", c.optimizer, tuple(OPTIMIZERS))
    yield from _choice("lr_scheduler", c.lr_scheduler, SCHEDULERS)
    yield from _choice("grad_norm_strategy", c.grad_norm_strategy, GRAD_NORM_STRATEGIES)
    yield from _choice("loss.name", c.loss.name, tuple(LOSS_KEYS))
    yield from _choice("trainer.name", c.trainer.name, TRAINERS)
    yield from _choice("adapter.name", c.adapter.name, ADAPTERS)
    yield from _choice("resume", c.resume, RESUME)
    yield from _choice("chat_template", c.chat_template, CHAT_TEMPLATES)
    yield from _choice("model.policy_dtype", c.model.policy_dtype, DTYPE_NAMES)
    yield from _choice("model.reference", c.model.reference, REFERENCES)
    yield from _choice("model.reference_dtype", c.model.reference_dtype, (None, *DTYPE_NAMES))
    yield from _choice("model.fsdp_policy_mp", c.model.fsdp_policy_mp, (None, "bfloat16"))
    yield from _choice("wandb.mode", c.wandb.mode, ("online", "offline"))
    yield from _number_problems(c)
    yield from _combination_problems(c)
    yield from loss_problems(c)


def _number_problems(c: Config) -> Iterator[str]:
    for key in AT_LEAST_1:
        if getattr(c, key) < 1:
            yield f"{key}={getattr(c, key)}: must be at least 1"
    for key in ("n_epochs", "n_examples"):
        if getattr(c, key) is not None and getattr(c, key) < 1:
            yield f"{key}={getattr(c, key)}: must be at least 1, or null for no limit"
    for key in AT_LEAST_0:
        value = getattr(c, key)
        if not (value >= 0 and math.isfinite(value)):
            yield f"{key}={value}: must be a finite number of at least 0"
    below_1 = {"alpha": c.alpha, "momentum": c.momentum, "lora_dropout": c.lora_dropout}
    for key, value in [*below_1.items(), *(("betas", b) for b in c.betas)]:
        if not 0 <= value < 1:
            yield f"{key}={value}: must be at least 0 and below 1"
    if len(c.betas) != 2:
        yield f"betas={c.betas}: give two numbers"
    if not (c.lora_alpha > 0 and math.isfinite(c.lora_alpha)):
        yield f"lora_alpha={c.lora_alpha}: must be a finite number above 0"
    if not 0 < c.data_fraction <= 1:
        yield f"data_fraction={c.data_fraction}: must be above 0 and at most 1"
    if c.grad_norm_strategy != "none" and not c.max_grad_norm > 0:
        yield f"max_grad_norm={c.max_grad_norm}: must be above 0 (or grad_norm_strategy=none)"
    try:
        if c.save_interval[1] < 1:
            raise ValueError
    except ValueError:
        yield f"save_every={c.save_every}: give epoch_N (N epochs) or N (examples), N at least 1"


def _combination_problems(c: Config) -> Iterator[str]:
    if not c.datasets:
        yield "datasets is empty: name at least one task, as in datasets=[gsm8k]"
    if len(set(c.datasets)) < len(c.datasets):
        yield f"datasets={c.datasets}: a task is named twice"
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
    yield from _snip_problems(c)
    if c.flip_mask and c.mask_path is None and not c.snip:
        yield "flip_mask=true needs a mask_path: dense training has nothing to flip"
    if c.freeze_odd_layers and c.freeze_even_layers:
        yield "freeze_odd_layers and freeze_even_layers are both true: no layer would train"
    if c.adapter.name == "lora":
        for key in MASK_KEYS:
            if getattr(c, key):
                yield (
                    f"{key}={getattr(c, key)} with adapter=lora: LoRA freezes every weight of the model and "
                    f"trains matrices beside them; drop {key}, or adapter=lora"
                )
    if c.model.fsdp_policy_mp == "bfloat16" and c.model.policy_dtype == "float16":
        yield "model.fsdp_policy_mp=bfloat16 with model.policy_dtype=float16: choose float32 or bfloat16"


def _snip_problems(c: Config) -> Iterator[str]:
    if not 0 <= c.snip_sparsity < 1:
        yield f"snip_sparsity={c.snip_sparsity}: must be at least 0 and below 1"
    if not c.snip:
        return
    if c.mask_path is not None:
        yield f"snip=true with mask_path={c.mask_path}: snip computes the mask itself; drop one of them"
    if c.flip_mask:
        yield (
            "flip_mask=true with snip=true: store the mask with save_snip_mask_path in a run of its own, and "
            "flip it by mask_path=FILE flip_mask=true without snip"
        )
    if c.model.reference_archive is not None and c.loss.on_preferences and not c.loss.reference_free:
        yield (
            f"snip=true with model.reference_archive={c.model.reference_archive}: the mask's gradients are "
            "those against the run's own start; compute the mask without it, and give it by mask_path"
        )


def unknown_keys(given: dict[str, Any], schema: type, prefix: str = "") -> list[str]:
    """A line per key that the schema does not have (Hydra's `+key=value` lets any pass), with near names."""
    known = get_type_hints(schema)
    lines = []
    for key, value in given.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=3, cutoff=0.5)
            hint = f"; did you mean {', '.join(prefix + name for name in near)}?" if near else ""
            lines.append(f"unknown key {prefix}{key}={value}{hint}")
        elif is_dataclass(known[key]) and isinstance(value, dict):
            lines += unknown_keys(value, known[key], f"{prefix}{key}.")
    return lines


def unused_settings(c: Config) -> list[str]:
    """Keys that differ from their default and that nothing reads in this run, as `key=value (why)`."""
    changed = _changed_keys(c)
    return [f"{key}={changed[key]} ({why})" for key, why in _unused_keys(c).items() if key in changed]


def _unused_keys(c: Config) -> dict[str, str]:
    """Dotted key -> why nothing reads it in this run."""
    used = OPTIMIZER_KEYS[c.optimizer]
    reasons = {
        key: f"optimizer={c.optimizer}" for keys in OPTIMIZER_KEYS.values() for key in keys if key not in used
    }
    reasons["fsdp_port"] = "trainer=BasicTrainer" if c.trainer.name == "BasicTrainer" else "one process"
    if c.grad_norm_strategy == "none":
        reasons["max_grad_norm"] = "grad_norm_strategy=none"
    if not c.sample_during_eval:
        reasons["n_eval_model_samples"] = "sample_during_eval=false"
    reasons |= unused_loss_keys(c)
    if not (c.flip_mask or c.snip) and c.adapter.name == "none":
        reasons["model.scope"] = "flip_mask=false, snip=false, adapter=none; a mask file has its own scope"
    if not c.snip:
        reasons |= dict.fromkeys(("snip_sparsity", "snip_batches", "save_snip_mask_path"), "snip=false")
    if c.adapter.name == "none":
        reasons |= dict.fromkeys(("lora_rank", "lora_alpha", "lora_dropout"), "adapter=none")
    if c.overwrite:
        reasons["resume"] = "overwrite=true"
    if c.debug:
        reasons |= dict.fromkeys(
            ("save_every", "save_delta", "resume", "overwrite"), "debug=true writes no checkpoint"
        )
    if not c.wandb.enabled or c.debug:
        why = "debug=true" if c.debug else "wandb.enabled=false"
        reasons |= dict.fromkeys(("wandb.entity", "wandb.project", "wandb.mode"), why)
        reasons["wandb.enabled"] = why
    return reasons


def _changed_keys(node: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value for every setting that differs from the schema's default."""
    changed: dict[str, Any] = {}
    own = LOSS_KEYS[node.name] if prefix == "loss." else {}
    for f in fields(node):
        value = getattr(node, f.name)
        if is_dataclass(value):
            changed |= _changed_keys(value, f"{prefix}{f.name}.")
            continue
        default = f.default_factory() if callable(f.default_factory) else f.default
        if value != own.get(f.name, default):
            changed[prefix + f.name] = value
    return changed


def differences(old: dict[str, Any], new: Config) -> list[str]:
    """`key: old -> new` for settings that can change weights and differ between an old run and a new one."""
    unused, current = _unused_keys(new), asdict(new)
    found = []
    for key in sorted({*old, *current} - WEIGHT_NEUTRAL):
        before, now = old.get(key), current.get(key)
        nested = isinstance(before, dict) and isinstance(now, dict)
        pairs = (
            {f"{key}.{k}": (before.get(k), now.get(k)) for k in sorted({*before, *now})}
            if nested
            else {key: (before, now)}
        )
        found += [f"{k}: {a} -> {b}" for k, (a, b) in pairs.items() if a != b and k not in unused]
    return found


LOSS_KEYS: dict[str, dict[str, Any]] = {  # settings of each loss and their defaults
    "sft": {"average_log_prob": False},
    "dpo": {
        "beta": 0.1,
        "reference_free": False,
        "sft_reg": 0.0,
        "importance_correction": False,
        "ipo": False,
        "ipo_sum": False,
        "robust_eps": 0.0,
    },
}
REFERENCES = (None, "swap", "model", "precomputed")
_REFERENCE_KEYS = ("model.reference", "model.reference_archive", "model.reference_dtype")


def loss_problems(c: Config) -> Iterator[str]:
    """A line per setting of the loss or its reference that cannot be honoured."""
    loss = c.loss
    for name, keys in LOSS_KEYS.items():
        given = [f"loss.{key}={getattr(loss, key)}" for key in keys if getattr(loss, key) is not None]
        if given and name != loss.name and loss.name in LOSS_KEYS:
            settings = "settings" if len(given) > 1 else "a setting"
            yield (
                f"{', '.join(given)}: {settings} of loss={name}, and this run has loss={loss.name}; leave "
                f"out, or choose loss={name} (loss=, not loss.name=)"
            )
    yield from _loss_number_problems(c)
    if loss.ipo and loss.robust_eps:
        yield (
            f"loss.robust_eps={loss.robust_eps} with loss.ipo=true: wrong labels are not defined for ipo; "
            "set one of them only"
        )
    if loss.reference_free and loss.importance_correction:
        yield (
            "loss.importance_correction=true with loss.reference_free=true: the correction needs a "
            "reference; set one of them only"
        )
    if c.model.reference == "swap" and c.model.reference_archive is not None:
        yield (
            f"model.reference=swap with model.reference_archive={c.model.reference_archive}: a swapped "
            "reference is the policy's own start; choose model.reference=model or precomputed"
        )


def _loss_number_problems(c: Config) -> Iterator[str]:
    loss = c.loss
    if loss.beta is not None and not 0 < loss.beta < math.inf:
        yield f"loss.beta={loss.beta}: must be a finite number above 0"
    if loss.sft_reg is not None and not 0 <= loss.sft_reg < math.inf:
        yield f"loss.sft_reg={loss.sft_reg}: must be a finite number of at least 0"
    if loss.robust_eps is not None and not 0 <= loss.robust_eps < 0.5:
        yield f"loss.robust_eps={loss.robust_eps}: a share of wrong labels, at least 0 and below 0.5"


def unused_loss_keys(c: Config) -> dict[str, str]:
    """Dotted key -> why nothing reads it in this run."""
    if c.loss.name == "sft":
        return dict.fromkeys(_REFERENCE_KEYS, "loss=sft has no reference")
    reasons = {} if c.loss.ipo else {"loss.ipo_sum": "loss.ipo=false"}
    if c.loss.reference_free:
        reasons |= dict.fromkeys(_REFERENCE_KEYS, "loss.reference_free=true")
    elif c.model.reference_archive is None and c.model.reference in ("swap", "precomputed"):
        reasons["model.reference_dtype"] = f"model.reference={c.model.reference} computes with the policy"
    return reasons
