"""Compact gradients inside of compiled code, where a backward pass may have no side effects.

Outside of the graph each weight gets a carrier, a tensor (kept,) without memory of its own. Inside, a linear
layer gives its kept gradient to the carrier and none to the weight, as values that leave the graph like any
other gradient. The carrier's backward, outside again, puts them aside and returns an empty sparse tensor for
the weight, as an uncompiled layer's does (lota/optim/compact_linear.py): to autograd both are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lota.models.roles import is_conv1d

_numbers = count()
_products: WeakValueDictionary[int, Any] = WeakValueDictionary()  # number -> what computes a^T b


class Compact(NamedTuple):
    """How a linear layer computes the kept gradient of its weight."""

    weight: nn.Parameter
    device: torch.device  # of the weight when this was made
    dtype: torch.dtype
    product: Callable[[Tensor, Tensor], Tensor]  # (tokens, height), (tokens, width) -> (kept,) in fp32
    number: Tensor  # of the product, int64 (): a tensor's value is no constant of a graph
    needed: Tensor | None  # features of the input that the product reads, (features,); None: all
    kept: int
    put_aside: Callable[[Tensor], None]  # takes what the product gives

    def fits(self, layer: nn.Module) -> bool:
        """Whether the layer trains this weight, where and as it was."""
        w = layer.weight
        return w is self.weight and w.requires_grad and w.device == self.device and w.dtype == self.dtype


def numbered(product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The number under which compiled code finds a product for as long as somebody else holds it."""
    number = next(_numbers)
    _products[number] = product
    return torch.tensor(number)


@torch.library.custom_op("lota::kept_gradient", mutates_args=())
def kept_gradient(a: Tensor, b: Tensor, carrier: Tensor, number: Tensor) -> Tensor:
    """a^T b at the kept entries, (kept,) in fp32. a: (tokens, height); b: (tokens, width)."""
    return _products[int(number)](a, b)


@kept_gradient.register_fake
def _(a: Tensor, b: Tensor, carrier: Tensor, number: Tensor) -> Tensor:
    return a.new_empty(carrier.shape, dtype=torch.float32)


class Carrier(torch.autograd.Function):
    """weight -> zeros (kept,) in fp32; the gradient that these get is put aside for the weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, kept: int, put_aside: Callable[[Tensor], None]) -> Tensor:
        ctx.put_aside, ctx.weight = put_aside, (weight.shape, weight.dtype, weight.device)
        return torch.zeros(1, device=weight.device).expand(kept)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        try:
            accumulates = torch._C._will_engine_execute_node(ctx.next_functions[0][0])
        except RuntimeError as error:  # torch's answer if the weight is one of autograd.grad's inputs
            raise RuntimeError(
                "a compiled block has the gradient of a weight's kept entries only: ask autograd.grad for it "
                "before lota.compile_blocks, or after its undo()"
            ) from error
        if not accumulates:
            return None, None, None
        ctx.put_aside(gradient)
        shape, dtype, device = ctx.weight
        empty = torch.sparse_coo_tensor(  # type: ignore[call-arg]  # torch's stub wants indices and values
            size=shape, dtype=dtype, device=device, check_invariants=False
        )
        return empty, None, None


class _Linear(torch.autograd.Function):
    """x W^T + b whose weight gradient goes to the carrier. Traced, never run.

    transposed: W is stored (in, out); then x W + b, and a and b change places.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        carrier: Tensor,
        number: Tensor,
        needed: Tensor | None,
        transposed: bool,
    ) -> Tensor:
        saved = x if needed is None else x.index_select(-1, needed)
        ctx.save_for_backward(saved, weight, carrier, number)
        ctx.transposed, ctx.trains_bias = transposed, bias is not None and bias.requires_grad
        if not transposed:
            return F.linear(x, weight, bias)
        assert bias is not None  # every Conv1D has one
        flat = torch.addmm(bias, x.reshape(-1, weight.shape[0]), weight)
        return flat.view(*x.shape[:-1], weight.shape[1])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, carrier, number = ctx.saved_tensors
        grad_x = grad_output @ (weight.t() if ctx.transposed else weight)
        rows = grad_output.reshape(-1, grad_output.shape[-1])  # (tokens, out)
        columns = x.reshape(-1, x.shape[-1])  # (tokens, in)
        grad_bias = rows.sum(0) if ctx.trains_bias else None
        a, b = (columns, rows) if ctx.transposed else (rows, columns)
        return grad_x, None, grad_bias, kept_gradient(a, b, carrier, number), None, None, None


class Place(NamedTuple):
    """What a graph takes from outside for one layer."""

    carrier: Tensor
    number: Tensor
    needed: Tensor | None


class _Running:
    """The block that is being run or traced."""

    places: list[Place | None] | None = None  # of its layers; None: their weights' gradients are autograd's


running = _Running()


def in_graph(layer: nn.Module, input: Tensor) -> Tensor:
    """What a compact layer computes while it is traced; without a place, what its class does."""
    places = running.places
    index = getattr(layer, "place", None)  # see `lota.compile_blocks`
    place = None if places is None or index is None else places[index]
    if place is None or input.dtype != layer.weight.dtype:
        return type(layer).forward(layer, input)
    carrier, number, needed = place
    return _Linear.apply(input, layer.weight, layer.bias, carrier, number, needed, is_conv1d(layer))
