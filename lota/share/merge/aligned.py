"""One tensor of a merge: parts of task vectors over the same entries, and what a rule makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lota.share.delta.format import as_integers
from lota.share.merge.inputs import Entries
from lota.share.merge.rules import MergeRule


@dataclass(frozen=True)
class Aligned:
    """The parts of one tensor; (n,) are the entries that one of them lists. Made by `align`."""

    parts: Sequence[Entries | None]
    positions: Tensor | None  # (n,) int64, ascending; None: every entry
    vectors: list[Tensor]  # (n,) float32 each, 0 for what a part does not list
    touches: Tensor  # (n,) int16, how many vectors change an entry

    def merge_(self, base: Tensor, rule: MergeRule, generator: torch.Generator) -> None:
        """Put the merged values into the base's tensor, contiguous; generator: `rule.generator()`, which all
        tensors of a model share.

        base + change in float32, rounded once to the base's dtype; where the change is 0, the base's bits.
        """
        change = rule.merge(self.vectors, generator, base.numel(), self.positions)
        where = slice(None) if self.positions is None else self.positions
        before = base.view(-1)[where]
        after = (before.float() + change).to(base.dtype)
        bits = as_integers(base)  # torch cannot select and scatter every dtype
        bits[where] = torch.where(change == 0, as_integers(before), as_integers(after))
        if rule.method == "sum":
            self._put_sole(bits)

    def _put_sole(self, bits: Tensor) -> None:
        """Give every entry that one vector alone changes that vector's tuned value, bit for bit.

        base + (tuned - base) can miss it: differences of floating-point numbers are rounded. bits: those of
        the merged tensor, `as_integers`.
        """
        for part in self.parts:
            if part is not None:
                sole = part.changed & (self.touches[part.places(self.positions)] == 1)
                own = sole.nonzero().flatten()
                bits[own if part.positions is None else part.positions[own]] = as_integers(part.tuned)[own]


def align(parts: Sequence[Entries | None], numel: int) -> Aligned:
    """The parts of one tensor, None where a vector changes nothing. numel: entries of the tensor."""
    listed = [torch.empty(0, dtype=torch.int64) if part is None else part.positions for part in parts]
    sparse = [one for one in listed if one is not None]
    positions = torch.unique(torch.cat(sparse)) if len(sparse) == len(listed) else None
    size = numel if positions is None else positions.numel()
    vectors, touches = [], torch.zeros(size, dtype=torch.int16)
    for part in parts:
        if part is None:
            vectors.append(torch.zeros(size))
            continue
        where = part.places(positions)
        touches[where] += part.changed.to(torch.int16)
        if part.positions is None:  # it lists everything, in order
            vectors.append(part.values)
        else:
            vectors.append(torch.zeros(size))
            vectors[-1][where] = part.values
    return Aligned(parts, positions, vectors, touches)
