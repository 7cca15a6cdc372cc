"""Optimizers that train only the entries a mask keeps: pure update rules, a class for each, learning rates.

The rules are functions on 1-D fp32 tensors of shape (kept,): values and state buffers are changed in place,
nothing is read elsewhere. Their arithmetic follows `torch.optim`'s single-tensor implementations term by
term.

The classes work deferred (`loss.backward(); optimizer.step()`, a normal `torch.optim.Optimizer`) and fused
into the backward pass (`lota.fuse_in_backward`).
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from lota.masks import Mask
from lota.optim.masked import MaskedOptimizer


def rmsprop_update_(
    values: Tensor,
    grad: Tensor,
    square_avg: Tensor,
    momentum_buffer: Tensor | None,
    *,
    lr: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    momentum: float,
) -> None:
    """RMSprop: v <- alpha v + (1 - alpha) g^2; w <- w - lr g / (sqrt(v) + eps). Source: Tieleman & Hinton
    2012.

    Weight decay is added to the gradient; with momentum the scaled gradient is averaged before it is applied.
    """
    if weight_decay:
        grad = grad.add(values, alpha=weight_decay)
    square_avg.mul_(alpha).addcmul_(grad, grad, value=1 - alpha)
    denominator = square_avg.sqrt().add_(eps)
    if momentum_buffer is None:
        values.addcdiv_(grad, denominator, value=-lr)
    else:
        momentum_buffer.mul_(momentum).addcdiv_(grad, denominator)
        values.add_(momentum_buffer, alpha=-lr)


def adamw_update_(
    values: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """AdamW with decoupled weight decay; `step` counts from 1. Source: Loshchilov & Hutter, arXiv
    1711.05101.
    """
    beta1, beta2 = betas
    values.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    denominator = (exp_avg_sq.sqrt() / correction2**0.5).add_(eps)
    values.addcdiv_(exp_avg, denominator, value=-lr / correction1)


def sgd_update_(
    values: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    *,
    lr: float,
    weight_decay: float,
    momentum: float,
) -> None:
    """SGD, with heavy-ball momentum where a buffer is given (zero before the first step)."""
    if weight_decay:
        grad = grad.add(values, alpha=weight_decay)
    if momentum_buffer is not None:
        grad = momentum_buffer.mul_(momentum).add_(grad)
    values.add_(grad, alpha=-lr)


class MaskedRMSprop(MaskedOptimizer):
    """RMSprop on the kept entries; the method's default optimizer. Arguments as in `torch.optim.RMSprop`."""

    def __init__(
        self,
        model,
        mask: Mask | None = None,
        lr: float = 1e-5,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        **clipping: Any,
    ):
        super().__init__(
            model, mask, lr=lr, alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum, **clipping
        )

    def _buffer_names(self, group):
        return ("square_avg", "momentum_buffer") if group["momentum"] else ("square_avg",)

    def _update(self, values, grad, state, group):
        rmsprop_update_(
            values,
            grad,
            state["square_avg"],
            state.get("momentum_buffer"),
            lr=group["lr"],
            alpha=group["alpha"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
        )


class MaskedAdamW(MaskedOptimizer):
    """AdamW on the kept entries. Arguments as in `torch.optim.AdamW`, with weight decay 0 by default."""

    buffers = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        model,
        mask: Mask | None = None,
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **clipping: Any,
    ):
        super().__init__(
            model, mask, lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, **clipping
        )

    def _update(self, values, grad, state, group):
        adamw_update_(
            values,
            grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            step=state["step"],
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )


class MaskedSGD(MaskedOptimizer):
    """SGD on the kept entries. Arguments as in `torch.optim.SGD`."""

    def __init__(
        self,
        model,
        mask: Mask | None = None,
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        **clipping: Any,
    ):
        super().__init__(model, mask, lr=lr, momentum=momentum, weight_decay=weight_decay, **clipping)

    def _buffer_names(self, group):
        return ("momentum_buffer",) if group["momentum"] else ()

    def _update(self, values, grad, state, group):
        sgd_update_(
            values,
            grad,
            state.get("momentum_buffer"),
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
        )


OPTIMIZERS: dict[str, type[MaskedOptimizer]] = {
    "RMSprop": MaskedRMSprop,
    "AdamW": MaskedAdamW,
    "SGD": MaskedSGD,
}

SCHEDULERS = ("constant", "linear", "cosine")


def learning_rate(step: int, *, peak: float, scheduler: str, warmup_steps: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up to `peak`, then the scheduler.

    `constant` stays at the peak; `linear` and `cosine` fall to 0 at total_steps.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if scheduler == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if scheduler == "linear":
        return peak * max(0.0, 1.0 - progress)
    return peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
