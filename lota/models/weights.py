"""Weights on disk, read piece by piece under the loaded model's parameter names.

Plain reads at a position in the file: a mapped page counts as memory of the process, a read into a small
buffer does not.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lota.models.key_mapping import Conversion, Run, Target, row_runs, translate
from lota.models.tensor_files import StoredTensor, checkpoint_files, index_torch_file, read_header

HASH_CHUNK = 1 << 20  # entries


class Group(NamedTuple):
    """Parameters and the stored tensors that they are read from: one of each, or those of a conversion."""

    parameters: list[str]
    stored: list[str]
    converted: bool


class WeightSource:
    """The weights of one model on disk; made by `open_weights`. Reading is safe from several threads."""

    def __init__(self, id: str, stored: Mapping[str, StoredTensor], targets: Mapping[str, Target]):
        self.id = id
        self._stored = dict(stored)
        self._targets = dict(targets)
        self._files: dict[Path, int] = {}
        self._runs: dict[str, list[Run] | None] = {}
        self._converted: tuple[Conversion | None, dict[str, Tensor]] = (None, {})
        self._lock = threading.RLock()
        self.close = weakref.finalize(self, _close_all, self._files)

    def __repr__(self) -> str:
        return f"WeightSource({self.id!r}, {len(self._targets)} tensors)"

    def __contains__(self, name: str) -> bool:
        return name in self._targets

    def names(self) -> list[str]:
        """Parameter names of the loaded model in its order, a tied one once."""
        return list(self._targets)

    @property
    def unused(self) -> dict[str, tuple[int, ...]]:
        """Stored names (of whatever shape) from which no parameter is read: buffers, or another model's."""
        used = {target.source for target in self._targets.values()}
        for target in self._targets.values():
            used.update(name for name, _ in target.conversion.sources) if target.conversion else None
        return {name: tensor.shape for name, tensor in self._stored.items() if name not in used}

    @property
    def stored(self) -> dict[str, StoredTensor]:
        """Stored name -> place in its file, parameters or not."""
        return dict(self._stored)

    def groups(self) -> list[Group]:
        """Which stored tensors belong to which parameters, in the order of names."""
        found: dict[int | str, Group] = {}
        for name, target in self._targets.items():
            if target.conversion is None:
                found[name] = Group([name], [target.source], converted=False)
            else:
                sources = [source for source, _ in target.conversion.sources]
                group = found.setdefault(id(target.conversion), Group([], sources, converted=True))
                group.parameters.append(name)
        return list(found.values())

    def read_stored(self, name: str) -> Tensor:
        """One tensor under its name in the file, in its own memory."""
        tensor = self._stored[name]
        return self._read_stored(name, 0, tensor.numel).reshape(tensor.shape)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._targets[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """As in the file."""
        return self._targets[name].dtype

    def numel(self, name: str) -> int:
        return math.prod(self.shape(name))

    def read(self, name: str) -> Tensor:
        """One parameter in its own memory, the file's dtype."""
        return self.read_flat(name, 0, self.numel(name)).reshape(self.shape(name))

    def read_flat(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> Tensor:
        """Entries [start, stop) of the flattened parameter: 1-D, the file's dtype.

        In its own memory, or, where that saves a copy, in `out` (uint8, as many bytes as asked for).
        """
        target = self._targets[name]
        if target.source is not None:
            return self._read_stored(target.source, start, stop, out)
        runs = self._row_runs(name)
        if runs is None:
            return self._convert(name).reshape(-1)[start:stop].clone()
        parts = []
        for run in runs:
            low, high = max(start, run.start), min(stop, run.start + run.length)
            if low < high:
                shift = run.source_start - run.start
                parts.append(self._read_stored(run.source, low + shift, high + shift))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _row_runs(self, name: str) -> list[Run] | None:
        with self._lock:
            if name not in self._runs:
                conversion = self._targets[name].conversion
                runs = row_runs(conversion, self._stored) or {}
                self._runs.update({target: runs.get(target) for target in self._targets_of(conversion)})
            return self._runs[name]

    def _targets_of(self, conversion: Conversion) -> list[str]:
        return [name for name, target in self._targets.items() if target.conversion is conversion]

    def _convert(self, name: str) -> Tensor:
        """A parameter through transformers' conversion; the last one is remembered for the next part."""
        with self._lock:
            conversion = self._targets[name].conversion
            if self._converted[0] is not conversion:
                self._converted = (None, {})
                results = conversion.apply(
                    lambda stored: self._read_stored(stored, 0, self._stored[stored].numel).reshape(
                        self._stored[stored].shape
                    )
                )
                self._converted = (conversion, results)
            return self._converted[1][name]

    def _read_stored(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> Tensor:
        tensor = self._stored[name]
        if tensor.stride is not None:
            whole = self._read_bytes(tensor, 0, tensor.span)
            return whole.as_strided(tensor.shape, tensor.stride).reshape(-1)[start:stop].clone()
        return self._read_bytes(tensor, start, stop, out)

    def _read_bytes(
        self, tensor: StoredTensor, start: int, stop: int, out: np.ndarray | None = None
    ) -> Tensor:
        buffer = np.empty((stop - start) * tensor.dtype.itemsize, dtype=np.uint8) if out is None else out
        view, position = memoryview(buffer), tensor.offset + start * tensor.dtype.itemsize
        while view:
            n_read = os.preadv(self._handle(tensor.path), [view], position)
            if n_read == 0:
                raise ValueError(f"{tensor.path} is truncated: it ends at byte {position}")
            view, position = view[n_read:], position + n_read
        return torch.from_numpy(buffer).view(tensor.dtype)

    def _handle(self, path: Path) -> int:
        with self._lock:
            if path not in self._files:
                self._files[path] = os.open(path, os.O_RDONLY)
            return self._files[path]


def open_weights(path: str | os.PathLike, model: nn.Module | None = None) -> WeightSource:
    """Index the weights of a Hugging Face folder or hub id, a `policy.pt`, or a run folder that holds one.

    A folder with both Hugging Face weights and a `policy.pt` is read as a Hugging Face folder.
    model: a transformers model (meta device is enough) that gives the parameter names; by default a folder's
    own config does, and a lone `policy.pt` keeps its stored names. Raises ValueError for what does not
    exist, is truncated, or is no checkpoint.
    """
    files, folder = checkpoint_files(path)
    stored: dict[str, StoredTensor] = {}
    for file in files:
        index = read_header(file).entries if file.suffix == ".safetensors" else index_torch_file(file)
        stored.update(index)
    if model is None and folder is not None and (folder / "config.json").is_file():
        from lota.models.scope import meta_model

        model = meta_model(folder)
    if model is None:
        return WeightSource(str(path), stored, _untied(stored))
    targets = translate(stored, model, loaded_names=folder is None)
    return WeightSource(str(path), stored, _parameters(targets, model))


def _parameters(targets: Mapping[str, Target], model: nn.Module) -> dict[str, Target]:
    """The targets of `named_parameters()`; a tied parameter may be stored under any of its names."""
    names_of: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name)
    found = {}
    for names in names_of.values():
        stored = next((name for name in names if name in targets), None)
        if stored is not None:
            found[names[0]] = targets[stored]
    return found


def _untied(stored: Mapping[str, StoredTensor]) -> dict[str, Target]:
    """Every stored tensor under its own name; of several names for the same bytes the first."""
    seen: set[StoredTensor] = set()
    targets = {}
    for name, tensor in stored.items():
        if tensor not in seen:
            targets[name] = Target(tensor.shape, tensor.dtype, source=name)
        seen.add(tensor)
    return targets


def _close_all(files: dict[Path, int]) -> None:
    for handle in files.values():
        os.close(handle)
    files.clear()
