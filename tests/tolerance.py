"""How far two ways of computing one thing may differ: by the rounding of their sums, and by nothing else.

Another processor, another number of threads or another batch adds the same numbers in another order. Each
addition rounds by at most eps/2 of its result, up or down without a pattern, so that the error of a sum of
n terms grows as a random walk: about eps/2 sqrt(n/3) times the size of the terms. Two ways differ by sqrt(2)
of that, and the worst of a million entries lies five standard deviations out, which makes 2 eps sqrt(n).
`FACTOR` is twice that.

The size of the terms is not known afterwards. The largest entry of the tensor stands for it: an entry near
zero is what remains of parts as large as its neighbours, and keeps their rounding. For the same reason
tolerances here are relative to a whole tensor and never to a single entry.

A case has to be well conditioned before such a tolerance can hold. RMSprop and Adam divide a gradient by its
own size: with a tiny eps an entry whose gradient is nothing but rounding moves by a whole step, in a
direction that the processor decides. Cases that train compare under an eps as large as the gradients are,
where a step is smooth in the gradient (and its scale matters, which a tiny eps would hide).

Bit equality (`torch.equal`) is right between runs of the same code on the same machine: frozen entries, a
resumed run, a file that is read back, and operations entry by entry that round once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

FACTOR = 4


def rounding(dtype: torch.dtype, terms: int) -> float:
    """Allowed difference of two sums of `terms` terms in `dtype`, as a share of the size of what is added."""
    return FACTOR * torch.finfo(dtype).eps * math.sqrt(terms)


def chain(model: nn.Module, tokens: int = 0) -> int:
    """Length of all sums between a model's input and its gradients: each matrix adds over one of its sides
    forward and over the other one backward, and a weight's gradient adds over `tokens`.

    Matrices beside each other (q, k, v; experts) are counted one after the other: an upper bound.
    """
    return sum(p.shape[-1] + p.shape[-2] for p in model.parameters() if p.ndim > 1) + tokens


def assert_same(
    got: Tensor, want: Tensor, *, terms: int, dtype: torch.dtype | None = None, name: str = ""
) -> None:
    """got equals want up to the rounding of sums of `terms` terms in `dtype` (default: got's own)."""
    assert got.shape == want.shape, name
    allowed = rounding(dtype or got.dtype, terms) * want.detach().double().abs().max().item()
    _within(got.detach().double() - want.detach().double(), allowed, name)


def assert_same_training(
    got: Mapping[str, Tensor],
    want: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    *,
    terms: int,
    steps: int,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Two trainings from `start` moved every entry alike: up to the rounding of gradients that are sums of
    `terms` terms, and to that of the weights themselves, which each step rounds once in either training.

    A step may differ by twice its gradient's rounding (a smooth update rule, see above), and the differences
    of the steps add up.
    """
    assert got.keys() == want.keys()
    eps = torch.finfo(dtype).eps
    for name, value in want.items():
        first = start[name].detach().double()
        moved = (value.detach().double() - first).abs().max().item()
        allowed = steps * (2 * rounding(dtype, terms) * moved + eps * value.detach().abs().max().item())
        _within(got[name].detach().double() - value.detach().double(), allowed, name)


def _within(difference: Tensor, allowed: float, name: str) -> None:
    worst = difference.abs().max().item()
    assert worst <= allowed, f"{name}: differs by {worst:.3g}, and rounding explains {allowed:.3g}"
