"""What runs a model for evaluation and samples: an `Engine`; here transformers in this process."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lota.evaluate.batching import context_length
from lota.evaluate.decoding import Decoding
from lota.evaluate.generation import generate
from lota.evaluate.loglik import Request, logliks
from lota.models.hashing import model_key


class Engine(Protocol):
    """A model that completes prompts and reads texts, wherever it runs."""

    @property
    def context(self) -> int | None:
        """Positions, prompt and completion together; None: no limit."""

    @property
    def readable(self) -> int | None:
        """Tokens of a context and what follows it, but for the last, that `logliks` takes; None: no limit."""

    @property
    def batch_size(self) -> int:
        """Sequences that it works on at a time."""

    @property
    def key(self) -> Mapping[str, Any]:
        """What decides its answers beside prompts and settings: results are stored under it."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """More of that, which is shown among the settings of a result."""

    def check(self, decoding: Decoding | None) -> None:
        """Raise ValueError, with the remedy, if it cannot complete so, or (None) tell log-likelihoods."""

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding,
        *,
        indices: Sequence[int],
        sample: int = 0,
        on_done: Callable[[int, str], object],
    ) -> None:
        """Call on_done(i, completion) for each of the prompts, in any order.

        prompts: token ids that fit. indices: what numbers the prompts for the draws; sample: which of several
        completions of a prompt. A completion has no special tokens, and ends before the first stop text.
        """

    def logliks(self, requests: Sequence[Request], *, on_done: Callable[[int, float], object]) -> None:
        """Call on_done(i, log p(continuation | context) in nats) for each of the requests, in any order."""


class TransformersEngine:
    """A model that transformers has loaded into this process."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 16
    ) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.context = self.readable = context_length(model.config)

    @functools.cached_property
    def key(self) -> dict[str, Any]:
        return dict(model_key(self.model, self.tokenizer))

    @property
    def settings(self) -> dict[str, Any]:
        return {"dtype": str(self.model.dtype).removeprefix("torch.")}

    def check(self, decoding: Decoding | None) -> None:
        """It can."""

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding,
        *,
        indices: Sequence[int],
        sample: int = 0,
        on_done: Callable[[int, str], object],
    ) -> None:
        generate(
            self.model,
            self.tokenizer,
            prompts,
            decoding,
            batch_size=self.batch_size,
            indices=indices,
            sample=sample,
            on_done=on_done,
        )

    def logliks(self, requests: Sequence[Request], *, on_done: Callable[[int, float], object]) -> None:
        logliks(self.model, requests, batch_size=self.batch_size, on_done=on_done)
