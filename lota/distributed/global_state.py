"""An optimizer's state of many processes on disk, in global coordinates: read again by any number of them.

Each trained parameter has, under `name/buffer`, one tensor (kept,) of all its kept entries in the order of
their positions in the whole parameter. A process writes the stretch of it that belongs to its part, and reads
that of the part that it has now, through torch.distributed.checkpoint.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from lota.distributed.processes import Processes, ProcessLost
from lota.optim.kept import Tiles
from lota.optim.masked import MaskedOptimizer


@dataclass(frozen=True)
class Stretch:
    """Where the kept entries of a part stand among those of the whole parameter."""

    before: int
    total: int


def stretches(optimizer: MaskedOptimizer, processes: Processes, holders: list[int]) -> dict[str, Stretch]:
    """Of each trained parameter's part in this process.

    holders: ranks of the processes that hold the model together with this one, in the order of their parts.
    """
    counts = processes.gather({name: optimizer.kept[p].count for p, name in optimizer.names.items()})
    earlier = holders[: holders.index(processes.rank)]
    return {
        name: Stretch(
            sum(counts[rank][name] for rank in earlier), sum(counts[rank][name] for rank in holders)
        )
        for name in optimizer.names.values()
    }


class _Slice(torch.Tensor):
    """A stretch of a 1-D tensor of which other processes have the rest, as torch's checkpoints ask for it."""

    stretch: Stretch
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(cls, values: Tensor, stretch: Stretch) -> _Slice:
        made = values.as_subclass(cls)
        made.stretch = stretch
        return made

    def size(self) -> torch.Size:  # type: ignore[override]  # of the whole, which torch compares
        return torch.Size([self.stretch.total])

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk,
                    properties=TensorProperties.create_from_tensor(self.as_subclass(torch.Tensor)),
                    size=self.size(),
                ),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        if not len(self):
            return []
        return [ChunkStorageMetadata(torch.Size([self.stretch.before]), torch.Size([len(self)]))]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.as_subclass(torch.Tensor)


def save_state(
    optimizer: MaskedOptimizer, places: Mapping[str, Stretch], folder: Path, processes: Processes
) -> dict[str, Any]:
    """Write masters and buffers into a folder that is not there yet; all processes call this.

    places: of `stretches`. Returns the rest of the state, plain values that are the same on each process.
    """
    buffers = {}
    for p, name, key, value in _buffers(optimizer):
        ascending = value if _order(optimizer, p) is None else value[_order(optimizer, p)]
        buffers[f"{name}/{key}"] = _placed(ascending, places[name], optimizer.kept[p].count)
    writer = FileSystemWriter(folder, single_file_per_rank=True, sync_files=True)
    _together(lambda: save(buffers, storage_writer=writer, no_dist=processes.count == 1))
    return {
        "param_groups": [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ],
        "steps": {name: optimizer.state[p]["step"] for p, name in optimizer.names.items()},
    }


def load_state(
    optimizer: MaskedOptimizer,
    rest: dict[str, Any],
    places: Mapping[str, Stretch],
    folder: Path,
    processes: Processes,
) -> None:
    """Read what `save_state` wrote, by however many processes; `rest` is what it returned.

    Raises ValueError if it is the state of another mask, other parameters or another update rule.
    """
    reader = _Reader(folder)
    stored, found = reader.read_metadata().state_dict_metadata, {}
    for p, name, key, value in _buffers(optimizer):
        fqn = f"{name}/{key}"
        target = _placed(torch.empty_like(value), places[name], optimizer.kept[p].count)
        size = target.stretch.total if isinstance(target, _Slice) else tuple(target.shape)
        _check(fqn, stored.get(fqn), (size,) if isinstance(size, int) else size, value.dtype)
        found[fqn] = target
    strange = sorted({*stored} - {*found} | {*rest["steps"]} ^ {*optimizer.names.values()})
    if strange:
        raise ValueError(f"{folder} holds the optimizer state of other parameters: {strange[0]} ...")
    _together(lambda: load(found, storage_reader=reader, no_dist=processes.count == 1))
    for p, name, key, value in _buffers(optimizer):
        read, order = found[f"{name}/{key}"].as_subclass(torch.Tensor), _order(optimizer, p)
        if order is None:
            value.copy_(read)
        else:
            value[order] = read
    for p, name in optimizer.names.items():
        optimizer.state[p]["step"] = rest["steps"][name]
    for group, saved in zip(optimizer.param_groups, rest["param_groups"], strict=True):
        group.update(saved)


def _buffers(optimizer: MaskedOptimizer) -> Iterator[tuple[nn.Parameter, str, str, Tensor]]:
    """(parameter, its name, key, tensor) of all state but the positions, which the mask tells."""
    for p, name in optimizer.names.items():
        for key, value in optimizer.state[p].items():
            if torch.is_tensor(value) and key not in optimizer.kept[p].state:
                yield p, name, key, value


def _placed(values: Tensor, stretch: Stretch, count: int) -> Tensor:
    """The values with their place; whole ones, such as means of rows and columns, as they are."""
    return _Slice.of(values, stretch) if values.shape == (count,) else values


def _order(optimizer: MaskedOptimizer, p: nn.Parameter) -> Tensor | None:
    """Which value stands at each place if they are ordered by position; None if they are."""
    kept = optimizer.kept[p]
    return kept.positions().argsort() if isinstance(kept, Tiles) else None


def _check(name: str, stored: object, size: tuple[int, ...], dtype: torch.dtype) -> None:
    if not isinstance(stored, TensorStorageMetadata):
        raise ValueError(f"optimizer state of {name} is missing: it belongs to another update rule")
    if (tuple(stored.size), stored.properties.dtype) != (size, dtype):
        other = "mask" if tuple(stored.size) != size else "optimizer_state"
        raise ValueError(
            f"optimizer state of {name} is {tuple(stored.size)} {stored.properties.dtype}, expected {size} "
            f"{dtype}: it belongs to another {other}"
        )


def _together(act: Callable[[], object]) -> None:
    """Tell an error of one process as what it is; torch hands all of them to each process."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process
            act()
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        if isinstance(first, OSError):
            raise first from error
        raise ProcessLost(str(first)) from error


class _Reader(FileSystemReader):
    """Reads a checkpoint's list of contents, a pickle, without running what a stranger put into it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        try:
            with open(Path(self.path) / ".metadata", "rb") as file:
                metadata = _Unpickler(file).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, LookupError, TypeError) as error:
            raise ValueError(
                f"{self.path} is damaged ({error}): use an earlier checkpoint of the run"
            ) from error
        assert isinstance(metadata, Metadata)
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    """Of what the metadata of torch's checkpoints are made of, and nothing else."""

    METADATA = (
        "Metadata", "MetadataIndex", "StorageMeta", "ChunkStorageMetadata", "TensorStorageMetadata",
        "TensorProperties", "_MEM_FORMAT_ENCODING",
    )  # fmt: skip
    KNOWN = frozenset(
        {
            *(("torch.distributed.checkpoint.metadata", name) for name in METADATA),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("pathlib", "PosixPath"),
            ("pathlib._local", "PosixPath"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in self.KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint holds")
        return super().find_class(module, name)
