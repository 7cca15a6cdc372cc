"""Files that are either whole or absent: written under a temporary name, flushed to disk, renamed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

TEMPORARY_SUFFIX = ".tmp"


def save_tensors(content: Any, path: str | os.PathLike) -> None:
    """torch.save to `path`. Raises OSError when it cannot be written, where torch names its own assertion."""
    try:
        with open(path, "wb") as file:
            torch.save(content, file)
    except RuntimeError as error:
        raise OSError(
            errno.ENOSPC, f"could not write the whole file ({str(error)[:120]})", str(path)
        ) from error


def flush_to_disk(path: Path) -> None:
    """fsync a file, or every file of a folder and the folder itself."""
    paths = [*sorted(path.rglob("*")), path] if path.is_dir() else [path]
    for item in paths:
        handle = os.open(item, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary name beside `path` for a file or folder; rename it to `path` if the block succeeds.

    An existing file is replaced in one step; an existing folder is moved aside first and removed afterwards,
    for another folder only: a file in its place is an IsADirectoryError. On failure the temporary is removed
    and what was at `path` stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    remove(temporary)
    try:
        yield temporary
        flush_to_disk(temporary)
        if path.is_dir():
            if not temporary.is_dir():
                raise IsADirectoryError(errno.EISDIR, "a file cannot take the place of a folder", str(path))
            old = path.with_name(f".{path.name}.old{TEMPORARY_SUFFIX}")
            remove(old)
            os.replace(path, old)
            os.replace(temporary, path)
            remove(old)
        else:
            os.replace(temporary, path)
        flush_directory(path.parent)
    except BaseException:
        remove(temporary)
        raise


def flush_directory(path: Path) -> None:
    """fsync the folder entry itself, so that a rename survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Delete a file or folder; nothing happens where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write indented JSON atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
