"""The delta file: a safetensors file with the coded changes of a model, and what they are changes of.

| part | content |
|---|---|
| header | as in every safetensors file: metadata (strings), and the places of the two tensors |
| `data`, uint8 | the codes of the segments, one after another (lota/share/delta/codec.py) |
| `index`, uint8 | zstandard-compressed JSON of `parameters`, [name, dtype, shape, changed entries] each, in |
| | sorted order, and `segments`, a `Coding` each |

| metadata | |
|---|---|
| `checksum` | sha256 of the file, with zeros for these digits |
| `base`, `tuned` | ids of the two models |
| `base_hash`, `tuned_hash` | their content hashes, of the tuned model in the base's dtypes |
| `base_fingerprint`, `tuned_fingerprint` | `entry_checksum` of the changed entries in either |
| `dtype` | of most entries |
| `sparsity`, `kept` | of the mask; without one, the unchanged share, and nothing |
| `changed`, `entries` | how many |
| `task`, `chat_template`, `max_length`, `max_prompt_length` | of the tuned model's run, if known |
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
import zstandard
from torch import Tensor

from lota.models.hashing import HASH_CHUNK
from lota.models.tensor_files import (
    DELTA_FORMAT,
    Header,
    StoredTensor,
    header_bytes,
    is_delta,
    read_header,
    read_metadata,
)
from lota.share.delta.codec import Coding
from lota.storage import atomic_path, refuse_foreign

VERSION = 1
SEGMENT = HASH_CHUNK  # entries; with the hash's chunks, a file is read once for both
_BLANK = b"0" * 64  # stands for the checksum's digits while they are computed
_WHOLE_NUMBERS = ("version", "changed", "entries", "kept", "max_length", "max_prompt_length")
_READ_AS = {**dict.fromkeys(_WHOLE_NUMBERS, int), "sparsity": float}
_REQUIRED = {"base", "tuned", "base_hash", "tuned_hash", "base_fingerprint", "tuned_fingerprint"}
_REQUIRED |= {"changed", "entries"}
_BLOCK = 1 << 20  # bytes hashed or copied at a time
_LARGEST_INDEX = 1 << 28  # bytes: that of a model of 10^12 entries is smaller


@dataclass(frozen=True)
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
        """The integers that have this dtype's bit patterns."""
        return np.dtype(f"<u{self.dtype.itemsize}")


def segments(parameters: Sequence[Parameter]) -> list[Segment]:
    """Every entry of every parameter once, in order. The file does not store them: they follow from this."""
    found: list[Segment] = []
    for parameter in parameters:
        for start in range(0, parameter.numel, SEGMENT):
            stop = min(start + SEGMENT, parameter.numel)
            last = found[-1] if found else None
            if last is not None and last.dtype == parameter.dtype and last.n + stop - start <= SEGMENT:
                last.pieces.append(Piece(parameter.name, start, stop, last.n))
            else:
                found.append(Segment(parameter.dtype, [Piece(parameter.name, start, stop, 0)]))
    return found


@dataclass(frozen=True)
class DeltaIndex:
    """What a delta file says of itself, before anything is decoded."""

    checksum: str
    meta: dict[str, Any]  # the metadata but for the checksum, numbers as numbers
    parameters: list[Parameter]  # in sorted order, with and without changes
    segments: list[Segment]
    codings: list[Coding]  # one per segment
    starts: list[int]  # byte of the file at which each segment's code begins, and at which the last one ends


def read_index(path: Path) -> DeltaIndex:
    """Read a delta file's index. Raises ValueError unless every byte of the file is as it was written."""
    header = _checked_header(path)
    try:
        meta = {key: _READ_AS.get(key, str)(value) for key, value in header.metadata.items()}
        if absent := _REQUIRED - meta.keys():
            raise ValueError(f"its metadata lack {sorted(absent)[0]}")
        data, stored = header.entries["data"], header.entries["index"]
        index = _decompressed_index(path, stored)
        parameters = [
            Parameter(name, getattr(torch, dtype), tuple(shape), changed)
            for name, dtype, shape, changed in index["parameters"]
        ]
        codings = index["segments"]
        if sum(parameter.numel for parameter in parameters) > SEGMENT * len(codings):
            raise ValueError("its index does not describe its parameters")
        starts = list(itertools.accumulate((sum(map(abs, c[2:])) for c in codings), initial=data.offset))
        cut = segments(parameters)
        if len(cut) != len(codings) or starts[-1] != data.offset + data.numel:
            raise ValueError("its index does not describe its data")
    except (KeyError, ValueError, TypeError, AttributeError, zstandard.ZstdError) as error:
        raise ValueError(f"{path} is no whole delta file: {error}") from error
    return DeltaIndex(meta.pop("checksum"), meta, parameters, cut, codings, starts)


def _checked_header(path: Path) -> Header:
    """The header of a delta file, of which every byte is checked."""
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder: give the delta file in it, such as {path / 'delta.safetensors'}"
        )
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a delta file (python -m lota.delta extract makes one)")
    try:
        metadata = read_metadata(path)
    except ValueError as error:
        raise ValueError(f"{path} is no delta file, or its header is damaged: {error}") from error
    if metadata.get("format") != DELTA_FORMAT:
        raise ValueError(f"{path} is no delta file, or its header is damaged")
    version = metadata.get("version", "")
    if version.isdigit() and int(version) > VERSION:
        raise ValueError(f"{path} has delta version {version}, this reads up to {VERSION}: update lota")
    with open(path, "rb") as file:
        digest = _checksum(file)[1]
    if digest != metadata.get("checksum"):
        raise ValueError(
            f"{path} is truncated or changed: its checksum does not fit; copy it again from its source"
        )
    return read_header(path)


def _decompressed_index(path: Path, stored: StoredTensor) -> dict[str, Any]:
    with open(path, "rb") as file:
        file.seek(stored.offset)
        compressed = file.read(stored.numel)
    if zstandard.frame_content_size(compressed) > _LARGEST_INDEX:
        raise ValueError("its index is too large")
    return dict(json.loads(zstandard.ZstdDecompressor().decompress(compressed)))


def check_target(path: Path) -> None:
    """Raise ValueError if a delta file would take the place of a folder or of another kind of file."""
    if path.is_dir():
        raise ValueError(f"out={path} is a folder: name a file, such as {path / 'delta.safetensors'}")
    refuse_foreign("out", path, "delta file", is_delta)


def write_delta(
    path: Path,
    parameters: Sequence[Parameter],
    codings: Sequence[Coding],
    data: BinaryIO,
    meta: Mapping[str, Any],
) -> dict[str, Any]:
    """Write a delta file atomically, in memory of a block; returns its metadata.

    parameters: in sorted order. codings: one for each of their `segments`, whose codes `data` holds. meta:
    metadata, of which None is left out.
    """
    meta = {
        "format": DELTA_FORMAT,
        "version": VERSION,
        **{key: value for key, value in meta.items() if value is not None},
        "changed": sum(parameter.changed for parameter in parameters),
        "entries": sum(parameter.numel for parameter in parameters),
    }
    index = _compressed_index(parameters, codings)
    with atomic_path(path) as temporary, open(temporary, "w+b") as file:
        sizes = {"data": data.tell(), "index": len(index)}
        tensors = {n: torch.empty(size, dtype=torch.uint8, device="meta") for n, size in sizes.items()}
        texts = {key: str(value) for key, value in meta.items()}
        file.write(header_bytes(tensors, {"checksum": _BLANK.decode(), **texts})[0])
        data.seek(0)
        shutil.copyfileobj(data, file, _BLOCK)
        file.write(index)
        place, digest = _checksum(file)
        file.seek(place)
        file.write(digest.encode())
    return meta


def _compressed_index(parameters: Sequence[Parameter], codings: Sequence[Coding]) -> bytes:
    listed = [[p.name, str(p.dtype).removeprefix("torch."), p.shape, p.changed] for p in parameters]
    text = json.dumps({"parameters": listed, "segments": codings}, separators=(",", ":"))
    return zstandard.ZstdCompressor(level=19, write_content_size=True).compress(text.encode())


def _checksum(file: BinaryIO) -> tuple[int, str]:
    """Returns (byte at which the checksum's digits stand, what they ought to be)."""
    file.seek(0)
    head = file.read(8)
    head += file.read(int.from_bytes(head, "little"))
    place = head.find(b'"checksum":"') + len(b'"checksum":"')
    digest = hashlib.sha256(head[:place] + _BLANK + head[place + len(_BLANK) :])
    while block := file.read(_BLOCK):
        digest.update(block)
    return place, digest.hexdigest()


# Bit patterns


def common_dtype(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """The narrowest dtype that holds the values of both. torch promotes no fp8, whose values bf16 holds."""
    if a == b:
        return a
    a, b = (torch.bfloat16 if d.itemsize == 1 and d.is_floating_point else d for d in (a, b))
    return torch.promote_types(a, b)


_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_integers(tensor: Tensor) -> Tensor:
    """A contiguous tensor's entries as signed integers of the same width: the same memory, 1-D."""
    return tensor.view(-1).view(_SIGNED[tensor.element_size()])


def xor_(tensor: Tensor, positions: Tensor, xors: Tensor) -> None:
    """XOR bit patterns of a contiguous tensor at flat positions, in place; doing it twice undoes it.

    positions: (c,) int64; xors: (c,) signed integers of the tensor's width; both on the tensor's device.
    """
    bits = as_integers(tensor)
    bits.index_copy_(0, positions, bits.index_select(0, positions) ^ xors)


def entry_checksum(number: int, positions: Tensor, bits: Tensor) -> int:
    """Returns (2 number + 1) * sum of (2 position + 1) * bits, over entries of the parameter of that number.

    Modulo 2^64 (`checksum_digits`), another value at one position is another sum, as both factors are odd.
    Parts of a parameter and parameters add up. positions: (c,) int64; bits: (c,) signed integers of the
    entries' width, taken as unsigned ones.
    """
    wide = bits.to(torch.int64)
    if bits.dtype != torch.int64:
        wide &= (1 << 8 * bits.element_size()) - 1  # undoes the sign's extension
    products = (wide * positions).sum()  # int64 wraps around, which keeps the remainder
    return (2 * number + 1) * (2 * int(products) + int(wide.sum()))


def checksum_digits(total: int) -> str:
    """A sum of entry checksums modulo 2^64, as the metadata hold it."""
    return f"{total % (1 << 64):016x}"
