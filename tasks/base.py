"""What every task shares: finding rows on disk or on the hub, checking them, and exact-match scoring."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

logger = logging.getLogger(__name__)

Row = dict[str, Any]

# The same words for every chat-like task, so that a model trained on one can be sampled by another.
CHAT_CLOSING = "\n\nAssistant:\n"
CHAT_STOP = ("\n\nHuman:",)


def chat_prompt(instruction: str) -> str:
    """The prompt of a chat that consists of one instruction."""
    return f"Human:\n{instruction}{CHAT_CLOSING}"


@dataclass(frozen=True)
class HubSet:
    """A data set on the Hugging Face hub, pinned to one commit.

    splits: our split name -> the set's. file: the data file that is read directly, for a repository which
    still carries a loading script (`datasets` refuses those).
    """

    path: str
    revision: str
    splits: Mapping[str, str]
    name: str | None = None
    file: str | None = None

    def arguments(self, split: str) -> dict[str, str]:
        """Keyword arguments of `datasets.load_dataset` for one of our splits."""
        if self.file is not None:
            url = f"hf://datasets/{self.path}@{self.revision}/{self.file}"
            return {"path": "json", "data_files": url, "split": "train"}  # a lone file is always called train
        named = {} if self.name is None else {"name": self.name}
        return {"path": self.path, **named, "split": self.splits[split], "revision": self.revision}


class Task:
    """A versioned task: where rows come from, what the model reads, and what its completion is worth.

    Raise `version` with every change that can alter a score: prompt, closing, stop, extraction, scoring.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    metric: ClassVar[str | None] = "exact_match"  # None: the task only provides prompts
    splits: ClassVar[tuple[str, ...]] = ("train", "test")
    held_out: ClassVar[str | None] = "test"  # the split that training never sees; None: the task has none
    hub: ClassVar[HubSet | None] = None
    fields: ClassVar[tuple[str, ...]] = ()  # fields of text that every row must hold
    closing: ClassVar[str] = ""  # last words of every prompt; kept whenever a prompt is cut
    max_new_tokens: ClassVar[int] = 256
    stop: ClassVar[tuple[str, ...]] = ()  # generation ends before any of these
    chat: ClassVar[bool] = False  # a prompt that is too long keeps its end instead of its start

    def prompt(self, row: Row) -> str:
        """What the model reads; the same in training and evaluation; ends with `closing`."""
        raise NotImplementedError

    def target(self, row: Row) -> str:
        """What the model is trained to write after the prompt."""
        raise NotImplementedError

    def gold(self, row: Row) -> str | None:
        """The right answer, in the normal form of `extract`."""
        raise NotImplementedError

    def extract(self, completion: str) -> str | None:
        """The answer in a completion (never the prompt), or None where it holds none."""
        raise NotImplementedError

    def score(self, extracted: str | None, gold: str | None) -> float:
        """1.0 for an answer equal to gold, else 0.0; no answer is never right."""
        return float(extracted is not None and extracted == gold)

    def check(self, row: Row) -> None:
        """Refuse a malformed row with a ValueError that names the field; tasks add their own conditions."""
        for field in self.fields:
            if field not in row:
                raise ValueError(f"field {field!r} is missing; found {', '.join(map(str, row)) or 'none'}")
            if not isinstance(row[field], str):
                raise ValueError(f"field {field!r} should be text, is {row[field]!r:.60}")

    def check_split(self, split: str) -> None:
        if split not in self.splits:
            raise ValueError(f"task {self.name} has no split {split!r}; it has {', '.join(self.splits)}")

    def load(self, split: str, data_dir: str | os.PathLike[str]) -> list[Row]:
        """All rows of a split: `<data_dir>/tasks/<name>/<split>.*` where that exists, else the hub set.

        A split is never made up from another one. Errors: ValueError for a malformed row (file, line, field),
        an empty file, or data that neither place holds.
        """
        self.check_split(split)
        folder = Path(data_dir).expanduser() / "tasks" / self.name
        path = find_file(folder, split)
        if path is None:
            return self._load_hub(split, folder)
        logger.info("%s %s: rows from %s", self.name, split, path)
        return read_rows(path, self.check)

    def _load_hub(self, split: str, folder: Path) -> list[Row]:
        wanted = f"{folder / split}.{{{','.join(READERS)}}}"
        if self.hub is None:
            raise ValueError(f"task {self.name}: no data for split {split!r} at {wanted}; it has no hub set")
        arguments = self.hub.arguments(split)
        import datasets  # takes seconds, and most runs read local files

        try:
            rows = [dict(row) for row in datasets.load_dataset(**arguments)]
        except Exception as error:  # network, hub and parsing libraries share no base class
            raise ValueError(
                f"task {self.name}: no data for split {split!r}. Looked at {wanted} and at hub set "
                f"{self.hub.path} ({type(error).__name__}: {error}). Fetch it where there is a network:\n"
                f"  {fetch_command(arguments, folder / f'{split}.jsonl')}"
            ) from error
        logger.info("%s %s: rows from hub set %s at %s", self.name, split, self.hub.path, self.hub.revision)
        return checked(enumerate(rows, start=1), self.check, f"hub set {self.hub.path} ({split}), row ")


def fetch_command(arguments: Mapping[str, str], path: Path) -> str:
    """Shell line that stores a hub set as the local file a task looks for."""
    call = ", ".join(f"{key}='{value}'" for key, value in arguments.items())
    code = f"import datasets; datasets.load_dataset({call}).to_json('{path}')"
    return f'mkdir -p "{path.parent}" && python -c "{code}"'


def find_file(folder: Path, split: str) -> Path | None:
    """The one file of a split, or None. Several are an error, because all but one would be ignored."""
    found = [path for kind in READERS if (path := folder / f"{split}.{kind}").is_file()]
    if len(found) > 1:
        raise ValueError(f"{folder} holds {' and '.join(path.name for path in found)}: remove all but one")
    return found[0] if found else None


def read_rows(path: str | os.PathLike[str], check: Callable[[Row], None]) -> list[Row]:
    """All rows of a .jsonl, .json, .csv or .txt file (UTF-8), each passed to `check`.

    Errors: ValueError naming file and line of what cannot be read or what `check` refuses.
    """
    path = Path(path)
    reader = READERS.get(path.suffix.removeprefix("."))
    if reader is None:
        raise ValueError(f"{path}: expected a name ending in {', '.join('.' + kind for kind in READERS)}")
    try:
        # newline="" leaves line ends inside quoted CSV fields as they are; -sig drops a byte order mark
        with path.open(encoding="utf-8-sig", newline="") as file:
            return checked(reader(file.read()), check, f"{path}, line ")
    except MalformedLine as error:
        raise ValueError(f"{path}, line {error.line}: {error}") from error
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from error


def checked(numbered: Iterator[tuple[int, Any]], check: Callable[[Row], None], place: str) -> list[Row]:
    """The rows of (number, row), each refused with its place where it is malformed."""
    rows: list[Row] = []
    for number, row in numbered:
        try:
            if not isinstance(row, dict):
                raise ValueError(f"expected an object with named fields, found {row!r:.60}")
            check(row)
        except ValueError as error:
            raise ValueError(f"{place}{number}: {error}") from error
        rows.append(row)
    if not rows:
        raise ValueError(f"{place.rpartition(',')[0]}: no rows")
    return rows


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
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise MalformedLine(number, f"not JSON: {error.msg} at column {error.colno}") from error


def _read_json(text: str) -> Iterator[tuple[int, Any]]:
    """A list of objects, decoded one by one, so that each keeps the line it starts at."""
    decoder = json.JSONDecoder()
    line, at = 1, 0

    def advance(to: int) -> None:
        nonlocal line, at
        line += text.count("\n", at, to)
        at = to

    def skip_blanks(start: int) -> int:
        while start < len(text) and text[start] in " \t\r\n":
            start += 1
        return start

    def expect(marks: str) -> str:
        advance(skip_blanks(at))
        if text[at : at + 1] not in tuple(marks):
            raise MalformedLine(line, f"not a JSON list of objects: expected one of {' '.join(marks)}")
        advance(at + 1)
        return text[at - 1]

    if not text.strip():
        return
    expect("[")
    advance(skip_blanks(at))
    mark = expect("]") if text[at : at + 1] == "]" else ","
    while mark == ",":
        advance(skip_blanks(at))
        try:
            row, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise MalformedLine(error.lineno, f"not JSON: {error.msg} at column {error.colno}") from error
        yield line, row
        advance(end)
        mark = expect(",]")
    if text[at:].strip():
        raise MalformedLine(line, "not JSON: something follows the list")


def _read_csv(text: str) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    end = 0  # line of the file that the last record ended on
    try:
        end = reader.line_num if reader.fieldnames else 0
        for row in reader:
            if None in row:
                raise MalformedLine(end + 1, f"more values than the {len(row) - 1} fields of the header")
            yield end + 1, {field: value for field, value in row.items() if value is not None}
            end = reader.line_num
    except csv.Error as error:
        raise MalformedLine(end + 1, f"not CSV: {error}") from error


def _read_txt(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line or number <= text.count("\n"):
            yield number, {"text": line.removesuffix("\r")}


READERS: dict[str, Callable[[str], Iterator[tuple[int, Any]]]] = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    "txt": _read_txt,
}
