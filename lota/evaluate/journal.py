"""Results on disk that a later run may continue, but only if everything that decides them is the same."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from lota.places import fsync, holding
from lota.storage import cut, naming, read_keyed, whole_lines

logger = logging.getLogger(__name__)


class Journal:
    """An append-only file of numbered records that were made under one key; use it in a `with` block.

    Line 1 holds the key, every other line {"index": i, "record": ...}. A file with the same key is
    continued; one with another key is set aside, together with the files made from it. A last line that was
    cut off is dropped. The block holds the file: it raises ValueError if another process writes it.
    """

    def __init__(
        self, path: str | os.PathLike[str], key: Mapping[str, Any], made_from_it: Iterable[Path] = ()
    ) -> None:
        self.path, self.made_from_it = Path(path), list(made_from_it)
        self.key = json.loads(json.dumps(key))  # as it is read back: tuples become lists
        self.records: dict[int, Any] = {}
        self._header = _line({"key": self.key})
        self._open = ExitStack()
        self._file: BinaryIO | None = None

    def __enter__(self) -> Journal:
        with ExitStack() as stack:
            stack.enter_context(holding(self.path))
            self._drop_torn_start()
            found = read_keyed(self.path, self.key, read_journal, self.made_from_it)
            if found is not None:
                self.records, length = found
                cut(self.path, length)
                logger.info("reusing %d results of %s", len(self.records), self.path)
            self._open = stack.pop_all()
        return self

    def _drop_torn_start(self) -> None:
        """Forget a file that was cut off within its first line: nothing is lost with it."""
        if self.path.is_file():
            with open(self.path, "rb") as file:
                start = file.read(len(self._header) + 1)
            if self._header.startswith(start) and start != self._header:
                self.path.unlink()

    def add(self, index: int, record: Any) -> None:
        """Store a record so that it outlives the process."""
        with naming(self.path):
            if self._file is None:
                self._file = self._open.enter_context(self.path.open("ab"))
                if self._file.tell() == 0:
                    self._file.write(self._header)
            self.records[index] = record
            self._file.write(_line({"index": index, "record": record}))
            self._file.flush()

    def sync(self) -> None:
        """Let what was stored outlive a power cut: before anything that is made from it is written."""
        if self._file is not None:
            fsync(self.path)
            fsync(self.path.parent)

    def __exit__(self, *_: object) -> None:
        with naming(self.path), self._open:
            self.sync()
        self._file = None


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode() + b"\n"


def read_journal(path: Path) -> tuple[Any, tuple[dict[int, Any], int]]:
    """Key; records and the length of the whole lines in bytes. Errors: ValueError, KeyError, TypeError."""
    lines = list(whole_lines(path))
    header, *entries = [json.loads(line) for _, line in lines]
    records = {entry["index"]: entry["record"] for entry in entries}
    return header["key"], (records, lines[-1][0])
