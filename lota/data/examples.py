"""What a run trains on and is evaluated on: examples of its tasks."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence

from lota.config import Config
from lota.data.batches import Example, fraction_of, seeded_sample
from lota.data.prompts import Prompter
from lota.data.task import FindTask, Row, Task

VALIDATION = "validation"
logger = logging.getLogger(__name__)


def with_options(find_task: FindTask, name: str, config: Config) -> Task:
    """The task, with the settings of its own that the run gives; one that it does not have is logged."""
    task = find_task(name)
    given = {key: getattr(config, key) for key in ("num_turns", "prefs_path")}
    for key, value in given.items():
        if key not in task.options and value != Config.__dataclass_fields__[key].default:
            logger.info("not used here: %s=%s (task %s)", key, value, name)
    task = task.with_options(**{key: value for key, value in given.items() if key in task.options})
    if config.loss.on_preferences and not task.has_preferences:
        how = "give prefs_path=FILE" if "prefs_path" in task.options else "name tasks that have, such as hh"
        raise ValueError(
            f"loss={config.loss.name} learns from preference pairs, and task {name} has none: {how} "
            "(docs/TASKS.md lists them), or choose loss=sft"
        )
    return task


def load_examples(
    tasks: Sequence[Task], split: str, config: Config, prompter: Prompter, fraction: float | None = None
) -> list[Example]:
    """Examples of all tasks, in order, of each a seeded sample of `fraction`, None: of `data_fraction`."""
    examples, share = [], config.data_fraction if fraction is None else fraction
    for task in tasks:
        rows = rows_of(task, split, config.data_folder, config.validation_fraction)
        kept = fraction_of(rows, share, config.seed)
        logger.info("%s: %d of %d %s rows", task.name, len(kept), len(rows), split)
        found = [prompter.example(task, row, config.loss.on_preferences) for row in kept]
        examples += _without_pointless(found, f"{task.name}, {split}")
    return examples


def _without_pointless(examples: list[Example], where: str) -> list[Example]:
    """Without preferences between equal answers, of which nothing is learnt, or for an empty answer.

    How many were left out is logged. Raises ValueError if nothing else is there.
    """
    pairs = [example for example in examples if example.rejected is not None]
    equal = sum(example.response == example.rejected for example in pairs)
    empty = sum(not example.response.strip() for example in pairs)
    left = [e for e in examples if e.rejected is None or (e.rejected != e.response and e.response.strip())]
    if len(left) == len(examples):
        return examples
    text = (
        f"{where}: {len(examples) - len(left)} of {len(examples)} preferences left out: both answers are "
        f"equal in {equal}, the preferred one is empty in {empty}"
    )
    if not left:
        raise ValueError(f"{text}; no preference is left to learn from")
    logger.warning("%s", text)
    return left


def hash_number(text: str) -> float:
    """A number in [0, 1) that a text has on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


def in_validation(task: Task, row: Row, fraction: float) -> bool:
    """Whether a training row is one of the share that validation gets, by the hash of its prompt.

    Rows with one prompt go together (a text without any: by the text), and a smaller share is part of a
    larger one.
    """
    return hash_number(f"validation {task.prompt(row) or task.target(row)}") < fraction


def rows_of(
    task: Task, split: str, data_dir: str | os.PathLike[str], validation_fraction: float = 0.0
) -> list[Row]:
    """Rows of a split. With a fraction the validation split is cut from train, else it is the task's own.

    Raises ValueError for a split that the task does not have, or if the cut leaves either side empty.
    """
    if not validation_fraction or split not in ("train", VALIDATION):
        return task.load(split, data_dir)
    rows = task.load("train", data_dir)
    found = [row for row in rows if in_validation(task, row, validation_fraction) == (split == VALIDATION)]
    if not found:
        asked = f"validation_fraction={validation_fraction:g}: task {task.name}"
        raise ValueError(f"{asked} has {len(rows)} training rows, of which none are left for {split}")
    return found


def held_out_rows(
    task: Task,
    data_dir: str | os.PathLike[str],
    split: str | None = None,
    validation_fraction: float = 0.0,
) -> list[Row]:
    """Rows that training never sees. split: None for the task's held-out split, or `validation`.

    Raises ValueError for a task without such a split.
    """
    if split == VALIDATION and not validation_fraction and VALIDATION not in task.splits:
        raise ValueError(
            f"task {task.name} has no validation split of its own: train and evaluate with "
            "validation_fraction, such as 0.05, which cuts one from its training rows"
        )
    if split is None and task.held_out is None:
        raise ValueError(f"task {task.name} has no held-out split to be evaluated on")
    return rows_of(task, split or str(task.held_out), data_dir, validation_fraction)


def run_held_out_rows(task: Task, config: Config) -> list[Row]:
    """Rows that a run is evaluated on: with validation_fraction those, else the task's held-out split."""
    fraction = config.validation_fraction
    return held_out_rows(task, config.data_folder, VALIDATION if fraction else None, fraction)


def load_held_out(tasks: Sequence[Task], config: Config, prompter: Prompter) -> list[Example]:
    """A seeded sample of n_eval_examples over the held-out rows of all tasks."""
    without = [task.name for task in tasks if task.held_out is None and not config.validation_fraction]
    if without:
        raise ValueError(
            f"datasets={without}: no held-out split to evaluate on; set validation_fraction=0.05, or "
            "do_first_eval=false and eval_every above the number of training examples"
        )
    rows = [(task, row) for task in tasks for row in run_held_out_rows(task, config)]
    chosen = seeded_sample(rows, config.n_eval_examples, config.seed)
    found = [prompter.example(task, row, config.loss.on_preferences) for task, row in chosen]
    return _without_pointless(found, "held-out rows")
