"""Places held by one process at a time, and cleared of what killed processes left half-done in them.

Whoever replaces or deletes something holds its place (`working_in` a folder, `holding` a single file or
folder) and looks, decides and acts under it. docs/RELIABILITY.md lists all such places and what guards them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import logging
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

TEMPORARY_SUFFIX = ".tmp"
REPLACED = "replaced"  # stands in the name of a folder that another one is about to replace
LOCK = ".lock"  # in a folder that is held; `.NAME.lock` beside a file or folder NAME that is held
logger = logging.getLogger(__name__)

_held: set[Path] = set()  # by this process
_OWNER = rf"[0-9a-f]{{8}}-\d+-\d+|\d+|{REPLACED}"  # machine, number and start of a process
_LEFTOVER = re.compile(rf"\.(?P<name>.+)\.(?P<owner>{_OWNER}){re.escape(TEMPORARY_SUFFIX)}")
_EXCLUSIVE = fcntl.LOCK_EX | fcntl.LOCK_NB
_WAIT = 0.5  # seconds for a holder that has only just begun, or looks whether anybody is there
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def working_in(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Hold a folder; what killed processes left half-done in it is undone first. Yields its real path.

    The folder is made if it is not there, and goes again if nothing was put into it. Raises ValueError if it
    is held. The lock ends with its process, however that ends.
    """
    folder = Path(folder).resolve()
    with folders(folder), _lock(folder / LOCK, folder):
        clear_leftovers(folder)
        with _remembered(folder):
            yield folder


@contextlib.contextmanager
def holding(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Hold one file or folder by its name, whether it exists or not; otherwise as `working_in`.

    What lies in a folder that this process works in is held already.
    """
    path = Path(path)
    path = path.parent.resolve() / path.name
    covered = path in _held or not _held.isdisjoint(path.parents)
    lock = contextlib.nullcontext() if covered else _lock(_lock_of(path), path)
    with folders(path.parent), lock, contextlib.nullcontext() if covered else _remembered(path):
        if path.parent not in _held:  # it was cleared as a whole
            clear_leftovers(path.parent, path.name)
        yield path


def clear_leftovers(folder: Path, name: str | None = None, held: bool = True) -> None:
    """Undo what killed processes left half-done: temporary files and locks go, a replaced folder comes back.

    What belongs to a living process stays. name: look at this entry alone. held: the caller holds the folder,
    or this entry; else nothing but temporary files is touched.
    """
    for item in sorted(folder.iterdir()):
        found = _LEFTOVER.fullmatch(item.name)
        if found is None or name not in (None, found["name"]) or _lives(found["owner"]):
            continue
        target = folder / found["name"]
        if name is None and _is_held(_lock_of(target)):
            continue
        if found["owner"] != REPLACED:
            remove(item)
        elif held and not target.exists():
            os.replace(item, target)
            fsync(folder)
        elif held:
            remove(item)
    if name is None:
        for lock in sorted(folder.glob(f".*{LOCK}")):
            if lock.name != LOCK:
                _is_held(lock)


def temporary_name(path: Path) -> Path:
    """A name beside `path` that tells whose it is."""
    return path.with_name(f".{path.name}.{_machine()}-{_process(os.getpid())}{TEMPORARY_SUFFIX}")


def replaced_name(path: Path) -> Path:
    """The name beside `path` of a folder that another one is about to replace."""
    return path.with_name(f".{path.name}.{REPLACED}{TEMPORARY_SUFFIX}")


def _lives(owner: str) -> bool:
    """Whether the process that a temporary name tells of may still be at work: if it is another machine's, or
    a process here has its number and start.
    """
    machine, _, process = owner.partition("-")
    return bool(process) and (machine != _machine() or _process(int(process.partition("-")[0])) == process)


@functools.cache
def _machine() -> str:
    """Of the host and of its space of process numbers, which containers can have for themselves."""
    space = Path("/proc/self/ns/pid")
    known = [platform.node(), os.readlink(space) if space.is_symlink() else ""]
    known += [file.read_text() for file in [Path("/etc/machine-id")] if os.access(file, os.R_OK)]
    return hashlib.sha256("\n".join(known).encode()).hexdigest()[:8]


def _process(pid: int) -> str | None:
    """Number and start of a process, which no later one has both; None if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return f"{pid}-{fields[19]}"  # in clock ticks after the machine's start
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    try:  # no Linux
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return f"{pid}-0"


def _lock_of(path: Path) -> Path:
    return path.with_name(f".{path.name}{LOCK}")


@contextlib.contextmanager
def _remembered(path: Path) -> Iterator[None]:
    _held.add(path)
    try:
        yield
    finally:
        _held.discard(path)


@contextlib.contextmanager
def folders(folder: Path) -> Iterator[None]:
    """Make a folder and its parents; at the end those of them that are empty go again."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        if made:
            folder.mkdir(parents=True, exist_ok=True)
        for path in made:
            fsync(path.parent)  # else a power cut could take the folder, whatever was flushed in it
        yield
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # it is not there, or another process has filled it
                if not any(path.iterdir()):
                    path.rmdir()


@contextlib.contextmanager
def _lock(file: Path, place: Path) -> Iterator[None]:
    handle = _acquire(file, place)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink()  # while it is held: whoever opened it before sees that it is gone, and tries again
            fsync(file.parent)
        os.close(handle)


def _acquire(file: Path, place: Path) -> int:
    """A handle of the locked file. Raises ValueError if another process holds it."""
    end = time.monotonic() + _WAIT
    while True:
        try:
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # the last holder has removed the empty folder
            file.parent.mkdir(parents=True, exist_ok=True)
            continue
        try:
            fcntl.flock(handle, _EXCLUSIVE)
        except BlockingIOError as error:
            holder, _, machine = os.read(handle, 200).decode(errors="replace").strip().partition(" ")
            os.close(handle)
            if not holder and time.monotonic() < end:
                time.sleep(0.01)
                continue
            raise ValueError(
                f"another process (pid {holder}) is at work in {place}: wait until it has ended, or name "
                f"another place (its lock is {file}, taken on {machine})"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(handle)
                raise
            logger.warning("%s: this file system has no locks; start nothing else in that place", place)
        if _is_at(handle, file):
            break
        os.close(handle)
    os.truncate(handle, 0)
    os.write(handle, f"{os.getpid()} {platform.node()}\n".encode())
    return handle


def _is_at(handle: int, file: Path) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(file))
    except FileNotFoundError:
        return False


def _is_held(file: Path) -> bool:
    """Whether a process holds this lock. One that nobody holds goes, while it is held here."""
    try:
        handle = os.open(file, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, _EXCLUSIVE)
        file.unlink(missing_ok=True)
        return False
    except OSError as error:
        return error.errno not in _NO_LOCKS
    finally:
        os.close(handle)


# Disk


def fsync(path: Path) -> None:
    """Flush one file, or a folder's own entries, so that a rename in it survives a power cut."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        # some network file systems do not flush folders, and some folders may be entered but not read
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.EACCES, errno.EBADF, errno.ENOTSUP):
            raise


def remove(path: Path) -> None:
    """Delete a file or folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
