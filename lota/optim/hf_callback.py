"""A masked optimizer inside a Hugging Face or TRL trainer: what cannot work is refused before a step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import TrainerCallback, TrainingArguments

from lota.optim.masked import MaskedOptimizer


class FusedCallback(TrainerCallback):
    """For `callbacks=[FusedCallback()]` beside `optimizers=(optimizer, None)`.

    A fused optimizer updates during the backward pass, so that what a trainer does to gradients afterwards
    comes too late. Refused, with a ValueError that names all problems, when the trainer is made and again
    when training starts: a `max_grad_norm` that is not 0, another `gradient_accumulation_steps` than the
    optimizer's, loss scaling (`fp16`), several devices, re-entrant checkpointing; and, fused or not, a
    trainer whose optimizer is none of ours, for it would train whole tensors. The trainer's own log shows
    grad_norm 0 in a fused run; `optimizer.grad_norm` has it.
    """

    def on_init_end(
        self, args: TrainingArguments, state: Any, control: Any, optimizer: Any = None, **_: Any
    ) -> None:
        if optimizer is not None:
            _check(args, optimizer)

    def on_train_begin(
        self, args: TrainingArguments, state: Any, control: Any, optimizer: Any = None, **_: Any
    ) -> None:
        _check(args, optimizer)


def _check(args: TrainingArguments, optimizer: Any) -> None:
    while not isinstance(optimizer, MaskedOptimizer) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer  # accelerate wraps it
    if not isinstance(optimizer, MaskedOptimizer):
        raise ValueError(
            f"the trainer's optimizer is {type(optimizer).__name__}, which trains whole tensors: give it "
            "optimizers=(lota.MaskedRMSprop(model, mask, lr=...), None)"
        )
    problems = list(_problems(args, optimizer)) if optimizer.fused else []
    if problems:
        lines = [
            "these settings of the trainer cannot reach an optimizer that is fused into the backward pass:"
        ]
        raise ValueError("\n  ".join([*lines, *problems]))


def _problems(args: TrainingArguments, optimizer: MaskedOptimizer) -> Iterator[str]:
    if args.max_grad_norm:
        yield (
            f"max_grad_norm={args.max_grad_norm}: set it to 0 in the trainer's arguments, and let the "
            'optimizer clip: MaskedRMSprop(..., grad_norm_strategy="even" or "global", max_grad_norm=...)'
        )
    steps = args.gradient_accumulation_steps
    if steps != optimizer.gradient_accumulation_steps:
        yield (
            f"gradient_accumulation_steps={steps}, but the optimizer updates after "
            f"{optimizer.gradient_accumulation_steps} backward passes: "
            f"fuse_in_backward(optimizer, gradient_accumulation_steps={steps})"
        )
    if args.fp16:
        yield "fp16=True scales the loss, and with it what the optimizer sees: use bf16=True"
    if args.world_size > 1 or args.n_gpu > 1:
        yield (
            "several devices, whose gradients are averaged after the optimizer has used them: use one, or do "
            "without fuse_in_backward"
        )
    for name in ("activation_checkpointing", "gradient_checkpointing"):  # the newer name, the older one
        given = getattr(args, f"{name}_kwargs", None) or {}
        if getattr(args, name, False) and given.get("use_reentrant"):
            yield f'{name}_kwargs: set "use_reentrant" to False'
            return
