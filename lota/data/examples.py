"""What a run trains on and is evaluated on: examples of its tasks."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from lota.config import Config
from lota.data.batches import Example, fraction_of, seeded_sample
from lota.data.prompts import Prompter
from lota.data.task import FindTask, Row, Task

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


def load_examples(tasks: Sequence[Task], split: str, config: Config, prompter: Prompter) -> list[Example]:
    """Examples of all tasks, in order, of each a seeded sample of `data_fraction`."""
    examples = []
    for task in tasks:
        rows = task.load(split, config.data_folder)
        kept = fraction_of(rows, config.data_fraction, config.seed)
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


def held_out_rows(task: Task, data_dir: str | os.PathLike[str]) -> list[Row]:
    """Rows of the split that training never sees; ValueError for a task without one."""
    if task.held_out is None:
        raise ValueError(f"task {task.name} has no held-out split to be evaluated on")
    return task.load(task.held_out, data_dir)


def load_held_out(tasks: Sequence[Task], config: Config, prompter: Prompter) -> list[Example]:
    """A seeded sample of n_eval_examples over the held-out splits of all tasks."""
    without = [task.name for task in tasks if task.held_out is None]
    if without:
        raise ValueError(
            f"datasets={without}: no held-out split to evaluate on; set do_first_eval=false and "
            "eval_every above the number of training examples"
        )
    rows = [(task, row) for task in tasks for row in held_out_rows(task, config.data_folder)]
    chosen = seeded_sample(rows, config.n_eval_examples, config.seed)
    found = [prompter.example(task, row, config.loss.on_preferences) for task, row in chosen]
    return _without_pointless(found, "held-out rows")
