"""How the parameters of a model are cut into segments, the units in which a delta is coded.

A segment is up to SEGMENT entries of one dtype: a part of a large tensor, or several small ones, whose
changed entries then share a coding. The order is that of the content hash: names sorted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from lota.weights import HASH_CHUNK

SEGMENT = HASH_CHUNK  # entries; with the hash's chunks, a file is read once for both
UNSIGNED = {1: np.dtype("u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4"), 8: np.dtype("<u8")}


@dataclass(frozen=True)
class Parameter:
    """A parameter of the base, its dtype in the base's file. changed: entries that differ when tuned."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    changed: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Piece(NamedTuple):
    """Entries [start, stop) of a flattened parameter that stand at `offset` of their segment."""

    name: str
    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class Segment:
    """n entries of `dtype`, in pieces without gaps."""

    dtype: torch.dtype
    pieces: tuple[Piece, ...]

    @property
    def n(self) -> int:
        last = self.pieces[-1]
        return last.offset + last.stop - last.start

    @property
    def unsigned(self) -> np.dtype:
        """The integers that have this dtype's bit patterns."""
        return UNSIGNED[self.dtype.itemsize]


def segments(parameters: Sequence[Parameter]) -> list[Segment]:
    """Every entry of every parameter once; empty parameters are left out."""
    found: list[Segment] = []
    pieces: list[Piece] = []
    dtype, size = None, 0
    for parameter, start, stop in _chunks(parameters):
        if pieces and (parameter.dtype != dtype or size + stop - start > SEGMENT):
            found.append(Segment(dtype, tuple(pieces)))
            pieces, size = [], 0
        pieces.append(Piece(parameter.name, start, stop, size))
        dtype, size = parameter.dtype, size + stop - start
    return [*found, Segment(dtype, tuple(pieces))] if pieces else found


def _chunks(parameters: Iterable[Parameter]) -> Iterator[tuple[Parameter, int, int]]:
    for parameter in parameters:
        for start in range(0, parameter.numel, SEGMENT):
            yield parameter, start, min(start + SEGMENT, parameter.numel)
