"""Hugging Face folders: the dtypes and small files of one that exists, and writing a new one whole or not."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from fnmatch import translate
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import PreTrainedConfig

from lota.models.provenance import RECORD
from lota.models.tensor_files import INSTALLING, read_header, safetensors_files
from lota.places import fsync, remove, temporary_name, working_in
from lota.storage import flush_to_disk, naming, parse_json

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
# Of models with towers: what turns images and sound into what the towers read.
PROCESSOR_FILES = ("processor_config.json", "*preprocessor_config.json", "image_processor*.json")


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
    elif models and not any((place / RECORD).is_file() for place in (folder, folder / INSTALLING)):
        problem = f"holds a model ({models[0].name}) that no conversion wrote, and it would be"
        problem += " overwritten: name another folder"
    if problem is not None:
        raise ValueError(f"{argument}={folder} {problem}")


@contextlib.contextmanager
def new_model_files(
    argument: str, folder: Path, base: str | os.PathLike[str], record: Mapping[str, Any]
) -> Iterator[Path]:
    """Yield an empty folder inside `folder`; if the block succeeds its files move up, else nothing changes.

    The files of an earlier conversion are replaced, all others stay; `check_replaceable` tells which folder
    may not be written, `argument` and `base` are its. A move that is cut short leaves INSTALLING: such a
    folder has no config.json, our readers refuse it, and the next conversion into it finishes the move first.
    Raises ValueError if another process writes into the folder.
    """
    with working_in(folder):
        ready = folder / INSTALLING
        if ready.is_dir():
            _install(ready, folder)
        check_replaceable(argument, folder, base)
        _listed(folder / RECORD)  # a record that is none is refused while nothing has changed
        staged = temporary_name(folder / "conversion")
        staged.mkdir()
        try:
            with naming(folder):
                yield staged
                files = sorted(path.name for path in staged.iterdir())
                (staged / RECORD).write_text(
                    json.dumps({**record, "files": files}, indent=2) + "\n", encoding="utf-8"
                )
                flush_to_disk(staged)
        except BaseException:
            remove(staged)
            raise
        fsync(folder)
        os.replace(staged, ready)  # from here on the new files take the old ones' places
        fsync(folder)
        _install(ready, folder)


def _install(ready: Path, folder: Path) -> None:
    """Move the entries of `ready` up into `folder` in place of the ones that its RECORD lists.

    It may be cut off anywhere, and be called again. config.json goes first and comes last but for the RECORD,
    which tells until then what the old files were.
    """
    left = {path.name for path in ready.iterdir()}
    if RECORD in left:  # else all but the folder's removal was done
        new = set(_listed(ready / RECORD))
        stale = [name for name in _listed(folder / RECORD) if name not in new]
        if "config.json" in left:
            remove(folder / "config.json")
            fsync(folder)
        for name in stale:
            remove(folder / name)
        for name in sorted(left, key=lambda name: (name == RECORD, name == "config.json", name)):
            if (ready / name).is_dir():
                remove(folder / name)
            os.replace(ready / name, folder / name)
            if name == "config.json":
                fsync(folder)
        fsync(folder)
    ready.rmdir()
    fsync(folder)


def _listed(record: Path) -> list[str]:
    """The names that a record lists, of those that a conversion writes: anybody may have written into it."""
    if not record.is_file():
        return []
    try:
        names = [str(name) for name in parse_json(record.read_bytes())["files"]]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{record} is not the record of a conversion ({error}): name a new folder"
        ) from error
    ours = [*CONFIG_FILES, "model*.safetensors", "model.safetensors.index.json", *TOKENIZER_FILES]
    ours += PROCESSOR_FILES
    pattern = re.compile("|".join(translate(pattern.split("/")[0]) for pattern in ours))
    return [name for name in names if "/" not in name and pattern.match(name)]
