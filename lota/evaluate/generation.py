"""Batched generation with any Hugging Face causal language model; used by evaluation, sampling and training.

Prompts of similar length share a batch, padded on the left; a row that has finished leaves its batch, so
that one long completion does not hold up the others. A sampled completion depends on (seed, prompt index,
sample index) only, not on the batch it was made in, as far as fp32 rounding allows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lota.data.batches import encode_prompt
from lota.evaluate.batching import accepted_arguments, in_batches, padded
from lota.evaluate.decoding import Decoding, StopCheck, choose, uniforms
from lota.evaluate.kv_cache import can_drop_rows, give_room


def generate(
    model,
    tokenizer,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    stop: Sequence[str] = (),
    max_prompt_length: int | None = None,
    indices: Sequence[int] | None = None,
    sample: int = 0,
    on_done: Callable[[int, str], None] | None = None,
) -> list[str]:
    """The completion of each prompt, without the prompt, special tokens and stop text.

    prompts: texts, or token ids that already fit (a text that is too long keeps its end). indices: what
    numbers the prompts for the seed, where they are part of a larger list. on_done(i, completion) is called
    for prompts[i] when its batch is done. Running out of memory halves the batch for the rest. Errors:
    ValueError for bad settings.
    """
    decoding = Decoding(max_new_tokens, temperature, top_p, top_k, seed, tuple(stop))
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1")
    bound = prompt_bound(model.config, max_new_tokens, max_prompt_length)
    ids = [_prompt_ids(tokenizer, prompt, bound) for prompt in prompts]
    indices = range(len(ids)) if indices is None else indices
    draws = [uniforms(decoding, index, sample) for index in indices]
    done: list[str] = [""] * len(ids)

    def run(rows: list[int]) -> None:
        batch = [ids[row] for row in rows]
        tokens = _complete(model, tokenizer, batch, [draws[row] for row in rows], decoding)
        for row, completion in zip(rows, tokens, strict=True):
            done[row] = completion_text(tokenizer, completion, decoding.stop)
            if on_done is not None:
                on_done(row, done[row])

    # longest first: if the memory is too small for this batch size, it shows at once
    order = sorted(range(len(ids)), key=lambda row: -len(ids[row]))
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            in_batches(order, batch_size, run)
    finally:
        model.train(training)
    return done


def context_length(config) -> int | None:
    """How many positions the model has, prompt and completion together; None where it sets no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def prompt_bound(config, max_new_tokens: int, max_prompt_length: int | None = None) -> int | None:
    """The most tokens a prompt may have: at most max_prompt_length, and beside it the completion has room.

    The completion is given max_new_tokens, but at most half the context. None: no limit.
    """
    context = context_length(config)
    if context is None:
        return max_prompt_length
    room = context - min(max_new_tokens, context // 2)
    return room if max_prompt_length is None else min(room, max_prompt_length)


def _prompt_ids(tokenizer, prompt: str | Sequence[int], bound: int | None) -> list[int]:
    if isinstance(prompt, str):
        ids = encode_prompt(tokenizer, prompt, max_prompt_length=bound, keep_end=True)
    else:
        ids = list(prompt)
    if not ids:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise ValueError(
                "an empty prompt needs a tokenizer with a token for the beginning or end of text"
            )
        ids = [start]
    return ids if bound is None else ids[-bound:]


def end_tokens(model, tokenizer) -> set[int]:
    """Every token id that ends a completion: the tokenizer's, and those of the model's generation config."""
    generation = getattr(model, "generation_config", None)
    ids = getattr(generation, "eos_token_id", None)
    ids = ids if isinstance(ids, list) else [ids]
    return {id for id in (tokenizer.eos_token_id, *ids) if id is not None}


def completion_text(tokenizer, tokens: Sequence[int], stop: Sequence[str]) -> str:
    """Decode a completion and cut it before the first stop text."""
    text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    ends = [at for word in stop if (at := text.find(word)) >= 0]
    return text[: min(ends)] if ends else text


def _complete(model, tokenizer, prompts, draws, decoding: Decoding) -> list[list[int]]:
    """Token ids of the completions of one batch, end token excluded."""
    context = context_length(model.config)
    limits = [
        decoding.max_new_tokens if context is None else min(decoding.max_new_tokens, context - len(prompt))
        for prompt in prompts
    ]
    ends = end_tokens(model, tokenizer)
    stops = StopCheck(tokenizer, decoding.stop)
    tokens: list[list[int]] = [[] for _ in prompts]
    all_draws = torch.stack(draws)  # (prompts, max_new_tokens)

    def finished(row: int, token: int) -> bool:
        if token in ends:
            return True
        tokens[row].append(token)
        if len(tokens[row]) >= limits[row]:
            return True
        return stops.reached(tokens[row])

    batch = _Batch(model, prompts, context)
    step = 0
    while batch.rows:
        logits = batch.logits()
        uniform = all_draws[batch.rows, step] if decoding.temperature else all_draws
        chosen = choose(logits, uniform, decoding)
        going = [
            not finished(row, token) if alive else False
            for row, token, alive in zip(batch.rows, chosen.tolist(), batch.alive, strict=True)
        ]
        batch.extend(chosen, going)
        step += 1
    return tokens


class _Batch:
    """Left-padded rows that grow by a token at a time, with the model's cache.

    rows: the prompt numbers in the batch; alive: which of them still go on. Finished rows leave; only where
    the model's cache cannot give up rows do they stay, masked, until all have finished.
    """

    def __init__(self, model, prompts: Sequence[Sequence[int]], context: int | None) -> None:
        self.model, self.context = model, context
        self.accepts = accepted_arguments(model)
        device = next(model.parameters()).device
        # (rows, width): ids, or what the cache has not read of them; mask 1 for tokens that count
        self.ids, self.mask = padded(prompts, device, left=True)
        self.positions = self._within((self.mask.cumsum(-1) - 1).clamp(min=0))  # of ids
        self.cache = None
        self.rows = list(range(len(prompts)))
        self.alive = [True] * len(prompts)

    def _within(self, positions: Tensor) -> Tensor:
        return positions if self.context is None else positions.clamp(max=self.context - 1)

    def logits(self) -> Tensor:
        """Scores of the next token, fp32, (rows, vocabulary)."""
        extra = {}
        if "position_ids" in self.accepts:
            extra["position_ids"] = self.positions
        if "logits_to_keep" in self.accepts:
            extra["logits_to_keep"] = 1
        first = self.cache is None
        output = self.model(
            input_ids=self.ids, attention_mask=self.mask, past_key_values=self.cache, use_cache=True, **extra
        )
        self.cache = getattr(output, "past_key_values", None)
        logits = output.logits[:, -1].float()
        if first:
            if logits.isnan().any():
                raise ValueError(
                    "the model's scores are not numbers (NaN): its weights or its dtype are broken"
                )
            give_room(self.cache)
        return logits

    def extend(self, chosen: Tensor, going: list[bool]) -> None:
        """Append a token to each row that goes on and drop the others."""
        alive = torch.tensor(going, device=self.ids.device)
        token, position = chosen[:, None], self._within(self.positions[:, -1:] + alive[:, None])
        self.mask = torch.cat([self.mask, alive[:, None].to(self.mask.dtype)], 1)
        if self.cache is None:
            token, position = torch.cat([self.ids, token], 1), torch.cat([self.positions, position], 1)
        self.ids, self.positions, self.alive = token, position, going
        if not any(going):
            self.rows = []
        elif not all(going) and can_drop_rows(self.cache):
            kept = alive.nonzero().squeeze(1)
            self.ids, self.mask, self.positions = self.ids[kept], self.mask[kept], self.positions[kept]
            if self.cache is not None:
                self.cache.batch_select_indices(kept)
            self.rows = [row for row, goes_on in zip(self.rows, going, strict=True) if goes_on]
            self.alive = [True] * len(self.rows)
