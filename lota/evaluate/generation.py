"""Batched generation with any Hugging Face causal language model; used by evaluation, sampling and training.

Prompts of similar length share a batch, padded on the left; a row that has finished leaves its batch, so
that one long completion does not hold up the others. A sampled completion depends on (seed, prompt index,
sample index) only, not on the batch it was made in, as far as fp32 rounding allows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lota.data.batches import Prompt
from lota.evaluate.batching import (
    Forward,
    can_drop_rows,
    context_length,
    first_token,
    in_batches,
    longest_first,
    padded,
    reading_only,
)
from lota.evaluate.decoding import Decoding, StopCheck, choose, decode, uniforms


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    batch_size: int,
    max_prompt_length: int | None = None,
    indices: Sequence[int] | None = None,
    sample: int = 0,
    on_done: Callable[[int, str], object] | None = None,
) -> list[str]:
    """Returns the completion of each prompt, without the prompt, special tokens and stop text.

    prompts: texts (one that is too long keeps its end), or token ids that already fit.
    indices: what numbers the prompts for the seed, if they are part of a larger list.
    on_done(i, completion) is called for prompts[i] when its batch is done.
    Running out of memory halves the batch for the rest.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1")
    bound = prompt_bound(context_length(model.config), decoding.max_new_tokens, max_prompt_length)
    ids = [_prompt_ids(tokenizer, prompt, bound) for prompt in prompts]
    draws = [uniforms(decoding, index, sample) for index in indices or range(len(ids))]
    done = [""] * len(ids)

    def run(rows: Sequence[int]) -> None:
        batch_draws = torch.stack([draws[row] for row in rows])
        completions = _complete(model, tokenizer, [ids[row] for row in rows], batch_draws, decoding)
        for row, tokens in zip(rows, completions, strict=True):
            done[row] = completion_text(tokenizer, tokens, decoding.stop)
            if on_done is not None:
                on_done(row, done[row])

    # longest first: if the memory is too small for this batch size, it shows at once
    with reading_only(model):
        in_batches(longest_first(ids), batch_size, run)
    return done


def prompt_bound(
    context: int | None, max_new_tokens: int, max_prompt_length: int | None = None
) -> int | None:
    """The most tokens a prompt may have: at most max_prompt_length, and beside it the completion has room.

    The completion is given max_new_tokens, but at most half the context. None: no limit.
    """
    if context is None:
        return max_prompt_length
    room = context - min(max_new_tokens, context // 2)
    return room if max_prompt_length is None else min(room, max_prompt_length)


def _prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[int], bound: int | None
) -> list[int]:
    ids = Prompt(prompt, keep_end=True).ids(tokenizer, bound) if isinstance(prompt, str) else list(prompt)
    ids = ids or [first_token(tokenizer, "an empty prompt")]
    return ids if bound is None else ids[-bound:]


def end_tokens(config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Every token id that ends a completion: the tokenizer's, and those of the model's generation config."""
    ids = getattr(config, "eos_token_id", None)
    listed = ids if isinstance(ids, list) else [ids]
    return {id for id in (tokenizer.eos_token_id, *listed) if id is not None}


def completion_text(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], stop: Sequence[str]) -> str:
    """Decode a completion and cut it before the first stop text."""
    text = decode(tokenizer, tokens, skip_special_tokens=True)
    return text[: min((at for word in stop if (at := text.find(word)) >= 0), default=len(text))]


def _complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    draws: Tensor,
    decoding: Decoding,
) -> list[list[int]]:
    """Token ids of the completions of one batch, end token excluded.

    draws: (prompts, max_new_tokens), numbers in [0, 1); (prompts, 0) for greedy decoding.
    """
    context, longest = context_length(model.config), decoding.max_new_tokens
    limits = [longest if context is None else min(longest, context - len(prompt)) for prompt in prompts]
    ends = end_tokens(getattr(model, "generation_config", None), tokenizer)
    stops = StopCheck(tokenizer, decoding.stop)
    tokens: list[list[int]] = [[] for _ in prompts]

    def goes_on(row: int, token: int) -> bool:
        if token in ends:
            return False
        tokens[row].append(token)
        return len(tokens[row]) < limits[row] and not stops.reached(tokens[row])

    batch = _Batch(model, prompts)
    step = 0
    while batch.rows:
        uniform = draws[batch.rows, step] if decoding.temperature else draws
        chosen = choose(batch.logits(), uniform, decoding)
        going = [
            alive and goes_on(row, token)
            for row, token, alive in zip(batch.rows, chosen.tolist(), batch.alive, strict=True)
        ]
        batch.extend(chosen, going)
        step += 1
    return tokens


class _Batch:
    """Left-padded rows that grow by a token at a time, with the model's cache.

    Finished rows leave; only if the model's cache cannot give up rows do they stay, masked, until all have
    finished.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[list[int]]) -> None:
        self.forward = Forward(model)
        # (rows, width): ids, or what the cache has not read of them; mask 1 for tokens that count
        self.ids, self.mask = padded(prompts, self.forward.device, left=True)
        self.cache: Any = None  # one of transformers' caches, or a model's own
        self.rows = list(range(len(prompts)))  # numbers of the prompts in the batch
        self.alive = [True] * len(prompts)  # which of them still go on

    def logits(self) -> Tensor:
        """Scores of the next token, fp32, (rows, vocabulary)."""
        output = self.forward(self.ids, self.mask, 1, past_key_values=self.cache, use_cache=True)
        first, self.cache = self.cache is None, getattr(output, "past_key_values", None)
        logits = output.logits[:, -1].float()
        if first and logits.isnan().any():
            raise ValueError("the model's scores are not numbers (NaN): its weights or its dtype are broken")
        return logits

    def extend(self, chosen: Tensor, going: list[bool]) -> None:
        """Append a token to each row that goes on and drop the others. chosen: (rows,)."""
        alive, token = torch.tensor(going, device=self.ids.device), chosen[:, None]
        # a finished row that has to stay gets tokens that nothing attends to
        self.mask = torch.cat([self.mask, alive[:, None].to(self.mask.dtype)], 1)
        self.ids = token if self.cache is not None else torch.cat([self.ids, token], 1)
        self.alive = going
        if not any(going):
            self.rows = []
        elif not all(going) and can_drop_rows(self.cache):
            kept = alive.nonzero().squeeze(1)
            self.ids, self.mask = self.ids[kept], self.mask[kept]
            if self.cache is not None:
                self.cache.batch_select_indices(kept)
            self.rows = [row for row, goes_on in zip(self.rows, going, strict=True) if goes_on]
            self.alive = [True] * len(self.rows)
