"""What stands for steps whose sizes only data tell, while a run is traced without data.

Each allocates what its original does for random positions, evenly filled experts and no padding. The
originals are those of the plain path on a CPU, and of the kernels on a GPU, which need not be there.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn

from lota import rounding
from lota.distributed.processes import Processes
from lota.distributed.replicated import Replicated
from lota.distributed.sharded import SumsOfParts
from lota.masks import Mask
from lota.optim import compact_experts, launches, low_precision, masked, products
from lota.optim.kept import Entries, Everything, Kept, Part, Tiles
from lota.plan.sizes import Sizes
from lota.system import assumed_device


@contextlib.contextmanager
def without_data(device: str) -> Iterator[None]:
    """Inside, masked optimizers work on fake tensors, as they would on that type of device."""
    swaps: list[tuple[Any, str, Any]] = [
        (masked, "kept_entries", _kept_entries),
        (low_precision, "pieces", _few(rounding.pieces)),
        (low_precision, "_row_pieces", _few(low_precision._row_pieces)),
        (products, "Sampled", _Sampled),
        (products, "_blocks", _blocks),
        (products.Tiled, "needed", _needed),
        (products, "_of_matrices", _of_matrices),
        (compact_experts._Routing, "sizes", property(_even_sizes)),
        (launches, "usable", lambda _: device == "cuda"),
        (launches, "serves", lambda p, kept, state: device == "cuda" and _serves(p, kept, state)),
        (launches, "gather", _gather),
        (launches, "update", lambda updates, squares: None),
        (launches, "block_table", _block_table),
        (launches, "multiplied", lambda a, b, blocks: torch.empty(blocks.count, device=a.device)),
    ]
    originals = [vars(owner)[name] for owner, name, _ in swaps]
    for owner, name, stand_in in swaps:
        setattr(owner, name, stand_in)
    try:
        with assumed_device(device):
            yield
    finally:
        for (owner, name, _), original in zip(swaps, originals, strict=True):
            setattr(owner, name, original)


def every_position(x: Tensor) -> Tensor:
    """For `nonzero`: all entries of x are (positions that count in a loss)."""
    return x.new_empty(x.numel(), x.ndim, dtype=torch.int64)


def grouped_product(a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """For `_grouped_mm`, whose form without data knows bf16 only. offs: where each of the groups ends."""
    if a.ndim == b.ndim == 2:  # (height, rows) x (rows, width): a product for each group
        assert offs is not None
        return a.new_empty(len(offs), a.shape[0], b.shape[1])
    return a.new_empty(*a.shape[:-1], b.shape[-1])


OPERATIONS: dict[Any, Any] = {
    torch.ops.aten._grouped_mm.default: grouped_product,
    torch.ops.aten.nonzero.default: every_position,
    # a question that the code asks of data: whether anything is wrong with them
    torch.ops.aten._local_scalar_dense.default: lambda x: x.dtype != torch.bool and 1,
}


# Kept entries


def _kept_entries(mask: Mask, name: str, device: torch.device) -> Kept:
    sizes = cast(Sizes, mask)
    shape, count, tile = torch.Size(sizes.shapes[name]), sizes.kept(name), sizes.tiles.get(name)
    if count == shape.numel():
        return Everything(shape)
    if tile is not None and len(shape) in (2, 3):
        return _tiles(shape, count, tile, device)
    return Entries(torch.empty(count, dtype=torch.int64, device=device), shape.numel(), device)


def _tiles(shape: torch.Size, count: int, tile: tuple[int, int], device: torch.device) -> Tiles:
    """As many whole tiles as make up `count` entries, in the part that whole tiles cover."""
    stack = (math.prod(shape[:-2]), *shape[-2:])
    tall, wide = min(tile[0], stack[1]), min(tile[1], stack[2])
    number = max(1, round(count / (tall * wide)))
    made = Tiles.__new__(Tiles)
    made.shape, made.device, made.count = torch.Size(stack), device, number * tall * wide
    numbers = torch.empty(3, number, dtype=torch.int64, device=device).unbind(0)
    lines, columns = slice(0, stack[1] - stack[1] % tall), slice(0, stack[2] - stack[2] % wide)
    made.parts = [Part(tall, wide, lines, columns, *numbers)]
    made.long = shape.numel() > torch.iinfo(torch.int32).max
    tiles = torch.empty(number, dtype=torch.int32, device=device)
    made.state = {"tiles": tiles, "tile_shape": (tall, wide)}
    return made


def _few(pieces: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """The first pieces of a tensor that is updated in pieces: all others are as large and come one by one."""
    return lambda *arguments: islice(pieces(*arguments), 2)


# Products


class _Sampled:
    """For `products.Sampled`: values and columns of the kept entries, the ends of their lines."""

    def __init__(self, positions: Tensor, shape: torch.Size, scratch: Tensor, start: int = 0):
        self.positions, self.scratch = positions, scratch
        self.starts = torch.empty(shape[0] + 1, dtype=torch.int32, device=positions.device)

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        values = torch.zeros(len(self.positions), device=self.positions.device)
        firsts = torch.empty_like(self.positions)  # of the lines, repeated for each entry
        columns = self.positions - firsts
        del firsts
        return values.add_(columns.shape[0])


def _blocks(
    a: Tensor, b: Tensor, lines: Tensor, columns: Tensor, tall: int, wide: int, at_once: bool
) -> Tensor:
    return a.new_empty(len(lines), tall, wide)


def _needed(self: products.Tiled, axis: int) -> Tensor:
    """For `Tiled.needed`: the lines or columns that random tiles cover, about."""
    side = self.shape[axis]
    (part, *_), *_ = self.parts
    length = part.wide if axis else part.tall
    ways = max(1, side // length)  # places of a tile along the axis
    covered = ways if length == side else round(ways * (1 - (1 - 1 / ways) ** len(part.matrix)))
    if self.shape[1 - axis] == (part.tall if axis else part.wide):  # whole columns, or rows: all different
        covered = min(ways, len(part.matrix))
    return torch.empty(min(side, max(1, covered) * length), dtype=torch.int64, device=part.matrix.device)


# Experts


def _even_sizes(self: compact_experts._Routing) -> list[int]:
    """For `_Routing.sizes`: every expert gets as many rows, none is left over."""
    experts = len(self.ends)
    each, more = divmod(self.rows, experts)
    return [each + (n < more) for n in range(experts)] + [0]


def _of_matrices(positions: Tensor, stack: Tensor) -> list[tuple[int, Tensor, slice]]:
    each, more = divmod(len(positions), len(stack))
    found, start = [], 0
    for number in range(len(stack)):
        span = slice(start, start + each + (number < more))
        found.append((number, positions[span], span))
        start = span.stop
    return [item for item in found if item[2].stop > item[2].start]


# Kernels


def _serves(p: nn.Parameter, kept: Kept, state: Mapping[str, Any]) -> bool:
    """For `launches.serves`: what it asks, but for the addresses."""
    own = [value for key, value in state.items() if torch.is_tensor(value) and key not in kept.state]
    fits = all(value.dtype == torch.float32 and value.shape == (kept.count,) for value in own)
    return fits and ("master" in state) != (p.dtype == torch.float32) and p.itemsize <= 4


def _gather(
    kept: list[Kept], wholes: list[Tensor], squares: Tensor | None = None, store: bool = True
) -> tuple[list[Tensor], Tensor]:
    wholes = [whole.contiguous() for whole in wholes]
    pairs = list(zip(kept, wholes, strict=True))
    copied = [store and not (isinstance(k, Everything) and w.dtype == torch.float32) for k, w in pairs]
    sizes = [k.count if copy else 0 for k, copy in zip(kept, copied, strict=True)]
    made = torch.empty(sum(sizes), dtype=torch.float32, device=wholes[0].device).split(sizes)
    compact = [new if copy else w.view(-1) for new, copy, w in zip(made, copied, wholes, strict=True)]
    return compact, torch.zeros(len(kept), device=wholes[0].device) if squares is None else squares


def _block_table(parts: list[tuple[int, int, Tensor, Tensor]]) -> launches.Blocks:
    tall, wide = max(part[0] for part in parts), max(part[1] for part in parts)
    number = sum(len(part[2]) for part in parts)
    table = torch.empty(number, 5, dtype=torch.int64, device=parts[0][2].device)
    return launches.Blocks(table, tall, wide, 16, number * tall * wide)


# Other processes


class Buckets(Replicated):
    """Other processes that hold the whole model, but for what they send."""

    def __init__(self, optimizer: masked.MaskedOptimizer):
        super().__init__(optimizer, Processes())

    def _send(self, bucket: Any) -> None:
        self._next += 1

    def gradients(self, grads: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        for bucket in self.buckets[self._next :]:
            self._fill(bucket, grads)
            self._send(bucket)
        for bucket in self.buckets:
            bucket.complete.clear()
        self._next = 0
        return {p: self.slots[p] for p in grads}


class Parts(SumsOfParts):
    """Other processes that hold parts of the model: complete gradients wait for the step."""

    parts = False  # whose norms take a few bytes

    def __init__(self) -> None:
        pass
