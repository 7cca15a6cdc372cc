"""Weight files, indexed: where in which file each tensor lies, without reading it.

Safetensors folders (one or many shards), `pytorch_model.bin`, `policy.pt` and other `torch.save` files.
"""

from __future__ import annotations

import json
import math
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lota.utils import torch_reason

DELTA_FORMAT = "lota-delta"  # in the metadata of delta files, which are safetensors too
_SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
}  # fmt: skip
_UNREADABLE = (
    RuntimeError,
    OSError,
    EOFError,
    KeyError,
    ValueError,
    TypeError,
    pickle.UnpicklingError,
    LookupError,
    AttributeError,
)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. offset: byte of its first entry; stride: entries, None where contiguous."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def span(self) -> int:
        """Entries between the first and the last one, both counted."""
        if self.stride is None or self.numel == 0:
            return self.numel
        return 1 + sum((d - 1) * s for d, s in zip(self.shape, self.stride, strict=True))


def checkpoint_files(path: str | os.PathLike) -> tuple[list[Path], Path | None]:
    """The files that hold the weights, and the Hugging Face folder that they belong to (None: policy.pt).

    A hub id is fetched with huggingface_hub. Raises ValueError for a path that does not exist or holds
    no weights.
    """
    local = Path(path).expanduser()
    if local.is_file():
        return [local], None
    if local.is_dir():
        folder = local
    elif _looks_like_hub_id(str(path)):
        folder = _fetch(str(path))
    else:
        raise ValueError(f"{path} does not exist: give a Hugging Face folder, a hub id or a policy.pt")
    files = _weight_files(folder)
    if files:
        return files, folder
    if (folder / "policy.pt").is_file():
        return [folder / "policy.pt"], None
    raise ValueError(f"{folder} holds no weights: expected *.safetensors, pytorch_model.bin or policy.pt")


def _weight_files(folder: Path) -> list[Path]:
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{stem}.index.json"
        if index.is_file():
            try:
                shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{index} is no index of weight shards: {error}") from error
            missing = [shard for shard in shards if not (folder / shard).is_file()]
            if missing:
                raise ValueError(f"{folder} lacks {len(missing)} of {len(shards)} shards: {missing[0]} ...")
            return [folder / shard for shard in shards]
        if (folder / stem).is_file():
            return [folder / stem]
    return safetensors_files(folder)


def safetensors_files(folder: Path) -> list[Path]:
    """A folder's safetensors files that hold weights: delta files, which hold changes, are left out."""
    return [path for path in sorted(folder.glob("*.safetensors")) if not is_delta(path)]


def is_delta(path: Path) -> bool:
    """Whether the header says that this is a delta file; whether it is whole, `lota.delta` finds out."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if 2 <= length <= path.stat().st_size - 8 else b""
    try:
        return json.loads(text)["__metadata__"]["format"] == DELTA_FORMAT
    except (ValueError, KeyError, TypeError):
        return False


def _looks_like_hub_id(path: str) -> bool:
    return path.count("/") <= 1 and not path.startswith((".", "/", "~")) and not path.endswith((".pt", "/"))


def _fetch(hub_id: str) -> Path:
    """Download a hub model's configuration and weights; safetensors where there are any."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=["*.json", "model*.safetensors"]))
        if not _weight_files(folder):
            folder = Path(snapshot_download(hub_id, allow_patterns=["*.json", "pytorch_model*.bin"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{hub_id} is neither a folder here nor a model that the hub gives: {error}"
        ) from error
    return folder


def index_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Name -> place in the file, from the file's header. Raises ValueError naming a damaged file."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError("its header does not fit into the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {name: _safetensors_entry(path, 8 + length, size, entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error


def _safetensors_entry(path: Path, data_start: int, size: int, entry: Mapping[str, Any]) -> StoredTensor:
    if entry["dtype"] not in _SAFETENSORS_DTYPES:
        raise ValueError(f"dtype {entry['dtype']} is not known")
    begin, end = entry["data_offsets"]
    tensor = StoredTensor(
        path, data_start + begin, _SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"])
    )
    if end - begin != tensor.numel * tensor.dtype.itemsize or not 0 <= begin <= end <= size - data_start:
        raise ValueError("a tensor lies outside of the file")
    return tensor


def index_torch_file(path: Path) -> dict[str, StoredTensor]:
    """Name -> place in a `torch.save` file: {step_idx, state, metrics}, or a plain state dict.

    The file is unpickled (weights only) without its data: under FakeTensorMode a storage knows its place in
    the file (torch's notes on serialization). Raises ValueError naming a damaged or unsafe file.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with FakeTensorMode():
            content = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise ValueError(
            f"{path} cannot be read: it is truncated, in the layout of before torch 1.6, or holds more than "
            f"plain tensors and numbers. torch says: {torch_reason(error)}"
        ) from error
    state = content.get("state", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} is no checkpoint: expected {{step_idx, state, metrics}} or a state dict")
    from lota.models.policy import unwrapped

    size = path.stat().st_size
    index: dict[str, StoredTensor] = {}
    for wrapped, value in state.items():
        name = unwrapped(wrapped)
        if name in index:
            raise ValueError(f"{path}: two tensors are both called {name} once wrapper names are removed")
        place = value.untyped_storage()._checkpoint_offset + value.storage_offset() * value.dtype.itemsize
        stride = None if value.is_contiguous() else tuple(value.stride())
        index[name] = StoredTensor(path, place, value.dtype, tuple(value.shape), stride)
        if place + index[name].span * value.dtype.itemsize > size:
            raise ValueError(f"{path} is truncated: {name} lies outside of the file")
    return index
