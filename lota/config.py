"""Settings of a training run, each with its default, meaning, values and effect on the weights.

A key is a field made by `setting`. Its metadata is the one source of the checks (lota/config_checks.py), of
the keys that a resumed run may change, of docs/SETTINGS.md and of the comments in config/*.yaml
(scripts/settings.py).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lota.settings import keys_of, neutral, setting

MISSING = "???"
CHAT_TEMPLATES = ("auto", "never", "always")
LOSSES = ("sft", "dpo")
DTYPES = ("float32", "bfloat16", "float16")
GRANULARITIES = ("element", "row", "column", "block")
OPTIMIZER_STATES = ("float32", "bfloat16", "factored")

# Settings that something else switches on
_reference = partial(setting, None, needs=("loss.name=dpo", "loss.reference_free=false"))
_sft, _dpo = (partial(setting, None, needs=(f"loss.name={name}",)) for name in LOSSES)
_snip, _lora = partial(setting, needs=("snip=true",)), partial(setting, needs=("adapter.name=lora",))
_wandb = partial(neutral, needs=("debug=false", "wandb.enabled=true"))
_saved = partial(neutral, needs=("debug=false",))
_RMSPROP, _ADAMW, _SGD = "optimizer=RMSprop", "optimizer=AdamW", "optimizer=SGD"


@dataclass
class ModelConfig:
    name_or_path: str = setting(
        MISSING, "Hugging Face folder (relative to the working directory) or hub id; must be given", path=True
    )
    tokenizer_name_or_path: str | None = setting(
        None, "folder or hub id of the tokenizer; null = that of name_or_path", path=True
    )
    archive: str | None = setting(
        None, "Hugging Face folder or policy.pt to start from; null = weights of name_or_path", path=True
    )
    block_name: str | None = setting(
        None, "class name of the transformer block, such as LlamaDecoderLayer; null = found by itself"
    )
    policy_dtype: str = setting("float32", "dtype of the weights and of policy.pt", choices=DTYPES)
    fsdp_policy_mp: str | None = setting(
        None,
        "dtype of the computation (with a mask the weights are held in it, trained ones also in float32); "
        "null = policy_dtype",
        choices=(None, "bfloat16"),
    )
    reference: str | None = _reference(
        "reference of a preference loss: swap (the policy, its trained entries swapped to "
        "their start), model (a second model) or precomputed (log-probabilities stored on disk); null = swap "
        "with a mask or LoRA, else model",
        choices=(None, "swap", "model", "precomputed"),
    )
    reference_archive: str | None = _reference(
        "weights of the reference: folder or policy.pt; null = what training starts from", path=True
    )
    reference_dtype: str | None = _reference(
        "dtype of a reference that is a second model; null = that of the policy", choices=(None, *DTYPES)
    )
    replicas: int = neutral(
        1,
        "of the model, each sharded over its own processes; must divide their number",
        at_least=1,
        needs=("trainer.name=FSDPTrainer",),
    )
    pad_token: str | None = setting(
        None, "token to add to the vocabulary for padding; null = pad with an existing token"
    )
    scope: str | None = setting(
        None,
        "regular expression over parameter names: what a mask chooses from and LoRA adapts; null = attention "
        "and MLP weights; also of a tower for images or sound, which is frozen unless this names its weights",
    )


@dataclass
class LossConfig:
    """Settings of all losses. Null: not given; `fill` gives those of the chosen loss their values, the others
    stay null.
    """

    name: str = setting("sft", "which loss", choices=LOSSES)
    average_log_prob: bool | None = _sft(
        "mean of an example's token losses, not their sum; published learning rates are for the sum",
        fill=False,
    )
    beta: float | None = _dpo("strength of the pull towards the reference, per nat", above=0, fill=0.1)
    reference_free: bool | None = _dpo(
        "leave the reference out: log-probabilities instead of log-ratios", fill=False
    )
    sft_reg: float | None = _dpo(
        "weight of the preferred answer's negative log-likelihood (nats, summed), added to the loss",
        at_least=0,
        fill=0.0,
    )
    importance_correction: bool | None = _dpo(
        "weigh each preference by the policy's over the reference's probability of the rejected answer",
        fill=False,
    )
    ipo: bool | None = _dpo(
        "squared distance of the log-ratio difference, per response token, from 1 / (2 beta)", fill=False
    )
    ipo_sum: bool | None = setting(
        None,
        "sum ipo's log-ratios over the response instead of per token",
        needs=("loss.name=dpo", "loss.ipo=true"),
        fill=False,
    )
    robust_eps: float | None = _dpo(
        "share of preferences labelled wrongly (conservative DPO)", at_least=0, below=0.5, fill=0.0
    )

    def fill(self) -> None:
        for key in keys_of(self):
            if key.value is None and f"loss.name={self.name}" in key.about.needs:
                setattr(self, key.name, key.about.fill)

    @property
    def on_preferences(self) -> bool:
        """Whether it is a loss on preferences."""
        return self.name == "dpo"


@dataclass
class TrainerConfig:
    name: str = setting("BasicTrainer", "which trainer", choices=("BasicTrainer", "FSDPTrainer"))


@dataclass
class AdapterConfig:
    name: str = setting(
        "none", "what trains: the model's weights, or low-rank matrices beside them", choices=("none", "lora")
    )


@dataclass
class WandbConfig:
    enabled: bool = _saved(False, "mirror metrics to Weights & Biases")
    entity: str | None = _wandb(None, "account or team; null = your default")
    project: str = _wandb("lota", "project name")
    mode: str = _wandb("online", "offline needs no account", choices=("online", "offline"))


@dataclass
class Config:
    exp_name: str = neutral(MISSING, "name of the run, and of its folder in local_dirs")
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)

    # data
    datasets: list[str] = setting([], "tasks to train on, names of tasks/")
    data_dir: str | None = setting(
        None,
        "folder with tasks/TASK/SPLIT.{jsonl,json,csv,txt}; null = $PROJECT_CACHE or ~/.cache/lota",
        path=True,
    )
    data_fraction: float = setting(
        1.0, "share of each task's training rows, a seeded sample", above=0, at_most=1
    )
    replay: list[str] = setting(
        [], "tasks of which a sample of training rows joins those of datasets, so that they are not forgotten"
    )
    replay_fraction: float = setting(
        0.01, "share of each replayed task's training rows, a seeded sample", above=0, at_most=1
    )
    validation_fraction: float = setting(
        0.0,
        "share of each task's training rows, by hash, that is not trained on and that the run is evaluated "
        "on, so that rows of the held-out split decide nothing; 0 = evaluated on the held-out split",
        at_least=0,
        below=1,
    )
    max_length: int = setting(
        512, "of prompt + response; a longer example loses prompt first, then response", "tokens", at_least=1
    )
    max_prompt_length: int = setting(
        256, "of the prompt that stay when the whole is longer than max_length", "tokens", at_least=1
    )
    chat_template: str = setting(
        "never",
        "prompts in the tokenizer's chat template (auto: if it has one); evaluation does the same",
        choices=CHAT_TEMPLATES,
    )
    num_turns: int = setting(
        1, "of a chat that one example holds (tasks sharegpt, sharegpt4, shareclaude)", "turns", at_least=1
    )
    prefs_path: str | None = setting(
        None,
        "task sharegpt: JSON file of {instruction, output_1, output_2, preference}; null = its chats",
        path=True,
    )
    group_by_length: bool = setting(
        False, "put examples of similar length into one batch (less padding, another order)"
    )
    packing: bool = setting(
        False,
        "lay the examples of a batch end to end, without padding; attention stays inside each example",
    )

    # which entries train
    mask_path: str | None = setting(
        None,
        "mask file, or hub:org/name[@revision][/FILE]; null, or 0.0_mask.pt if no such file exists, trains "
        "densely",
        path=True,
    )
    mask_of_other_base: bool = neutral(
        False, "take a mask file that says it was extracted from other weights than this run starts from"
    )
    flip_mask: bool = setting(False, "train the mask's complement within its scope instead")
    protect_masks: list[str] = setting(
        [], "mask files whose kept entries stay frozen (earlier tasks)", path=True
    )
    freeze_odd_layers: bool = setting(False, "freeze transformer layers 1, 3, 5, ... (counted from 0)")
    freeze_even_layers: bool = setting(False, "freeze transformer layers 0, 2, 4, ... (counted from 0)")
    snip: bool = setting(
        False,
        "compute a mask before training, of the entries where weight x gradient is largest, on the run's own "
        "data and loss",
    )
    snip_sparsity: float = _snip(0.9, "frozen share of the scope in the mask of snip", at_least=0, below=1)
    snip_granularity: str = _snip("element", "what the mask of snip keeps as wholes", choices=GRANULARITIES)
    snip_block: int = setting(
        64,
        "side of a block, in entries",
        at_least=16,
        at_most=256,
        needs=("snip=true", "snip_granularity=block"),
    )
    snip_batches: int = _snip(
        64, "of training examples whose gradients snip sums; at most one pass", "batches", at_least=1
    )
    save_snip_mask_path: str | None = _snip(
        None,
        "file for the mask of snip, reused by runs that would compute the same; null = snip_mask.pt in the "
        "run's folder",
        changes_weights=False,
    )
    lora_rank: int = _lora(8, "rank r of the matrices A (r x in) and B (out x r)", at_least=1)
    lora_alpha: float = _lora(16.0, "a weight becomes W + (lora_alpha / lora_rank) B A", above=0)
    lora_dropout: float = _lora(0.0, "share of A's inputs dropped in training", at_least=0, below=1)

    # optimizer
    optimizer: str = setting("RMSprop", "update rule", choices=("RMSprop", "AdamW", "SGD"))
    lr: float = setting(
        1e-5, "peak learning rate; a mask wants about ten times the rate of dense training", at_least=0
    )
    lr_scheduler: str = setting(
        "constant",
        "course of the learning rate; linear and cosine fall to 0 at the end of the run",
        choices=("constant", "linear", "cosine"),
    )
    warmup_steps: int = setting(150, "of linear warm-up from 0 to lr", "optimizer steps", at_least=0)
    alpha: float = setting(
        0.99,
        "decay of the squared-gradient average, per step",
        at_least=0,
        below=1,
        needs=(_RMSPROP,),
    )
    eps: float = setting(1e-8, "added to the denominator", at_least=0, needs=(_RMSPROP, _ADAMW))
    betas: list[float] = setting(
        [0.9, 0.999],
        "decay of the gradient and squared-gradient averages, per step",
        at_least=0,
        below=1,
        needs=(_ADAMW,),
    )
    weight_decay: float = setting(
        0.0, "pull of trained entries towards 0, per unit of learning rate", at_least=0
    )
    l2_sp: float = setting(
        0.0,
        "pull of trained entries to the values that training starts from: l2_sp (w - start) is added to "
        "the gradient after clipping; above 0 costs 4 bytes per trained entry",
        at_least=0,
    )
    ewc: float = setting(
        0.0,
        "the same pull, times each entry's importance of importance_path; above 0 costs 8 bytes per trained "
        "entry, l2_sp included",
        at_least=0,
    )
    importance_path: str | None = setting(
        None, "file of what entries matter to earlier tasks, which lotto.py writes with retain.ewc", path=True
    )
    momentum: float = setting(
        0.0,
        "momentum factor; above 0 costs 4 bytes per trained entry (2 with optimizer_state=bfloat16)",
        at_least=0,
        below=1,
        needs=(_RMSPROP, _SGD),
    )
    optimizer_state: str = setting(
        "float32",
        "of the averages that the optimizer holds: float32 (4 bytes per trained entry), bfloat16 (2, rounded "
        "up or down by lot) or factored (the squared-gradient average of a matrix as means of its rows and "
        "columns, others in bfloat16; for whole matrices)",
        choices=OPTIMIZER_STATES,
    )
    stochastic_rounding: bool = setting(
        False,
        "hold trained weights in bfloat16 alone, without float32 copies: updates are rounded up or down by "
        "lot, so that they add up on average; with model.policy_dtype=bfloat16",
    )
    grad_norm_strategy: str = setting(
        "even",
        "gradient clipping: of each tensor (even), of each tensor to max_grad_norm / sqrt(tensors) "
        "(proportional), of all together (global)",
        choices=("even", "proportional", "global", "none"),
    )
    max_grad_norm: float = setting(
        10.0,
        "largest gradient norm that is not scaled down; above 0",
        needs=("grad_norm_strategy=even", "grad_norm_strategy=proportional", "grad_norm_strategy=global"),
    )

    # length of the run
    batch_size: int = setting(8, "per optimizer step (loss=dpo: preferences)", "examples", at_least=1)
    gradient_accumulation_steps: int = setting(
        1, "that a batch is cut into; must divide batch_size", "parts", at_least=1
    )
    n_epochs: int | None = setting(
        1,
        "over the data; null = no limit; the run ends at n_epochs or n_examples, whichever is first",
        "passes",
        at_least=1,
    )
    n_examples: int | None = setting(None, "to train on; null = no limit", "examples", at_least=1)
    fast_forward: int = setting(0, "skipped at the start of the run", "batches", at_least=0)
    activation_checkpointing: bool = setting(
        False, "recompute activations in the backward pass: less memory, about a third more time"
    )
    compile: bool = setting(
        False,
        "compile each transformer block (torch.compile); on a CPU that needs a C++ compiler; where it fails, "
        "the blocks run as they are and the log says why",
    )
    seed: int = setting(0, "seed of data order, samples and everything random", at_least=0, at_most=2**63 - 1)

    # evaluation during training, on a split that training never sees
    do_first_eval: bool = neutral(True, "evaluate before the first step")
    eval_every: int = neutral(20_000, "between evaluations", "training examples", at_least=1)
    eval_batch_size: int = neutral(16, "per evaluation batch (loss=dpo: preferences)", "examples", at_least=1)
    n_eval_examples: int = neutral(256, "held out, a seeded sample over all tasks", "examples", at_least=1)
    sample_during_eval: bool = neutral(False, "also write completions of held-out prompts to samples.jsonl")
    n_eval_model_samples: int = neutral(
        16, "per evaluation", "completions", at_least=1, needs=("sample_during_eval=true",)
    )

    # run folder, checkpoints, logging
    local_dirs: list[str] | None = neutral(
        None,
        "folders for runs: the first that exists, else the last is created; null = [$PROJECT_CACHE or "
        "~/.cache/lota]",
    )
    save_every: str | int = _saved(
        "epoch_1", "epoch_N: every N epochs into epoch-N/; N: every N examples into step-EXAMPLES/"
    )
    save_format: str = _saved(
        "policy",
        "weights of a checkpoint: policy (policy.pt) or folder (a Hugging Face folder of shards in its "
        "place, for models that no single memory holds)",
        choices=("policy", "folder"),
    )
    save_delta: bool = _saved(
        False, "also write delta.safetensors, the run's changes to the base, beside the weights"
    )
    resume: str = neutral(
        "auto",
        "auto: continue an unfinished run of the same settings; never: an existing run is an error",
        choices=("auto", "never"),
        needs=("debug=false", "overwrite=false"),
    )
    overwrite: bool = _saved(False, "delete an existing run of this name and start anew")
    debug: bool = neutral(False, "no wandb, no checkpoint")
    minimum_log_interval_secs: float = neutral(1.0, "between lines of metrics.jsonl", "seconds", at_least=0)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    compare_every: int | None = neutral(
        None,
        "between comparisons of what the processes of a run hold; null = once, at its end",
        "optimizer steps",
        at_least=1,
    )
    fsdp_port: int | None = neutral(
        None, "port where the processes of a run meet if MASTER_PORT is not set, as torchrun does"
    )

    def __post_init__(self) -> None:
        self.loss.fill()

    def resolve_paths(self) -> None:
        """Make local paths that exist absolute, so that a run can be resumed from another folder."""
        for owner in (self, self.model):
            for key in keys_of(owner):
                if key.about.path and key.value is not None:
                    many = isinstance(key.value, list)
                    found = [absolute(path) for path in key.value] if many else absolute(key.value)
                    setattr(owner, key.name, found)
        if self.save_snip_mask_path is not None:  # which need not exist yet
            self.save_snip_mask_path = str(expanded(self.save_snip_mask_path).resolve())

    @property
    def task_names(self) -> list[str]:
        """Every task that is named."""
        return [*self.datasets, *self.replay]

    @property
    def mask_files(self) -> list[str | None]:
        """Every mask file that is named."""
        return [self.mask_path, *self.protect_masks]

    @property
    def save_interval(self) -> tuple[str, int]:
        """(`epoch` or `step`, number): `epoch_2` -> every 2 epochs, 500 -> every 500 examples."""
        text = str(self.save_every)
        unit = "epoch" if text.startswith("epoch_") else "step"
        return unit, int(text.removeprefix("epoch_"))

    @property
    def cache_dir(self) -> Path:
        """The first of local_dirs that exists, else the last of them (not created here)."""
        choices = [expanded(folder) for folder in self.local_dirs or [default_cache()]]
        return next((folder for folder in choices if folder.is_dir()), choices[-1])

    @property
    def run_dir(self) -> Path:
        return self.cache_dir / self.exp_name

    @property
    def snip_mask_file(self) -> Path | None:
        """Where the mask of snip=true is stored; None for a debug run that names no file."""
        if self.save_snip_mask_path is not None:
            return expanded(self.save_snip_mask_path)
        return None if self.debug else self.run_dir / "snip_mask.pt"

    @property
    def data_folder(self) -> Path:
        return expanded(self.data_dir or default_cache())

    @property
    def freeze_layers(self) -> str | None:
        return "odd" if self.freeze_odd_layers else "even" if self.freeze_even_layers else None

    @property
    def optimizer_settings(self) -> dict[str, Any]:
        """Keyword arguments of the optimizer class, learning rate and clipping included."""
        own = {
            key.name: key.value for key in keys_of(self) if f"optimizer={self.optimizer}" in key.about.needs
        }
        keys = (
            "lr", "weight_decay", "grad_norm_strategy", "max_grad_norm", "optimizer_state",
            "stochastic_rounding", "seed",
        )  # fmt: skip
        return {**own, **{key: getattr(self, key) for key in keys}}


def expanded(path: str) -> Path:
    """With environment variables and `~` replaced."""
    return Path(os.path.expandvars(path)).expanduser()


def absolute(path: str) -> str:
    """The absolute path of what exists; anything else, such as a hub id or `hub:org/name`, as it is."""
    if path.startswith("hub:"):
        return path
    local = expanded(path)
    return str(local.resolve()) if local.exists() else path


def default_cache() -> str:
    """$PROJECT_CACHE, or ~/.cache/lota."""
    return os.environ.get("PROJECT_CACHE") or "~/.cache/lota"
