"""A sequence on several processes: the first one leads; the others train what it trains, and share in what it
measures.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from lota.config import Config
from lota.distributed.processes import Processes
from lota.evaluate.engine import Engine, TransformersEngine
from lota.evaluate.engine_shared import SharedEngine, answer_first
from lota.models.loading import dtype_of, load_model
from lota.train.run_model import load_run_tokenizer

Train = Callable[[Config], Path | None]  # runs a training to its end; returns its last checkpoint


@dataclass(frozen=True)
class Measure:
    """What the first process tells the others when it measures a model; a `Config` when it trains one."""

    policy: Path | None  # None: the base


class Leader:
    """The first process, which goes through the sequence; alone, if there are no others."""

    def __init__(self, config: Config, train: Train, processes: Processes):
        self.config, self._train, self.processes = config, train, processes

    def train(self, run: Config) -> Path | None:
        self.processes.broadcast(run)
        return _trained(self._train, run)

    @contextlib.contextmanager
    def opened(self, policy: Path | None) -> Iterator[tuple[Engine, PreTrainedTokenizerBase]]:
        """The model of a policy.pt, or the base, which all processes answer for."""
        self.processes.broadcast(Measure(policy))
        engine, tokenizer = _engine(self.config, policy, self.processes)
        if self.processes.count == 1:
            yield engine, tokenizer
            return
        with SharedEngine(engine, self.processes) as shared:
            yield shared, tokenizer

    def end(self) -> None:
        """Let the others go."""
        self.processes.broadcast(None)


def follow(config: Config, train: Train, processes: Processes) -> None:
    """What each other process does until the first one has come to the end."""
    while (what := processes.broadcast(None)) is not None:
        if isinstance(what, Measure):
            answer_first(_engine(config, what.policy, processes)[0], processes)
        else:
            _trained(train, what)


def _trained(train: Train, run: Config) -> Path | None:
    """Train to the end and give back the memory, for the next model."""
    folder = train(run)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return folder


def _engine(
    config: Config, policy: Path | None, processes: Processes
) -> tuple[TransformersEngine, PreTrainedTokenizerBase]:
    model, tokenizer = config.model, load_run_tokenizer(config)
    loaded = load_model(
        model.name_or_path,
        archive=policy or model.archive,
        dtype=dtype_of(model.policy_dtype),
        device=processes.device,
        pad_token=model.pad_token,
        tokenizer=tokenizer,
    )
    return TransformersEngine(loaded, tokenizer, config.eval_batch_size), tokenizer
