"""What engines share whose model something else has loaded: its key, the fields of a request, its answers."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from lota.evaluate.batching import first_token
from lota.evaluate.decoding import Decoding, draw_seed
from lota.evaluate.generation import completion_text, end_tokens
from lota.models.hashing import remembered_hash, tokenizer_key


@dataclass(frozen=True)
class OutsideModel:
    """A model by its folder or hub id, and the tokenizer that makes its prompts and reads its answers."""

    name: str
    tokenizer: PreTrainedTokenizerBase

    @property
    def folder(self) -> Path | None:
        """Where it lies on this machine; None for a hub id."""
        path = Path(self.name).expanduser()
        return path.resolve() if path.is_dir() else None

    @functools.cached_property
    def key(self) -> dict[str, Any]:
        """Of what is taken to be loaded: the content hash of the folder, or the name if it has no weights."""
        weights = None
        if self.folder is not None:
            with contextlib.suppress(ValueError, OSError):  # a folder of a tokenizer and a config alone
                weights = remembered_hash(self.folder)
        named = {} if weights else {"name": self.name}
        return {"weights": weights, **named, "tokenizer": tokenizer_key(self.tokenizer)}

    @functools.cached_property
    def ends(self) -> list[int]:
        """Token ids that end a completion."""
        try:
            config = GenerationConfig.from_pretrained(self.name)
        except OSError:  # the model has none
            config = None
        return sorted(end_tokens(config, self.tokenizer))

    def prompts(self, given: Sequence[Sequence[int]]) -> list[list[int]]:
        """Token ids as they are; an empty prompt is the token for the beginning of text."""
        return [list(ids) or [first_token(self.tokenizer, "an empty prompt")] for ids in given]

    def fields(
        self, n_prompt: int, context: int | None, decoding: Decoding, index: int, sample: int
    ) -> dict[str, Any]:
        """A request by the names that vLLM's sampling parameters and OpenAI's protocol share.

        Whatever a server could set otherwise by a generation_config.json is said.
        """
        room = decoding.max_new_tokens if context is None else context - n_prompt
        drawn = {"seed": draw_seed(decoding.seed, index, sample)} if decoding.temperature else {}
        return {
            "max_tokens": min(decoding.max_new_tokens, room),
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop": list(decoding.stop),
            **drawn,
        }

    def more_fields(self, decoding: Decoding) -> dict[str, Any]:
        """The rest, which vLLM knows and other servers may not."""
        return {
            "top_k": decoding.top_k,  # 0: all
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": self.ends,
        }

    def text(self, tokens: Sequence[int], stop: Sequence[str]) -> str:
        """The completion that the tokens are, as this process would have made it."""
        end = next((at for at, token in enumerate(tokens) if token in self.ends), len(tokens))
        return completion_text(self.tokenizer, tokens[:end], stop)


def scored(logps: Sequence[float | None], n_context: int, n_all: int) -> float:
    """The sum over a continuation of the log-probabilities of all tokens, (n_all,) or more, in nats.

    Raises ValueError if any is missing.
    """
    values = [value for value in logps[n_context:n_all] if value is not None]
    if len(values) != n_all - n_context:
        raise ValueError(
            f"{n_all - n_context} log-probabilities were asked for, {len(values)} came: the engine does not "
            "return those of a prompt's tokens"
        )
    return float(sum(values))
