"""The index of a delta file: the base's parameters, and how each segment of their entries is coded.

In the file: zstandard-compressed JSON of `parameters`, [name, dtype, shape, changed entries] each, in sorted
order, and `segments`, a `Coding` each. A few bytes can decompress to any number of these, so they are read
in blocks, kept compactly, and counted against what a file of this size can mean.
"""

from __future__ import annotations

import itertools
import json
import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import zstandard

from lota.models.hashing import HASH_CHUNK
from lota.models.tensor_files import FILE_DTYPES
from lota.share.delta.codec import Coding

SEGMENT = HASH_CHUNK  # entries; with the hash's chunks, a file is read once for both
# Of what a file may have: so much, and one more for each byte of it by which it is larger, or each KiB.
_MOST_PARAMETERS = 1 << 15  # and one per KiB; 600 bytes each in memory
_MOST_ENTRIES = 1 << 40  # and 1024 per byte; 40 bytes per segment with changes, of 2^20 entries
_BLOCK = 1 << 16  # bytes of JSON parsed at a time, and the most that one parameter takes
_WINDOW = 1 << 23  # bytes that decompressing looks back, as `compressed_index` writes


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter as the base's file holds it, under its name in the loaded model."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    changed: int = 0  # entries that differ in the tuned model

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Piece(NamedTuple):
    """Entries [start, stop) of a flattened parameter, which stand at `offset` of their segment."""

    name: str
    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class Segment:
    """Up to SEGMENT entries of one dtype that are coded together: large parameters cut, small ones pooled."""

    dtype: torch.dtype
    pieces: list[Piece]  # without gaps between them

    @property
    def n(self) -> int:
        last = self.pieces[-1]
        return last.offset + last.stop - last.start

    @property
    def unsigned(self) -> np.dtype[Any]:
        return unsigned(self.dtype)


def unsigned(dtype: torch.dtype) -> np.dtype[Any]:
    """The integers that have this dtype's bit patterns."""
    return np.dtype(f"<u{dtype.itemsize}")


class Layout:
    """Every entry of every parameter once, in order, cut into segments.

    The file does not store it: it follows from the parameters. Memory: that of the parameters, however many
    segments there are.
    """

    def __init__(self, parameters: Sequence[Parameter]):
        self.count = 0  # of segments
        self._places: dict[str, tuple[int, int]] = {}  # name -> its first segment, and where it begins in it
        self._short: dict[int, int] = {}  # segment -> its entries, of those that are not full
        self._firsts: list[int] = []  # segments that begin a run of segments of one dtype,
        self._dtypes: list[torch.dtype] = []  # and that dtype
        filled = SEGMENT  # entries of the last segment
        for parameter in parameters:
            numel = parameter.numel
            pooled = bool(self.count) and parameter.dtype == self._dtypes[-1] and filled + numel <= SEGMENT
            first, offset = (self.count - 1, filled) if pooled else (self.count, 0)
            self._places[parameter.name] = first, offset
            if not numel:
                continue
            if not self._dtypes or self._dtypes[-1] != parameter.dtype:
                self._firsts.append(first)
                self._dtypes.append(parameter.dtype)
            self.count = first + -(-(offset + numel) // SEGMENT)
            filled = offset + numel - (self.count - 1 - first) * SEGMENT
            self._short[self.count - 1] = filled

    def dtype(self, i: int) -> torch.dtype:
        """Of segment `i`."""
        return self._dtypes[bisect_right(self._firsts, i) - 1]

    def entries(self, i: int) -> int:
        """Of segment `i`."""
        return self._short.get(i, SEGMENT)

    def pieces(self, parameter: Parameter, start: int, stop: int) -> Iterator[tuple[int, Piece]]:
        """(number of the segment, piece) of what holds entries [start, stop) of the flattened parameter."""
        first, offset = self._places[parameter.name]
        for j in range(start // SEGMENT, -(-stop // SEGMENT)):
            end = min((j + 1) * SEGMENT, parameter.numel)
            yield first + j, Piece(parameter.name, j * SEGMENT, end, 0 if j else offset)


def segments(parameters: Sequence[Parameter]) -> list[Segment]:
    """The segments of a layout, one by one."""
    layout = Layout(parameters)
    found = [Segment(layout.dtype(i), []) for i in range(layout.count)]
    for parameter in parameters:
        for i, piece in layout.pieces(parameter, 0, parameter.numel):
            found[i].pieces.append(piece)
    return found


class Codings:
    """The coding of each segment and where its code begins, of those with changes alone."""

    def __init__(self) -> None:
        self.count = 0  # of segments
        self.changed = 0  # entries
        self.bytes = 0  # of all codes
        self._numbers = array("i")  # the codings, one after another
        # of each that has changes: its number, where its coding begins in `_numbers`, where its code begins
        self._which, self._rows, self._begins = array("i"), array("q"), array("q")

    def add(self, coding: Any, n: int, itemsize: int) -> None:
        """Append one of a segment of n entries. Raises ValueError for what no writer wrote."""
        if coding == [0] * (4 + itemsize):  # nothing changed, as in most segments of a large model
            self.count += 1
            return
        fits = isinstance(coding, list) and len(coding) == 4 + itemsize
        if not fits or not all(type(number) is int and abs(number) < 1 << 31 for number in coding):
            raise ValueError(f"segment {self.count} has no coding of its dtype")
        if not 0 <= coding[0] <= n or not 0 <= coding[1] <= n.bit_length():
            raise ValueError(f"segment {self.count} of {n} entries has the coding {coding}")
        self._which.append(self.count)
        self._rows.append(len(self._numbers))
        self._begins.append(self.bytes)
        self._numbers.extend(coding)
        self.count += 1
        self.changed += coding[0]
        self.bytes += sum(map(abs, coding[2:]))

    def __getitem__(self, i: int) -> tuple[Coding, int] | None:
        """(coding, byte of the data at which the code begins) of segment `i`; None without changes."""
        place = bisect_left(self._which, i)
        if place == len(self._which) or self._which[place] != i:
            return None
        stop = self._rows[place + 1] if place + 1 < len(self._rows) else len(self._numbers)
        return self._numbers[self._rows[place] : stop].tolist(), self._begins[place]


def compressed_index(parameters: Sequence[Parameter], codings: Sequence[Coding]) -> bytes:
    """The bytes of an index."""
    listed = [[p.name, str(p.dtype).removeprefix("torch."), p.shape, p.changed] for p in parameters]
    text = json.dumps({"parameters": listed, "segments": codings}, separators=(",", ":"))
    return zstandard.ZstdCompressor(level=19, write_content_size=True).compress(text.encode())


def read_compressed_index(compressed: bytes, size: int) -> tuple[list[Parameter], Layout, Codings]:
    """The parameters, their segments and the codings of these, of a file of `size` bytes.

    Raises ValueError for what `compressed_index` does not write, and for more than such a file can mean.
    """
    try:
        with zstandard.ZstdDecompressor(max_window_size=_WINDOW).stream_reader(compressed) as text:
            begin = text.read(len(b'{"parameters":['))
            if begin != b'{"parameters":[':
                raise ValueError("its index has no parameters")
            parameters: list[Parameter] = []
            for found, held in _lists(text, b"", b'],["', b'],"segments":['):
                rest = held
                parameters += map(_parameter, found)
                if len(parameters) > _MOST_PARAMETERS + size // 1024:
                    raise ValueError(f"its index has more parameters than a file of {size:,} bytes can have")
            _check_parameters(parameters, size)
            layout, codings = Layout(parameters), Codings()
            for found, _ in _lists(text, rest, b"],[", b"]}"):
                for coding in found:
                    if codings.count == layout.count:
                        raise ValueError("its index has more segments than its parameters have")
                    i = codings.count
                    codings.add(coding, layout.entries(i), layout.dtype(i).itemsize)
    except (zstandard.ZstdError, RecursionError) as error:
        raise ValueError(f"its index is damaged: {error}") from error
    if codings.count != layout.count:
        raise ValueError("its index does not describe its parameters")
    if codings.changed != sum(parameter.changed for parameter in parameters):
        raise ValueError("its parameters have other numbers of changes than its segments")
    return parameters, layout, codings


def _lists(text: Any, held: bytes, between: bytes, end: bytes) -> Iterator[tuple[list[Any], bytes]]:
    """(lists, what was read behind `end`) of JSON lists, some at a time, up to `end`.

    between: what stands between two of them and nowhere else. held: text that was read already. The last of
    them has what was read too far.
    """
    while (place := held.find(end)) < 0:
        block = text.read(_BLOCK)
        if not block:
            raise ValueError("its index ends early")
        held += block
        cut = held.rfind(between)
        if held.find(end) < 0 and cut >= 0:
            yield json.loads(b"[" + held[: cut + 1] + b"]"), b""
            held = held[cut + 2 :]
        elif len(held) > 2 * _BLOCK:
            raise ValueError("its index has a part that is too long")
    yield json.loads(b"[" + held[:place] + b"]"), held[place + len(end) :]


def _parameter(found: object) -> Parameter:
    """Raises ValueError for what describes none."""
    if not isinstance(found, list) or len(found) != 4:
        raise ValueError("its index has a parameter without name, dtype, shape and changes")
    name, dtype_name, shape, changed = found
    dtype = getattr(torch, dtype_name, None) if isinstance(dtype_name, str) else None
    if not isinstance(name, str) or not isinstance(dtype, torch.dtype) or dtype not in FILE_DTYPES:
        raise ValueError(f"{name!r:.100} has the dtype {dtype_name!r:.60}, which no parameter has")
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 1 << 48 for n in shape):
        raise ValueError(f"{name!r:.100} has the shape {shape!r:.60}, which no parameter has")
    parameter = Parameter(name, dtype, tuple(shape), changed)
    if len(shape) > 64 or type(changed) is not int or not 0 <= changed <= parameter.numel:
        raise ValueError(f"{name!r:.100} has {changed!r:.60} changes in {shape!r:.60}")
    return parameter


def _check_parameters(parameters: Sequence[Parameter], size: int) -> None:
    """Raise ValueError for more entries than a file of `size` bytes can have, or another order of names."""
    if sum(parameter.numel for parameter in parameters) > _MOST_ENTRIES + size * 1024:
        raise ValueError(f"its index has more entries than a file of {size:,} bytes can have")
    if any(a.name >= b.name for a, b in itertools.pairwise(parameters)):
        raise ValueError("its parameters are not in sorted order")
