"""The weight files of a model, and where each tensor lies in a safetensors file, without reading it.

The only reader and writer of safetensors headers; lota/models/policy.py indexes `torch.save` files.

A safetensors file: the header's length (8 bytes, little endian), the header as JSON, padded with blanks to 8
bytes, then the tensors without gaps. The header has an entry {dtype, shape, data_offsets} per tensor, offsets
counted from the end of the header, and may have `__metadata__`, a dict of strings.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lota.models.damaged import refuse_stranger
from lota.models.hub import refuse_absent
from lota.storage import parse_json

INSTALLING = ".conversion.installing"  # in a folder into which a conversion was moving its files
DELTA_FORMAT = "lota-delta"  # in the metadata of delta files, which are safetensors too
# Every dtype of safetensors whose entries are whole bytes; F4 and F6 are packed, and no tensor here has them.
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E8M0": torch.float8_e8m0fnu, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
}  # fmt: skip
FILE_DTYPES = frozenset(_DTYPES.values())
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file."""

    path: Path
    offset: int  # byte of the file at which its first entry begins
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None  # in entries, None if contiguous

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def span(self) -> int:
        """Entries between the first and the last one, both counted."""
        if self.stride is None or self.numel == 0:
            return self.numel
        return 1 + sum((d - 1) * s for d, s in zip(self.shape, self.stride, strict=True))


def checkpoint_files(path: str | os.PathLike[str]) -> tuple[list[Path], Path | None]:
    """The files that hold the weights, and the Hugging Face folder that they belong to (None: policy.pt).

    A hub id is fetched with huggingface_hub. Raises ValueError for a path that does not exist or holds
    no weights.
    """
    local = Path(path).expanduser()
    if local.is_file():
        refuse_delta(local)
        return [local], None
    refuse_absent(path)
    folder = local if local.is_dir() else _fetch(str(path))
    if (folder / INSTALLING).is_dir():
        raise ValueError(
            f"{folder} holds old and new files: a conversion was cut short while it moved its files there; "
            "run the same conversion again, which finishes it"
        )
    if files := _weight_files(folder):
        return files, folder
    if (folder / "policy.pt").is_file():
        return [folder / "policy.pt"], None
    raise ValueError(f"{folder} holds no weights: expected *.safetensors, pytorch_model.bin or policy.pt")


def has_weights(path: str | os.PathLike[str]) -> bool:
    """Whether a local folder holds weights; a hub id does."""
    local = Path(path).expanduser()
    return not local.is_dir() or bool(_weight_files(local))


def refuse_delta(path: Path) -> None:
    """Raise ValueError for a delta file in the place of a model."""
    if path.suffix == ".safetensors" and is_delta(path):
        raise ValueError(
            f"{path} is a delta file, which holds changes and no model: put it on its base first, with "
            f"convert_policy_to_hf_resize.py --model_path BASE --delta {path} --save_path FOLDER"
        )


def config_folder(path: str | os.PathLike[str]) -> Path | None:
    """The Hugging Face folder that `path` means, if it has a config.json. Errors: as `checkpoint_files`."""
    folder = checkpoint_files(path)[1]
    return folder if folder is not None and (folder / "config.json").is_file() else None


def _weight_files(folder: Path) -> list[Path]:
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{stem}.index.json"
        if index.is_file():
            try:
                weight_map = parse_json(index.read_bytes())["weight_map"]
                shards = sorted({_shard_name(shard) for shard in weight_map.values()})
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                refuse_stranger(index)
                raise ValueError(f"{index} is no index of weight shards: {error}") from error
            missing = [shard for shard in shards if not (folder / shard).is_file()]
            if missing:
                raise ValueError(f"{folder} lacks {len(missing)} of {len(shards)} shards: {missing[0]} ...")
            return [folder / shard for shard in shards]
        if (folder / stem).is_file():
            return [folder / stem]
    return safetensors_files(folder)


def _shard_name(name: object) -> str:
    """The name of a file beside the index. Raises ValueError for one that leads out of the folder."""
    if not isinstance(name, str) or name != PurePosixPath(name).name or "\\" in name or name in ("", ".."):
        raise ValueError(f"it names {name!r}, which is no file of its folder; download the index again")
    return name


def safetensors_files(folder: Path) -> list[Path]:
    """A folder's safetensors files that hold weights: delta files, which hold changes, are left out."""
    return [path for path in sorted(folder.glob("*.safetensors")) if not is_delta(path)]


def is_delta(path: Path) -> bool:
    """Whether the header says that this is a delta file; `lota.delta` checks its integrity."""
    try:
        return read_metadata(path).get("format") == DELTA_FORMAT
    except ValueError:
        return False


def _fetch(hub_id: str) -> Path:
    """Download a hub model's configuration and weights; safetensors if there are any."""
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


class Header(NamedTuple):
    """The header of a safetensors file."""

    metadata: dict[str, str]  # `__metadata__`, empty if there is none
    entries: dict[str, StoredTensor]  # by name, in the header's order
    data_start: int  # byte of the file at which the tensors begin


def read_header(path: Path) -> Header:
    """The header, every entry checked against the file's size. Raises ValueError naming a damaged file."""
    metadata, content, data_start = _read_json(path)
    size = path.stat().st_size
    entries: dict[str, StoredTensor] = {}
    for name, entry in content.items():
        try:
            entries[name] = _stored_tensor(path, data_start, size, entry)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is truncated or no safetensors file: {name}: {error}") from error
    ends = [data_start]  # of each tensor; safetensors lets no byte between or behind them be unused
    ordered = sorted(entries.values(), key=lambda tensor: (tensor.offset, tensor.numel))
    ends += [tensor.offset + tensor.numel * tensor.dtype.itemsize for tensor in ordered]
    if ends != [*(tensor.offset for tensor in ordered), size]:
        raise ValueError(
            f"{path} is damaged: its tensors do not fill the file, they overlap, or bytes follow them; copy "
            "or download it again"
        )
    return Header(metadata, entries, data_start)


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata alone; the file may be cut off behind its header. Raises ValueError naming the file."""
    return _read_json(path)[0]


def _read_json(path: Path) -> tuple[dict[str, str], dict[str, Any], int]:
    """(metadata, entries as they stand in the header, byte of the file at which the tensors begin)."""
    refuse_stranger(path)
    try:
        with open(path, "rb") as file:
            size, length = path.stat().st_size, int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError("its header does not fit into the file")
            content = parse_json(file.read(length), size)
        if not isinstance(content, dict):
            raise ValueError("its header is no dict")
        metadata = content.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("its metadata are no dict of strings")
    except ValueError as error:
        raise ValueError(
            f"{path} is truncated or no safetensors file: {error}; copy or download it again"
        ) from error
    return metadata, content, 8 + length


def _stored_tensor(path: Path, data_start: int, size: int, entry: Mapping[str, Any]) -> StoredTensor:
    """A header's entry, checked: whatever it says, no more is read than the file holds."""
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"its dtype {entry['dtype']} is not known")
    if not all(type(n) is int and n >= 0 for n in (*entry["shape"], *entry["data_offsets"])):
        raise ValueError("its shape and data_offsets are no whole numbers from 0 on")
    begin, end = entry["data_offsets"]
    tensor = StoredTensor(path, data_start + begin, _DTYPES[entry["dtype"]], tuple(entry["shape"]))
    if end - begin != tensor.numel * tensor.dtype.itemsize or end > size - data_start:
        raise ValueError("the tensor lies outside of the file")
    return tensor


class Shaped(Protocol):
    """What a header says of a tensor: a StoredTensor, or any torch tensor, such as one on the meta device."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> Sequence[int]: ...


def header_bytes(
    tensors: Mapping[str, Shaped], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """(first bytes of a safetensors file, name -> byte of the file at which its tensor begins).

    tensors: in the order in which they will lie. Raises ValueError for a dtype that such files cannot hold.
    """
    content: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begins, end = {}, 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPE_NAMES:
            raise ValueError(f"{name} is {tensor.dtype}, which a safetensors file cannot hold")
        begins[name], end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        content[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begins[name], end],
        }
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    text = len(text).to_bytes(8, "little") + text
    return text, {name: len(text) + begin for name, begin in begins.items()}


@contextlib.contextmanager
def new_safetensors(
    path: Path, tensors: Mapping[str, Shaped], metadata: Mapping[str, str] | None = None
) -> Iterator[Callable[[str, Tensor], None]]:
    """A new safetensors file; yields put(name, value), to be called once for each name, in any order.

    Values are cast to the dtype of `tensors`, which need no memory, and written at once: safetensors' own
    save_file wants all of them at the same time. Raises ValueError for a dtype that such files cannot hold.
    """
    try:
        header, begins = header_bytes(tensors, metadata)
    except ValueError as error:
        raise ValueError(f"{path} cannot be written: {error}") from error

    def put(name: str, value: Tensor) -> None:
        value = value.to(tensors[name].dtype).contiguous()
        assert tuple(value.shape) == tuple(tensors[name].shape), name
        file.seek(begins.pop(name))
        file.write(value.reshape(-1).view(torch.uint8).numpy().data)

    with open(path, "xb") as file:
        file.write(header)
        yield put
        assert not begins, f"never written: {list(begins)[:5]}"
