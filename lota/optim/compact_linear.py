"""Linear layers that hand over the gradient of their kept entries, without a weight gradient in between.

Autograd would allocate a gradient as large as the weight, page by page, to be gathered from and freed. Where
a mask keeps whole rows or columns only their gradient is computed, on any device: a smaller product of the
same kind. For other masks, on a CPU, the product goes to one scratch buffer that all layers share, and when
very few entries are kept only those are computed (`torch.sparse.sampled_addmm`: at 1 % kept 3 times faster
than the dense product, no faster from about 5 % on).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lota.optim.masked import MaskedOptimizer

SAMPLED_DENSITY = 0.02  # kept share of a weight up to which the sampled product is clearly faster


class _KeptGradientLinear(torch.autograd.Function):
    """x W^T + b, whose backward hands a and b to `receive` instead of returning W's gradient a^T b.

    a: output gradient (tokens, out); b: input (tokens, in). transposed: W is stored (in, out), as GPT-2's
    Conv1D does; then the output is x W + b, and a and b change places.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, receive: Callable, transposed: bool = False
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.receive, ctx.transposed = receive, transposed
        return _transposed_linear(x, weight, bias) if transposed else F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        x, weight = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:  # before the weight is updated
            grad_x = grad_output @ (weight.t() if ctx.transposed else weight)
        a, b = (x, grad_output) if ctx.transposed else (grad_output, x)
        ctx.receive(a.reshape(-1, weight.shape[0]), b.reshape(-1, weight.shape[1]))
        return grad_x, None, None, None, None


def _transposed_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What transformers' Conv1D computes, by the same operation."""
    return torch.addmm(bias, x.reshape(-1, weight.shape[0]), weight).view(*x.shape[:-1], weight.shape[1])


class _Product(Protocol):
    """a^T b at the kept positions of the weight, in their order: (tokens, height), (tokens, width) -> (kept,)
    in fp32.
    """

    def __call__(self, a: Tensor, b: Tensor) -> Tensor: ...


class _Lines:
    """The product of the kept lines only: rows of the weight as stored (axis 0), or columns (axis 1)."""

    def __init__(self, lines: Tensor, axis: int):
        self.lines, self.axis = lines, axis

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        if self.axis == 0:
            a = a.index_select(1, self.lines)
        else:
            b = b.index_select(1, self.lines)
        return torch.mm(a.t(), b).view(-1).float()

    @classmethod
    def of(cls, positions: Tensor, shape: torch.Size) -> _Lines | None:
        """None where the kept positions are not whole lines."""
        for axis in (0, 1):
            length = shape[1 - axis]
            if positions.numel() % length == 0:
                if axis == 0:
                    line = torch.div(positions, shape[1], rounding_mode="floor")
                else:
                    line = torch.remainder(positions, shape[1])
                kept = torch.bincount(line, minlength=shape[axis])
                if bool(((kept == 0) | (kept == length)).all()):
                    return cls(kept.nonzero().view(-1), axis)
        return None


class _Sampled:
    """The product computed at the kept positions only, given as a sparse CSR pattern."""

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

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.sparse.sampled_addmm(self.csr, a.t(), b, beta=0.0).values()


class _Gathered:
    """The dense product in a scratch buffer, gathered at the kept positions."""

    def __init__(self, positions: Tensor, shape: torch.Size, scratch: Tensor):
        self.positions, self.shape, self.scratch = positions, shape, scratch[: shape.numel()]

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        torch.mm(a.t(), b, out=self.scratch.view(self.shape))
        return self.scratch.index_select(0, self.positions).float()


def use_compact_gradients(model: nn.Module, optimizer: MaskedOptimizer) -> Callable[[], None]:
    """Let every suitable linear layer of `model` hand its kept gradient to `optimizer` itself.

    Suitable: a plain `nn.Linear` or Conv1D that keeps some of its weight, is not shared, and whose bias is
    frozen; on another device than the CPU only where whole rows or columns are kept. Other parameters, such
    as stacks of experts, are untouched. Returns a function that undoes it.
    """
    uses: dict[nn.Parameter, int] = {}
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                uses[p] = uses.get(p, 0) + 1
    suitable = [m for m in model.modules() if _is_suitable(m, uses, optimizer)]
    products = _products([m.weight for m in suitable], optimizer)
    chosen = [m for m in suitable if m.weight in products]
    for module in chosen:
        module.forward = _forward(module, optimizer, products[module.weight])

    def undo() -> None:
        for module in chosen:
            del module.forward

    return undo


def _is_suitable(module: nn.Module, uses: dict[nn.Parameter, int], optimizer: MaskedOptimizer) -> bool:
    if (type(module) is not nn.Linear and not _is_conv1d(module)) or "forward" in vars(module):
        return False
    weight, bias = module.weight, module.bias
    if weight not in optimizer.names or uses[weight] > 1 or (bias is not None and bias.requires_grad):
        return False
    return optimizer.positions(weight) is not None


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, by name: transformers need not be there for other models."""
    return type(module).__name__ == "Conv1D" and module.weight.ndim == 2 and module.bias is not None


def _products(weights: list[nn.Parameter], optimizer: MaskedOptimizer) -> dict[nn.Parameter, _Product]:
    """How each weight's kept gradient is computed, where that beats autograd; buffers are as large as the
    largest weight needs.
    """
    lines = {w: _Lines.of(optimizer.positions(w), w.shape) for w in weights}
    scattered = [w for w in weights if lines[w] is None and w.device.type == "cpu"]
    sampled = {w for w in scattered if w.dtype == torch.float32 and _density(w, optimizer) <= SAMPLED_DENSITY}
    zeros = torch.zeros(max((optimizer.positions(w).numel() for w in sampled), default=0))
    gathered = [w for w in scattered if w not in sampled]
    scratch = {
        dtype: torch.empty(max(w.numel() for w in gathered if w.dtype == dtype), dtype=dtype)
        for dtype in {w.dtype for w in gathered}
    }
    products: dict[nn.Parameter, _Product] = {
        w: product for w, product in lines.items() if product is not None
    }
    for w in scattered:
        positions = optimizer.positions(w)
        if w in sampled:
            products[w] = _Sampled(positions, w.shape, zeros)
        else:
            products[w] = _Gathered(positions, w.shape, scratch[w.dtype])
    return products


def _density(weight: nn.Parameter, optimizer: MaskedOptimizer) -> float:
    return optimizer.positions(weight).numel() / weight.numel()


def _forward(module: nn.Module, optimizer: MaskedOptimizer, product: _Product) -> Callable[[Tensor], Tensor]:
    """A forward bound to the module, so that a deep copy's is bound to the copy: that one computes as its
    class does (a reference or an average of a model is often a deep copy of it).
    """
    weight, transposed = module.weight, _is_conv1d(module)
    home = module.weight.device
    last_pass = -1

    def receive(a: Tensor, b: Tensor) -> None:
        nonlocal last_pass
        current = torch._C._current_graph_task_id()
        if current == last_pass:
            raise RuntimeError(
                f"{optimizer.names[weight]} is used twice in one backward pass, which compact gradients do "
                "not support: call fuse_in_backward(..., compact_linear=False)"
            )
        last_pass = current
        optimizer.accumulate(weight, product(a, b))

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        moved = self.weight.device != home  # the product stayed behind
        other = self is not module or moved or x.dtype != weight.dtype
        if other or torch.is_autocast_enabled(x.device.type):
            return type(self).forward(self, x)
        return _KeptGradientLinear.apply(x, weight, self.bias, receive, transposed)

    return MethodType(forward, module)
