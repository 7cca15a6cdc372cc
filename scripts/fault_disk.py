"""The disk under a command of scripts/faults.py: its operations counted, and what a power cut would leave."""

from __future__ import annotations

import builtins
import functools
import io
import os
import signal
import stat
import sys
from pathlib import Path
from typing import Any


class Disk:
    """Counts the file operations below a folder, and kills this process at one of them.

    With `power_to` it keeps what a power cut would leave (`Flushed`), and writes that there first.
    """

    def __init__(self, root: Path, kill_at: int | None, power_to: Path | None):
        self.root, self.kill_at, self.power_to = str(root), kill_at, power_to
        self.counted: list[str] = []
        self.flushed = Flushed(root) if power_to is not None else None
        self.busy = False  # with operations of its own

    def install(self) -> None:
        sys.addaudithook(self._event)
        os.fsync = functools.partial(self._fsync, os.fsync)
        io.open = builtins.open = self._open

    def operation(self, kind: str, name: str) -> bool:
        """Count an operation; whether it is the one to die at."""
        self.counted.append(f"{kind} {os.path.relpath(name, self.root)}")
        return len(self.counted) == self.kill_at

    def die(self) -> None:
        self.busy = True
        if self.flushed is not None and self.power_to is not None:
            self.flushed.write(self.power_to)
        os.kill(os.getpid(), signal.SIGKILL)

    def concerns(self, path: Any, folder: int = -1) -> str | None:
        """The path of an operation below the folder; None for any other."""
        if self.busy or not isinstance(path, str | bytes | os.PathLike):
            return None
        base = os.readlink(f"/proc/self/fd/{folder}") if folder is not None and folder >= 0 else os.getcwd()
        whole = os.path.normpath(os.path.join(base, os.fsdecode(path)))
        return whole if whole.startswith(self.root) and not whole.endswith(".pyc") else None

    def _event(self, event: str, arguments: tuple[Any, ...]) -> None:
        kind = event.removeprefix("os.")
        if kind == "open":
            path, flags = arguments[0], arguments[2] or 0
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                return
            whole = self.concerns(path)
        elif kind in ("remove", "rmdir"):
            whole = self.concerns(arguments[0], arguments[1])
        elif kind == "mkdir":
            whole = self.concerns(arguments[0], arguments[2])
        elif kind in ("rename", "link"):
            whole = self.concerns(arguments[1], arguments[3])
        elif kind == "truncate":
            path = arguments[0]
            whole = self.concerns(os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else path)
        else:
            return
        if whole is not None and self.operation(kind, whole):
            self.die()

    def _fsync(self, fsync: Any, handle: Any) -> None:
        number = handle if isinstance(handle, int) else handle.fileno()
        whole = self.concerns(os.readlink(f"/proc/self/fd/{number}"))
        if whole is not None and self.operation("fsync", whole):
            self.die()
        fsync(handle)
        if whole is not None and self.flushed is not None:
            self.busy = True
            self.flushed.flush(number)
            self.busy = False

    def _open(self, file: Any, mode: str = "r", buffering: int = -1, *more: Any, **named: Any) -> Any:
        """`open`, whose writes of whole buffers to files below the folder are counted."""
        whole = None if isinstance(file, int) or not set(mode) & set("wax+") else self.concerns(file)
        if whole is None or buffering == 0 or named.get("opener"):
            return _real_open(file, mode, buffering, *more, **named)
        raw = _CountedFile(self, whole, file, mode.replace("b", "").replace("t", ""))
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffered
        text = dict(zip(("encoding", "errors", "newline"), more, strict=False)) | named
        text.pop("closefd", None), text.pop("opener", None)
        return io.TextIOWrapper(buffered, line_buffering=buffering == 1, **text)


_real_open = io.open


class _CountedFile(io.FileIO):
    def __init__(self, disk: Disk, whole: str, *arguments: Any):
        super().__init__(*arguments)
        self._disk, self._whole = disk, whole

    def write(self, data: Any) -> int:
        if not self._disk.busy and self._disk.operation("write", self._whole):
            super().write(memoryview(data)[: len(data) // 2])  # torn
            self._disk.die()
        return super().write(data)


class Flushed:
    """What of a folder is safe from a power cut: content of files and entries of folders, as last flushed.

    Files are known by their inodes, which stay in use by open handles, so that none is given to another file.
    """

    def __init__(self, root: Path):
        self.root = root
        self.content: dict[int, bytes] = {}  # of files and links
        self.modes: dict[int, int] = {}
        self.entries: dict[int, dict[str, int]] = {}  # of folders
        self.pins: dict[int, int] = {}
        for folder, _, files in os.walk(root):
            self._pin(folder)
            self.entries[os.stat(folder).st_ino] = self._list(folder)
            for name in files:
                self._keep(os.path.join(folder, name))

    def _pin(self, path: str) -> int:
        status = os.lstat(path)
        if status.st_ino not in self.pins:
            self.pins[status.st_ino] = os.open(path, os.O_PATH | os.O_NOFOLLOW)
            self.modes[status.st_ino] = status.st_mode
        return status.st_ino

    def _keep(self, path: str) -> None:
        inode = self._pin(path)
        if stat.S_ISLNK(self.modes[inode]):
            self.content[inode] = os.fsencode(os.readlink(path))
        else:
            with _real_open(path, "rb") as file:
                self.content[inode] = file.read()

    def _list(self, folder: str) -> dict[str, int]:
        return {name: self._pin(os.path.join(folder, name)) for name in os.listdir(folder)}

    def flush(self, handle: int) -> None:
        """The file or folder of an open handle has reached the disk."""
        path = os.readlink(f"/proc/self/fd/{handle}")
        if not stat.S_ISDIR(os.fstat(handle).st_mode):
            if os.path.exists(path):
                self._keep(path)
            return
        real = {os.stat(folder).st_ino: self._list(folder) for folder, *_ in os.walk(self.root)}
        flushed = self._pin(path)
        before, now = set(self.entries.get(flushed, {}).values()), set(real[flushed].values())
        self.entries[flushed] = dict(real[flushed])
        for folder, listed in self.entries.items():  # a rename between two folders is one operation
            if folder == flushed:
                continue
            there = real.get(folder, {})
            for name, inode in list(listed.items()):
                if inode in now - before and inode not in there.values():
                    del listed[name]
            listed.update({name: inode for name, inode in there.items() if inode in before - now})

    def write(self, to: Path) -> None:
        """Write what a power cut would leave, as a folder."""
        self._write(os.stat(self.root).st_ino, str(to))

    def _write(self, inode: int, path: str) -> None:
        if stat.S_ISDIR(self.modes[inode]):
            os.mkdir(path)
            for name, child in self.entries.get(inode, {}).items():
                self._write(child, os.path.join(path, name))
        elif stat.S_ISLNK(self.modes[inode]):
            os.symlink(self.content[inode], path)
        else:
            with _real_open(path, "wb") as file:
                file.write(self.content.get(inode, b""))
