"""The delta file: a safetensors file with the coded changes, and what they are changes of.

    data    uint8, the segments one after another (lota/delta/codec.py)
    index   uint8, zstandard-compressed JSON: `parameters`, [name, dtype, shape, changed entries] in sorted
            order, and `segments`, a row of numbers each (lota/delta/layout.py says what a segment holds)

The metadata are strings; `checksum` is the sha256 of the file with that field's digits as zeros.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
import zstandard
from torch import Tensor

from lota.models.tensor_files import DELTA_FORMAT, is_delta
from lota.models.weights import HASH_CHUNK
from lota.share.delta.codec import Row
from lota.utils import atomic_path

FORMAT, VERSION = DELTA_FORMAT, 1
_BLANK = "0" * 64
_WHOLE = ("version", "changed", "entries", "kept", "max_length", "max_prompt_length")
_NUMBERS = {**dict.fromkeys(_WHOLE, int), "sparsity": float}
_BLOCK = 1 << 20  # bytes


@dataclass(frozen=True)
class Content:
    """What a delta file says of itself. starts: byte of each segment, and of the end of the last one."""

    checksum: str
    meta: dict[str, Any]
    parameters: list[Parameter]
    rows: list[Row]
    starts: list[int]


def read(path: Path) -> Content:
    """The index of a delta file. Raises ValueError unless every byte of the file is as it was written."""
    header, start = _read_header(path)
    try:
        raw = header["__metadata__"]
        meta = {key: _NUMBERS.get(key, str)(value) for key, value in raw.items() if key != "checksum"}
        begin, end = header["index"]["data_offsets"]
        with open(path, "rb") as file:
            file.seek(start + begin)
            index = json.loads(zstandard.ZstdDecompressor().decompress(file.read(end - begin)))
        parameters = [
            Parameter(name, getattr(torch, dtype), tuple(shape), changed)
            for name, dtype, shape, changed in index["parameters"]
        ]
        starts = [start]
        for row in index["segments"]:
            starts.append(starts[-1] + sum(map(abs, row[2:])))
        if len(segments(parameters)) != len(starts) - 1 or starts[-1] != start + begin:
            raise ValueError("its index does not describe its data")
    except (KeyError, ValueError, TypeError, AttributeError, zstandard.ZstdError) as error:
        raise ValueError(f"{path} is no whole delta file: {error}") from error
    return Content(raw["checksum"], meta, parameters, index["segments"], starts)


def check_target(path: str | os.PathLike) -> None:
    """Raise ValueError where a delta file would take the place of a folder or of something else."""
    path = Path(path).expanduser()
    if path.is_dir():
        raise ValueError(f"--out {path} is a folder: name a file, such as {path / 'delta.safetensors'}")
    if path.exists() and not is_delta(path):
        raise ValueError(f"--out {path} exists and is no delta file: name a new file")


def write(
    path: str | os.PathLike,
    parameters: Sequence[Parameter],
    coded: Iterable[tuple[Row, bytes]],
    finish: Callable[[], tuple[Mapping[str, int], Mapping[str, Any]]],
) -> dict[str, Any]:
    """Write a delta file atomically, in memory of a segment; returns its metadata.

    parameters: in sorted order. coded: a pair per segment of `layout.segments(parameters)`, taken one by one.
    finish: called after the last; returns (changed entries by name, metadata).
    """
    with atomic_path(path) as temporary, open(temporary, "w+b") as file:
        with open(temporary.with_name(f"{temporary.name}.data"), "w+b") as data:
            os.unlink(data.name)
            rows = []
            for row, content in coded:
                rows.append(row)
                data.write(content)
            changed, meta = finish()
            meta = {
                "format": FORMAT,
                "version": VERSION,
                **{key: value for key, value in meta.items() if value is not None},
                "changed": sum(changed.values()),
                "entries": sum(parameter.numel for parameter in parameters),
            }
            index = _index(parameters, changed, rows)
            _write_header(file, meta, data.tell(), len(index))
            data.seek(0)
            while block := data.read(_BLOCK):
                file.write(block)
            file.write(index)
        _put_checksum(file)
    return meta


def _index(parameters: Sequence[Parameter], changed: Mapping[str, int], rows: list[Row]) -> bytes:
    listed = [
        [p.name, str(p.dtype).removeprefix("torch."), list(p.shape), int(changed.get(p.name, 0))]
        for p in parameters
    ]
    text = json.dumps({"parameters": listed, "segments": rows}, separators=(",", ":"))
    return zstandard.ZstdCompressor(level=19, write_content_size=True).compress(text.encode())


def _write_header(file: BinaryIO, meta: Mapping[str, Any], n_data: int, n_index: int) -> None:
    header = {
        "__metadata__": {"checksum": _BLANK, **{key: str(value) for key, value in meta.items()}},
        "data": {"dtype": "U8", "shape": [n_data], "data_offsets": [0, n_data]},
        "index": {"dtype": "U8", "shape": [n_index], "data_offsets": [n_data, n_data + n_index]},
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)


def _put_checksum(file: BinaryIO) -> None:
    file.flush()
    place, digest = _checksum(file)
    file.seek(place)
    file.write(digest.encode())


def _checksum(file: BinaryIO) -> tuple[int, str]:
    """(byte where the checksum's digits stand, what they ought to be)."""
    file.seek(0)
    head = file.read(8)
    head += file.read(int.from_bytes(head, "little"))
    place = head.index(b'"checksum":"') + len(b'"checksum":"')
    digest = hashlib.sha256(head[:place] + _BLANK.encode() + head[place + len(_BLANK) :])
    while block := file.read(_BLOCK):
        digest.update(block)
    return place, digest.hexdigest()


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """(header, byte where the data start), every byte of the file checked."""
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder: give the delta file in it, such as {path / 'delta.safetensors'}"
        )
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a delta file (python -m lota.delta extract makes one)")
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if 2 <= length <= size - 8 else b""
        try:
            header = json.loads(text)
            meta = header["__metadata__"]
            if meta["format"] != FORMAT:
                raise KeyError("format")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no delta file, or its header is damaged") from error
        if str(meta.get("version", "")).isdigit() and int(meta["version"]) > VERSION:
            raise ValueError(
                f"{path} has delta version {meta['version']}, this reads up to {VERSION}: update lota"
            )
        try:
            right = _checksum(file)[1] == meta["checksum"]
            end = 8 + length + header["index"]["data_offsets"][1]
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise ValueError(f"{path} is no whole delta file: {error}") from error
    if not right or size != end:
        raise ValueError(
            f"{path} is truncated or changed: its checksum does not fit; copy it again from its source"
        )
    return header, 8 + length


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


_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MODULUS = 1 << 64


def as_integers(tensor: Tensor) -> Tensor:
    """A contiguous tensor's entries as signed integers of the same width; the same memory, 1-D."""
    return tensor.view(-1).view(_SIGNED[tensor.element_size()])


def xor_(tensor: Tensor, positions: Tensor, xors: Tensor) -> None:
    """XOR bit patterns of a contiguous tensor at flat positions, in place; twice is nothing.

    positions: int64; xors: signed integers of the tensor's width; on the tensor's device.
    """
    bits = as_integers(tensor)
    bits.index_copy_(0, positions, bits.index_select(0, positions) ^ xors)


def fingerprint(positions: Tensor, bits: Tensor) -> int:
    """The sum of bits * (2 * position + 1): modulo 2^64 another value at one position is another sum.

    Parts of a parameter add up; those of several parameters are multiplied by `weight` first. positions:
    int64; bits: signed integers, taken as unsigned ones.
    """
    wide = bits.to(torch.int64)
    if bits.element_size() < 8:
        wide &= (1 << 8 * bits.element_size()) - 1
    # int64 wraps around, which keeps the remainder; only a CPU has a dot product of integers
    products = wide.dot(positions) if wide.device.type == "cpu" else (wide * positions).sum()
    return 2 * int(products) + int(wide.sum())


def weight(number: int) -> int:
    """Odd, and another one for each parameter."""
    return 2 * number + 1


def as_hex(total: int) -> str:
    """A sum of fingerprints modulo 2^64."""
    return f"{total % _MODULUS:016x}"
