"""From text to batches: examples, their tokens, tensors, and an order of batches that can be resumed."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lota.config import Config

T = TypeVar("T")
IGNORED = -100  # label of tokens that the loss does not count
COUNTED = 500  # examples that are tokenized to tell how many are cut: two seconds if all are long
SPECIAL_TOKENS = 8  # that a tokenizer adds at most


@dataclass(frozen=True)
class Prompt:
    """What the model reads before it writes."""

    text: str
    closing: str = ""  # its last words, kept whenever it is cut
    keep_end: bool = False  # if it is too long it keeps its last tokens (a chat), not its first ones
    templated: bool = False  # a chat template wrote it, special tokens and all: the tokenizer adds none

    def stripped(self) -> Prompt:
        """Without the blanks at its end."""
        return replace(self, text=self.text.rstrip(), closing=self.closing.rstrip())

    def ids(self, tokenizer: PreTrainedTokenizerBase, bound: int | None = None) -> list[int]:
        """Token ids, with the special tokens that the tokenizer puts in front of a text.

        If there are more than `bound`, the prompt loses the end of what stands before `closing` (with
        keep_end: the start); special tokens in front and the closing words stay.
        """
        split = _as_written if self.templated else _with_special_tokens
        prefix, ids = split(tokenizer, self.text)
        if bound is None or len(prefix) + len(ids) <= bound:
            return prefix + ids
        closes = self.closing and self.text.endswith(self.closing)
        n_tail = _closing_tokens(tokenizer, ids, self.closing) if closes else 0
        body, tail = ids[: len(ids) - n_tail], ids[len(ids) - n_tail :]
        room = bound - len(prefix) - len(tail)
        if room <= 0:
            return (prefix + tail)[-bound:]
        return prefix + (body[-room:] if self.keep_end else body[:room]) + tail


@dataclass(frozen=True)
class Example:
    """A training example as text."""

    prompt: Prompt
    response: str
    rejected: str | None = None  # of a preference: the answer that people like less than `response`


@dataclass(frozen=True)
class Encoded:
    """Token ids of prompt + response."""

    input_ids: list[int]
    prompt_length: int  # so many of the first ids are the prompt

    def __len__(self) -> int:
        return len(self.input_ids)


def _closing_tokens(tokenizer: PreTrainedTokenizerBase, ids: list[int], closing: str) -> int:
    """How many of the last ids it takes to hold the closing words (their first token may hold more)."""
    wanted = closing.strip(" ")
    for n in range(1, min(len(ids), len(closing) + 8) + 1):
        if wanted in tokenizer.decode(ids[-n:]):
            return n
    return min(len(ids), len(tokenizer(closing, add_special_tokens=False).input_ids))


def encode(
    tokenizer: PreTrainedTokenizerBase, example: Example, *, max_length: int, max_prompt_length: int
) -> Encoded:
    """Token ids of prompt, response and end-of-sequence token; see `encode_rows`."""
    return encode_rows(tokenizer, example, max_length=max_length, max_prompt_length=max_prompt_length)[0]


def encode_rows(
    tokenizer: PreTrainedTokenizerBase, example: Example, *, max_length: int, max_prompt_length: int
) -> list[Encoded]:
    """Returns the example's row or, of a preference, the rows of the preferred and the rejected response.

    If the longest row has more than max_length tokens, the prompt is cut first, to max_prompt_length tokens,
    then the responses; a cut response has no end-of-sequence token. All rows have the same prompt tokens.
    Raises ValueError for a tokenizer without an end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-sequence token, which ends every training response")
    responses = [example.response] if example.rejected is None else [example.response, example.rejected]
    prompt = example.prompt.ids(tokenizer)
    endings = [
        [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for text in responses
    ]
    if len(prompt) + max(map(len, endings)) > max_length:
        prompt = example.prompt.ids(tokenizer, max_prompt_length)
    return [Encoded((prompt + ending)[:max_length], len(prompt)) for ending in endings]


def encoder(config: Config, tokenizer: PreTrainedTokenizerBase) -> Callable[[Example], list[Encoded]]:
    """Returns `encode_rows` with the limits of a run."""
    return partial(
        encode_rows, tokenizer, max_length=config.max_length, max_prompt_length=config.max_prompt_length
    )


def cut_text(config: Config, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> str:
    """How many prompts and responses a run cuts, in words; empty if it cuts none.

    Of more than COUNTED examples that may be too long it looks at a sample, and says `about`.
    """
    encoded = encoder(config, tokenizer)
    # no token is shorter than a byte, so that what is short in bytes needs no tokenizer
    long = [example for example in examples if _n_bytes(example) + SPECIAL_TOKENS > config.max_length]
    looked_at = seeded_sample(long, COUNTED, config.seed)
    prompts = responses = 0
    for example in looked_at:
        rows = encoded(example)
        prompts += rows[0].prompt_length < len(example.prompt.ids(tokenizer))
        responses += any(
            len(row) == config.max_length and row.input_ids[-1] != tokenizer.eos_token_id for row in rows
        )
    if not prompts + responses:
        return ""
    share, about = len(long) / len(looked_at), "about " if len(looked_at) < len(long) else ""
    return (
        f"{about}{round(share * prompts):,} prompts and {round(share * responses):,} responses of "
        f"{len(examples):,} examples are cut (max_length={config.max_length}, "
        f"max_prompt_length={config.max_prompt_length}); a cut response has no end"
    )


def _n_bytes(example: Example) -> int:
    """Of the prompt and the longest response."""
    responses = (example.response, example.rejected or "")
    return len(example.prompt.text.encode()) + max(len(text.encode()) for text in responses)


def _with_special_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """(special tokens in front, tokens of the text); what a tokenizer appends is dropped: a response
    follows.
    """
    plain = tokenizer(text, add_special_tokens=False).input_ids
    full = tokenizer(text).input_ids
    for n in range(len(full) - len(plain) + 1):
        if full[n : n + len(plain)] == plain:
            return full[:n], plain
    return [], full


def _as_written(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """(the token for the beginning of text where the text starts with it, the other tokens)."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    n = int(bool(ids) and ids[0] == tokenizer.bos_token_id)
    return ids[:n], ids[n:]


# Tensors


@dataclass(frozen=True)
class Batch:
    """Rows of tokens as tensors, padded on the right."""

    input_ids: Tensor  # (rows, longest row), int64
    attention_mask: Tensor  # (rows, longest row), int64: 1 for a token, 0 for padding
    labels: Tensor  # (rows, longest row), int64: the token of a response, else IGNORED
    n_tokens: int  # tokens that are not padding
    examples: Sequence[Example] = ()  # what the rows were made of, if that is known

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of the model's forward pass."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "use_cache": False}

    @cached_property
    def targets(self) -> Tensor:
        """The token that is to be predicted at each position, else IGNORED: (rows, longest row)."""
        return next_tokens(self.labels)

    def row_sums(self, values: Tensor) -> Tensor:
        """Sums over the tokens of each row, (rows,), of values (rows, longest row)."""
        return values.sum(dim=1)

    def to(self, device: torch.device) -> Self:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: v.to(device) for k, v in values.items() if torch.is_tensor(v)}
        return replace(self, **moved)


def next_tokens(labels: Tensor) -> Tensor:
    """Labels shifted to where they are predicted: at position t the label of t + 1; IGNORED at the end.

    labels: (rows, length). Shifting labels copies ids; shifting logits would copy logits.
    """
    targets = torch.full_like(labels, IGNORED)
    targets[:, :-1] = labels[:, 1:]
    return targets


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


# Order


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


class ScheduledBatch(NamedTuple):
    """A batch and its place in the run."""

    epoch: int
    batch: int  # its number in the epoch
    last_of_epoch: bool
    rows: list[int]  # numbers of its examples


def batch_order(
    config: Config,
    n_rows: int,
    lengths: list[int] | None,
    epoch: int = 0,
    batch: int | None = None,
    examples: int = 0,
) -> Iterator[ScheduledBatch]:
    """Yields every batch still to come, in order.

    Starts at (epoch, batch) with `examples` seen; at the very start (batch None) fast_forward batches are
    skipped. lengths: see `epoch_batches`.
    """
    skip = config.fast_forward if batch is None else 0
    batch = batch or 0
    while config.n_epochs is None or epoch < config.n_epochs:
        batches = epoch_batches(n_rows, config.batch_size, seed=config.seed, epoch=epoch, lengths=lengths)
        for index in range(batch, len(batches)):
            if skip > 0:
                skip -= 1
                continue
            rows = batches[index]
            if config.n_examples is not None:
                rows = rows[: config.n_examples - examples]
            if not rows:
                return
            examples += len(rows)
            yield ScheduledBatch(epoch, index, index + 1 == len(batches), rows)
        epoch, batch = epoch + 1, 0


# Hashes


def examples_hash(examples: Iterable[Example]) -> str:
    """SHA-256 of the texts: a continued run must see the rows that it started with."""
    digest = hashlib.sha256()
    for example in examples:
        texts = [example.prompt.text, example.response]
        digest.update(json.dumps(texts if example.rejected is None else [*texts, example.rejected]).encode())
    return digest.hexdigest()


def encoded_hash_and_lengths(examples: Iterable[Sequence[Encoded]]) -> tuple[str, list[int]]:
    """SHA-256 of all token ids (so of texts, tokenizer, template, cuts); tokens of each longest row."""
    digest, lengths = hashlib.sha256(), []
    for rows in examples:
        digest.update(json.dumps([[row.prompt_length, row.input_ids] for row in rows]).encode())
        lengths.append(max(map(len, rows)))
    return digest.hexdigest(), lengths
