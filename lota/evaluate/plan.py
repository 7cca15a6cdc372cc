"""What an evaluation does for a task, with everything that can be refused before a model loads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lota.data.batches import seeded_sample
from lota.data.prompts import FewShot
from lota.evaluate.compare import Stored, stored_runs
from lota.evaluate.decoding import Decoding
from lota.evaluate.scorers import SCORERS, scorer_of

Row = dict[str, Any]


@dataclass(frozen=True)
class Wanted:
    """The settings of the command line that plans depend on.

    n_examples: 0 is all; scoring: None is each task's own; sampling: settings of `Decoding`, {} for greedy;
    max_new_tokens: None is each task's own; compare: folder of another model's results.
    """

    data_dir: str | Path
    n_examples: int = 0
    seed: int = 0
    scoring: str | None = None
    num_fewshot: int = 0
    sampling: Mapping[str, Any] | None = None
    max_new_tokens: int | None = None
    compare: Path | None = None


@dataclass(frozen=True)
class Plan:
    """What is done for a task. chosen: numbers of its rows; other: predictions of the model compared with."""

    task: Any
    rows: list[Row]
    chosen: list[int]
    scoring: str
    decoding: Decoding
    few_shot: FewShot | None
    other: Stored | None

    @property
    def draws(self) -> bool:
        """Whether its predictions depend on a seed, so that several runs differ."""
        return SCORERS[self.scoring].draws


def plans_of(names: Iterable[str], find: Callable[[str], Any], wanted: Wanted) -> list[Plan]:
    """A plan per task that `find` has by that name. Errors: one ValueError with the problems of all."""
    plans, problems = [], []
    for name in names:
        try:
            plans.append(plan_of(find(name), wanted))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    if not plans:
        raise ValueError("--datasets names no task")
    return plans


def plan_of(task: Any, wanted: Wanted) -> Plan:
    """The plan for a task. Errors: ValueError for settings, rows or a comparison that cannot be."""
    # a text is always scored by its perplexity
    kind = scorer_of(task, None if task.scoring == ("perplexity",) else wanted.scoring)
    rows = held_out_rows(task, wanted.data_dir)
    chosen = seeded_sample(range(len(rows)), wanted.n_examples or len(rows), wanted.seed)
    new_tokens = task.max_new_tokens if wanted.max_new_tokens is None else wanted.max_new_tokens
    return Plan(
        task=task,
        rows=rows,
        chosen=chosen,
        scoring=kind.name,
        decoding=Decoding(new_tokens, seed=wanted.seed, stop=task.stop, **wanted.sampling or {}),
        few_shot=_few_shot(task, kind.name, wanted) if wanted.num_fewshot else None,
        other=stored_runs(wanted.compare, task, kind, rows, chosen) if wanted.compare else None,
    )


def held_out_rows(task: Any, data_dir: str | Path) -> list[Row]:
    """Rows of the split that training never sees."""
    if task.held_out is None:
        raise ValueError(f"task {task.name} has no held-out split to be evaluated on")
    return task.load(task.held_out, data_dir)


def _few_shot(task: Any, scoring: str, wanted: Wanted) -> FewShot:
    given = f"--num_fewshot {wanted.num_fewshot}"
    if scoring == "perplexity":
        raise ValueError(f"{given}: task {task.name} scores texts, without prompts")
    if "train" not in task.splits:
        raise ValueError(f"{given}: task {task.name} has no train split to take examples from")
    return FewShot(wanted.num_fewshot, wanted.seed, task.load("train", wanted.data_dir))
