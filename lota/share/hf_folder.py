"""Hugging Face folders: the dtypes and small files of one that exists, and writing a new one whole or not."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from lota.models.policy import tied_names
from lota.models.provenance import RECORD
from lota.models.tensor_files import index_safetensors, safetensors_files
from lota.utils import TEMPORARY_SUFFIX, flush_to_disk, fsync, remove

_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*",
)


def disk_dtypes(
    name_or_path: str | Path, config: PreTrainedConfig
) -> tuple[torch.dtype, dict[str, torch.dtype]]:
    """(dtype of most entries, {name on disk: dtype}) of a local folder's floating-point weights.

    A hub id or a folder without safetensors: what its config declares (float32 where it does not), and {}.
    """
    entries: Counter[torch.dtype] = Counter()
    dtypes = {}
    for file in safetensors_files(Path(name_or_path).expanduser()):
        for name, tensor in index_safetensors(file).items():
            if tensor.dtype.is_floating_point:
                dtypes[name] = tensor.dtype
                entries[tensor.dtype] += tensor.numel
    if not entries:
        return config.dtype or torch.float32, {}
    return entries.most_common(1)[0][0], dtypes


def copy_small_files(name_or_path: str | Path, patterns: tuple[str, ...], to: Path) -> None:
    """Copy the files of a local folder or hub id that match `patterns`, byte for byte."""
    source = Path(name_or_path).expanduser()
    if not source.is_dir():
        source = Path(snapshot_download(str(name_or_path), allow_patterns=list(patterns)))
    for pattern in patterns:
        for file in source.glob(pattern):
            destination = to / file.relative_to(source)
            destination.parent.mkdir(exist_ok=True)
            if file.is_file():
                shutil.copyfile(file, destination)


def write_weights(
    model: PreTrainedModel,
    folder: Path,
    dtype: torch.dtype,
    dtypes: Mapping[str, torch.dtype],
    max_shard_size: str,
) -> None:
    """Write the model's tensors under their names on disk, in `dtypes[name]` where given, else `dtype`.

    A tied weight is written once. Extra memory: one tensor. Raises OSError when the disk is full.
    """
    ignored = {*tied_names(model), *(model._keys_to_ignore_on_save or ())}
    state = {name: value.detach() for name, value in model.state_dict().items() if name not in ignored}
    state = revert_weight_conversion(model, state)
    wanted = {k: dtypes.get(k, dtype) if v.is_floating_point() else v.dtype for k, v in state.items()}
    shapes = {k: torch.empty(v.shape, dtype=wanted[k], device="meta") for k, v in state.items()}
    for file, names in plan_shards(shapes, folder, max_shard_size).items():
        _write_safetensors(folder / file, {name: shapes[name] for name in names}, state)


def check_shard_size(max_shard_size: str) -> None:
    """Raise ValueError for what is no size of a file."""
    try:
        split_torch_state_dict_into_shards({}, max_shard_size=max_shard_size)
    except (ValueError, KeyError) as error:
        raise ValueError(f"--max_shard_size {max_shard_size}: give a size such as 500MB or 2GB") from error


def plan_shards(
    shapes: Mapping[str, torch.Tensor], folder: Path, max_shard_size: str
) -> dict[str, list[str]]:
    """File -> names of the tensors (meta ones will do) to write into it; with several, writes the index."""
    plan = split_torch_state_dict_into_shards(
        dict(shapes), filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return plan.filename_to_tensors


def _write_safetensors(
    path: Path, shapes: Mapping[str, torch.Tensor], state: dict[str, torch.Tensor]
) -> None:
    """Write the tensors of `state` named in `shapes` (meta tensors of the dtype to write), one by one.

    safetensors' own save_file takes tensors that are all in memory in their final dtype, half a model more
    for float32 weights written as bfloat16. Format: length of the header (8 bytes, little endian), header as
    JSON padded with blanks to 8 bytes, tensors without gaps.
    """
    header, _ = safetensors_header(shapes)
    with open(path, "wb") as file:
        file.write(header)
        for name, shape in shapes.items():
            value = state.pop(name).to(shape.dtype).contiguous()
            file.write(value.reshape(-1).view(torch.uint8).numpy())


def safetensors_header(tensors: Mapping[str, torch.Tensor]) -> tuple[bytes, dict[str, int]]:
    """(first bytes of a safetensors file, name -> byte at which its tensor begins).

    tensors: anything with dtype and shape, such as meta tensors, in the order in which they will lie.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    begins, end = {}, 0
    for name, tensor in tensors.items():
        begins[name], end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {
            "dtype": _TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begins[name], end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    text = len(text).to_bytes(8, "little") + text
    return text, {name: len(text) + begin for name, begin in begins.items()}


def write_config(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """config.json with the model's class and dtype."""
    model.config.dtype = dtype
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)


def check_replaceable(folder: Path, base: str | Path, option: str = "--save_path") -> None:
    """Raise ValueError when `folder` is the base, or holds a model that no conversion wrote."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{option} {folder} is a file: name a folder")
    if folder == Path(base).expanduser().resolve():
        raise ValueError(
            f"{option} {folder} is the base itself and would be overwritten: name another folder"
        )
    models = [*safetensors_files(folder), *folder.glob("config.json")]
    if models and not (folder / RECORD).is_file():
        raise ValueError(
            f"{option} {folder} holds a model ({models[0].name}) that no conversion wrote, and it would be"
            " overwritten: name another folder"
        )


@contextlib.contextmanager
def new_model_files(folder: Path, record: dict) -> Iterator[Path]:
    """Yield an empty folder inside `folder`; if the block succeeds its files move up, else nothing changes.

    The files of an earlier conversion are replaced, all others stay. config.json goes first and comes last,
    so that a move cut short leaves a folder that no loader accepts, and that the next conversion repairs.
    """
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    staged = folder / f".conversion{TEMPORARY_SUFFIX}"
    remove(staged)
    staged.mkdir()
    try:
        yield staged
        files = sorted(path.name for path in staged.iterdir())
        (staged / RECORD).write_text(
            json.dumps({**record, "files": files}, indent=2) + "\n", encoding="utf-8"
        )
        flush_to_disk(staged)
        _install(staged, folder)
    except BaseException:
        remove(staged)
        if created:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _install(staged: Path, folder: Path) -> None:
    """Move the entries of `staged` up into `folder` in place of the ones that its RECORD lists."""
    before = folder / RECORD
    stale = json.loads(before.read_text(encoding="utf-8"))["files"] if before.is_file() else []
    remove(folder / "config.json")
    os.replace(staged / RECORD, before)
    for name in stale:
        remove(folder / Path(name).name)
    for entry in sorted(staged.iterdir(), key=lambda path: path.name == "config.json"):
        remove(folder / entry.name)
        os.replace(entry, folder / entry.name)
    staged.rmdir()
    fsync(folder)
