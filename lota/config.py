"""Typed configuration of a training run, with every check that needs no file.

The meaning and unit of each key stand beside it in config/*.yaml and in the README; here are its type and
what it must satisfy. `Config.__post_init__` (run by `OmegaConf.to_object`) reports all problems in one
ValueError.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lota.config_checks import LOSS_KEYS, OPTIMIZER_KEYS, problems_of

MISSING = "???"


@dataclass
class ModelConfig:
    name_or_path: str = MISSING  # folder or hub id
    tokenizer_name_or_path: str | None = None
    archive: str | None = None  # folder or policy.pt
    block_name: str | None = None  # class name
    policy_dtype: str = "float32"
    fsdp_policy_mp: str | None = None  # dtype
    reference: str | None = None
    reference_archive: str | None = None  # folder or policy.pt
    reference_dtype: str | None = None
    pad_token: str | None = None
    scope: str | None = None  # regular expression


@dataclass
class LossConfig:
    """Settings of all losses. None: not given; those of the chosen loss then get their default, the others
    stay.
    """

    name: str = "sft"
    average_log_prob: bool | None = None
    beta: float | None = None
    reference_free: bool | None = None
    sft_reg: float | None = None
    importance_correction: bool | None = None
    ipo: bool | None = None
    ipo_sum: bool | None = None
    robust_eps: float | None = None

    def fill(self) -> None:
        for key, default in LOSS_KEYS[self.name].items():
            if getattr(self, key) is None:
                setattr(self, key, default)

    @property
    def on_preferences(self) -> bool:
        """Whether it is a loss on preference pairs."""
        return self.name == "dpo"


@dataclass
class TrainerConfig:
    name: str = "BasicTrainer"


@dataclass
class AdapterConfig:
    name: str = "none"


@dataclass
class WandbConfig:
    enabled: bool = False
    entity: str | None = None
    project: str = "lota"
    mode: str = "online"


@dataclass
class Config:
    exp_name: str = MISSING
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)

    datasets: list[str] = field(default_factory=list)
    data_dir: str | None = None
    data_fraction: float = 1.0
    max_length: int = 512  # tokens
    max_prompt_length: int = 256  # tokens
    chat_template: str = "never"
    group_by_length: bool = False
    num_turns: int = 1
    prefs_path: str | None = None

    mask_path: str | None = None
    flip_mask: bool = False
    protect_masks: list[str] = field(default_factory=list)
    freeze_odd_layers: bool = False
    freeze_even_layers: bool = False
    snip: bool = False
    snip_sparsity: float = 0.9
    snip_batches: int = 64
    save_snip_mask_path: str | None = None
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0

    optimizer: str = "RMSprop"
    lr: float = 1e-5
    lr_scheduler: str = "constant"
    warmup_steps: int = 150  # optimizer steps
    alpha: float = 0.99
    eps: float = 1e-8
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 0.0
    momentum: float = 0.0
    grad_norm_strategy: str = "even"
    max_grad_norm: float = 10.0

    batch_size: int = 8  # examples
    gradient_accumulation_steps: int = 1
    n_epochs: int | None = 1
    n_examples: int | None = None
    fast_forward: int = 0  # batches
    activation_checkpointing: bool = False
    seed: int = 0

    do_first_eval: bool = True
    eval_every: int = 20_000  # examples
    eval_batch_size: int = 16  # examples
    n_eval_examples: int = 256
    sample_during_eval: bool = False
    n_eval_model_samples: int = 16

    local_dirs: list[str] | None = None
    save_every: str | int = "epoch_1"
    save_delta: bool = False
    resume: str = "auto"
    overwrite: bool = False
    debug: bool = False
    minimum_log_interval_secs: float = 1.0  # seconds
    wandb: WandbConfig = field(default_factory=WandbConfig)
    fsdp_port: int | None = None

    def __post_init__(self) -> None:
        problems = list(problems_of(self))
        if problems:
            raise ValueError("\n".join(["these settings cannot be honoured:", *(f"  {p}" for p in problems)]))
        self.loss.fill()

    def resolve_paths(self) -> None:
        """Make local paths that exist absolute, so that a run can be continued from another folder."""
        for owner, keys in ((self.model, _MODEL_PATHS), (self, ("mask_path", "data_dir", "prefs_path"))):
            for key in keys:
                setattr(owner, key, absolute(getattr(owner, key)))
        self.protect_masks = [absolute(path) for path in self.protect_masks]
        if self.save_snip_mask_path is not None:  # which need not exist yet
            path = Path(os.path.expandvars(self.save_snip_mask_path)).expanduser()
            self.save_snip_mask_path = str(path.resolve())

    @property
    def save_interval(self) -> tuple[str, int]:
        """(`epoch` or `step`, number): `epoch_2` -> every 2 epochs, 500 -> every 500 examples."""
        text = str(self.save_every)
        return (
            ("epoch", int(text.removeprefix("epoch_"))) if text.startswith("epoch_") else ("step", int(text))
        )

    @property
    def cache_dir(self) -> Path:
        """The first of local_dirs that exists, else the last of them (not created here)."""
        choices = [Path(os.path.expandvars(d)).expanduser() for d in self.local_dirs or [default_cache()]]
        return next((d for d in choices if d.is_dir()), choices[-1])

    @property
    def run_dir(self) -> Path:
        return self.cache_dir / self.exp_name

    @property
    def snip_mask_file(self) -> Path | None:
        """Where the mask of snip=true is stored; None for a debug run that names no file."""
        if self.save_snip_mask_path is not None:
            return Path(os.path.expandvars(self.save_snip_mask_path)).expanduser()
        return None if self.debug else self.run_dir / "snip_mask.pt"

    @property
    def data_folder(self) -> Path:
        return Path(os.path.expandvars(self.data_dir or default_cache())).expanduser()

    @property
    def freeze_layers(self) -> str | None:
        return "odd" if self.freeze_odd_layers else "even" if self.freeze_even_layers else None

    @property
    def optimizer_settings(self) -> dict[str, Any]:
        """Keyword arguments of the optimizer class, learning rate and clipping included."""
        settings = {key: getattr(self, key) for key in OPTIMIZER_KEYS[self.optimizer]}
        clipping = {"grad_norm_strategy": self.grad_norm_strategy, "max_grad_norm": self.max_grad_norm}
        return {"lr": self.lr, **settings, **clipping}


_MODEL_PATHS = ("name_or_path", "tokenizer_name_or_path", "archive", "reference_archive")


def absolute(path: str | None) -> str | None:
    if path is None:
        return None
    local = Path(os.path.expandvars(path)).expanduser()
    return str(local.resolve()) if local.exists() else path


def default_cache() -> str:
    """$PROJECT_CACHE, or ~/.cache/lota."""
    return os.environ.get("PROJECT_CACHE") or "~/.cache/lota"
