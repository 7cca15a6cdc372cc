"""Clipping of gradients: which norm has which limit, and what a gradient is multiplied with."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

GRAD_NORM_STRATEGIES = ("even", "proportional", "global", "none")
_EPS = 1e-6  # the constant of torch.nn.utils.clip_grad_norm_


def scale_to(limit: float, norm: Tensor) -> Tensor:
    """What a gradient of that norm, (), is multiplied with to stay within the limit."""
    return (limit / (norm + _EPS)).clamp(max=1.0)


def tensor_limit(strategy: str, max_grad_norm: float, n_tensors: int) -> float:
    """What each tensor's norm is clipped to; infinite if it is not."""
    if strategy == "even":
        return max_grad_norm
    if strategy == "proportional":
        return max_grad_norm / math.sqrt(n_tensors)
    return math.inf


def total(parts: list[Tensor]) -> Tensor:
    """Of all numbers in several tensors, on the device of the first."""
    return torch.cat([part.reshape(-1).to(parts[0].device) for part in parts]).sum()


def check_settings(strategy: str, max_grad_norm: float | None, settings: dict[str, Any]) -> None:
    """Raise ValueError for a strategy, a limit or numbers of an update rule that cannot be used."""
    problems = []
    if strategy not in GRAD_NORM_STRATEGIES:
        problems.append(f"grad_norm_strategy={strategy!r}: choose one of {', '.join(GRAD_NORM_STRATEGIES)}")
    elif strategy != "none" and (max_grad_norm is None or not max_grad_norm > 0):
        problems.append(f"max_grad_norm={max_grad_norm}: must be above 0 with grad_norm_strategy={strategy}")
    for key in ("lr", "eps", "weight_decay", "momentum", "alpha"):
        if key in settings and not settings[key] >= 0:
            problems.append(f"{key}={settings[key]}: must be 0 or more")
    if problems:
        raise ValueError("; ".join(problems))
