"""The delta file: a safetensors file with the coded changes of a model, and what they are changes of.

| part | content |
|---|---|
| header | as in every safetensors file: metadata (strings), and the places of the two tensors |
| `data`, uint8 | the codes of the segments, one after another (lota/share/delta/codec.py) |
| `index`, uint8 | the base's parameters and the coding of each segment (lota/share/delta/index.py) |

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
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lota.models.tensor_files import (
    DELTA_FORMAT,
    Header,
    header_bytes,
    is_delta,
    read_header,
    read_metadata,
)
from lota.share.delta.codec import Coding
from lota.share.delta.index import Codings, Layout, Parameter, compressed_index, read_compressed_index
from lota.storage import atomic_path, refuse_foreign

VERSION = 1
_BLANK = b"0" * 64  # stands for the checksum's digits while they are computed
_WHOLE_NUMBERS = ("version", "changed", "entries", "kept", "max_length", "max_prompt_length")
_READ_AS = {**dict.fromkeys(_WHOLE_NUMBERS, int), "sparsity": float}
_REQUIRED = {"base", "tuned", "base_hash", "tuned_hash", "base_fingerprint", "tuned_fingerprint"}
_REQUIRED |= {"changed", "entries"}
_BLOCK = 1 << 20  # bytes hashed or copied at a time


@dataclass(frozen=True)
class DeltaIndex:
    """What a delta file says of itself, before anything is decoded."""

    checksum: str
    meta: dict[str, Any]  # the metadata but for the checksum, numbers as numbers
    parameters: list[Parameter]  # in sorted order, with and without changes
    layout: Layout
    codings: Codings  # of the segments of the layout
    data: int  # byte of the file at which the codes begin


def read_index(path: Path) -> DeltaIndex:
    """Read a delta file's index. Raises ValueError unless every byte of the file is as it was written."""
    header = _checked_header(path)
    try:
        meta = {key: _READ_AS.get(key, str)(value) for key, value in header.metadata.items()}
        if absent := _REQUIRED - meta.keys():
            raise ValueError(f"its metadata lack {sorted(absent)[0]}")
        data, stored = header.entries["data"], header.entries["index"]
        with open(path, "rb") as file:
            file.seek(stored.offset)
            compressed = file.read(stored.numel)
        parameters, layout, codings = read_compressed_index(compressed, path.stat().st_size)
        counts = {
            "changed": codings.changed,
            "entries": sum(parameter.numel for parameter in parameters),
        }
        if codings.bytes != data.numel or any(meta[key] != count for key, count in counts.items()):
            raise ValueError("its index does not describe its data")
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is no whole delta file: {error}") from error
    return DeltaIndex(meta.pop("checksum"), meta, parameters, layout, codings, data.offset)


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
    if re.fullmatch("[0-9]{1,9}", version) and int(version) > VERSION:
        raise ValueError(f"{path} has delta version {version}, this reads up to {VERSION}: update lota")
    with open(path, "rb") as file:
        digest = _checksum(file)[1]
    if digest != metadata.get("checksum"):
        raise ValueError(
            f"{path} is truncated or changed: its checksum does not fit; copy it again from its source"
        )
    return read_header(path)


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
    index = compressed_index(parameters, codings)
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
