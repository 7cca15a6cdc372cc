"""Rows of tokens laid end to end in one, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lota.data.batches import IGNORED, Batch, Encoded, next_tokens


@dataclass(frozen=True)
class PackedBatch(Batch):
    """Rows of tokens in one row: tensors are (1, tokens). `attention_mask` holds the number of the row that a
    token is from, counted from 1; the model is given places instead.
    """

    position_ids: Tensor = field(kw_only=True)  # (1, tokens), int64: the place of each token in its row
    lengths: Sequence[int] = field(kw_only=True)  # tokens of each row

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of the model's forward pass: places tell it where a row begins."""
        return {"input_ids": self.input_ids, "position_ids": self.position_ids, "use_cache": False}

    @cached_property
    def targets(self) -> Tensor:
        """The token that is to be predicted at each position, (1, tokens); none after the end of a row."""
        targets = next_tokens(self.labels)
        number = self.attention_mask
        targets[:, :-1].masked_fill_(number[:, 1:] != number[:, :-1], IGNORED)
        return targets

    def row_sums(self, values: Tensor) -> Tensor:
        """Sums over the tokens of each row, (rows,), of values (1, tokens).

        The values are written into a table, (rows, longest row): the order of a sum is always the same.
        """
        table = values.new_zeros(len(self), max(self.lengths))
        return table.index_put((self.attention_mask[0] - 1, self.position_ids[0]), values[0]).sum(dim=1)


def pack(rows: Sequence[Encoded]) -> PackedBatch:
    """Lay rows end to end; prompt tokens get the label -100."""
    lengths = torch.tensor([len(row) for row in rows])
    input_ids = torch.tensor([i for row in rows for i in row.input_ids])  # (tokens,)
    number = torch.arange(len(rows)).repeat_interleave(lengths)  # of the row that a token is from
    place = torch.arange(len(input_ids)) - (lengths.cumsum(0) - lengths)[number]  # in that row
    prompt = torch.tensor([row.prompt_length for row in rows])[number]
    labels = input_ids.masked_fill(place < prompt, IGNORED)
    return PackedBatch(
        input_ids[None],
        number[None] + 1,
        labels[None],
        len(input_ids),
        position_ids=place[None],
        lengths=lengths.tolist(),
    )
