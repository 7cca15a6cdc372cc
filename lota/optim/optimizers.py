"""Optimizers that train only the entries a mask keeps: pure update rules, learning rates, and the classes.

The rules are functions on 1-D fp32 tensors of shape (kept,): values and state buffers are changed in place,
nothing is read elsewhere. Their arithmetic follows `torch.optim`'s single-tensor implementations term by
term.

The classes work deferred (`loss.backward(); optimizer.step()`, a normal `torch.optim.Optimizer`) and fused
into the backward pass (`lota.fuse_in_backward`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lota.masks import Mask
from lota.optim.launches import Rule
from lota.optim.masked import MaskedOptimizer

Parameters = nn.Module | Iterable[tuple[str, nn.Parameter]]  # see `MaskedOptimizer`


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
    rmsprop_step_(values, grad, square_avg, momentum_buffer, lr=lr, eps=eps, momentum=momentum)


def rmsprop_step_(
    values: Tensor,
    grad: Tensor,
    square_avg: Tensor,
    momentum_buffer: Tensor | None,
    *,
    lr: float,
    eps: float,
    momentum: float,
) -> None:
    """The second half of `rmsprop_update_`: grad has its decay, square_avg holds it and stays."""
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
    beta2 = betas[1]
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    adamw_step_(
        values, grad, exp_avg, exp_avg_sq, step=step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay
    )


def adamw_step_(
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
    """The second half of `adamw_update_`: exp_avg_sq holds the gradient already and stays."""
    beta1, beta2 = betas
    values.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
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


SCHEDULERS = ("constant", "linear", "cosine")


def learning_rate(step: int, *, peak: float, scheduler: str, warmup_steps: int, total_steps: int) -> float:
    """Returns the learning rate of optimizer step `step` (from 0): nothing to save, nothing to restore.

    Linear warm-up to `peak`, then the scheduler: `constant` stays there, `linear` and `cosine` fall to 0 at
    total_steps.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if scheduler == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if scheduler == "linear":
        return peak * max(0.0, 1.0 - progress)
    return peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


class MaskedRMSprop(MaskedOptimizer):
    """RMSprop on the kept entries; the method's default optimizer. Arguments as in `torch.optim.RMSprop`."""

    square_average = "square_avg"

    def __init__(
        self,
        model: Parameters,
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

    def _buffer_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("square_avg", "momentum_buffer") if group["momentum"] else ("square_avg",)

    def _update(self, values: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        settings = {key: group[key] for key in ("lr", "alpha", "eps", "weight_decay", "momentum")}
        rmsprop_update_(values, grad, state["square_avg"], state.get("momentum_buffer"), **settings)

    def _squared(self, values: Tensor, grad: Tensor, group: dict[str, Any]) -> tuple[Tensor, float]:
        decay = group["weight_decay"]
        return grad.add(values, alpha=decay) if decay else grad, group["alpha"]

    def _step_by(
        self, values: Tensor, grad: Tensor, square: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        decayed, _ = self._squared(values, grad, group)
        settings = {key: group[key] for key in ("lr", "eps", "momentum")}
        rmsprop_step_(values, decayed, square, state.get("momentum_buffer"), **settings)

    def _kernel_rule(self, state: dict[str, Any], group: dict[str, Any]) -> Rule:
        alpha = group["alpha"]
        numbers = (group["lr"], alpha, 1 - alpha, group["eps"], group["weight_decay"], group["momentum"])
        if "momentum_buffer" in state:
            return Rule("RMSPROP_MOMENTUM", ("square_avg", "momentum_buffer"), numbers)
        return Rule("RMSPROP", ("square_avg",), numbers)


class MaskedAdamW(MaskedOptimizer):
    """AdamW on the kept entries. Arguments as in `torch.optim.AdamW`, with weight decay 0 by default."""

    square_average = "exp_avg_sq"

    def __init__(
        self,
        model: Parameters,
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

    def _buffer_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def _update(self, values: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        settings = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
        adamw_update_(values, grad, state["exp_avg"], state["exp_avg_sq"], step=state["step"], **settings)

    def _squared(self, values: Tensor, grad: Tensor, group: dict[str, Any]) -> tuple[Tensor, float]:
        return grad, group["betas"][1]

    def _step_by(
        self, values: Tensor, grad: Tensor, square: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        settings = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
        adamw_step_(values, grad, state["exp_avg"], square, step=state["step"], **settings)

    def _kernel_rule(self, state: dict[str, Any], group: dict[str, Any]) -> Rule:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        correction1, correction2 = (1 - beta ** state["step"] for beta in (beta1, beta2))
        shrink = 1 - lr * group["weight_decay"]
        sizes = correction2**0.5, group["eps"], lr / correction1
        return Rule("ADAMW", ("exp_avg", "exp_avg_sq"), (shrink, 1 - beta1, beta2, 1 - beta2, *sizes))


class MaskedSGD(MaskedOptimizer):
    """SGD on the kept entries. Arguments as in `torch.optim.SGD`."""

    def __init__(
        self,
        model: Parameters,
        mask: Mask | None = None,
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        **clipping: Any,
    ):
        super().__init__(model, mask, lr=lr, momentum=momentum, weight_decay=weight_decay, **clipping)

    def _buffer_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def _update(self, values: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        settings = {key: group[key] for key in ("lr", "weight_decay", "momentum")}
        sgd_update_(values, grad, state.get("momentum_buffer"), **settings)

    def _kernel_rule(self, state: dict[str, Any], group: dict[str, Any]) -> Rule:
        numbers = group["lr"], group["weight_decay"], group["momentum"]
        if "momentum_buffer" in state:
            return Rule("SGD_MOMENTUM", ("momentum_buffer",), numbers)
        return Rule("SGD", (), numbers)


OPTIMIZERS: dict[str, type[MaskedOptimizer]] = {
    "RMSprop": MaskedRMSprop,
    "AdamW": MaskedAdamW,
    "SGD": MaskedSGD,
}
