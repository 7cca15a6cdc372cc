"""Linear layers whose backward computes the gradient of their kept entries only.

Autograd would allocate a gradient as large as the weight, page by page, gather the kept entries from it and
free it. Here lota/optim/products.py chooses how the gradient of the kept entries is computed; weights for
which it knows nothing better stay autograd's.

If the kept entries lie in few columns of a weight (out, in), only those features of the layer's input are
kept for the backward pass.

To autograd the weight stays a leaf like any other. The backward of a layer adds the compact gradient to what
the optimizer holds for the running pass and returns an empty sparse tensor as the weight's gradient, so the
weight's post-accumulate hook runs exactly once per pass, after every use of the weight, and does not run
under `torch.autograd.grad` or `backward(inputs=...)` without the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from lota.models.roles import is_conv1d
from lota.optim.in_graph import Compact, in_graph, numbered
from lota.optim.masked import MaskedOptimizer
from lota.optim.products import Product, Tiled, products

# Share of the input's features up to which a copy of them is saved instead of the input. Three or four layers
# save one input together: copies of a quarter each are no more.
FEW_FEATURES = 0.25


def compact_of(layer: nn.Module) -> Compact | None:
    """How a layer computes its kept gradient; None if it does not, or no longer is what that was made for."""
    compact = getattr(vars(layer).get("forward"), "compact", None)
    return compact if compact is not None and compact.fits(layer) else None


class _CompactLinear(torch.autograd.Function):
    """x W^T + b with the weight's gradient a^T b at kept entries only.

    a: output gradient (tokens, out); b: input (tokens, in). transposed: W is stored (in, out), as GPT-2's
    Conv1D does; then the output is x W + b, and a and b change places. needed: the features of x that the
    kept entries are multiplied with, (features,), if x is saved without the others; None: it is saved whole.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        put_aside: Callable[[Tensor, Tensor], None],
        transposed: bool,
        needed: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x if needed is None else x.index_select(-1, needed), weight)
        ctx.put_aside, ctx.transposed, ctx.needed = put_aside, transposed, needed
        if not transposed:
            return F.linear(x, weight, bias)
        # what transformers' Conv1D computes, by the same operation
        assert bias is not None  # every Conv1D has one
        flat = torch.addmm(bias, x.reshape(-1, weight.shape[0]), weight)
        return flat.view(*x.shape[:-1], weight.shape[1])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        if need_x:
            grad_x = grad_output @ (weight.t() if ctx.transposed else weight)
        rows = grad_output.reshape(-1, grad_output.shape[-1])  # (tokens, out)
        if need_bias:
            grad_bias = rows.sum(0)
        if need_weight:
            columns = x.reshape(-1, x.shape[-1])  # (tokens, in)
            a, b = (columns, rows) if ctx.transposed else (rows, columns)
            grad_weight = weight_gradient(
                ctx, weight, lambda: ctx.put_aside(a, b), lambda: _whole_gradient(ctx, a, b, weight.shape)
            )
        return grad_x, grad_weight, grad_bias, None, None, None


def weight_gradient(
    ctx: Any, weight: Tensor, put_aside: Callable[[], None], whole: Callable[[], Tensor]
) -> Tensor | None:
    """What the backward of a compact function returns for the weight, which is its second argument.

    A pass that accumulates into the weight gets an empty sparse tensor; the compact gradient is put aside. A
    pass that asks for the gradient itself (`torch.autograd.grad`), or one whose gradients are to be
    differentiated again (`create_graph=True`), gets the whole gradient. Other passes get None.
    """
    accumulates: bool | None
    try:
        accumulates = torch._C._will_engine_execute_node(ctx.next_functions[1][0])
    except RuntimeError:  # torch's answer if the weight is one of autograd.grad's inputs
        accumulates = None
    if accumulates is False:
        return None
    if accumulates is None or torch.is_grad_enabled():
        return whole()
    put_aside()
    return torch.sparse_coo_tensor(  # type: ignore[call-arg]  # torch's stub wants indices and values
        size=weight.shape, dtype=weight.dtype, device=weight.device, check_invariants=False
    )


def _whole_gradient(ctx: Any, a: Tensor, b: Tensor, shape: torch.Size) -> Tensor:
    """a^T b, (height, width); zeros for the features that were not saved, where all entries are frozen."""
    if ctx.needed is None:
        return a.t() @ b
    refuse_second_derivative()
    return a.new_zeros(shape).index_copy_(0 if ctx.transposed else 1, ctx.needed, a.t() @ b)


def refuse_second_derivative() -> None:
    """Raise RuntimeError if the gradient in the making, of a part of the input, is to be differentiated."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph=True differentiates a gradient for which this layer has saved part of its input "
            "only: make the optimizer without lota.fuse_in_backward for that"
        )


def use_compact_gradients(model: nn.Module, optimizer: MaskedOptimizer) -> Callable[[], None]:
    """Let every suitable linear layer of `model` compute its kept gradient only.

    Suitable: a plain `nn.Linear` or Conv1D that keeps some, not all, of its weight; on another device than
    the CPU only if whole rows, columns or blocks are kept. Returns a function that undoes it.
    """
    weights: dict[nn.Module, nn.Parameter] = {}  # of plain linear layers
    for module in model.modules():
        is_linear = type(module) is nn.Linear or is_conv1d(module)
        if is_linear and "forward" not in vars(module) and isinstance(module.weight, nn.Parameter):
            weights[module] = module.weight
    trained = (weight for weight in weights.values() if weight in optimizer.names)
    found = products({weight: optimizer.kept[weight] for weight in trained})
    chosen = {module: weight for module, weight in weights.items() if weight in found}
    for module, weight in chosen.items():
        module.forward = _forward(module, weight, optimizer, found[weight])

    def undo() -> None:
        for module in chosen:
            del module.forward

    return undo


def _forward(
    module: nn.Module, weight: nn.Parameter, optimizer: MaskedOptimizer, product: Product
) -> Callable[[Tensor], Tensor]:
    """A forward bound to the module, so that a deep copy's is bound to the copy.

    It computes as the layer's class does whenever the layer no longer is what the product was made for:
    another weight stands in its place (a deep copy, `functional_call`, pruning, tying), the model was moved
    or cast, or autocast or functorch transforms the computation.
    """
    device, dtype, transposed = weight.device, weight.dtype, is_conv1d(module)
    needed = None
    if isinstance(product, Tiled):
        axis = 0 if transposed else 1  # of the weight, along which the input's features lie
        found = product.needed(axis)
        if len(found) <= FEW_FEATURES * weight.shape[axis]:
            needed, product = found, product.narrowed(axis, found)

    def put_aside(a: Tensor, b: Tensor) -> None:
        optimizer.put_aside(weight, product(a, b))

    def forward(self: nn.Module, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return in_graph(self, input)
        same = self.weight is weight and weight.device == device and weight.dtype == dtype == input.dtype
        if not same or is_transformed(input):
            return type(self).forward(self, input)
        saved = needed if torch.is_grad_enabled() else None
        return _CompactLinear.apply(input, weight, self.bias, put_aside, transposed, saved)

    kept, aside = optimizer.kept[weight].count, partial(optimizer.put_aside, weight)
    vars(forward)["compact"] = Compact(weight, device, dtype, product, numbered(product), needed, kept, aside)
    return MethodType(forward, module)


def is_transformed(x: Tensor) -> bool:
    """Whether autocast, functorch (vmap, torch.func.grad) or forward-mode autograd is at work."""
    return in_transform() or torch.is_autocast_enabled(x.device.type)


def in_transform() -> bool:
    """Whether functorch or forward-mode autograd is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
