"""Hugging Face folders: the dtypes and small files of one that exists, and writing a new one whole or not."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import PreTrainedConfig

from lota.models.provenance import RECORD
from lota.models.tensor_files import read_header, safetensors_files
from lota.storage import TEMPORARY_SUFFIX, flush_to_disk, fsync, remove

CONFIG_FILES = ("config.json", "generation_config.json")
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

    A hub id or a folder without safetensors: what its config declares (float32 if it does not), and {}.
    """
    entries: Counter[torch.dtype] = Counter()
    dtypes = {}
    for file in safetensors_files(Path(name_or_path).expanduser()):
        for name, tensor in read_header(file).entries.items():
            if tensor.dtype.is_floating_point:
                dtypes[name] = tensor.dtype
                entries[tensor.dtype] += tensor.numel
    if not entries:
        declared = config.dtype
        return declared if isinstance(declared, torch.dtype) else torch.float32, {}
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


def check_replaceable(argument: str, folder: Path, base: str | os.PathLike[str]) -> None:
    """Raise ValueError when `folder` is the base, or holds a model that no conversion wrote.

    argument: what gave the folder, for the error.
    """
    models = [*safetensors_files(folder), *folder.glob("config.json")]
    problem = None
    if folder.exists() and not folder.is_dir():
        problem = "is a file: name a folder"
    elif folder == Path(base).expanduser().resolve():
        problem = "is the base itself and would be overwritten: name another folder"
    elif models and not (folder / RECORD).is_file():
        problem = f"holds a model ({models[0].name}) that no conversion wrote, and it would be"
        problem += " overwritten: name another folder"
    if problem is not None:
        raise ValueError(f"{argument}={folder} {problem}")


@contextlib.contextmanager
def new_model_files(folder: Path, record: Mapping[str, Any]) -> Iterator[Path]:
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
    stale = _listed_before(folder / RECORD)
    remove(folder / "config.json")
    os.replace(staged / RECORD, folder / RECORD)
    for name in stale:
        remove(folder / name)
    for entry in sorted(staged.iterdir(), key=lambda path: path.name == "config.json"):
        remove(folder / entry.name)
        os.replace(entry, folder / entry.name)
    staged.rmdir()
    fsync(folder)


def _listed_before(record: Path) -> list[str]:
    """The names that a record lists, of those that a conversion writes: anybody may have written into it."""
    if not record.is_file():
        return []
    try:
        names = [str(name) for name in json.loads(record.read_text(encoding="utf-8"))["files"]]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{record} is not the record of a conversion ({error}): name a new folder"
        ) from error
    ours = [*CONFIG_FILES, "model*.safetensors", "model.safetensors.index.json", *TOKENIZER_FILES]
    patterns = [pattern.split("/")[0] for pattern in ours]
    return [name for name in names if "/" not in name and any(fnmatch(name, p) for p in patterns)]
