"""Files that are whole or absent, and results that are valid under a key."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import pickle
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

TEMPORARY_SUFFIX = ".tmp"
T = TypeVar("T")
logger = logging.getLogger(__name__)


# Files


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
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
        fsync(path.parent)
    except BaseException:
        remove(temporary)
        raise


def flush_to_disk(path: Path) -> None:
    """fsync a file, or every file of a folder and the folder itself."""
    for item in [*sorted(path.rglob("*")), path] if path.is_dir() else [path]:
        fsync(item)


def fsync(path: Path) -> None:
    """Flush one file, or a folder's own entries, so that a rename in it survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Delete a file or folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write indented JSON atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_tensors(content: Any, path: str | os.PathLike[str]) -> None:
    """torch.save to `path`. Raises OSError if it cannot be written; torch would name its own assertion."""
    import torch  # settings are checked without it

    try:
        with open(path, "wb") as file:
            torch.save(content, file)
    except RuntimeError as error:
        raise OSError(
            errno.ENOSPC, f"could not write the whole file ({str(error)[:120]})", str(path)
        ) from error


def torch_reason(error: Exception) -> str:
    """One line of why `torch.load` refused a file, without its advice to load with weights_only=False."""
    text = str(error).rsplit("WeightsUnpickler error:", 1)[-1].strip() or type(error).__name__
    return text.splitlines()[0].split(" Please use")[0][:200]


# Stored results

# What reading a damaged file raises: JSON, a pickle, or a structure that lacks what it should have.
DAMAGED = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    EOFError,
    RuntimeError,
    pickle.UnpicklingError,
)


def content_key(content: Any) -> str:
    """sha256 of plain values, the same for equal content whatever the order of dict keys."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def key_differences(stored: Any, key: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of what differs between the key that a result was stored under and the one wanted now."""
    if not isinstance(stored, Mapping):
        return [prefix.rstrip(".") or "key"]
    absent, found = object(), []
    for name in sorted({*stored, *key}):
        before, now = stored.get(name, absent), key.get(name, absent)
        if isinstance(now, Mapping):
            found += key_differences(before, now, f"{prefix}{name}.")
        elif before != now:
            found.append(prefix + name)
    return found


def read_keyed(
    path: Path,
    key: Mapping[str, Any],
    read: Callable[[Path], tuple[Any, T]],
    made_from_it: Iterable[Path] = (),
) -> T | None:
    """Returns the content of a stored result if it was made under `key`; else sets the file aside.

    read: returns the file's (key, content), or raises one of DAMAGED. made_from_it: files that are valid with
    this result only, and are set aside if it is not there or not reused.
    """
    if path.exists():
        try:
            stored, content = read(path)
        except DAMAGED as error:
            logger.warning("%s is not reused: it cannot be read (%s)", path, str(error)[:200])
        else:
            differ = key_differences(stored, key)
            if not differ:
                return content
            logger.warning("%s is not reused: made with another %s", path, ", ".join(differ))
    moved = [set_aside(old).name for old in (path, *made_from_it) if old.exists()]
    if moved:
        logger.info("starting anew; what was there is now %s", ", ".join(moved))
    return None


def set_aside(path: Path) -> Path:
    """Rename a file to the first free name of NAME.1.SUFFIX, NAME.2.SUFFIX, ..."""
    number = 1
    while (free := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return path.rename(free)
