"""What every task shares: finding rows on disk or on the hub, checking them, and exact-match scoring."""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from lota.data.task import Message, Preference, Row
from lota.storage import atomic_path
from tasks.hub import HubSet, unreachable
from tasks.rows import READERS, checked, find_file, read_rows

__all__ = ["HubSet", "Message", "Preference", "QuestionTask", "Row", "Task", "read_rows", "text_of"]

logger = logging.getLogger(__name__)


class Task:
    """A versioned task: where rows come from, what the model reads, and what its completion is worth.

    Raise `version` with every change that can alter a score: prompt, closing, stop, extraction, scoring.
    """

    name: str
    version: int = 1
    metric: str | None = "exact_match"  # the first of `metrics`; None: there is nothing to score
    more_metrics: tuple[str, ...] = ()  # the others
    scoring: tuple[str, ...] = ("generation",)  # of generation, loglik, perplexity; the first is the default
    splits: tuple[str, ...] = ("train", "test")
    held_out: str | None = "test"  # the split that training never sees; None: the task has none
    hub: HubSet | None = None  # where rows come from if there is no local file
    fields: tuple[str, ...] = ()  # fields of text that every row must hold
    closing: str = ""  # last words of every prompt; kept whenever a prompt is cut
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()  # generation ends before any of these
    chat: bool = False  # a prompt that is too long keeps its end instead of its start
    options: Mapping[str, Any] = {}  # settings of the task's own and their defaults

    # what the model reads and should write

    def prompt(self, row: Row) -> str:
        """What the model reads; the same in training and evaluation; ends with `closing`."""
        raise NotImplementedError

    def target(self, row: Row) -> str:
        """What the model is trained to write after the prompt."""
        raise NotImplementedError

    def messages(self, row: Row) -> list[Message]:
        """The prompt as a chat, for a tokenizer's chat template: its last message is the user's."""
        return [{"role": "user", "content": self.prompt(row).removesuffix(self.closing)}]

    def demonstration(self, row: Row) -> str:
        """A solved row, to stand before a prompt in few-shot evaluation."""
        return f"{self.prompt(row)}{self.target(row)}\n\n"

    # what a completion is worth

    def gold(self, row: Row) -> str | None:
        """The right answer, in the normal form of `extract`."""
        raise NotImplementedError

    def extract(self, completion: str) -> str | None:
        """The answer in a completion (never the prompt), or None if it holds none."""
        raise NotImplementedError

    def score(self, extracted: str | None, gold: str | None) -> float:
        """`metric` of an answer: 1.0 for one equal to gold, else 0.0; no answer is never right."""
        return float(extracted is not None and extracted == gold)

    def metrics(self, row: Row, completion: str) -> dict[str, float]:
        """All metrics of a completion, `metric` first; one that has no meaning for the row is left out."""
        extracted = self.extract(completion)
        return {self.metric or "": 0.0 if extracted is None else self.score(extracted, self.gold(row))}

    def choices(self, row: Row) -> list[str]:
        """For scoring by log-likelihood: what may follow the prompt."""
        raise NotImplementedError

    def choice(self, row: Row) -> int:
        """For scoring by log-likelihood: the place of the right one of `choices`."""
        raise NotImplementedError

    def n_words(self, row: Row) -> int:
        """For perplexity per word: the number of words of the target."""
        raise NotImplementedError

    # preferences

    @property
    def has_preferences(self) -> bool:
        """Whether rows are preferences."""
        return False

    def preference(self, row: Row) -> Preference:
        """The prompt and two answers to it; of such a task `target` is the preferred answer."""
        raise NotImplementedError

    # settings and rows

    def with_options(self, **options: Any) -> Self:
        """Returns a copy with other values of `options`; ValueError for one that the task does not have."""
        unknown = [name for name in options if name not in self.options]
        if unknown:
            known = f"it has {', '.join(self.options)}" if self.options else "it has none"
            raise ValueError(f"task {self.name} has no option {', '.join(unknown)}; {known}")
        task = copy.copy(self)
        task.options = {**self.options, **options}
        return task

    def unpack(self, entry: Row) -> Iterable[Row]:
        """The rows in an entry of a file or hub set: one, none (left out), or several (turns of a chat)."""
        return (entry,)

    def check(self, row: Row) -> None:
        """Refuse a malformed row with a ValueError that names the field; tasks add their own conditions."""
        for field in self.fields:
            text_of(row, field)

    def check_split(self, split: str) -> None:
        if split not in self.splits:
            raise ValueError(f"task {self.name} has no split {split!r}; it has {', '.join(self.splits)}")

    def load(self, split: str, data_dir: str | os.PathLike[str]) -> list[Row]:
        """All rows of a split: of `<data_dir>/tasks/<name>/<split>.*` if that exists, else of the hub set.

        A split is never made up from another one. Raises ValueError for a malformed row (file, line, field),
        an empty file, or if neither place holds the data.
        """
        self.check_split(split)
        folder = Path(data_dir).expanduser() / "tasks" / self.name
        path = find_file(folder, split)
        if path is None:
            return self._load_hub(split, folder)
        logger.info("%s %s: rows from %s", self.name, split, path)
        rows = read_rows(path, self.check, self.unpack)
        if split == self.held_out:
            self._warn_of_shared(rows, path)
        return rows

    def _warn_of_shared(self, rows: list[Row], path: Path) -> None:
        """Log how many held-out rows also stand in the local training file, if there is one."""
        try:
            train = find_file(path.parent, "train")
            seen = {_row_key(row) for row in read_rows(train, self.check, self.unpack)} if train else set()
        except ValueError:  # who trains on it is told
            return
        shared = sum(_row_key(row) in seen for row in rows)
        if shared:
            text = "%s: %d of %d rows of %s are training rows too (%s): scores on them prove nothing"
            logger.warning(text, self.name, shared, len(rows), path, train)

    def hub_of(self, split: str) -> HubSet | None:
        """The set that holds a split if there is no local file."""
        return self.hub

    def fetch(self, split: str, path: str | os.PathLike[str]) -> None:
        """Store a split of the hub set as a local file."""
        hub = self.hub_of(split)
        if hub is None:
            raise ValueError(f"task {self.name} has no hub set to fetch split {split!r} from")
        with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in hub.load(split))

    def _load_hub(self, split: str, folder: Path) -> list[Row]:
        wanted = f"{folder / split}.{{{','.join(READERS)}}}"
        hub = self.hub_of(split)
        if hub is None:
            raise ValueError(f"task {self.name}: no data for split {split!r} at {wanted}; it has no hub set")
        self._check_cut(split, folder, hub)
        try:
            rows = hub.load(split)
        except Exception as error:  # network, hub and parsing libraries share no base class
            places, file = f"{wanted} and at hub set {hub.path}", f"{split}.jsonl"
            command = hub.fetch_command(self.name, split, file)
            missing = f"task {self.name}: no data for split {split!r}"
            raise unreachable(missing, places, error, command, file, folder) from error
        logger.info("%s %s: rows from hub set %s at %s", self.name, split, hub.path, hub.revision)
        place = f"hub set {hub.path} ({split}), row "
        return checked(enumerate(rows, start=1), self.check, place, self.unpack)

    def _check_cut(self, split: str, folder: Path, hub: HubSet) -> None:
        """If the hub has one split only, a local file of another split may hold the very rows of this one."""
        others = [other for other in self.splits if other != split and find_file(folder, other)]
        if hub.cut and others:
            raise ValueError(
                f"task {self.name}: {folder} holds {others[0]} but not {split}, and the hub set "
                f"{hub.path} has one split, so that its rows may be those of {others[0]}: put a {split} "
                f"file there too, or remove {others[0]}"
            )


class QuestionTask(Task):
    """Rows with a `question`, which the answer follows after "Answer:"."""

    closing = "\nAnswer:\n"
    stop = ("\nQuestion:",)

    def prompt(self, row: Row) -> str:
        return f"Question: {self.question(row)}{self.closing}"

    def question(self, row: Row) -> str:
        return row["question"].strip()


def _row_key(row: Row) -> str:
    return json.dumps(row, sort_keys=True)


def text_of(row: Row, field: str, *, empty: bool = True) -> str:
    """The text in a field; ValueError naming it if it is missing, no text or, unless `empty`, blank."""
    if field not in row:
        raise ValueError(f"field {field!r} is missing; found {', '.join(map(str, row)) or 'none'}")
    if not isinstance(row[field], str):
        raise ValueError(f"field {field!r} should be text, is {row[field]!r:.60}")
    if not empty and not row[field].strip():
        raise ValueError(f"field {field!r} is empty")
    return row[field]
