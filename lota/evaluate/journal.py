"""Results on disk that a later run may continue, but only if everything that decides them is the same."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from lota.utils import set_aside

logger = logging.getLogger(__name__)


class Journal:
    """An append-only file of numbered records that were made under one key.

    Line 1 holds the key, every other line {"index": i, "record": ...}. A file with the same key is
    continued; one with another key is set aside, together with the files made from it. A last line that was
    cut off is dropped. Use it in a `with` block, which closes the file.
    """

    def __init__(
        self, path: str | os.PathLike[str], key: Mapping[str, Any], made_from_it: Iterable[Path] = ()
    ) -> None:
        self.path = Path(path)
        self.key = json.loads(json.dumps(key))  # as it is read back: tuples become lists
        self.records: dict[int, Any] = {}
        self._file: TextIO | None = None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._continue()
        if not self.records:
            moved = [set_aside(path) for path in (self.path, *made_from_it) if path.exists()]
            if moved:
                logger.info("starting anew; what was there is now %s", ", ".join(path.name for path in moved))

    def _continue(self) -> None:
        try:
            key, records, length = read_journal(self.path)
            differences = _differences(key, self.key)
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("%s is not reused: it cannot be read (%s)", self.path, error)
            return
        if differences:
            logger.info("%s is not reused: made with another %s", self.path, ", ".join(differences))
            return
        if records:
            os.truncate(self.path, length)
            logger.info("reusing %d results of %s", len(records), self.path)
        self.records = records

    def add(self, index: int, record: Any) -> None:
        """Store a record so that it outlives the process."""
        if self._file is None:
            self._file = self.path.open("a", encoding="utf-8")
        if not self.records:
            self._write({"key": self.key})
        self.records[index] = record
        self._write({"index": index, "record": record})
        self._file.flush()

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def read_journal(path: Path) -> tuple[Any, dict[int, Any], int]:
    """Key, records, and the length of the whole lines in bytes. Errors: ValueError, KeyError, TypeError."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    header, *lines = [json.loads(line) for line in whole.split(b"\n")[:-1]]
    return header["key"], {line["index"]: line["record"] for line in lines}, len(whole)


def _differences(old: Any, new: Mapping[str, Any]) -> list[str]:
    if not isinstance(old, dict):
        raise TypeError("its first line is no key")
    absent = object()
    return [name for name in sorted({*old, *new}) if old.get(name, absent) != new.get(name, absent)]
