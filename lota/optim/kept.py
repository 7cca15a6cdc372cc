"""The kept entries of a parameter: how they are addressed, and in which order their values stand.

    Everything  all entries, as they are stored                             no memory
    Entries     single entries by their flat positions, ascending           4 bytes per kept entry
    Tiles       whole rows, columns or blocks of a matrix or of a stack,    4 bytes per tile in checkpoints,
                tile after tile, each line after line                       24 while training, 32 with kernels

Values of kept entries are 1-D tensors (kept,) in that order.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lota.masks import Mask

LEAST_SIDE = 16  # of a tile that is neither a whole row nor a whole column
_SAMPLE = 64  # lines that are looked at first: scattered entries show there


@dataclass(frozen=True)
class Stretch:
    """Values that follow each other, and the one rule by which their entries lie in the whole tensor.

    Without places, they lie there as they follow each other. With a tile's area, entry e is in tile
    e // area, whose first position is places[e // area]; without, at places[e].
    """

    count: int  # of the values
    first: int  # values before it
    places: Tensor | None = None  # int32 or int64 (count,), or int64 (tiles,)
    area: int = 0  # entries of a tile
    wide: int = 0  # entries of a line of a tile
    width: int = 0  # entries of a line of the matrix


class Kept(ABC):
    """The kept entries of one parameter."""

    count: int  # of the entries
    state: dict[str, Any]  # what an optimizer's state holds to know them again
    long: bool  # whether positions are beyond int32
    before: int = 0  # kept entries of the whole parameter before these, which are of a part of it

    @cached_property
    @abstractmethod
    def stretches(self) -> list[Stretch]:
        """Where each value lies, as kernels address it; made when one first asks."""

    @abstractmethod
    def gather(self, whole: Tensor) -> Tensor:
        """Their values in a tensor of the parameter's size, (kept,) in its dtype; a view if all are kept."""

    @abstractmethod
    def write(self, whole: Tensor, values: Tensor) -> None:
        """Set them in a contiguous tensor of the parameter's size, on any device, to the values (kept,)."""

    @abstractmethod
    def positions(self) -> Tensor:
        """Flat positions, int (kept,), in the order of the values."""


class Everything(Kept):
    """All entries of a parameter."""

    def __init__(self, shape: torch.Size):
        self.shape, self.count, self.state = shape, shape.numel(), {}
        self.long = _is_long(self.count)

    @cached_property
    def stretches(self) -> list[Stretch]:
        return [Stretch(self.count, 0)]

    def gather(self, whole: Tensor) -> Tensor:
        return whole.reshape(-1)

    def write(self, whole: Tensor, values: Tensor) -> None:
        whole.view(-1).copy_(values)

    def positions(self) -> Tensor:
        return torch.arange(self.count)


class Entries(Kept):
    """Single entries. positions: flat, ascending, of a parameter of `numel` entries."""

    def __init__(self, positions: Tensor, numel: int, device: torch.device):
        self.long = _is_long(numel)
        self._positions = positions.to(device=device, dtype=torch.int64 if self.long else torch.int32)
        self.count, self.state = positions.numel(), {"positions": self._positions}

    @cached_property
    def stretches(self) -> list[Stretch]:
        return [Stretch(self.count, 0, self._positions)]

    def gather(self, whole: Tensor) -> Tensor:
        return whole.reshape(-1).index_select(0, self._positions.to(whole.device))

    def write(self, whole: Tensor, values: Tensor) -> None:
        positions = self._positions.to(whole.device).long()  # what scatter_ takes
        whole.view(-1).scatter_(0, positions, values.to(whole.device, whole.dtype))

    def positions(self) -> Tensor:
        return self._positions


@dataclass
class Part:
    """Tiles of one size, which stand side by side in a rectangle of each matrix of a stack."""

    tall: int  # lines of a tile
    wide: int  # entries of each of its lines
    lines: slice  # of the matrices, a multiple of `tall`
    columns: slice  # of the matrices, a multiple of `wide`
    matrix: Tensor  # int64 (tiles,), which matrix each tile is in, ...
    row: Tensor  # ... how many tiles lie above it in the rectangle
    column: Tensor  # ... and how many to the left

    @property
    def first_lines(self) -> Tensor:
        """Of each tile, int64 (tiles,)."""
        return self.lines.start + self.row * self.tall

    @property
    def first_columns(self) -> Tensor:
        """Of each tile, int64 (tiles,)."""
        return self.columns.start + self.column * self.wide

    def first_positions(self, shape: torch.Size) -> Tensor:
        """Of each tile in a stack (matrices, height, width), flat, int64 (tiles,)."""
        return (self.matrix * shape[1] + self.first_lines) * shape[2] + self.first_columns

    def of(self, stack: Tensor) -> Tensor:
        """All tiles of the rectangle, (matrices, rows of tiles, columns of tiles, tall, wide), as a view."""
        rectangle = stack[:, self.lines, self.columns]
        return rectangle.unflatten(2, (-1, self.wide)).unflatten(1, (-1, self.tall)).transpose(2, 3)

    def index(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        return self.matrix.to(device), self.row.to(device), self.column.to(device)


class Tiles(Kept):
    """Whole tiles of a matrix, or of the matrices of a stack, `tall` lines of `wide` entries each.

    kept: bool (matrices, height, width) that is constant inside of each tile. Where height or width is no
    multiple, the last tiles are smaller; tiles of one size make up a part, the whole ones first.
    """

    def __init__(self, kept: Tensor, tall: int, wide: int, device: torch.device):
        self.shape, self.device = kept.shape, device
        _, height, width = kept.shape
        across = math.ceil(width / wide)
        self.parts: list[Part] = []
        numbers = []  # of the tiles, counted line by line over all matrices
        for lines, part_tall in _ranges(height, tall):
            for columns, part_wide in _ranges(width, wide):
                found = kept[:, lines, columns][:, ::part_tall, ::part_wide].nonzero()
                if len(found):
                    part = Part(part_tall, part_wide, lines, columns, *found.unbind(1))
                    row, column = part.first_lines // tall, part.first_columns // wide
                    numbers.append((part.matrix * math.ceil(height / tall) + row) * across + column)
                    part.matrix, part.row, part.column = part.index(device)
                    self.parts.append(part)
        self.count = sum(part.tall * part.wide * len(part.matrix) for part in self.parts)
        self.long = _is_long(kept.numel())
        tiles = torch.cat(numbers).to(device, torch.int32)
        self.state = {"tiles": tiles, "tile_shape": (tall, wide)}

    @cached_property
    def stretches(self) -> list[Stretch]:
        """One per part; 8 bytes per tile."""
        made, first = [], 0
        for part in self.parts:
            area = part.tall * part.wide
            places = part.first_positions(self.shape)
            made.append(Stretch(len(places) * area, first, places, area, part.wide, self.shape[2]))
            first += made[-1].count
        return made

    def gather(self, whole: Tensor) -> Tensor:
        stack = whole.reshape(self.shape)
        first, *more = [part.of(stack)[part.index(whole.device)].reshape(-1) for part in self.parts]
        return torch.cat([first, *more]) if more else first

    def write(self, whole: Tensor, values: Tensor) -> None:
        stack, start = whole.view(self.shape), 0
        for part in self.parts:
            shape = (len(part.matrix), part.tall, part.wide)
            stop = start + math.prod(shape)
            value = values[start:stop].view(shape).to(whole.device, whole.dtype)
            part.of(stack)[part.index(whole.device)] = value
            start = stop

    def positions(self) -> Tensor:
        return self.gather(torch.arange(math.prod(self.shape), device=self.device))

    def matrices(self) -> Iterator[tuple[int, list[Part], list[slice]]]:
        """Each matrix that has tiles: its number, its parts, where the values of these stand among all."""
        numbers = [part.matrix.cpu() for part in self.parts]  # each ascends
        for number in torch.cat(numbers).unique().tolist():
            parts, spans, start = [], [], 0
            for part, found in zip(self.parts, numbers, strict=True):
                first, last = torch.searchsorted(found, torch.tensor([number, number + 1])).tolist()
                size = part.tall * part.wide
                if last > first:
                    matrix, row, column = (x[first:last] for x in (part.matrix, part.row, part.column))
                    parts.append(replace(part, matrix=matrix, row=row, column=column))
                    spans.append(slice(start + first * size, start + last * size))
                start += len(found) * size
            yield number, parts, spans


def _is_long(numel: int) -> bool:
    """Whether positions in a tensor of so many entries need int64.

    Kernels count to the end of a stretch and up to a step of all their programs beyond it.
    """
    return numel > torch.iinfo(torch.int32).max - (1 << 22)


def _ranges(length: int, side: int) -> list[tuple[slice, int]]:
    """The stretch of a length that whole tiles cover, and the rest: (stretch, side of the tiles there)."""
    whole = length - length % side
    ranges = [(slice(0, whole), side), (slice(whole, length), length - whole)]
    return [(stretch, side) for stretch, side in ranges if stretch.stop > stretch.start]


def kept_entries(mask: Mask, name: str, device: torch.device) -> Kept:
    """The entries that a mask keeps of a parameter, addressed in the least memory."""
    shape = torch.Size(mask.shapes[name])
    if mask.kept(name) == shape.numel():
        return Everything(shape)
    if not mask.kept(name):  # of a sharded parameter of which other processes train entries
        return Entries(torch.empty(0, dtype=torch.int64), shape.numel(), device)
    if len(shape) in (2, 3):
        kept = mask.dense(name).view(-1, *shape[-2:])
        tile = tile_shape(kept)
        if tile is not None:
            return Tiles(kept, *tile, device)
    return Entries(mask.positions(name), shape.numel(), device)


def tile_shape(kept: Tensor) -> tuple[int, int] | None:
    """(lines, entries of each) of the largest tiles that make up the kept entries; None for scattered ones.

    kept: bool (matrices, height, width). Tiles are whole rows, whole columns, or have at least LEAST_SIDE on
    each side.
    """
    _, height, width = kept.shape
    for lines in (_SAMPLE, height):
        part = kept[:, :lines]
        # a tile ends where two neighbouring lines, or columns, differ
        tall = _side((part[:, 1:] != part[:, :-1]).any((0, 2)), height)
        wide = _side((part[:, :, 1:] != part[:, :, :-1]).any((0, 1)), width)
        if not (tall == height or wide == width or min(tall, wide) >= LEAST_SIDE):
            return None
    return tall, wide


def _side(ends: Tensor, length: int) -> int:
    """The largest side whose multiples are all places where a tile ends; the length if none ends inside."""
    return math.gcd(*(ends.nonzero().view(-1) + 1).tolist()) or length
