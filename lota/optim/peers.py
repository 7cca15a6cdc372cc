"""What a masked optimizer asks of the other processes that train the same tensors."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn


class Peers(Protocol):
    """Given to a masked optimizer as `optimizer.peers`: then complete gradients wait for `step()`, even if
    the optimizer is fused, and an update is made of their sums over all processes.

    All processes list the same names, in the same order. Gradients are compact, fp32 (kept,). A process that
    saw no examples has none; what it is asked for, and in which order, is the same as everywhere else.
    """

    parts: bool  # whether a process holds a part of each tensor, so that norms are of all parts together

    def begin(self, p: nn.Parameter, grad: Tensor) -> Tensor:
        """Where the gradient of an update's first backward pass is held; later passes are added to it."""
        ...

    def complete(self, p: nn.Parameter) -> None:
        """The gradient begun has had as many passes as an update waits for: it may be sent already."""
        ...

    def gradients(self, grads: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        """Sums over all processes, in the order of names; without those that no process has a gradient of.

        grads: what this process has, wherever it lies. Called by each `step()`.
        """
        ...

    def squares(self, squares: Tensor) -> Tensor:
        """Sums over all processes, asked if `parts`. squares: fp32 (names,), of norms; 0: no gradient."""
        ...
