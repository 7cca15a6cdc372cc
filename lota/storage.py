"""Files that are whole or absent, files that grow, checksums, and results that are valid under a key."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from lota.places import clear_leftovers, folders, fsync, holding, remove, replaced_name, temporary_name

if TYPE_CHECKING:
    import torch

CHECKSUMS = "checksums.json"  # in a folder: name of each of its files -> SHA-256
T = TypeVar("T")
logger = logging.getLogger(__name__)


# Files


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary name beside `path` for a file or folder; rename it to `path` if the block succeeds.

    An existing file is replaced in one step. An existing folder is moved aside first, and comes back if the
    process ends before the new one has its place; only a folder takes the place of a folder
    (IsADirectoryError). On failure the temporary is removed, and what was at `path` stays.
    """
    path = Path(path)
    with folders(path.parent):
        clear_leftovers(path.parent, path.name, held=False)
        temporary = temporary_name(path)
        try:
            with naming(path):
                yield temporary
                flush_to_disk(temporary)
            if path.is_dir():
                _replace_folder(path, temporary)
            else:
                os.replace(temporary, path)
                fsync(path.parent)
        except BaseException:
            remove(temporary)
            raise


def _replace_folder(path: Path, new: Path) -> None:
    """Give the folder `new` the name of the one at `path`, which comes back if that fails halfway."""
    if not new.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a file cannot take the place of a folder", str(path))
    with holding(path):
        old = replaced_name(path)
        os.replace(path, old)
        try:
            os.replace(new, path)
        except BaseException:
            os.replace(old, path)
            raise
        fsync(path.parent)
        with contextlib.suppress(OSError):  # a network file system keeps what is open
            remove(old)


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """An OSError of writing, which names no file, names this one: a full disk does not say where."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def refuse_foreign(argument: str, path: Path, kind: str, is_ours: Callable[[Path], bool]) -> None:
    """Raise ValueError if there is something at `path` that is not what the caller writes there.

    argument: what named the path, for the error. kind: what the caller writes, in words.
    """
    if os.path.lexists(path) and not (path.is_file() and is_ours(path)):
        raise ValueError(f"{argument}={path} exists and is no {kind}: name a new file")


def refuse_filled(argument: str, folder: Path) -> None:
    """Raise ValueError if there is anything at `folder` but an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{argument}={folder} exists and is not empty: name a new folder")


def flush_to_disk(path: Path) -> None:
    """fsync a file, or every file of a folder and the folder itself."""
    for item in [*sorted(path.rglob("*")), path] if path.is_dir() else [path]:
        fsync(item)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write indented JSON atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


_JSON_SLACK = 48 << 20  # bytes that the values of any JSON may take
# Bytes that one of these characters can mean in memory: a dict, a list, a pair in a dict, a number in a
# list, half of what a string has besides its text. Measured with CPython 3.11 and rounded up.
_JSON_COSTS = {b"{": 200, b"[": 80, b":": 170, b",": 48, b'"': 30}


def parse_json(data: bytes, size: int | None = None) -> Any:
    """json.loads of what a stranger may have written.

    size: bytes of the file that it is a part of, by default its own. Raises ValueError for no JSON, for
    values that could take more memory than `size` and 48 MiB, and for ones nested too deep.
    """
    text = 2 * len(data) * (1 if data.isascii() else 4)  # as one string, and as its parts
    if sum(cost * data.count(sign) for sign, cost in _JSON_COSTS.items()) + text > _JSON_SLACK + (
        len(data) if size is None else size
    ):
        raise ValueError(f"its {len(data):,} bytes of JSON could take far more memory than that")
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("its JSON is nested too deep") from error


def save_tensors(
    content: Any, path: str | os.PathLike[str], values: Iterable[torch.Tensor] | None = None
) -> str:
    """torch.save to `path`; returns the file's SHA-256.

    values: what `content` holds blanks for (`blank`), in its order and one at a time, so that no more than
    one of them need be in memory. Raises OSError if it cannot be written; torch would name its own assertion.
    """
    import torch  # settings are checked without it

    try:
        with open(path, "wb") as file:
            hashed = _HashedFile(file)
            if values is None:
                torch.save(content, hashed)  # type: ignore[arg-type]  # torch calls write and flush alone
            else:
                _save_filled(content, hashed, iter(values))
            return hashed.digest.hexdigest()
    except RuntimeError as error:
        raise OSError(
            errno.ENOSPC, f"could not write the whole file ({str(error)[:120]})", str(path)
        ) from error


def blank(shape: Iterable[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor without memory, for `save_tensors`."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")


def _save_filled(content: Any, file: _HashedFile, values: Iterator[torch.Tensor]) -> None:
    """What torch.save writes, where the bytes of each storage come from `values` when their turn comes.

    torch's own `_save` makes the pickle and calls `write_record_metadata` for each storage that it is asked
    to leave out (torch.serialization.skip_data).
    """
    from torch import serialization

    class Filling:
        def write_record(self, *record: Any) -> None:
            writer.write_record(*record)

        def write_record_metadata(self, name: str, size: int) -> None:
            value = next(values).detach().contiguous()
            storage = value.untyped_storage()
            if storage.nbytes() != size:  # a view of a larger tensor
                storage = value.clone().untyped_storage()
            assert storage.nbytes() == size, (name, size, tuple(value.shape), value.dtype)
            writer.write_record(name, storage, size)

    protocol = serialization.DEFAULT_PROTOCOL
    with (
        serialization.skip_data(materialize_fake_tensors=True),
        serialization._open_zipfile_writer(file) as writer,  # type: ignore[arg-type]
    ):
        serialization._save(content, Filling(), pickle, protocol, False)


class _HashedFile:
    """A file that is written from its beginning to its end, hashed on the way."""

    def __init__(self, file: BinaryIO):
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


# Checksums


def write_checksums(folder: Path, known: Mapping[str, str]) -> None:
    """Write CHECKSUMS into a folder that is whole. known: SHA-256 of files that need not be read again."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    sums = {name: known.get(name) or file_hash(folder / name) for name in files}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_verified: set[tuple[Path, int, int, int, str]] = set()  # files that this process has found whole


def verify_checksum(path: Path, expected: str | None = None) -> bool:
    """Raise ValueError if a file does not have its SHA-256; returns whether that is known.

    expected: by default what the CHECKSUMS beside the file say. A file is read once per process, unless its
    size, time or inode changes.
    """
    path = path.resolve()
    expected = expected or read_checksums(path.parent).get(path.name)
    if expected is None:
        return False
    status = path.stat()
    known = (path, status.st_size, status.st_mtime_ns, status.st_ino, expected)
    if known in _verified:
        return True
    if file_hash(path) != expected:
        raise ValueError(
            f"{path} is damaged: its content has changed since it was written ({CHECKSUMS} tells); copy it "
            "again from its source, or use another checkpoint of the run"
        )
    _verified.add(known)
    return True


def read_checksums(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of a folder's files; empty if it has none. Raises ValueError for a damaged list."""
    file = folder / CHECKSUMS
    if not file.is_file():
        return {}
    try:
        content = parse_json(file.read_bytes())
        if not all(isinstance(text, str) for text in content.values()):
            raise ValueError("its values are no texts")
        return dict(content)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({error}): use another checkpoint of the run") from error


# Files that grow line by line


def whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(byte of the file behind the line, the line without its end) for each line that has an end.

    A line ends at b"\\n" alone: JSON may hold U+2028, at which `str.splitlines` would cut.
    """
    end = 0
    with open(path, "rb") as file:
        for line in file:
            end += len(line)
            if line.endswith(b"\n"):
                yield end, line[:-1]


def cut(path: Path, size: int) -> None:
    """Drop what a file holds behind byte `size`."""
    if path.stat().st_size > size:
        os.truncate(path, size)
        fsync(path)


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
