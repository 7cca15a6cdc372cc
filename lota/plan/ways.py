"""The ways to train that a plan sets side by side, and what would make a run smaller."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from lota.config import Config, LossConfig
from lota.config_checks import problems_of, process_problems
from lota.plan.predict import Prediction, Setup

USUAL_SPARSITY = 0.9  # of the masks that are compared, if the run has none
SPARSITIES = (0.9, 0.95, 0.99)
PROCESSES = (2, 4, 8, 16)


@dataclass
class Way:
    """A run to plan. changes: what is changed of the run that was asked for, as overrides."""

    name: str
    config: Config
    setup: Setup
    changes: tuple[str, ...] = ()

    def with_(self, *overrides: str) -> Way:
        """The same with other settings. Of the plan's own: sparsity and processes."""
        config, setup = copy.deepcopy(self.config), self.setup
        for override in overrides:
            key, _, text = override.partition("=")
            value: Any = _value(text)
            if key in ("sparsity", "processes"):
                setup = replace(setup, **{key: value})
            elif key == "loss":
                config.loss = LossConfig(text)
                config.loss.fill()
            elif key in ("adapter", "trainer"):
                getattr(config, key).name = text
            else:
                *path, last = key.split(".")
                owner: Any = config
                for part in path:
                    owner = getattr(owner, part)
                assert hasattr(owner, last), key
                setattr(owner, last, value)
        return Way(self.name, config, setup, (*self.changes, *overrides))

    def named(self, name: str) -> Way:
        return replace(self, name=name)

    @property
    def masked(self) -> bool:
        c = self.config
        return self.setup.sparsity is not None or c.mask_path is not None or c.snip

    @property
    def can_run(self) -> bool:
        """Whether the settings agree with each other."""
        c = self.config
        as_masked = c if self.setup.sparsity is None else replace(c, mask_path="not there yet")
        return not [*problems_of(c), *process_problems(as_masked, self.setup.processes)]

    @property
    def lora(self) -> bool:
        return self.config.adapter.name == "lora"


def _value(text: str) -> Any:
    if text in ("null", "true", "false"):
        return {"null": None, "true": True, "false": False}[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


_DENSE = (
    "adapter=none", "mask_path=null", "snip=false", "flip_mask=false", "sparsity=null",
    "freeze_odd_layers=false", "freeze_even_layers=false",
)  # fmt: skip
_SFT = ("loss=sft", "model.reference=null", "model.reference_archive=null")
_ROUNDED = (
    "model.policy_dtype=bfloat16", "model.fsdp_policy_mp=null", "stochastic_rounding=true",
    "optimizer_state=bfloat16",
)  # fmt: skip
_MASTERS = ("stochastic_rounding=false", "optimizer_state=float32")


def compared(run: Way) -> list[Way]:
    """The run, and each other way to train the same model on batches of the same size."""
    dense = run.with_(*_DENSE, *_SFT)
    dense.config.protect_masks = []
    if run.setup.processes > 1:
        dense = dense.with_("trainer=FSDPTrainer")
    masked = run
    if not run.masked:
        masked = run.with_("adapter=none", f"sparsity={USUAL_SPARSITY}", *_MASTERS)
    adapt = masked.with_(*_SFT)
    ways = [
        run.named("this run"),
        dense.named("calibrate"),
        dense.with_(*_ROUNDED).named("calibrate, low memory"),
        dense.with_("optimizer=AdamW", "grad_norm_strategy=global", *_MASTERS).named(
            "full fine-tuning, AdamW"
        ),
        adapt.named("adapt"),
        masked.with_("loss=dpo").named("DPO"),
        run.with_(*_DENSE, *_SFT, *_MASTERS, "adapter=lora", "trainer=BasicTrainer").named(
            f"LoRA, r={run.config.lora_rank}"
        ),
    ]
    if run.config.loss.on_preferences and run.masked:
        ways = [way for way in ways if way.name != "DPO"]
    known: list[tuple[Config, Setup]] = []
    kept = []
    for way in ways:
        if (way.config, way.setup) not in known and (way is ways[0] or way.can_run):
            known.append((way.config, way.setup))
            kept.append(way)
    return kept


# Making it smaller


def smaller(run: Way) -> Iterator[Way]:
    """Each single change that can lower the peak of a run, cheapest first."""
    return (way for way in _changes(run) if way.can_run)


def _changes(run: Way) -> Iterator[Way]:
    c = run.config
    parts = c.gradient_accumulation_steps
    if not c.activation_checkpointing:
        yield run.with_("activation_checkpointing=true")
    finer = [n for n in range(2 * parts, c.batch_size + 1) if c.batch_size % n == 0]
    if finer:
        yield run.with_(f"gradient_accumulation_steps={finer[0]}")
        if finer[-1] != finer[0]:
            yield run.with_(f"gradient_accumulation_steps={finer[-1]}")
    if c.eval_batch_size > 1:
        yield run.with_("eval_batch_size=1")
    if (run.masked or run.lora) and "bfloat16" not in (c.model.policy_dtype, c.model.fsdp_policy_mp):
        yield run.with_("model.fsdp_policy_mp=bfloat16")
    if not run.masked and not run.lora and not c.stochastic_rounding:
        yield run.with_(*_ROUNDED)
    if c.loss.on_preferences and not run.masked and not run.lora:
        yield run.with_("model.reference=precomputed")
    for sparsity in SPARSITIES:
        if _can_be_sparser(run, sparsity):
            yield run.with_(*_sparser(run, sparsity))
    for n in PROCESSES:
        if n > run.setup.processes:
            yield run.with_("trainer=FSDPTrainer", f"processes={n}")


def _can_be_sparser(run: Way, sparsity: float) -> bool:
    if run.config.snip:
        return sparsity > run.config.snip_sparsity
    return run.setup.sparsity is not None and sparsity > run.setup.sparsity


def _sparser(run: Way, sparsity: float) -> tuple[str, ...]:
    return (f"snip_sparsity={sparsity}",) if run.config.snip else (f"sparsity={sparsity}",)


@dataclass
class Advice:
    """What was tried to make a run fit. tried: a change and its peak, in bytes."""

    tried: list[tuple[Way, int]]
    fitting: tuple[Way, int] | None  # the first changes together that fit, fewest first


def advise(run: Way, first: Prediction, plan: Callable[[Way], Prediction], limit: int) -> Advice:
    """Plan every single change, then, if none makes the run fit, the helpful ones together, one by one.

    first: the plan of the run itself. limit: bytes.
    """
    tried = [(way, plan(way).peak.peak) for way in smaller(run)]
    alone = next(((way, peak) for way, peak in tried if peak <= limit), None)
    if alone is not None:
        return Advice(tried, alone)
    together, helpful = run, [way for way, peak in tried if peak < 0.99 * first.peak.peak]
    for way in helpful:
        together = together.with_(*way.changes)
        peak = plan(together).peak.peak
        if peak <= limit:
            return Advice(tried, (together, peak))
    return Advice(tried, None)
