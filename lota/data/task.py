"""What a task offers to training, evaluation and sampling; `tasks.base.Task` is one."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

Row = dict[str, Any]  # one row of a data set: field -> value, as read from the file
Message = dict[str, str]  # "role" (system, user or assistant) and "content"


class Preference(NamedTuple):
    """A prompt and two responses, of which people prefer the first."""

    prompt: str
    chosen: str
    rejected: str


class Task(Protocol):
    """The library's view of a task. The methods are documented in tasks/base.py."""

    name: str
    version: int
    metric: str | None  # the metric that ranks models; None: nothing to score
    more_metrics: tuple[str, ...]
    scoring: tuple[str, ...]  # of generation, loglik and perplexity; the first is the default
    splits: tuple[str, ...]
    held_out: str | None  # the split that training never sees; None: the task has none
    closing: str  # last words of every prompt, kept whenever a prompt is cut
    max_new_tokens: int
    stop: tuple[str, ...]  # generation ends before any of these texts
    chat: bool  # a prompt that is too long keeps its end instead of its start
    options: Mapping[str, Any]  # settings of the task's own and their values

    @property
    def has_preferences(self) -> bool: ...
    def with_options(self, **options: Any) -> Task: ...
    def load(self, split: str, data_dir: str | os.PathLike[str]) -> list[Row]: ...

    def prompt(self, row: Row) -> str: ...
    def messages(self, row: Row) -> Sequence[Message]: ...
    def demonstration(self, row: Row) -> str: ...
    def target(self, row: Row) -> str: ...
    def preference(self, row: Row) -> Preference: ...

    def gold(self, row: Row) -> str | None: ...
    def extract(self, completion: str) -> str | None: ...
    def score(self, extracted: str | None, gold: str | None) -> float: ...
    def metrics(self, row: Row, completion: str) -> dict[str, float]: ...
    def choices(self, row: Row) -> Sequence[str]: ...
    def choice(self, row: Row) -> int: ...
    def n_words(self, row: Row) -> int: ...


FindTask = Callable[[str], Task]  # name -> task; ValueError with the nearest names for an unknown one
