"""The gradients of frozen entries of an optimizer that is not fused: zero, as far as anybody can see."""

from __future__ import annotations

from typing import Protocol
from weakref import WeakSet

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from lota.optim.kept import Everything, Kept


class Trains(Protocol):
    """What is asked of a masked optimizer here."""

    fused: bool
    kept: dict[nn.Parameter, Kept]


# parameter -> the optimizers that train it
_OPTIMIZERS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def clear_frozen_gradients(p: nn.Parameter, optimizer: Trains) -> None:
    """Set p.grad's frozen entries to zero after each backward pass, unless an optimizer is fused into it.

    So that whatever reads p.grad in an ordinary loop, such as a trainer's clipping, sees the gradient that
    trains. If several optimizers share a parameter, entries that any of them keeps stay.
    """
    if p in _OPTIMIZERS:
        _OPTIMIZERS[p].add(optimizer)
        return
    optimizers = _OPTIMIZERS[p] = WeakSet([optimizer])

    @torch.no_grad()
    def hook(p: nn.Parameter) -> None:
        alive = list(optimizers)
        if not alive or any(other.fused for other in alive) or p.grad is None or p.grad.is_sparse:
            return
        kept = [other.kept[p] for other in alive]
        if any(isinstance(entries, Everything) for entries in kept):
            return
        values = [entries.gather(p.grad) for entries in kept]
        p.grad.zero_()
        for entries, gradient in zip(kept, values, strict=True):
            entries.write(p.grad, gradient)

    p.register_post_accumulate_grad_hook(hook)
