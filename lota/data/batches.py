"""From text to batches: encode, truncate, collate, and an order of batches that can be resumed at any
point.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from lota.config import Config
from lota.data.encoding import (
    IGNORED,
    Encoded,
    Example,
)

T = TypeVar("T")


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


def plan(
    config: Config,
    n_rows: int,
    lengths: list[int] | None,
    epoch: int = 0,
    batch: int | None = None,
    examples: int = 0,
) -> Iterator[tuple[int, int, bool, list[int]]]:
    """(epoch, batch, whether it is the epoch's last, row numbers) of every batch still to come.

    Starts at (epoch, batch) with `examples` seen; at the very start (batch None) fast_forward batches are
    skipped.
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
            yield epoch, index, index + 1 == len(batches), rows
        epoch, batch = epoch + 1, 0
