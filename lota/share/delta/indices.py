"""Delta files <-> plain safetensors files of positions and values, which need no lota to be read.

A tensor NAME of the checkpoint that changed has two entries, both (changed,): `NAME.indices`, int32 (int64
for more than 2^31 entries), flat, ascending, and `NAME.values`, the tuned values in the checkpoint's dtype.
Names and positions are those of the base's files, so what transformers merges on loading (experts) is listed
tensor by tensor. Importing compares with the base again: a delta holds what differs in bits.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lota.models.hashing import content_hash
from lota.models.tensor_files import Header, new_safetensors, read_header, read_metadata
from lota.models.weights import ReadUnit, WeightSource, refuse_not_finite
from lota.places import holding
from lota.share.delta.apply import check_model
from lota.share.delta.extract import write_changes
from lota.share.delta.format import as_integers
from lota.share.delta.reader import Delta
from lota.share.hf_weights import on_disk, open_folder
from lota.storage import atomic_path, refuse_foreign

FORMAT = "lota-indices"  # in the metadata
_COPIED = ("base", "tuned", "base_hash", "tuned_hash", "task", "sparsity")  # metadata of the delta
Place = str | os.PathLike[str]


class Patch(NamedTuple):
    """The changed entries of one tensor of the base's files."""

    name: str  # in the files
    positions: Tensor  # int64 (c,), ascending, flat
    base: Tensor  # (c,), their values in the base, in the file's dtype
    tuned: Tensor  # (c,), their values in the tuned model


def export_indices(base: Place, delta: Place, out: Place) -> dict[str, Any]:
    """Write a delta's changes as plain indices and values; returns {tensors, entries, bytes}.

    base: Hugging Face folder or hub id. Memory: two copies of one parameter. Raises ValueError unless `base`
    is the delta's base to the last bit, and for an `out` that is no such file.
    """
    out, opened = Path(out).expanduser(), Delta.open(delta)
    refuse_foreign("out", out, "file of indices", _is_indices)
    source, _ = open_folder(base)
    check_model(source, opened, "base")
    counts = {patch.name: len(patch.positions) for patch in checkpoint_patches(source, opened)}
    forms: dict[str, Tensor] = {}
    for name, count in counts.items():
        stored = source.stored[name]
        index = torch.int32 if stored.numel <= 1 << 31 else torch.int64
        forms[f"{name}.indices"] = torch.empty(count, dtype=index, device="meta")
        forms[f"{name}.values"] = torch.empty(count, dtype=stored.dtype, device="meta")
    meta = {"format": FORMAT, "version": "1"}
    meta |= {key: str(opened.meta[key]) for key in _COPIED if opened.meta.get(key) is not None}
    with holding(out):
        refuse_foreign("out", out, "file of indices", _is_indices)
        with atomic_path(out) as temporary, new_safetensors(temporary, forms, meta) as put:
            for patch in checkpoint_patches(source, opened):
                put(f"{patch.name}.indices", patch.positions)
                put(f"{patch.name}.values", patch.tuned)
    return {"tensors": len(counts), "entries": sum(counts.values()), "bytes": out.stat().st_size}


def _is_indices(path: Path) -> bool:
    try:
        return read_metadata(path).get("format") == FORMAT
    except ValueError:
        return False


def checkpoint_patches(source: WeightSource, delta: Delta) -> Iterator[Patch]:
    """The changes of every tensor that has some, in the order of the base's parameters.

    Raises ValueError for a delta of other shapes or dtypes, or that makes NaN or infinity.
    """
    for unit in source.units():
        if not any(delta.changed(name) for name in unit.parameters):
            continue
        tuned = {name: delta.tuned(name, source.read(name)) for name in unit.parameters}
        for name, value in tuned.items():  # vLLM takes NaN for an entry that stays
            refuse_not_finite(value, name, delta.path)
        for name, value in on_disk(tuned, unit).items():
            value = value.contiguous()
            before = source.read_stored(name)
            positions = (as_integers(value) != as_integers(before)).nonzero().view(-1)
            if len(positions):
                yield Patch(name, positions, before.view(-1)[positions], value.view(-1)[positions])


class Overlay:
    """A base with other values of some parameters, read as a `WeightSource` is. Safe to call from threads.

    value_of: parameter name -> its value in the base's dtype and shape, None if it is the base's.
    """

    def __init__(self, base: WeightSource, id: str, value_of: Callable[[str], Tensor | None]):
        self.base, self.id, self._value_of = base, id, value_of
        self._last: tuple[str, Tensor | None] = (
            "",
            None,
        )  # parts of one parameter are read one after another
        self._lock = threading.Lock()

    def dtype(self, name: str) -> torch.dtype:
        return self.base.dtype(name)

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        with self._lock:
            if self._last[0] != name:
                self._last = (name, self._value_of(name))
            value = self._last[1]
        return self.base.read_flat(name, start, stop) if value is None else value.reshape(-1)[start:stop]


def import_indices(base: Place, file: Place, out: Place) -> dict[str, Any]:
    """Make a delta of a base and a file of indices and values; returns its metadata.

    Raises ValueError for a file of another base, positions outside of a tensor or twice, values of another
    dtype or not finite.
    """
    path = Path(file).expanduser()
    source, _ = open_folder(base)
    header = read_header(path)
    changed = _checked_names(path, header, source)
    meta = header.metadata
    if "base_hash" in meta and content_hash(source) != meta["base_hash"]:
        raise ValueError(
            f"{path} was not made of {source.id}, which has other weights: give {meta.get('base')}"
        )
    unit_of = {name: unit for unit in source.units() for name in unit.parameters}

    def value_of(name: str) -> Tensor | None:
        return _patched(path, header, source, changed, unit_of[name], name)

    overlay = Overlay(source, str(path), value_of)
    run = {"tuned": meta.get("tuned", str(path)), "task": meta.get("task")}
    return write_changes(source, overlay, Path(out).expanduser(), run, tuned_hash=meta.get("tuned_hash"))


def _checked_names(path: Path, header: Header, source: WeightSource) -> set[str]:
    """The tensors that a file changes. Raises ValueError for parts that do not belong together or here."""
    parts = {name.rpartition(".")[::2] for name in header.entries}
    names = {name for name, _ in parts}
    if not names or parts != {(name, kind) for name in names for kind in ("indices", "values")}:
        raise ValueError(
            f"{path} is no file of indices: it needs NAME.indices and NAME.values of each tensor"
        )
    readable = {name for unit in source.units() for name in unit.stored}
    for name in sorted(names):
        indices, values = header.entries[f"{name}.indices"], header.entries[f"{name}.values"]
        if name not in readable:
            raise ValueError(f"{path} changes {name}, which {source.id} does not have")
        stored = source.stored[name]
        if values.dtype != stored.dtype or indices.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{path}: the values of {name} are {values.dtype} at {indices.dtype} indices, but "
                f"{source.id} has it as {stored.dtype}, and indices are int32 or int64"
            )
        if len(indices.shape) != 1 or indices.shape != values.shape or indices.numel > stored.numel:
            raise ValueError(
                f"{path}: {name} has indices {list(indices.shape)} and values {list(values.shape)} for "
                f"{stored.numel} entries"
            )
    return names


def _patched(
    path: Path, header: Header, source: WeightSource, changed: set[str], unit: ReadUnit, name: str
) -> Tensor | None:
    """A parameter with the file's values, None if the file changes nothing of it."""
    if changed.isdisjoint(unit.stored):
        return None

    def read(stored: str) -> Tensor:
        value = source.read_stored(stored)
        if stored in changed:
            indices, values = (_read(path, header, f"{stored}.{kind}") for kind in ("indices", "values"))
            _check_positions(path, stored, indices, value.numel())
            refuse_not_finite(values, stored, path)
            value.view(-1)[indices.long()] = values
        return value

    return read(unit.stored[0]) if unit.conversion is None else unit.conversion.apply(read)[name]


def _read(path: Path, header: Header, name: str) -> Tensor:
    entry = header.entries[name]
    data = bytearray(entry.numel * entry.dtype.itemsize)
    with open(path, "rb") as file:
        file.seek(entry.offset)
        file.readinto(data)
    return torch.frombuffer(data, dtype=entry.dtype) if data else torch.empty(0, dtype=entry.dtype)


def _check_positions(path: Path, name: str, indices: Tensor, numel: int) -> None:
    if not len(indices):
        return
    if int(indices.min()) < 0 or int(indices.max()) >= numel:
        raise ValueError(f"{path}: {name} has indices outside of its {numel} entries")
    seen = torch.zeros(numel, dtype=torch.bool)
    seen[indices.long()] = True
    if int(seen.sum()) != len(indices):
        raise ValueError(f"{path}: {name} has an index twice")
