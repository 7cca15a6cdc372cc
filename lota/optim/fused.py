"""Fusing a masked optimizer into the backward pass: each gradient is used and freed as soon as it is
complete.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from lota.optim.compact_linear import use_compact_gradients
from lota.optim.masked import MaskedOptimizer


def fuse_in_backward(
    optimizer: MaskedOptimizer, gradient_accumulation_steps: int = 1, compact_linear: bool = True
) -> Callable[[], None]:
    """Update each parameter as soon as its gradient is complete during `loss.backward()`, then free the
    gradient.

    gradient_accumulation_steps: backward passes per update; their compact gradients are *summed*, as `p.grad`
    would be, so divide the loss as in any PyTorch loop. Call `optimizer.step()` once per update all the
    same (a scheduler or a Hugging Face trainer does): it finishes `global` clipping and sets `grad_norm`.
    compact_linear: linear layers hand over the gradient of their kept entries themselves, on a CPU, or where
    whole rows or columns are kept (lota/kept_linear.py); False for a model that runs a layer twice in one
    pass.
    Needs non-reentrant activation checkpointing (`use_reentrant=False`): the reentrant kind runs the hook
    of a shared parameter more than once.
    Returns a function that removes what it attached. Raises ValueError for an optimizer that is fused
    already.
    """
    if optimizer.fused:
        raise ValueError("this optimizer is fused into the backward pass already")
    if gradient_accumulation_steps < 1:
        raise ValueError(f"gradient_accumulation_steps={gradient_accumulation_steps}: must be at least 1")

    def hook(p: nn.Parameter) -> None:
        if p.grad is None:  # kept_linear handed its gradient over already
            return
        with torch.no_grad():
            optimizer._receive(p)

    handles = [p.register_post_accumulate_grad_hook(hook) for p in optimizer.names]
    compact = compact_linear and optimizer.model is not None
    undo = use_compact_gradients(optimizer.model, optimizer) if compact else None
    optimizer.fused, optimizer._accumulation = True, gradient_accumulation_steps

    def unfuse() -> None:
        for handle in handles:
            handle.remove()
        if undo is not None:
            undo()
        optimizer.fused, optimizer._accumulation = False, 1
        optimizer._pending.clear()

    return unfuse


apply_mask_in_backward = fuse_in_backward
