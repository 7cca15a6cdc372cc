"""From text to batches: encode, truncate, collate, and an order of batches that can be resumed at any
point.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

IGNORED = -100  # label of tokens that the loss does not count
T = TypeVar("T")


@dataclass(frozen=True)
class Example:
    """A training example as text. closing: the prompt's last words, kept whenever the prompt is cut.

    keep_end: a prompt that is too long keeps its last tokens (a chat) instead of its first ones. templated: a
    chat template wrote the prompt, special tokens and all. rejected: of a preference pair the answer that
    people like less than `response`.
    """

    prompt: str
    response: str
    closing: str = ""
    keep_end: bool = False
    templated: bool = False
    rejected: str | None = None


@dataclass(frozen=True)
class Encoded:
    """Token ids of prompt + response; the first `prompt_length` of them are the prompt."""

    input_ids: list[int]
    prompt_length: int

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Batch:
    """input_ids, attention_mask, labels: int64 tensors of shape (rows, longest row), padded on the right.

    n_tokens: tokens that are not padding. examples: what the rows were made of, where that is known.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    n_tokens: int
    examples: Sequence[Example] = ()

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device: torch.device) -> Batch:
        tensors = (t.to(device) for t in (self.input_ids, self.attention_mask, self.labels))
        return Batch(*tensors, self.n_tokens, self.examples)


def encode_prompt(
    tokenizer: Any,
    prompt: str,
    *,
    max_prompt_length: int | None = None,
    closing: str = "",
    keep_end: bool = False,
    special_tokens: bool = True,
) -> list[int]:
    """Token ids of a prompt, with the special tokens that the tokenizer puts in front of a text.

    special_tokens: False where a chat template has written them already. A prompt of more than
    max_prompt_length tokens loses the end of what stands before `closing` (with keep_end: the start); special
    tokens in front and the closing words stay.
    """
    split = _with_special_tokens if special_tokens else _as_written
    prefix, ids = split(tokenizer, prompt)
    if max_prompt_length is None or len(prefix) + len(ids) <= max_prompt_length:
        return prefix + ids
    n_tail = _closing_tokens(tokenizer, ids, closing) if closing and prompt.endswith(closing) else 0
    body, tail = ids[: len(ids) - n_tail], ids[len(ids) - n_tail :]
    room = max_prompt_length - len(prefix) - len(tail)
    if room <= 0:
        return (prefix + tail)[-max_prompt_length:]
    return prefix + (body[-room:] if keep_end else body[:room]) + tail


def _closing_tokens(tokenizer: Any, ids: list[int], closing: str) -> int:
    """How many of the last ids it takes to hold the closing words (their first token may hold more)."""
    wanted = closing.strip(" ")
    for n in range(1, min(len(ids), len(closing) + 8) + 1):
        if wanted in tokenizer.decode(ids[-n:]):
            return n
    return min(len(ids), len(tokenizer(closing, add_special_tokens=False).input_ids))


def encode(tokenizer: Any, example: Example, *, max_length: int, max_prompt_length: int) -> Encoded:
    """Token ids of prompt, response and end-of-sequence token, at most max_length of them.

    When the whole is too long the prompt is cut first, to max_prompt_length tokens, then the response; a cut
    response has no end-of-sequence token. Raises ValueError for a tokenizer without one.
    """
    (encoded,) = _encode(tokenizer, example, [example.response], max_length, max_prompt_length)
    return encoded


def encode_pair(
    tokenizer: Any, example: Example, *, max_length: int, max_prompt_length: int
) -> tuple[Encoded, Encoded]:
    """A preference pair, (preferred, rejected), cut as by `encode`; both have the same prompt tokens."""
    responses = [example.response, example.rejected]
    chosen, rejected = _encode(tokenizer, example, responses, max_length, max_prompt_length)
    return chosen, rejected


def _encode(
    tokenizer: Any, example: Example, responses: Sequence[str], max_length: int, max_prompt_length: int
) -> list[Encoded]:
    """The example's prompt, cut when the longest response asks for it, before each of the responses."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-sequence token, which ends every training response")
    special = not example.templated
    prompt = encode_prompt(tokenizer, example.prompt, special_tokens=special)
    endings = [
        [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for text in responses
    ]
    if len(prompt) + max(map(len, endings)) > max_length:
        prompt = encode_prompt(
            tokenizer,
            example.prompt,
            max_prompt_length=max_prompt_length,
            closing=example.closing,
            keep_end=example.keep_end,
            special_tokens=special,
        )
    return [Encoded((prompt + ending)[:max_length], len(prompt)) for ending in endings]


def _with_special_tokens(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """(special tokens in front, tokens of the text); what a tokenizer appends is dropped: a response
    follows.
    """
    plain = tokenizer(text, add_special_tokens=False).input_ids
    full = tokenizer(text).input_ids
    for n in range(len(full) - len(plain) + 1):
        if full[n : n + len(plain)] == plain:
            return full[:n], plain
    return [], full


def _as_written(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """(the token for the beginning of text where the text starts with it, the other tokens)."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    n = int(bool(ids) and ids[0] == tokenizer.bos_token_id)
    return ids[:n], ids[n:]


def collate(rows: Sequence[Encoded], pad_token_id: int) -> Batch:
    """Pad on the right; padding and prompt tokens get the label -100."""
    longest = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), longest), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for i, row in enumerate(rows):
        ids = torch.tensor(row.input_ids, dtype=torch.int64)
        input_ids[i, : len(row)] = ids
        attention_mask[i, : len(row)] = 1
        labels[i, row.prompt_length : len(row)] = ids[row.prompt_length :]
    return Batch(input_ids, attention_mask, labels, sum(len(row) for row in rows))


def seeded_sample(items: Sequence[T], n: int, seed: int) -> list[T]:
    """n of the items chosen at random by the seed, in their original order; all of them if n is larger."""
    if n >= len(items):
        return list(items)
    chosen = sorted(random.Random(seed).sample(range(len(items)), n))
    return [items[i] for i in chosen]


def fraction_of(items: Sequence[T], fraction: float, seed: int) -> list[T]:
    """A seeded sample of round(fraction * n) items, at least one."""
    return seeded_sample(items, max(1, round(fraction * len(items))), seed)


def epoch_batches(
    n: int, batch_size: int, *, seed: int, epoch: int, lengths: Sequence[int] | None = None
) -> list[list[int]]:
    """Row numbers of every batch of an epoch, shuffled by (seed, epoch); the last batch may be smaller.

    lengths: tokens per row; given, rows of similar length share a batch (shuffled rows are sorted within
    stretches of 50 batches, and the order of the batches is shuffled).
    """
    rng = random.Random(f"{seed}-{epoch}")
    rows = list(range(n))
    rng.shuffle(rows)
    if lengths is None:
        return [rows[i : i + batch_size] for i in range(0, n, batch_size)]
    stretch = 50 * batch_size
    batches = []
    for start in range(0, n, stretch):
        part = sorted(rows[start : start + stretch], key=lambda i: lengths[i], reverse=True)
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    rng.shuffle(batches)
    return batches
