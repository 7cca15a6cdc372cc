"""One model after another on the held-out rows of several tasks: the task's score and the token loss."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from lota.config import Config
from lota.data.batches import encoder, seeded_sample
from lota.data.examples import run_held_out_rows
from lota.data.prompts import Limits, Prompter
from lota.data.task import Task
from lota.evaluate.decoding import Decoding
from lota.evaluate.engine import Engine
from lota.evaluate.estimates import Estimate, ratio
from lota.evaluate.evaluator import Evaluator
from lota.evaluate.scorers import TaskRequest
from lota.storage import DAMAGED, content_key, set_aside, write_json

RESULTS = "held_out.json"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """Results of a model on a task."""

    metric: str | None  # of the score; None: the task has none
    score: Estimate | None
    loss: Estimate  # nats per target token

    def to_dict(self) -> dict[str, Any]:
        both = {"score": self.score, "loss": self.loss}
        return {"metric": self.metric, **{name: found and _plain(found) for name, found in both.items()}}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Measured:
        score = content["score"]
        return cls(content["metric"], score and _estimate(score), _estimate(content["loss"]))


def _plain(found: Estimate) -> dict[str, Any]:
    numbers, pulls = list(found.influence), list(found.influence.values())
    return {"value": found.value, "stderr": found.stderr, "n": found.n, "rows": numbers, "influence": pulls}


def _estimate(content: Mapping[str, Any]) -> Estimate:
    return Estimate(content["value"], dict(zip(content["rows"], content["influence"], strict=True)))


class HeldOut:
    """A task's held-out rows, a seeded sample of n_eval_examples that is the same for every model.

    Raises ValueError for a task without held-out rows.
    """

    def __init__(self, config: Config, task: Task):
        self.config, self.task = config, task
        self.rows = run_held_out_rows(task, config)
        self.chosen = seeded_sample(range(len(self.rows)), config.n_eval_examples, config.seed)
        self.key = content_key(
            {
                "task": [task.name, task.version],
                "rows": [self.rows[i] for i in self.chosen],
                "settings": [config.seed, config.chat_template, config.max_length, config.max_prompt_length],
            }
        )

    def measure(self, engine: Engine, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Measured:
        """Returns the model's loss and score; its predictions go to <folder>/metrics."""
        limits = Limits(self.config.max_length, self.config.max_prompt_length)
        prompter = Prompter(tokenizer, self.config.chat_template, limits)
        loss = self._loss(engine, prompter)
        if self.task.metric is None:
            return Measured(None, None, loss)
        evaluator = Evaluator(engine, prompter, model_name=folder.name, out_dir=folder)
        decoding = Decoding(self.task.max_new_tokens, seed=self.config.seed, stop=self.task.stop)
        request = TaskRequest(self.task, self.rows, decoding, self.chosen)
        with tqdm(total=len(self.chosen), desc=self.task.name, unit="example", disable=None) as bar:
            result = evaluator.evaluate(request, on_done=lambda prediction: bar.update())
        return Measured(result.metric, result.estimates[result.metric], loss)

    def _loss(self, engine: Engine, prompter: Prompter) -> Estimate:
        """Nats per target token, of prompts and targets cut as in training."""
        encode = encoder(self.config, prompter.tokenizer)
        rows = [encode(prompter.example(self.task, self.rows[i]))[0] for i in self.chosen]
        requests = [(row.input_ids[: row.prompt_length], row.input_ids[row.prompt_length :]) for row in rows]
        nats: dict[int, float] = {}
        engine.logliks(requests, on_done=lambda at, value: nats.update({self.chosen[at]: -value}))
        return ratio(nats, {i: len(target) for i, (_, target) in zip(self.chosen, requests, strict=True)})


def measure_all(
    held_out: Sequence[HeldOut],
    opened: Callable[[], AbstractContextManager[tuple[Engine, PreTrainedTokenizerBase]]],
    folder: Path,
    weights: str,
) -> dict[str, Measured]:
    """Returns task name -> results of the model that `opened` gives.

    What <folder>/held_out.json holds for the same weights, rows and settings is not measured again; the model
    is loaded only if something is missing. weights: the model's content hash.
    """
    path = folder / RESULTS
    keys = {one.task.name: content_key([one.key, weights]) for one in held_out}
    stored = _stored(path)
    missing = [one for one in held_out if stored.get(one.task.name, {}).get("key") != keys[one.task.name]]
    if missing:
        with opened() as (engine, tokenizer):
            for one in missing:
                found = one.measure(engine, tokenizer, folder)
                stored[one.task.name] = {"key": keys[one.task.name], **found.to_dict()}
                write_json(path, stored)
    return {one.task.name: Measured.from_dict(stored[one.task.name]) for one in held_out}


def _stored(path: Path) -> dict[str, Any]:
    """The content of a results file; one that cannot be read is set aside."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for entry in content.values():
            Measured.from_dict(entry)
        return dict(content)
    except DAMAGED as error:
        moved = set_aside(path).name
        logger.warning("%s cannot be read (%s) and is now %s", path, str(error)[:200], moved)
        return {}
