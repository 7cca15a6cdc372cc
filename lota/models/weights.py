"""Weights on disk, read piece by piece under the loaded model's parameter names.

Plain reads at a position in the file: a mapped page counts as memory of the process, a read into a small
buffer does not.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lota.models.key_mapping import Conversion, translate
from lota.models.policy import index_torch_file
from lota.models.scope import meta_model
from lota.models.tensor_files import Shaped, StoredTensor, checkpoint_files, config_folder, read_header
from lota.utils import first_few

if TYPE_CHECKING:
    from transformers import PreTrainedModel


FileState = tuple[int, int, int]  # inode, bytes, time of change in ns


@dataclass
class ReadUnit:
    """Parameters and the stored tensors that they are read from: one of each, or those of a conversion."""

    parameters: list[str]
    stored: list[str]
    conversion: Conversion | None = None

    @property
    def converted(self) -> bool:
        return self.conversion is not None


class WeightSource:
    """The weights of one model on disk; made by `open_weights`. Reading is safe from several threads."""

    def __init__(
        self,
        id: str,
        stored: Mapping[str, StoredTensor],
        origins: Mapping[str, str | Conversion],
        strange: Mapping[str, tuple[int, ...]] | None = None,
        states: Mapping[Path, FileState] | None = None,
    ):
        self.id = id  # the path or hub id that was opened
        self.strange = dict(strange or {})  # stored name -> shape of what the model has no place for
        self.buffers: dict[str, str] = {}  # name of a buffer -> its stored name
        self.stored = dict(stored)  # stored name -> place in its file, parameters or not
        self._origins = dict(origins)  # parameter name -> its stored name, or what makes it of several
        self._files: dict[Path, int] = {}  # open files' handles
        self._states = dict(states or {})  # what the files were when their headers were read
        self._converted: tuple[Conversion | None, dict[str, Tensor]] = (None, {})  # the last one converted
        self._lock = threading.RLock()
        self.close = weakref.finalize(self, _close_all, self._files)

    def __repr__(self) -> str:
        return f"WeightSource({self.id!r}, {len(self._origins)} tensors)"

    def __contains__(self, name: str) -> bool:
        return name in self._origins

    def names(self) -> list[str]:
        """Parameter names of the loaded model in its order, a tied one once."""
        return list(self._origins)

    @property
    def files(self) -> list[Path]:
        """Of all its tensors, sorted."""
        return sorted({tensor.path for tensor in self.stored.values()})

    def file_of(self, name: str) -> Path:
        """The file that a parameter is read from, or the first of them."""
        return self.stored[_stored_names(self._origins[name])[0]].path

    @property
    def unused(self) -> dict[str, tuple[int, ...]]:
        """Stored names and shapes from which no parameter is read: buffers, or another model's."""
        used = {name for unit in self.units() for name in unit.stored}
        return {name: tensor.shape for name, tensor in self.stored.items() if name not in used}

    def units(self) -> list[ReadUnit]:
        """Which stored tensors belong to which parameters, in the order of names."""
        found: dict[str | Conversion, ReadUnit] = {}
        for name, origin in self._origins.items():
            if isinstance(origin, str):
                found[origin] = ReadUnit([name], [origin])
            else:
                unit = ReadUnit([], origin.stored_names, origin)
                found.setdefault(origin, unit).parameters.append(name)
        return list(found.values())

    @property
    def n_entries(self) -> int:
        """Of all parameters."""
        return sum(self.numel(name) for name in self._origins)

    @property
    def main_dtype(self) -> torch.dtype:
        """The dtype of most entries."""
        entries: Counter[torch.dtype] = Counter()
        for name in self._origins:
            entries[self.dtype(name)] += self.numel(name)
        return entries.most_common(1)[0][0]

    def shape(self, name: str) -> tuple[int, ...]:
        """The parameter's shape in the loaded model."""
        return tuple(self._form(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        """The parameter's dtype in the file."""
        return self._form(name).dtype

    def _form(self, name: str) -> Shaped:
        origin = self._origins[name]
        return self.stored[origin] if isinstance(origin, str) else origin.results[name]

    def numel(self, name: str) -> int:
        """Entries of the parameter."""
        return math.prod(self.shape(name))

    def read(self, name: str) -> Tensor:
        """One parameter in its own memory, the file's dtype."""
        return self.read_flat(name, 0, self.numel(name)).reshape(self.shape(name))

    def read_flat(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> Tensor:
        """Entries [start, stop) of the flattened parameter: 1-D, the file's dtype.

        In its own memory, or, if that saves a copy, in `out` (uint8, as many bytes as asked for).
        """
        origin = self._origins[name]
        if isinstance(origin, str):
            return self._read_part(self.stored[origin], start, stop, out)
        with self._lock:
            spans = origin.row_spans.get(name)
        if spans is None:
            return self._convert(origin)[name].reshape(-1)[start:stop].clone()
        # Of every span its overlap with [start, stop), at the place in the file that the span says.
        parts = []
        for span in spans:
            low, high = max(start, span.start), min(stop, span.start + span.length)
            if low < high:
                shift = span.source_start - span.start  # from positions in the parameter to those in the file
                parts.append(self._read_part(self.stored[span.source], low + shift, high + shift))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def read_stored(self, name: str) -> Tensor:
        """One tensor under its name in the file, in its own memory."""
        tensor = self.stored[name]
        return self._read_part(tensor, 0, tensor.numel).reshape(tensor.shape)

    def _convert(self, conversion: Conversion) -> dict[str, Tensor]:
        """Parameters through transformers' conversion; the last ones are remembered for the next part."""
        with self._lock:
            if self._converted[0] is not conversion:
                self._converted = (None, {})  # frees the memory of the last ones first
                self._converted = (conversion, conversion.apply(self.read_stored))
            return self._converted[1]

    def _read_part(
        self, tensor: StoredTensor, start: int, stop: int, out: np.ndarray | None = None
    ) -> Tensor:
        if tensor.stride is None:
            return self._read_bytes(tensor, start, stop, out)
        whole = self._read_bytes(tensor, 0, tensor.span)
        return whole.as_strided(tensor.shape, tensor.stride).reshape(-1)[start:stop].clone()

    def _read_bytes(
        self, tensor: StoredTensor, start: int, stop: int, out: np.ndarray | None = None
    ) -> Tensor:
        buffer = np.empty((stop - start) * tensor.dtype.itemsize, dtype=np.uint8) if out is None else out
        view, position = buffer.data, tensor.offset + start * tensor.dtype.itemsize
        with self._lock:
            handle = self._files.get(tensor.path)
            if handle is None:
                handle = self._files[tensor.path] = os.open(tensor.path, os.O_RDONLY)
                if self._states.get(tensor.path, state := _file_state(handle)) != state:
                    raise ValueError(
                        f"{tensor.path} was replaced while it was read: run the command again when nothing "
                        "writes there"
                    )
        while view:  # a read may stop short of what was asked for
            n_read = os.preadv(handle, [view], position)
            if n_read == 0:
                raise ValueError(f"{tensor.path} is truncated: it ends at byte {position}")
            view, position = view[n_read:], position + n_read
        if start == stop:  # NumPy's empty arrays have no stride that torch could view
            return torch.empty(0, dtype=tensor.dtype)
        return torch.from_numpy(buffer).view(tensor.dtype)


def open_weights(path: str | os.PathLike[str], model: PreTrainedModel | None = None) -> WeightSource:
    """Index the weights of a Hugging Face folder or hub id, a `policy.pt`, or a run folder that holds one.

    A folder with both Hugging Face weights and a `policy.pt` is read as a Hugging Face folder.
    model: a transformers model (meta device is enough) that gives the parameter names; by default a folder's
    own config does, and a lone `policy.pt` keeps its stored names. Raises ValueError for what does not
    exist, is truncated, or is no checkpoint.
    """
    files, folder = checkpoint_files(path)
    states = {file: _file_state(file) for file in files}  # of all, before the first header is read
    stored: dict[str, StoredTensor] = {}
    for file in files:
        index = read_header(file).entries if file.suffix == ".safetensors" else index_torch_file(file)
        stored.update(index)
    _refuse_scaled(path, stored)
    if model is None and folder is not None and config_folder(folder):
        model = meta_model(folder)
    if model is None:  # every stored tensor under its own name; of several names for the same bytes the first
        first = {tensor: name for name, tensor in reversed(stored.items())}
        own = {name: name for name in stored if first[stored[name]] == name}
        return WeightSource(str(path), stored, own, states=states)
    origins = translate(stored, model, loaded_names=folder is None)
    placed = {name for origin in origins.values() for name in _stored_names(origin)}
    strange = {name: tensor.shape for name, tensor in stored.items() if name not in placed}
    names_of: dict[int, list[str]] = {}  # of each parameter: a tied one is stored under any of its names
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name)
    held = {names[0]: [origins[name] for name in names if name in origins] for names in names_of.values()}
    first_of = {name: found[0] for name, found in held.items() if found}
    source = WeightSource(str(path), stored, first_of, strange, states)
    own_names = {name for names in names_of.values() for name in names}
    source.buffers = {n: o for n, o in origins.items() if isinstance(o, str) and n not in own_names}
    return source


def _file_state(file: Path | int) -> FileState:
    found = os.stat(file)
    return found.st_ino, found.st_size, found.st_mtime_ns


def _stored_names(origin: str | Conversion) -> list[str]:
    return [origin] if isinstance(origin, str) else origin.stored_names


def _refuse_scaled(path: str | os.PathLike[str], stored: Mapping[str, StoredTensor]) -> None:
    """Raise ValueError for 8-bit floats that are stored with scales: without them they are other numbers."""
    narrow = [n for n, t in stored.items() if t.dtype.is_floating_point and t.dtype.itemsize == 1]
    scales = [name for name in stored if "scale" in name.rpartition(".")[2]]
    if narrow and scales:
        raise ValueError(
            f"{path}: {narrow[0]} is {stored[narrow[0]].dtype} and has its scales in another tensor "
            f"({scales[0]}): give the model from before quantization, or load it with transformers, "
            "dequantize it and save_pretrained it"
        )


def all_finite(tensor: Tensor) -> bool:
    """Whether there is no NaN and no infinity. Memory: none, unless the sum is not finite."""
    if not tensor.is_floating_point():
        return True
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()  # torch computes little with fp8
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def refuse_not_finite(tensor: Tensor, name: str, source: object) -> None:
    """Raise ValueError for NaN or infinity in a parameter, which no model that was trained well has."""
    if not all_finite(tensor):
        raise ValueError(
            f"{source}: {name} holds NaN or infinity: the file is damaged, or the training that wrote it "
            "diverged; copy it again, or give an earlier checkpoint"
        )


def refuse_misfit(
    source: object,
    partner: object,
    expected: Mapping[str, tuple[int, ...]],
    held: Mapping[str, tuple[int, ...]],
    remedy: str = "",
) -> None:
    """Raise ValueError with the first few differences of each kind unless names and shapes are the same."""
    differences = {
        "missing there": [name for name in expected if name not in held],
        "only there": [name for name in held if name not in expected],
        "of another shape": [
            f"{name} {held[name]} instead of {expected[name]}"
            for name in expected
            if name in held and held[name] != expected[name]
        ],
    }
    lines = [f"  {len(n)} {kind}: {first_few(n, 4)}" for kind, n in differences.items() if n]
    if lines:
        last = [f"  {remedy}"] if remedy else []
        raise ValueError("\n".join([f"{source} does not belong to {partner}:", *lines, *last]))


def _close_all(files: dict[Path, int]) -> None:
    for handle in files.values():
        os.close(handle)
    files.clear()
