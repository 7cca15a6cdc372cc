"""Rows of tasks from files: .jsonl, .json, .csv and .txt, each row with the line it starts at."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lota.data.task import Row

logger = logging.getLogger(__name__)

Reader = Callable[[str], Iterator[tuple[int, Any]]]
Unpack = Callable[[Row], Iterable[Row]]


def find_file(folder: Path, split: str) -> Path | None:
    """The one file of a split, or None. Several are an error, because all but one would be ignored."""
    found = [path for kind in READERS if (path := folder / f"{split}.{kind}").is_file()]
    if len(found) > 1:
        raise ValueError(f"{folder} holds {' and '.join(path.name for path in found)}: remove all but one")
    return found[0] if found else None


def read_rows(
    path: str | os.PathLike[str],
    check: Callable[[Row], None],
    unpack: Unpack | None = None,
    reader: Reader | None = None,
) -> list[Row]:
    """All rows of a file (UTF-8).

    unpack: turns an entry of the file into rows. check: raises ValueError for a malformed row.
    reader: by default that of the name's ending. Raises ValueError naming file and line of what cannot be
    read, or is refused by unpack or check.
    """
    path = Path(path)
    reader = reader or READERS.get(path.suffix.removeprefix("."))
    if reader is None:
        raise ValueError(f"{path}: expected a name ending in {', '.join('.' + kind for kind in READERS)}")
    try:
        # newline="" leaves line ends inside quoted CSV fields as they are; -sig drops a byte order mark
        with path.open(encoding="utf-8-sig", newline="") as file:
            return checked(reader(file.read()), check, f"{path}, line ", unpack)
    except MalformedLine as error:
        raise ValueError(f"{path}, line {error.line}: {error}") from error
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from error


def checked(
    numbered: Iterable[tuple[int, Any]],
    check: Callable[[Row], None],
    place: str,
    unpack: Unpack | None = None,
) -> list[Row]:
    """The rows of (number, entry). Raises ValueError for a malformed one, naming its place.

    The number of entries without any row (those that a task leaves out) is logged.
    """
    rows: list[Row] = []
    total = empty = 0
    for number, entry in numbered:
        try:
            if not isinstance(entry, dict):
                raise ValueError(f"expected an object with named fields, found {entry!r:.60}")
            found = [entry] if unpack is None else list(unpack(entry))
            if found:
                _check_texts(entry)
            for row in found:
                check(row)
        except ValueError as error:
            raise ValueError(f"{place}{number}: {error}") from error
        rows += found
        total, empty = total + 1, empty + (not found)
    origin = place.rpartition(",")[0]
    if not rows:
        left_out = f"; all {total} entries were left out" if total else ""
        raise ValueError(f"{origin}: no rows{left_out}")
    if empty:
        logger.info("%s: %d of %d entries left out", origin, empty, total)
    return rows


def _check_texts(value: Any, field: str = "") -> None:
    """Refuse text that no tokenizer takes, or that no person wrote, anywhere in an entry."""
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError(f"field {field!r} holds a NUL character: remove it, the file may be damaged")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(value[error.start]):04x}"
            raise ValueError(f"field {field!r} holds {half}, one half of a character: remove it") from None
    elif isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            _check_texts(key, field)
            _check_texts(part, f"{field}.{key}" if field else str(key))


class MalformedLine(ValueError):
    """A file that does not parse, at `line` (counted from 1)."""

    def __init__(self, line: int, problem: str) -> None:
        super().__init__(problem)
        self.line = line


def _read_jsonl(text: str) -> Iterator[tuple[int, Any]]:
    # Not str.splitlines: JSON strings may hold U+2028 and other separators that it would split at.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line, object_pairs_hook=_each_key_once)
            except (ValueError, RecursionError) as error:
                raise _malformed(error, number) from error


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object: remove one of them")
    return found


def _malformed(error: ValueError | RecursionError, line: int) -> MalformedLine:
    """What reading a JSON value raised, as an error at that line or, if it tells a later one, there."""
    if isinstance(error, json.JSONDecodeError):
        return MalformedLine(max(line, error.lineno), f"not JSON: {error.msg} at column {error.colno}")
    if isinstance(error, RecursionError):
        return MalformedLine(line, "nested too deeply to be read")
    return MalformedLine(line, str(error).partition(";")[0])  # Python advises on its limit of digits


class _JsonCursor:
    """Reads a JSON list or object value by value, so that each keeps the line it starts at."""

    def __init__(self, text: str, expected: str) -> None:
        self.text, self.expected = text, expected
        self.line, self.at = 1, 0
        self.decoder = json.JSONDecoder(object_pairs_hook=_each_key_once)

    def peek(self) -> str:
        """The next character that is not blank, or nothing at the end."""
        to = self.at
        while to < len(self.text) and self.text[to] in " \t\r\n":
            to += 1
        self._advance(to)
        return self.text[to : to + 1]

    def mark(self, marks: str) -> str:
        """Pass one of the marks."""
        found = self.peek()
        if found not in tuple(marks):
            raise MalformedLine(self.line, f"not {self.expected}: expected one of {' '.join(marks)}")
        self._advance(self.at + 1)
        return found

    def value(self) -> tuple[int, Any]:
        """The line where a value starts, and the value."""
        self.peek()
        try:
            value, end = self.decoder.raw_decode(self.text, self.at)
        except (ValueError, RecursionError) as error:
            raise _malformed(error, self.line) from error
        line = self.line
        self._advance(end)
        return line, value

    def items(self, opening: str, closing: str) -> Iterator[None]:
        """Pass the marks around and between the items of a list or object; the caller reads each item.

        An empty text has no items. Nothing may follow the end.
        """
        if not self.peek():
            return
        self.mark(opening)
        mark = self.mark(closing) if self.peek() == closing else ","
        while mark == ",":
            yield
            mark = self.mark("," + closing)
        if self.peek():
            raise MalformedLine(self.line, "not JSON: something follows the end")

    def _advance(self, to: int) -> None:
        self.line += self.text.count("\n", self.at, to)
        self.at = to


def _read_json(text: str) -> Iterator[tuple[int, Any]]:
    """A list of objects."""
    cursor = _JsonCursor(text, "a JSON list of objects")
    for _ in cursor.items("[", "]"):
        yield cursor.value()


def read_completions(text: str) -> Iterator[tuple[int, Any]]:
    """An object {prompt: [completion, ...]}, as entries {prompt, completions}; a prompt may come twice."""
    cursor = _JsonCursor(text, "a JSON object {prompt: [completion]}")
    for _ in cursor.items("{", "}"):
        line, prompt = cursor.value()
        if not isinstance(prompt, str):
            raise MalformedLine(line, f"not {cursor.expected}: {prompt!r:.60} is no text")
        cursor.mark(":")
        yield line, {"prompt": prompt, "completions": cursor.value()[1]}


def _read_csv(text: str) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    end = 0  # line of the file that the last record ended on
    usual = csv.field_size_limit(len(text) + 1)  # it would refuse a field of more than 131,072 characters
    try:
        header = list(reader.fieldnames or ())
        end = reader.line_num if header else 0
        if len(set(header)) < len(header):
            twice = next(field for field in header if header.count(field) > 1)
            raise MalformedLine(1, f"the header has the column {twice!r} twice: rename or remove one of them")
        for row in reader:
            if None in row:
                raise MalformedLine(end + 1, f"more values than the {len(row) - 1} fields of the header")
            yield end + 1, {field: value for field, value in row.items() if value is not None}
            end = reader.line_num
    except csv.Error as error:
        raise MalformedLine(end + 1, f"not CSV: {error}") from error
    finally:
        csv.field_size_limit(usual)


def _read_txt(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line or number <= text.count("\n"):
            yield number, {"text": line.removesuffix("\r")}


READERS: dict[str, Reader] = {"jsonl": _read_jsonl, "json": _read_json, "csv": _read_csv, "txt": _read_txt}
