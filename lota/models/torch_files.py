"""What a file of `torch.save` holds and where its tensors lie, read without torch.load.

torch.load(weights_only=True) runs no code of a file, but a stranger's few hundred bytes can make it hang or
take any amount of memory: keys of nested tuples, copies of copies, tensors larger than what is stored,
compressed records. This reader knows what torch.save writes of tensors and plain values, refuses everything
else, and takes no more memory than the file has bytes and `SLACK`.

A file: a zip archive (lota/models/zip_records.py) with ARCHIVE/data.pkl, the structure as a pickle, and
ARCHIVE/data/KEY for each storage (torch's notes on serialization).
"""

from __future__ import annotations

import math
import pickletools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lota.models.tensor_files import StoredTensor
from lota.models.zip_records import NotSupported, Record, check_records, content_of, read_records

SLACK = 1 << 19  # bytes of data.pkl, each of which can become a hundred in memory, that every file may have
_PER_FILE = 200  # one byte more of data.pkl for so many of the file
_DIMENSIONS = 64  # of a tensor; torch's operations take no more
_DEPTH = 20  # of dicts, lists and tuples within each other
_PLAIN = {str, int, float, bool, type(None)}
_BEFORE_1_6 = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the pickled number that such files begin with
_STORAGES = {
    "torch DoubleStorage": torch.float64, "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16, "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64, "torch IntStorage": torch.int32, "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8, "torch ByteStorage": torch.uint8, "torch BoolStorage": torch.bool,
    "torch ComplexFloatStorage": torch.complex64, "torch ComplexDoubleStorage": torch.complex128,
    "torch.storage UntypedStorage": torch.uint8,
}  # fmt: skip


class HoldsObjects(ValueError):
    """A file has something else in it than tensors and plain values."""


@dataclass(frozen=True)
class _Global:
    name: str  # "module name"


@dataclass
class _Storage:
    dtype: torch.dtype
    offset: int  # byte of the file
    numel: int


def read_torch_file(path: Path, check_crc: bool = True) -> Any:
    """What was saved, with a StoredTensor in place of each tensor.

    check_crc: compare every record with its CRC-32, which reads the whole file, once per process. Raises
    ValueError, without the file's name, for anything that torch.save does not write of tensors and plain
    values (HoldsObjects), for what it writes and is not read (NotSupported: the error has the remedy), and
    for what is truncated or damaged.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        if file.read(len(_BEFORE_1_6)) == _BEFORE_1_6:
            raise NotSupported("it is in the layout of before torch 1.6: load it and torch.save it again")
        records = read_records(file, size)
        if check_crc:
            check_records(path, file, records)
        structures = [name for name in records if name.partition("/")[2] == "data.pkl"]
        if len(structures) != 1:
            raise ValueError("it has no data.pkl, or more than one")
        archive, structure = structures[0].partition("/")[0], records[structures[0]]
        order = records.get(f"{archive}/byteorder")
        if order is not None and content_of(file, order) != sys.byteorder.encode():
            raise NotSupported(
                f"its numbers are not in {sys.byteorder}-endian order: load it and torch.save it again here"
            )
        if structure.size > SLACK + size // _PER_FILE:
            raise NotSupported(
                f"its structure takes {structure.size:,} bytes of only {size:,}: save it without other values"
                " than its tensors need, or the smallest tensors in a file of their own"
            )
        reader = _Structure(path, archive, records, size)
        try:
            return reader.run(content_of(file, structure))
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"its structure is damaged: {type(error).__name__} {error}") from error


class _Structure:
    """The machine that a pickle is a program for, as far as tensors and plain values need it."""

    def __init__(self, path: Path, archive: str, records: dict[str, Record], size: int):
        self.path, self.archive, self.records, self.left = path, archive, records, size
        self.stack: list[Any] = []
        self.marks: list[int] = []  # lengths of the stack
        self.memo: dict[int, Any] = {}
        # id of a dict, list or tuple with others in it -> how deep they are, until it is itself in another:
        # nothing but a flat tuple is in two places
        self.depth: dict[int, int] = {}
        self.places: set[StoredTensor] = set()  # of tensors: without tied ones no more than the file holds

    def run(self, program: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(program):
            if opcode.name == "STOP":
                if len(self.stack) != 1 or self.marks:
                    raise ValueError("its structure ends early")
                return self.stack.pop()
            self.step(opcode.name, argument)
        raise ValueError("its structure has no end")

    def step(self, name: str, argument: Any) -> None:
        """One instruction of the program."""
        match name:
            case "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                self.stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                self.stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                self.push({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                parts = [self.stack.pop() for _ in range(int(name[-1]))]
                self.push(tuple(reversed(parts)))
            case "TUPLE":
                self.push(tuple(self.since_mark()))
            case "MARK":
                self.marks.append(len(self.stack))
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                self.stack.append(self.remembered(argument))
            case "SETITEM" | "SETITEMS":
                parts = self.since_mark() if name == "SETITEMS" else [self.stack.pop(-2), self.stack.pop()]
                self.set_items(self.stack[-1], parts)
            case "APPEND" | "APPENDS":
                parts = self.since_mark() if name == "APPENDS" else [self.stack.pop()]
                self.extend(self.stack[-1], parts)
            case "GLOBAL":
                self.stack.append(_Global(argument))
            case "BINPERSID":
                self.stack.append(self.storage(self.stack.pop()))
            case "REDUCE":
                arguments = self.stack.pop()
                self.depth.pop(id(arguments), None)
                self.push(self.call(self.stack.pop(), arguments))
            case "BUILD":  # what an OrderedDict carries besides its items, such as `_metadata`
                state = self.stack.pop()
                self.depth.pop(id(state), None)
                if not isinstance(state, dict) or not isinstance(self.stack[-1], dict):
                    raise HoldsObjects("Unsupported class: an object with a state")
            case "PROTO":
                pass
            case _:
                raise HoldsObjects(f"Unsupported instruction {name}")

    def push(self, value: Any) -> None:
        if isinstance(value, tuple):
            self.deepen(value, value)
        self.stack.append(value)

    def deepen(self, whole: Any, parts: Any) -> None:
        """Note that a dict, list or tuple has these in it."""
        if not isinstance(whole, tuple) and any(isinstance(part, _Global | _Storage) for part in parts):
            raise HoldsObjects("Unsupported class: a class or storage by itself")
        inner = (part for part in parts if isinstance(part, dict | list | tuple))
        depth = max((1 + self.depth.pop(id(part), 0) for part in inner), default=0)
        if depth >= _DEPTH:
            raise NotSupported(
                f"its structure is more than {_DEPTH} deep: save it with fewer dicts, lists and tuples within"
                " each other"
            )
        if depth > self.depth.get(id(whole), 0):
            self.depth[id(whole)] = depth

    def since_mark(self) -> list[Any]:
        mark = self.marks.pop()
        parts = self.stack[mark:]
        del self.stack[mark:]
        return parts

    def remembered(self, place: int) -> Any:
        """Something from before. A dict, list or nested tuple twice could be written out without end."""
        value = self.memo[place]
        if isinstance(value, dict | list | tuple) and not (len(value) <= _DIMENSIONS and _is_flat(value)):
            raise NotSupported("its structure holds one part in two places: save a copy of it in each")
        return value

    def set_items(self, whole: Any, parts: list[Any]) -> None:
        keys, values = parts[::2], parts[1::2]
        if not isinstance(whole, dict) or len(keys) != len(values):
            raise ValueError("its structure sets items of no dict")
        if not all(isinstance(key, str | int | float | None) for key in keys):
            raise HoldsObjects("Unsupported class: a key that is no plain value")
        self.deepen(whole, values)
        whole.update(zip(keys, values, strict=True))

    def extend(self, whole: Any, parts: list[Any]) -> None:
        if not isinstance(whole, list):
            raise ValueError("its structure appends to no list")
        self.deepen(whole, parts)
        whole.extend(parts)

    def storage(self, found: Any) -> _Storage:
        """A storage by its persistent id: ("storage", class, key, location, entries)."""
        _, kind, key, _, numel = found
        if not isinstance(kind, _Global) or kind.name not in _STORAGES:
            raise HoldsObjects(f"Unsupported class of storage: {kind!r:.100}")
        record, dtype = self.records[f"{self.archive}/data/{key}"], _STORAGES[kind.name]
        if not isinstance(numel, int) or numel * dtype.itemsize != record.size:
            raise ValueError(f"its record {key!r:.100} is not as large as its structure says")
        return _Storage(dtype, record.offset, numel)

    def call(self, what: Any, arguments: Any) -> Any:
        name = what.name if isinstance(what, _Global) else f"{what!r:.100}"
        if name == "collections OrderedDict" and arguments == ():
            return {}
        if name == "torch Size":
            (sizes,) = arguments
            return tuple(_whole_numbers(sizes))
        if name in ("torch._utils _rebuild_parameter", "torch._utils _rebuild_parameter_with_state"):
            value, _, _, *state = arguments  # attributes, or a pair with those of __slots__: left out
            if isinstance(value, StoredTensor) and all(isinstance(part, dict | tuple) for part in state):
                return value
        if name in ("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3"):
            storage, offset, shape, stride, _, _, *rest = arguments
            dtype = storage.dtype
            if name.endswith("v3"):  # of dtypes without a class of storages
                dtype, *rest = rest
                dtype = getattr(torch, dtype.name.removeprefix("torch "), None)
            if any(part is not None for part in rest) or not isinstance(dtype, torch.dtype):
                raise HoldsObjects("Unsupported class: a tensor with more than its entries")
            return self.tensor(storage, dtype, offset, _whole_numbers(shape), _whole_numbers(stride))
        raise HoldsObjects(f"Unsupported global: {name[:100]} was not an allowed one")

    def tensor(
        self, storage: _Storage, dtype: torch.dtype, offset: int, shape: list[int], stride: list[int]
    ) -> StoredTensor:
        """A tensor, checked: every entry of it has a place of its own in its storage."""
        (offset,) = _whole_numbers([offset])
        if math.prod(max(size, 1) for size in shape) >= 1 << 63:  # torch has no such tensor, even if empty
            raise ValueError("a tensor of it has more entries than the file holds")
        begin = storage.offset + offset * dtype.itemsize
        kept = None if 0 in shape or _is_contiguous(shape, stride) else tuple(stride)
        found = StoredTensor(self.path, begin, dtype, tuple(shape), kept)
        end = (offset + found.span) * dtype.itemsize
        if found.numel and end > storage.numel * storage.dtype.itemsize:
            raise ValueError("a tensor of it has more entries than the file holds")
        if found.numel > found.span:
            raise NotSupported("entries of a tensor share a place, as after expand: save a clone() of it")
        if found not in self.places:
            self.places.add(found)
            self.left -= found.numel * dtype.itemsize
        if self.left < 0:
            raise NotSupported(
                "its tensors share places and have more entries than it: save a clone() of each"
            )
        return found


def _is_flat(value: Any) -> bool:
    """Whether this is a tuple of plain values: it takes no more memory for being in many places."""
    return isinstance(value, tuple) and all(type(part) in _PLAIN for part in value)


def _is_contiguous(shape: Sequence[int], stride: Sequence[int]) -> bool:
    step = 1  # entries between two neighbours of a dimension
    for size, found in zip(reversed(shape), reversed(stride), strict=True):
        if found != step and size != 1:
            return False
        step *= size
    return True


def _whole_numbers(numbers: Any) -> list[int]:
    """A shape or stride. Raises ValueError for what is none."""
    if not isinstance(numbers, tuple | list) or len(numbers) > _DIMENSIONS:
        raise ValueError(f"{numbers!r:.60} is no shape")
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in numbers):
        raise ValueError(f"{numbers!r:.60} is no shape")
    return list(numbers)


def map_tensors(path: Path, content: Any) -> Any:
    """The same with tensors whose memory is the file's: private pages, read when they are looked at."""
    storage = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
    assert isinstance(storage, torch.UntypedStorage)
    made: dict[StoredTensor, Tensor] = {}  # tied tensors stay one

    def with_tensors(part: Any) -> Any:
        if isinstance(part, StoredTensor):
            return made.setdefault(part, _tensor_in(storage, part))
        if isinstance(part, tuple) and not _is_flat(part):
            return tuple(map(with_tensors, part))
        for key, value in part.items() if isinstance(part, dict) else ():
            part[key] = with_tensors(value)
        if isinstance(part, list):
            part[:] = map(with_tensors, part)
        return part

    return with_tensors(content)


def _tensor_in(storage: torch.UntypedStorage, place: StoredTensor) -> Tensor:
    width = place.dtype.itemsize
    part = storage[place.offset : place.offset + place.span * width]
    flat = torch.empty(0, dtype=place.dtype).set_(part)
    return flat.view(place.shape) if place.stride is None else flat.as_strided(place.shape, place.stride)
