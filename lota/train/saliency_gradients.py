"""Gradients of the training loss on examples of tasks, summed for the saliencies that read them.

The loss is that of lota/train/objectives.py, summed over the examples of a batch, so that the sum of the
gradients does not depend on how the examples are cut into batches.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lota.config import CHAT_TEMPLATES, Config, ModelConfig
from lota.config_checks import validated
from lota.data.batches import Example, encoded_hash_and_lengths, encoder, epoch_batches
from lota.data.examples import load_examples, with_options
from lota.data.prompts import Prompter
from lota.data.task import FindTask
from lota.distributed.processes import ALONE, Processes
from lota.masks.extract.gradients import Collected, collect_gradients
from lota.models.loading import dtype_of, enable_activation_checkpointing
from lota.settings import keys_of, setting, value_problems
from lota.train.objectives import OBJECTIVES
from lota.train.run_model import load_run_model, load_run_tokenizer, run_skeleton
from lota.utils import Problems

logger = logging.getLogger(__name__)


@dataclass
class SaliencySettings:
    """What data-driven saliencies look at, and how; extract_masks.py has a flag of each."""

    datasets: str | None = setting(None, "task names, separated by commas, whose training examples are read")
    score_batches: int = setting(64, "batches, at most one pass over the examples", at_least=1)
    batch_size: int = setting(
        8, "examples per batch; fisher squares a batch's gradient: 1 for each example's"
    )
    data_dir: str | None = setting(None, "has tasks/<task>/<split>.*; default $PROJECT_CACHE, ~/.cache/lota")
    validation_fraction: float = setting(0.0, "share of the training rows that is left out, as by training")
    max_length: int = setting(512, "tokens of prompt + response")
    max_prompt_length: int = setting(256, "tokens of the prompt that stay when the whole is longer")
    chat_template: str = setting("never", f"of the prompts: {', '.join(CHAT_TEMPLATES)}")
    tokenizer_path: str | None = setting(None, "where the tokenizer is, if not with the model")
    dtype: str = setting("float32", "of weights and gradients: float32, bfloat16 or float16")
    score_dtype: str = setting(
        "auto",
        "of the sums: float32 (4 bytes per entry), bfloat16 (2, rounded up or down by lot), or auto: "
        "bfloat16 if dtype is, else float32",
        choices=("auto", "float32", "bfloat16"),
    )
    device: str | None = setting(None, "cpu, cuda, cuda:1 ...; default: a GPU if there is one")
    activation_checkpointing: bool = setting(False, "recompute activations: less memory, more time")
    seed: int = 0

    def problems(self) -> Iterator[str]:
        """What is wrong, besides what `Config` checks."""
        if not self.tasks:
            yield "datasets=null: name the tasks whose examples the score reads"
        yield from value_problems(self)
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            yield f"device={self.device}: {str(error).splitlines()[0]}"

    @property
    def tasks(self) -> list[str]:
        return [name.strip() for name in (self.datasets or "").split(",") if name.strip()]

    def config(self, base: str | os.PathLike[str], structure: str) -> Config:
        """The settings of a training run that would see the same batches. structure: see `ModelPair`."""
        model = ModelConfig(
            name_or_path=structure,
            tokenizer_name_or_path=self.tokenizer_path,
            archive=None if str(base) == structure else str(base),
            policy_dtype=self.dtype,
        )
        config = Config(exp_name="masks", model=model, datasets=self.tasks or ["none"])
        shared = {f.name for f in fields(Config)} & {f.name for f in fields(self)} - {"datasets"}
        return validated(replace(config, **{key: getattr(self, key) for key in shared}))


def data_flags() -> list[tuple[str, Any, str]]:
    """(name, default, meaning) of every setting that is of data-driven saliencies only."""
    return [(key.name, key.about.default, key.about.meaning) for key in keys_of(SaliencySettings())]


@dataclass
class SaliencyData:
    """The first batches of an epoch, in its order, and how their gradients are computed."""

    config: Config  # names model, lengths and loss
    tokenizer: PreTrainedTokenizerBase
    batches: list[list[Example]]
    dtype: str = "float32"  # of weights and gradients
    sums: str = "auto"  # dtype of the sums of gradients; auto: see `score_dtype`
    device: str | None = None  # of both; None: a GPU if there is one

    @property
    def score_dtype(self) -> str:
        """Of the sums: bf16 weights are there to save memory, and fp32 sums would take twice their size."""
        if self.sums != "auto":
            return self.sums
        return "bfloat16" if self.dtype == "bfloat16" else "float32"

    @property
    def meta(self) -> dict[str, Any]:
        """What decides the gradients besides the weights, as a mask made of them records it."""
        config = self.config
        rows = map(encoder(config, self.tokenizer), chain.from_iterable(self.batches))
        return {
            "datasets": list(config.datasets),
            "batches": len(self.batches),
            "examples": sum(len(batch) for batch in self.batches),
            "data_hash": encoded_hash_and_lengths(rows)[0],
            "loss": asdict(config.loss),
            "dtype": self.dtype,
            "score_dtype": self.score_dtype,
        }


def first_batches(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    n_batches: int,
    size: int,
) -> SaliencyData:
    """The first n_batches of `size` examples in the order that training would see; at most all examples."""
    order = epoch_batches(len(examples), size, seed=config.seed, epoch=0)[:n_batches]
    if len(order) < n_batches:
        logger.info("gradients of all %d examples: %d batches", len(examples), len(order))
    return SaliencyData(config, tokenizer, [[examples[i] for i in rows] for rows in order])


def load_saliency_data(
    settings: SaliencySettings, find_task: FindTask, base: str | os.PathLike[str], structure: str
) -> SaliencyData:
    """Training examples of the tasks. Raises one ValueError with all problems, before a model loads.

    base, structure: the model and whose config it has.
    """
    problems = Problems()
    attempt = problems.attempt
    problems.found += settings.problems()
    config = attempt(settings.config, base, structure)
    tasks, tokenizer = [], None
    if config is not None:
        tasks = [attempt(with_options, find_task, name, config) for name in settings.tasks]
        tokenizer = attempt(load_run_tokenizer, config)
        if tokenizer is not None:
            attempt(run_skeleton, config, tokenizer)
    problems.refuse()
    assert config is not None and tokenizer is not None
    prompter = Prompter(tokenizer, config.chat_template)
    examples = load_examples([task for task in tasks if task], "train", config, prompter)
    data = first_batches(config, tokenizer, examples, settings.score_batches, config.batch_size)
    data.dtype, data.sums, data.device = settings.dtype, settings.score_dtype, settings.device
    return data


def collect(
    data: SaliencyData,
    names: Iterable[str],
    kind: str,
    progress: Callable[[int], object] | None = None,
    together: Processes = ALONE,
    sharded: PreTrainedModel | None = None,
) -> Collected:
    """Load the base, sum its gradients for `names`, and let it go.

    progress: called with 1 for each batch. together: the processes that share the examples of each batch; the
    sums of gradients are those of all of them. sharded: the base if these processes hold it together; then
    each has the sums of its parts.
    """
    config = data.config
    device = data.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = sharded
    if model is None:
        model = load_run_model(config, data.tokenizer, config.model.archive, dtype_of(data.dtype), device)
    if config.activation_checkpointing:
        enable_activation_checkpointing(model)
    model.train()
    objective = OBJECTIVES[config.loss.name](config, data.tokenizer, model)

    def loss_of(share: tuple[Sequence[Example], float]) -> torch.Tensor:
        examples, weight = share
        return objective.losses(objective.batch(examples))[0].sum() * weight

    def own_batches() -> Iterator[tuple[list[Example], float]]:
        for batch in data.batches:
            if own := together.share(batch):
                yield own, 1.0
            elif sharded is not None:  # its parts are needed for the others' examples
                yield batch[:1], 0.0
            if progress:
                progress(1)

    sums = dtype_of(data.score_dtype)
    collected = collect_gradients(
        model, loss_of, own_batches(), names=names, kind=kind, dtype=sums, meta=data.meta
    )
    if together.count > 1 and sharded is None:
        for total in collected.values.values():
            total.copy_(together.sum_(total.float()))
    return collected
