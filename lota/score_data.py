"""Examples of tasks streamed through the base model, for the scores that read gradients.

The loss is that of training (lota/objectives.py), summed over the examples of a batch, so that the sum of the
gradients does not depend on how the examples are cut into batches.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lota.config import Config
from lota.data import Example, epoch_batches
from lota.gradient_scores import Collected, collect_gradients
from lota.journal import content_key
from lota.models import dtype_of, enable_activation_checkpointing, load_model
from lota.objectives import OBJECTIVES
from lota.prompting import Prompter
from lota.run_model import run_structure, run_tokenizer
from lota.training_data import load_examples, with_options

logger = logging.getLogger(__name__)


@dataclass
class ScoreData:
    """The first batches of an epoch, in its order. config: names model, lengths and loss."""

    config: Config
    tokenizer: Any
    batches: list[list[Example]]

    @property
    def meta(self) -> dict[str, Any]:
        """What decides the gradients besides the weights, as a mask made of them records it."""
        config, tokenizer = self.config, self.tokenizer
        special = [tokenizer.bos_token_id, tokenizer.eos_token_id]
        return {
            "datasets": list(config.datasets),
            "batches": len(self.batches),
            "examples": sum(len(batch) for batch in self.batches),
            "examples_hash": content_key([[asdict(example) for example in batch] for batch in self.batches]),
            "tokenizer_hash": content_key([type(tokenizer).__name__, tokenizer.get_vocab(), special]),
            "max_length": config.max_length,
            "max_prompt_length": config.max_prompt_length,
            "loss": asdict(config.loss),
            "dtype": config.model.policy_dtype,
        }


def first_batches(
    config: Config, tokenizer: Any, examples: Sequence[Example], n_batches: int, size: int
) -> ScoreData:
    """The first n_batches of `size` examples in the order that training would see; at most all examples."""
    order = epoch_batches(len(examples), size, seed=config.seed, epoch=0)[:n_batches]
    if len(order) < n_batches:
        logger.info("gradients of all %d examples: %d batches", len(examples), len(order))
    return ScoreData(config, tokenizer, [[examples[i] for i in rows] for rows in order])


def load_score_data(config: Config, find_task: Callable[[str], Any], n_batches: int) -> ScoreData:
    """Training examples of the config's tasks. Raises one ValueError with all problems, before a model loads.

    find_task: gives the task object of a name.
    """
    problems = [] if n_batches >= 1 else [f"score_batches={n_batches}: must be at least 1"]
    tokenizer, tasks = None, []
    for name in config.datasets:
        try:
            tasks.append(with_options(find_task, name, config))
        except ValueError as error:
            problems.append(str(error))
    try:
        tokenizer = run_tokenizer(config)
        run_structure(config, tokenizer)
        examples = load_examples(tasks, "train", config, Prompter(tokenizer, config.chat_template))
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return first_batches(config, tokenizer, examples, n_batches, config.batch_size)


def collect(
    data: ScoreData,
    names: Iterable[str],
    kind: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    progress: Callable[[int], object] | None = None,
) -> Collected:
    """Load the base in the config's model.policy_dtype, sum its gradients for `names`, and let it go.

    dtype: of the sums, on `device` as the weights are. progress: called with 1 after each batch.
    """
    config = data.config
    model = load_model(
        config.model.name_or_path,
        archive=config.model.archive,
        dtype=dtype_of(config.model.policy_dtype),
        device=device,
        pad_token=config.model.pad_token,
        tokenizer=data.tokenizer,
    )
    if config.activation_checkpointing:
        enable_activation_checkpointing(model)
    model.train()
    objective = OBJECTIVES[config.loss.name](config, data.tokenizer, model)

    def loss_of(examples: Sequence[Example]) -> torch.Tensor:
        loss = objective.losses(objective.batch(examples))[0].sum()
        if progress:
            progress(1)
        return loss

    meta = {**data.meta, "sums": str(dtype).removeprefix("torch.")}
    return collect_gradients(model, loss_of, data.batches, names=names, kind=kind, dtype=dtype, meta=meta)
