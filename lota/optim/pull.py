"""A pull of trained entries towards the values that training starts from, as a term of their gradient.

    g_i + (l2_sp + ewc * importance_i) * (w_i - anchor_i)

is the gradient of loss + sum_i (l2_sp + ewc * importance_i) / 2 * (w_i - anchor_i)^2. The term is added to
the complete gradient after clipping, in front of the update rule: RMSprop's and AdamW's averages are of the
sum, as RMSprop's are of weight decay. Sources: L2-SP, Li et al. (arXiv 1802.01483); EWC, Kirkpatrick et al.
(arXiv 1612.00796), where importance is the diagonal of the Fisher information.

What it adds to a parameter's state, by key:

    anchor   fp32 (kept,), the exact values at the start
    pull     what the distance is multiplied with: fp32 (kept,) if ewc is not 0, else a number
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lota.optim.kept import Kept, Tiles

ANCHOR, PULL = "anchor", "pull"


class Pulled(Protocol):
    """What is asked of a masked optimizer."""

    @property
    def names(self) -> Mapping[nn.Parameter, str]: ...
    @property
    def kept(self) -> Mapping[nn.Parameter, Kept]: ...
    @property
    def state(self) -> Mapping[Any, Any]: ...
    def exact_values(self, p: nn.Parameter) -> Tensor: ...


def pull_to_start(
    optimizer: Pulled,
    l2_sp: float = 0.0,
    ewc: float = 0.0,
    importance: Mapping[str, Tensor] | None = None,
) -> None:
    """Pull the entries that an optimizer trains to the values that they have now.

    importance: of each parameter, in the order of its kept positions, (kept,) of the whole parameter even if
    this process holds a part; only ewc reads it. Call it once, after the masters are filled and before a
    checkpoint is restored, which brings its own anchors. Raises ValueError if importance lacks a parameter.
    """
    for p, name in optimizer.names.items():
        state, kept = optimizer.state[p], optimizer.kept[p]
        state[ANCHOR] = optimizer.exact_values(p).detach().to(torch.float32, copy=True)
        state[PULL] = l2_sp
        if ewc:
            if importance is None or name not in importance:
                raise ValueError(f"ewc={ewc:g} needs the importance of {name}, which is not listed")
            own = importance[name][kept.before : kept.before + kept.count].to(p.device, torch.float32)
            if own.shape != (kept.count,):
                raise ValueError(f"importance of {name}: {len(own)} entries, and {kept.count} train")
            if isinstance(kept, Tiles):  # whose values are not in the order of positions
                own = own[kept.positions().argsort().argsort()]
            state[PULL] = own * ewc + l2_sp


def with_pull(grad: Tensor, values: Tensor, state: Mapping[str, Any], piece: slice | None = None) -> Tensor:
    """The gradient plus the pull, fp32 (entries,); the gradient itself, which stays as it is, without one.

    values: fp32 (entries,). piece: which of a parameter's kept entries these are; None: all.
    """
    if ANCHOR not in state:
        return grad
    anchor, pull = state[ANCHOR], state[PULL]
    if piece is not None:
        anchor, pull = anchor[piece], pull[piece] if torch.is_tensor(pull) else pull
    return (values - anchor).mul_(pull).add_(grad)
