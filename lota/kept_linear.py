"""Linear layers whose backward pass computes the weight gradient of kept entries only.

A dense weight gradient costs as much as the forward pass. When a mask keeps few entries, the product
sampled at those entries (`torch.sparse.sampled_addmm`) is cheaper: on a CPU 3 times at 1 % kept, and no
cheaper from about 5 % on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lota.masked_optimizer import MaskedOptimizer

MAX_DENSITY = 0.02  # kept share of a weight up to which the sampled product is clearly faster


class _KeptGradientLinear(torch.autograd.Function):
    """x W^T + b, whose backward hands (output gradient, input) to `receive` instead of forming W's
    gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, receive: Callable) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.receive = receive
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None, None, None]:
        x, weight = ctx.saved_tensors
        grad_x = grad_output @ weight if ctx.needs_input_grad[0] else None  # before the weight is updated
        ctx.receive(grad_output.reshape(-1, weight.shape[0]), x.reshape(-1, weight.shape[1]))
        return grad_x, None, None, None


class _Pattern:
    """Kept positions of a (out, in) weight as a sparse CSR pattern, and the product sampled there."""

    def __init__(self, positions: Tensor, shape: torch.Size, zeros: Tensor):
        rows = torch.div(positions, shape[1], rounding_mode="floor")
        ends = torch.bincount(rows, minlength=shape[0]).cumsum(0)
        starts = torch.cat([ends.new_zeros(1), ends]).to(torch.int32)
        columns = torch.remainder(positions, shape[1]).to(torch.int32)
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="Sparse CSR tensor support is in beta", category=UserWarning
            )
            self.csr = torch.sparse_csr_tensor(
                starts, columns, zeros[: len(columns)], size=tuple(shape), check_invariants=True
            )

    def gradient(self, grad_output: Tensor, x: Tensor) -> Tensor:
        """Entries of grad_output^T x at the kept positions, in their order: (kept,)."""
        return torch.sparse.sampled_addmm(self.csr, grad_output.t(), x, beta=0.0).values()


def use_kept_gradients(
    model: nn.Module, optimizer: MaskedOptimizer, max_density: float = MAX_DENSITY
) -> Callable[[], None]:
    """Let every suitable linear layer of `model` compute the gradient of its kept entries only.

    Suitable: a plain fp32 `nn.Linear` on the CPU, not shared, its bias frozen, at most max_density of its
    weight kept. Other parameters are untouched. Returns a function that undoes it.
    A layer that runs twice in one backward pass raises RuntimeError; fuse with `max_density=0` then.
    """
    uses: dict[nn.Parameter, int] = {}
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                uses[p] = uses.get(p, 0) + 1
    chosen = [m for m in model.modules() if _is_suitable(m, uses, optimizer, max_density)]
    longest = max((optimizer.positions(m.weight).numel() for m in chosen), default=0)
    zeros = torch.zeros(longest)
    for module in chosen:
        module.forward = _forward(module, optimizer, zeros)

    def undo() -> None:
        for module in chosen:
            del module.forward

    return undo


def _is_suitable(
    module: nn.Module, uses: dict[nn.Parameter, int], optimizer: MaskedOptimizer, max_density: float
) -> bool:
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    weight, bias = module.weight, module.bias
    if weight not in optimizer.names or uses[weight] > 1 or (bias is not None and bias.requires_grad):
        return False
    positions = optimizer.positions(weight)
    plain = weight.device.type == "cpu" and weight.dtype == torch.float32
    return plain and positions is not None and positions.numel() <= max_density * weight.numel()


def _forward(module: nn.Linear, optimizer: MaskedOptimizer, zeros: Tensor) -> Callable[[Tensor], Tensor]:
    weight = module.weight
    pattern = _Pattern(optimizer.positions(weight), weight.shape, zeros)
    last_pass = -1

    def receive(grad_output: Tensor, x: Tensor) -> None:
        nonlocal last_pass
        current = torch._C._current_graph_task_id()
        if current == last_pass:
            raise RuntimeError(
                f"{optimizer.names[weight]} is used twice in one backward pass, which sampled gradients do "
                "not support: call fuse_in_backward(..., max_density=0)"
            )
        last_pass = current
        optimizer.accumulate(weight, pattern.gradient(grad_output, x))

    def forward(x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type) or x.dtype != weight.dtype:
            return F.linear(x, weight, module.bias)
        return _KeptGradientLinear.apply(x, weight, module.bias, receive)

    return forward
