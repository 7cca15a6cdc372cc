"""One model after another on the held-out rows of several tasks: the task's score and the token loss."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lota.config import Config
from lota.data.batches import collate, encode, seeded_sample
from lota.data.examples import held_out_rows
from lota.data.prompts import Limits, Prompter
from lota.evaluate.decoding import Decoding
from lota.evaluate.estimates import Estimate, ratio
from lota.evaluate.evaluator import Evaluator
from lota.evaluate.scorers import TaskRequest
from lota.models.loading import choose_pad_token_id
from lota.train.losses import sequence_logps
from lota.utils import content_key, write_json

RESULTS = "held_out.json"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """A model on a task. score: in the task's metric, None where it has none; loss: nats per target token."""

    metric: str | None
    score: Estimate | None
    loss: Estimate

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
    """The tasks' held-out rows, of each a seeded sample of n_eval_examples, the same for every model.

    Reads the rows when made; raises ValueError for a task without held-out rows.
    """

    def __init__(self, config: Config, task: Any):
        self.config, self.task = config, task
        self.rows = held_out_rows(task, config.data_folder)
        self.chosen = seeded_sample(range(len(self.rows)), config.n_eval_examples, config.seed)
        self.key = content_key(
            {
                "task": [task.name, task.version],
                "rows": [self.rows[i] for i in self.chosen],
                "settings": [config.seed, config.chat_template, config.max_length, config.max_prompt_length],
            }
        )

    def measure(self, model: Any, tokenizer: Any, folder: Path, name: str) -> Measured:
        """Scores the model; predictions go to <folder>/metrics. name: of the model, for the results."""
        limits = Limits(self.config.max_length, self.config.max_prompt_length)
        prompter = Prompter(tokenizer, self.config.chat_template, limits)
        loss = self._loss(model, tokenizer, prompter)
        if self.task.metric is None:
            return Measured(None, None, loss)
        evaluator = Evaluator(
            model, prompter, model_name=name, out_dir=folder, batch_size=self.config.eval_batch_size
        )
        decoding = Decoding(self.task.max_new_tokens, seed=self.config.seed, stop=self.task.stop)
        request = TaskRequest(self.task, self.rows, decoding, self.chosen)
        with tqdm(total=len(self.chosen), desc=self.task.name, unit="example", disable=None) as bar:
            result = evaluator.evaluate(request, on_done=lambda prediction: bar.update())
        return Measured(result.metric, result.estimates[result.metric], loss)

    @torch.no_grad()
    def _loss(self, model: Any, tokenizer: Any, prompter: Prompter) -> Estimate:
        pad = choose_pad_token_id(tokenizer, model.config)
        limits = {"max_length": self.config.max_length, "max_prompt_length": self.config.max_prompt_length}
        nats: dict[int, float] = {}
        counts: dict[int, float] = {}
        for start in range(0, len(self.chosen), self.config.eval_batch_size):
            numbers = self.chosen[start : start + self.config.eval_batch_size]
            examples = [prompter.example(self.task, self.rows[i]) for i in numbers]
            batch = collate([encode(tokenizer, e, **limits) for e in examples], pad).to(model.device)
            logits = model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            ).logits
            logps, counted = sequence_logps(logits, batch.labels)
            nats.update(zip(numbers, (-logps).tolist(), strict=True))
            counts.update(zip(numbers, counted.tolist(), strict=True))
        return ratio(nats, counts)


def measure_all(
    held_out: Sequence[HeldOut], load: Callable[[], tuple[Any, Any]], folder: Path
) -> dict[str, Measured]:
    """Task name -> what the model of `load` (model and tokenizer) makes of it.

    What <folder>/held_out.json holds for the same rows and settings is not measured again; the model is
    loaded only where something is missing.
    """
    path = folder / RESULTS
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    missing = [one for one in held_out if stored.get(one.task.name, {}).get("key") != one.key]
    if missing:
        model, tokenizer = load()
        for one in missing:
            found = one.measure(model, tokenizer, folder, folder.name)
            stored[one.task.name] = {"key": one.key, **found.to_dict()}
            write_json(path, stored)
    return {one.task.name: Measured.from_dict(stored[one.task.name]) for one in held_out}
