"""Learning rate as a function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

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
