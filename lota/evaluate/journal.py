"""Results on disk that a later run may continue, but only if everything that decides them is the same."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from lota.storage import read_keyed

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
        found = read_keyed(self.path, self.key, read_journal, made_from_it)
        if found is not None:
            self.records, length = found
            os.truncate(self.path, length)
            logger.info("reusing %d results of %s", len(self.records), self.path)

    def add(self, index: int, record: Any) -> None:
        """Store a record so that it outlives the process."""
        if self._file is None:
            self._file = self.path.open("a", encoding="utf-8")
        lines = [{"index": index, "record": record}]
        if not self.records:
            lines.insert(0, {"key": self.key})
        self.records[index] = record
        self._file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        self._file.flush()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def read_journal(path: Path) -> tuple[Any, tuple[dict[int, Any], int]]:
    """Key; records and the length of the whole lines in bytes. Errors: ValueError, KeyError, TypeError."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    header, *lines = [json.loads(line) for line in whole.split(b"\n")[:-1]]
    records = {line["index"]: line["record"] for line in lines}
    if not records:
        raise ValueError("it holds no record")
    return header["key"], (records, len(whole))
