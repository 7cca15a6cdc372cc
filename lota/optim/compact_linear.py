"""Linear layers whose backward computes the gradient of their kept entries only.

Autograd would allocate a gradient as large as the weight, page by page, gather the kept entries from it and
free it. If a mask keeps whole rows, columns or blocks, only their gradient is computed, on any device, by
smaller products of the same kind. For other masks, on a CPU, the product goes to one scratch buffer that all
layers share; if very few entries are kept, only those are computed (`torch.sparse.sampled_addmm`: at 1 % kept
3 times faster than the dense product, no faster from about 5 % on).

    product     for                                         on          computes
    _Tiled      whole rows, columns or blocks               any device  the kept entries, tile by tile
    _Sampled    fp32, at most SAMPLED_DENSITY of a weight   CPU         the kept entries, (kept,)
    _Gathered   other masks                                 CPU         (height, width) in a shared buffer
    autograd    all other weights                           any device  (height, width) in memory of its own

If the kept entries lie in few columns of a weight (out, in), only those features of the layer's input are
kept for the backward pass.

To autograd the weight stays a leaf like any other. The backward of a layer adds the compact gradient to what
the optimizer holds for the running pass and returns an empty sparse tensor as the weight's gradient, so the
weight's post-accumulate hook runs exactly once per pass, after every use of the weight, and does not run
under `torch.autograd.grad` or `backward(inputs=...)` without the weight.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import copy
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from lota.models.roles import is_conv1d
from lota.optim.kept import Entries, Kept, Part, Tiles
from lota.optim.masked import MaskedOptimizer

SAMPLED_DENSITY = 0.02  # kept share of a weight up to which the sampled product is clearly faster
# Share of the input's features up to which a copy of them is saved instead of the input. Three or four layers
# save one input together: copies of a quarter each are no more.
FEW_FEATURES = 0.25


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
            grad_weight = _weight_gradient(ctx, a, b, weight.shape)
        return grad_x, grad_weight, grad_bias, None, None, None


def _weight_gradient(ctx: Any, a: Tensor, b: Tensor, shape: torch.Size) -> Tensor | None:
    """What the backward of `_CompactLinear` returns for the weight, (height, width).

    A pass that accumulates into the weight gets an empty sparse tensor; the compact gradient is put aside. A
    pass that asks for the gradient itself (`torch.autograd.grad`), or one whose gradients are to be
    differentiated again (`create_graph=True`), gets the dense product. Other passes get None.
    """
    accumulates: bool | None
    try:
        accumulates = torch._C._will_engine_execute_node(ctx.next_functions[1][0])
    except RuntimeError:  # torch's answer if the weight is one of autograd.grad's inputs
        accumulates = None
    if accumulates is False:
        return None
    if accumulates is None or torch.is_grad_enabled():
        return _whole_gradient(ctx, a, b, shape)
    ctx.put_aside(a, b)
    return torch.sparse_coo_tensor(  # type: ignore[call-arg]  # torch's stub wants indices and values
        size=shape, dtype=a.dtype, device=a.device, check_invariants=False
    )


def _whole_gradient(ctx: Any, a: Tensor, b: Tensor, shape: torch.Size) -> Tensor:
    """a^T b, (height, width); zeros for the features that were not saved, where all entries are frozen."""
    if ctx.needed is None:
        return a.t() @ b
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph=True differentiates a gradient for which this layer has saved part of its input "
            "only: make the optimizer without lota.fuse_in_backward for that"
        )
    return a.new_zeros(shape).index_copy_(0 if ctx.transposed else 1, ctx.needed, a.t() @ b)


# What computes a^T b at the kept positions of a weight (height, width), in their order:
# (tokens, height), (tokens, width) -> (kept,) in fp32.
_Product = Callable[[Tensor, Tensor], Tensor]


class _Tiled:
    """The product of whole rows, columns or blocks only, in the order of lota/optim/kept.py."""

    def __init__(self, tiles: Tiles):
        self.shape = tiles.shape[1:]  # of the weight
        self.parts = [(part, part.first_lines, part.first_columns) for part in tiles.parts]

    def needed(self, axis: int) -> Tensor:
        """The lines (axis 0) or columns (axis 1) of the weight that a tile covers, ascending."""
        sides = ((part.wide, columns) if axis else (part.tall, lines) for part, lines, columns in self.parts)
        return torch.cat([_stretches(starts, side) for side, starts in sides]).unique()

    def narrowed(self, axis: int, needed: Tensor) -> _Tiled:
        """The same product of a, or b, without the columns that are not needed."""
        made = copy(self)
        made.parts = []
        for part, lines, columns in self.parts:
            if axis == 0:
                made.parts.append((part, torch.searchsorted(needed, lines), columns))
            else:
                made.parts.append((part, lines, torch.searchsorted(needed, columns)))
        return made

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        first, *more = [self._of(part, lines, columns, a, b) for part, lines, columns in self.parts]
        return (torch.cat([first, *more]) if more else first).float()

    def _of(self, part: Part, lines: Tensor, columns: Tensor, a: Tensor, b: Tensor) -> Tensor:
        if part.wide == self.shape[1]:  # whole rows: (tiles x tall, width)
            return torch.mm(_columns_of(a, lines, part.tall).t(), b).view(-1)
        if part.tall == self.shape[0]:  # whole columns: (tiles x wide, height)
            across = torch.mm(_columns_of(b, columns, part.wide).t(), a)
            return across.view(-1, part.wide, part.tall).transpose(1, 2).reshape(-1)
        at_once = a.device.type != "cpu"
        return _blocks(a, b, lines, columns, part.tall, part.wide, at_once).view(-1)


def _stretches(starts: Tensor, length: int) -> Tensor:
    """start, ..., start + length - 1 of every start, 1-D."""
    return (starts[:, None] + torch.arange(length, device=starts.device)).view(-1)


def _columns_of(x: Tensor, starts: Tensor, length: int) -> Tensor:
    """The columns of the ascending stretches; x itself if they are all it has, as where few were saved."""
    if starts.numel() * length == x.shape[1]:
        return x
    return x.index_select(1, _stretches(starts, length))


def _blocks(
    a: Tensor, b: Tensor, lines: Tensor, columns: Tensor, tall: int, wide: int, at_once: bool
) -> Tensor:
    """(blocks, tall, wide): for each, the columns of `a` from its line on, transposed, times those of `b`.

    at_once: as many together as copies of their columns take no more memory than `a` or `b`; else one after
    the other, which copies nothing and is as fast on a CPU.
    """
    out = a.new_empty(len(lines), tall, wide)
    if not at_once:
        for block, line, column in zip(out, lines.tolist(), columns.tolist(), strict=True):
            torch.mm(a[:, line : line + tall].t(), b[:, column : column + wide], out=block)
        return out
    size = min(a.shape[1] // tall, b.shape[1] // wide)
    for many, line, column in zip(out.split(size), lines.split(size), columns.split(size), strict=True):
        of_a = a.index_select(1, _stretches(line, tall)).view(-1, len(line), tall)
        of_b = b.index_select(1, _stretches(column, wide)).view(-1, len(column), wide)
        torch.bmm(of_a.permute(1, 2, 0), of_b.transpose(0, 1), out=many)
    return out


class _Sampled:
    """The product computed at the kept positions only, given as a sparse CSR pattern."""

    def __init__(self, positions: Tensor, shape: torch.Size, zeros: Tensor):
        # CSR: entries of row r are those from ends[r - 1] to ends[r]; positions ascend, so rows do too
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
    """Let every suitable linear layer of `model` compute its kept gradient only.

    Suitable: a plain `nn.Linear` or Conv1D that keeps some, not all, of its weight; on another device than
    the CPU only if whole rows, columns or blocks are kept. Other parameters, such as stacks of experts, stay
    autograd's. Returns a function that undoes it.
    """
    weights: dict[nn.Module, nn.Parameter] = {}  # of plain linear layers
    for module in model.modules():
        is_linear = type(module) is nn.Linear or is_conv1d(module)
        if is_linear and "forward" not in vars(module) and isinstance(module.weight, nn.Parameter):
            weights[module] = module.weight
    trained = (weight for weight in weights.values() if weight in optimizer.names)
    products = _products({weight: optimizer.kept[weight] for weight in trained})
    chosen = {module: weight for module, weight in weights.items() if weight in products}
    for module, weight in chosen.items():
        module.forward = _forward(module, weight, optimizer, products[weight])

    def undo() -> None:
        for module in chosen:
            del module.forward

    return undo


def _products(kept: dict[nn.Parameter, Kept]) -> dict[nn.Parameter, _Product]:
    """How each weight's kept gradient is computed, if that beats autograd.

    Scratch buffers are as large as the largest weight needs, one per dtype.
    """
    products: dict[nn.Parameter, _Product] = {
        w: _Tiled(entries) for w, entries in kept.items() if isinstance(entries, Tiles)
    }
    scattered = {
        w: entries.positions()
        for w, entries in kept.items()
        if isinstance(entries, Entries) and w.device.type == "cpu"
    }
    sampled = {
        w: p
        for w, p in scattered.items()
        if w.dtype == torch.float32 and p.numel() / w.numel() <= SAMPLED_DENSITY
    }
    gathered = {w: p for w, p in scattered.items() if w not in sampled}
    zeros = torch.zeros(max((p.numel() for p in sampled.values()), default=0))
    scratch = {
        dtype: torch.empty(max(w.numel() for w in gathered if w.dtype == dtype), dtype=dtype)
        for dtype in {w.dtype for w in gathered}
    }
    products |= {w: _Sampled(p, w.shape, zeros) for w, p in sampled.items()}
    products |= {w: _Gathered(p, w.shape, scratch[w.dtype]) for w, p in gathered.items()}
    return products


def _forward(
    module: nn.Module, weight: nn.Parameter, optimizer: MaskedOptimizer, product: _Product
) -> Callable[[Tensor], Tensor]:
    """A forward bound to the module, so that a deep copy's is bound to the copy.

    It computes as the layer's class does whenever the layer no longer is what the product was made for:
    another weight stands in its place (a deep copy, `functional_call`, pruning, tying), the model was moved
    or cast, or autocast or functorch transforms the computation.
    """
    device, dtype, transposed = weight.device, weight.dtype, is_conv1d(module)
    needed = None
    if isinstance(product, _Tiled):
        axis = 0 if transposed else 1  # of the weight, along which the input's features lie
        found = product.needed(axis)
        if len(found) <= FEW_FEATURES * weight.shape[axis]:
            needed, product = found, product.narrowed(axis, found)

    def put_aside(a: Tensor, b: Tensor) -> None:
        optimizer.put_aside(weight, product(a, b))

    def forward(self: nn.Module, input: Tensor) -> Tensor:
        same = self.weight is weight and weight.device == device and weight.dtype == dtype == input.dtype
        if not same or _is_transformed(input):
            return type(self).forward(self, input)
        saved = needed if torch.is_grad_enabled() else None
        return _CompactLinear.apply(input, weight, self.bias, put_aside, transposed, saved)

    return MethodType(forward, module)


def _is_transformed(x: Tensor) -> bool:
    """Whether autocast, functorch (vmap, torch.func.grad) or forward-mode autograd is at work."""
    functorch = torch._C._functorch.peek_interpreter_stack() is not None
    return functorch or forward_ad._current_level >= 0 or torch.is_autocast_enabled(x.device.type)
