"""Products that compute the gradient a^T b of a weight at its kept entries only.

If a mask keeps whole rows, columns or blocks, only their gradient is computed, on any device, by smaller
products of the same kind. For other masks, on a CPU, the product goes to one scratch buffer that all layers
share; if few entries are kept, only those are computed (`torch.sparse.sampled_addmm`; the table in
docs/BENCHMARKS.md: at 10 % kept twice as fast as the dense product, at 20 % as fast).

    product    for                                         on          computes
    Tiled      whole rows, columns or blocks               any device  the kept entries, tile by tile; with
                                                                       Triton all blocks by one launch
    Sampled    fp32, at most SAMPLED_DENSITY of a weight   CPU         the kept entries, (kept,)
    Gathered   other masks                                 CPU         (height, width) in a shared buffer
    autograd   all other weights                           any device  (height, width) in memory of its own
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import copy
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from lota.optim import launches
from lota.optim.kept import Entries, Kept, Part, Tiles
from lota.optim.launches import Blocks
from lota.system import device_kind

SAMPLED_DENSITY = 0.15  # kept share of a weight up to which the sampled product is clearly faster
SAMPLED_TOKENS = 64  # that it multiplies at a time: 256 bytes of each column
# Share of a stack's input features up to which a copy of them is saved instead of the input, which no other
# layer saves.
FEW_OF_STACK = 0.5

# What computes a^T b at the kept positions of a weight (height, width), in their order:
# (tokens, height), (tokens, width) -> (kept,) in fp32.
Product = Callable[[Tensor, Tensor], Tensor]


class Tiled:
    """The product of whole rows, columns or blocks only, in the order of lota/optim/kept.py."""

    def __init__(self, tiles: Tiles, parts: list[Part] | None = None):
        """parts: those of one matrix, if the weight is a stack; None: all, of the only matrix."""
        self.shape = tiles.shape[1:]  # of the matrix
        parts = tiles.parts if parts is None else parts
        self.parts = [(part, part.first_lines, part.first_columns) for part in parts]
        self.blocks: Blocks | None = None  # for kernels, made when they are first used

    def needed(self, axis: int) -> Tensor:
        """The lines (axis 0) or columns (axis 1) of the weight that a tile covers, ascending."""
        sides = ((part.wide, columns) if axis else (part.tall, lines) for part, lines, columns in self.parts)
        return torch.cat([_stretches(starts, side) for side, starts in sides]).unique()

    def narrowed(self, axis: int, needed: Tensor) -> Tiled:
        """The same product of a, or b, without the columns that are not needed."""
        made = copy(self)
        made.parts, made.blocks = [], None
        for part, lines, columns in self.parts:
            if axis == 0:
                made.parts.append((part, torch.searchsorted(needed, lines), columns))
            else:
                made.parts.append((part, lines, torch.searchsorted(needed, columns)))
        return made

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        if all(self._are_blocks(part) for part, *_ in self.parts) and launches.usable(a.device):
            if self.blocks is None:
                parts = [(part.tall, part.wide, lines, columns) for part, lines, columns in self.parts]
                self.blocks = launches.block_table(parts)
            return launches.multiplied(a, b, self.blocks)
        first, *more = [self._of(part, lines, columns, a, b) for part, lines, columns in self.parts]
        return (torch.cat([first, *more]) if more else first).float()

    def _are_blocks(self, part: Part) -> bool:
        """Whether they are neither whole rows nor whole columns, whose product is one large one."""
        return part.tall < self.shape[0] and part.wide < self.shape[1]

    def _of(self, part: Part, lines: Tensor, columns: Tensor, a: Tensor, b: Tensor) -> Tensor:
        if part.wide == self.shape[1]:  # whole rows: (tiles x tall, width)
            return torch.mm(_columns_of(a, lines, part.tall).t(), b).view(-1)
        if part.tall == self.shape[0]:  # whole columns: (tiles x wide, height)
            across = torch.mm(_columns_of(b, columns, part.wide).t(), a)
            return across.view(-1, part.wide, part.tall).transpose(1, 2).reshape(-1)
        at_once = device_kind(a.device) != "cpu"
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


class Sampled:
    """The product computed at the kept positions only, which count from `start`, as a sparse CSR pattern.

    `sampled_addmm` takes one dot product over the tokens per kept entry, from the columns of `a` and `b` laid
    out as lines. It gets SAMPLED_TOKENS at a time: then the lines of `b` fit into a core's cache, and the
    processor works on several of the short sums at once.
    """

    def __init__(self, positions: Tensor, shape: torch.Size, scratch: Tensor, start: int = 0):
        # CSR: entries of line i are those from starts[i] to starts[i + 1]; positions ascend, so lines do too
        lines = torch.div(positions - start, shape[1], rounding_mode="floor")
        ends = torch.bincount(lines, minlength=shape[0]).cumsum(0)
        self.starts = torch.cat([ends.new_zeros(1), ends]).to(torch.int32)
        self.positions, self.start, self.shape = positions, start, shape
        self.scratch = scratch  # SAMPLED_TOKENS x (height + width) at least
        self._pattern(torch.zeros(len(positions)), check=True)

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        values = torch.zeros(len(self.positions))
        pattern = self._pattern(values)
        for some_a, some_b in zip(a.split(SAMPLED_TOKENS), b.split(SAMPLED_TOKENS), strict=True):
            left, right = self._laid_out(some_a, some_b)
            torch.sparse.sampled_addmm(pattern, left, right.t(), out=pattern)  # adds to `values`
        return values

    def _laid_out(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of a^T (height, tokens) and b^T (width, tokens) in the scratch buffer."""
        (height, width), tokens = self.shape, len(a)
        left, right = self.scratch[: tokens * (height + width)].split([tokens * height, tokens * width])
        return left.view(height, tokens).copy_(a.t()), right.view(width, tokens).copy_(b.t())

    def _pattern(self, values: Tensor, check: bool = False) -> Tensor:
        """The kept positions as a sparse matrix with its values (kept,) in that memory.

        Its columns are made anew each time: that takes a hundredth of the product's time, and kept they would
        take 4 bytes per kept entry.
        """
        height, width = self.shape
        firsts = torch.arange(height, dtype=self.positions.dtype) * width + self.start  # position, per line
        columns = (self.positions - firsts.repeat_interleave(self.starts.diff())).to(torch.int32)
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="Sparse CSR tensor support is in beta", category=UserWarning
            )
            return torch.sparse_csr_tensor(
                self.starts, columns, values, size=tuple(self.shape), check_invariants=check
            )


class Gathered:
    """The dense product in a scratch buffer, gathered at the kept positions, which count from `start`."""

    def __init__(self, positions: Tensor, shape: torch.Size, scratch: Tensor, start: int = 0):
        self.positions, self.start = positions, start
        self.shape, self.scratch = shape, scratch[: shape.numel()]

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        torch.mm(a.t(), b, out=self.scratch.view(self.shape))
        positions = self.positions - self.start if self.start else self.positions
        return self.scratch.index_select(0, positions).float()


def products(kept: dict[nn.Parameter, Kept]) -> dict[nn.Parameter, Product]:
    """How each weight's kept gradient is computed, if that beats autograd.

    Scratch buffers are as large as the largest weight needs, one per dtype.
    """
    chosen: dict[nn.Parameter, Product] = {
        w: Tiled(entries) for w, entries in kept.items() if isinstance(entries, Tiles)
    }
    scattered = {
        w: entries.positions()
        for w, entries in kept.items()
        if isinstance(entries, Entries) and device_kind(w.device) == "cpu"
    }
    sampled = {
        w: p
        for w, p in scattered.items()
        if w.dtype == torch.float32 and p.numel() / w.numel() <= SAMPLED_DENSITY
    }
    gathered = {w: p for w, p in scattered.items() if w not in sampled}
    lines = torch.empty(SAMPLED_TOKENS * max((sum(w.shape) for w in sampled), default=0))
    scratch = {
        dtype: torch.empty(max(w.numel() for w in gathered if w.dtype == dtype), dtype=dtype)
        for dtype in {w.dtype for w in gathered}
    }
    chosen |= {w: Sampled(p, w.shape, lines) for w, p in sampled.items()}
    chosen |= {w: Gathered(p, w.shape, scratch[w.dtype]) for w, p in gathered.items()}
    return chosen


_Placed = tuple[Product, list[slice]]  # of a matrix: its product, and where the values stand in the stack's


class Stacked:
    """The product of a stack's kept entries, matrix by matrix.

    matrices: the product of each matrix that keeps some, and where its values stand among all `count`.
    needed: of each of these matrices, the features of its input that its kept entries are multiplied with, if
    the input is saved without the others; None: it is saved whole.
    """

    def __init__(self, count: int, matrices: dict[int, _Placed]):
        self.count, self.matrices = count, matrices
        self.needed: dict[int, Tensor] | None = None

    def narrow(self, axis: int) -> None:
        """Need only some features, if they are few. axis: of the matrices, along which the features lie."""
        tiled = {n: made for n, (made, _) in self.matrices.items() if isinstance(made, Tiled)}
        needed = {number: product.needed(axis) for number, product in tiled.items()}
        if any(len(needed[n]) > FEW_OF_STACK * product.shape[axis] for n, product in tiled.items()):
            return
        for number, product in tiled.items():
            narrow = partial(first_columns, product.narrowed(axis, needed[number]), axis, len(needed[number]))
            self.matrices[number] = (narrow, self.matrices[number][1])
        self.needed = needed or None

    def few_features(self, x: Tensor, sizes: list[int]) -> Tensor:
        """Of each row of x (rows, in) the features that its expert needs, (rows, most that any needs)."""
        assert self.needed is not None
        few = x.new_empty(len(x), max(map(len, self.needed.values())))
        before, after = x.split(sizes), few.split(sizes)
        for number, features in self.needed.items():
            after[number][:, : len(features)] = before[number].index_select(1, features)
        return few

    def __call__(self, a: Tensor, b: Tensor, sizes: list[int]) -> Tensor:
        """(rows, height), (rows, width) -> (kept,) in fp32."""
        out = torch.empty(self.count, device=a.device)
        rows_of_a, rows_of_b = a.split(sizes), b.split(sizes)
        for number, (product, spans) in self.matrices.items():
            lengths = [span.stop - span.start for span in spans]
            if sizes[number]:
                values = product(rows_of_a[number], rows_of_b[number])
            else:
                values = out.new_zeros(sum(lengths))
            for span, piece in zip(spans, values.split(lengths), strict=True):
                out[span] = piece
        return out


def first_columns(product: Product, axis: int, n: int, a: Tensor, b: Tensor) -> Tensor:
    """The product of the first n columns of a (axis 0) or b (axis 1), where few features were saved."""
    return product(a[:, :n], b) if axis == 0 else product(a, b[:, :n])


def stack_products(kept: dict[nn.Parameter, Kept]) -> dict[nn.Parameter, Stacked]:
    """How each stack's kept gradient is computed, if that beats autograd. One scratch buffer per dtype."""
    products: dict[nn.Parameter, Stacked] = {}
    scattered: dict[nn.Parameter, list[tuple[int, Tensor, slice]]] = {}  # number, positions, where they stand
    for w, entries in kept.items():
        if isinstance(entries, Tiles):
            products[w] = Stacked(
                entries.count, {n: (Tiled(entries, parts), spans) for n, parts, spans in entries.matrices()}
            )
        elif isinstance(entries, Entries) and device_kind(w.device) == "cpu":
            scattered[w] = _of_matrices(entries.positions(), w)
    lines = torch.empty(SAMPLED_TOKENS * max((sum(w.shape[1:]) for w in scattered), default=0))
    scratch = {
        dtype: torch.empty(max(w[0].numel() for w in scattered if w.dtype == dtype), dtype=dtype)
        for dtype in {w.dtype for w in scattered}
    }
    for w, found in scattered.items():
        made: dict[int, _Placed] = {}
        for number, positions, span in found:
            start, shape = number * w[0].numel(), w.shape[1:]
            if w.dtype == torch.float32 and len(positions) <= SAMPLED_DENSITY * shape.numel():
                made[number] = (Sampled(positions, shape, lines, start), [span])
            else:
                made[number] = (Gathered(positions, shape, scratch[w.dtype], start), [span])
        products[w] = Stacked(kept[w].count, made)
    return products


def _of_matrices(positions: Tensor, stack: Tensor) -> list[tuple[int, Tensor, slice]]:
    """(number, flat positions in the stack, where they stand among all) of each matrix that keeps some."""
    ends = torch.arange(1, len(stack) + 1) * stack[0].numel()
    stops = [0, *torch.searchsorted(positions, ends.to(positions.dtype)).tolist()]
    spans = [slice(start, stop) for start, stop in pairwise(stops)]
    return [(n, positions[span], span) for n, span in enumerate(spans) if span.stop > span.start]
