"""Rows, columns and blocks: units that a mask keeps or freezes as wholes, instead of single entries.

A row is one output neuron and a column one input neuron, whatever the storage: `nn.Linear` stores (out, in),
GPT-2's `Conv1D` (in, out), stacks of expert matrices (experts, out, in), or (experts, in, out) if they are
transposed; there a row is one pair of expert and output. Blocks are squares of the matrices as they are
stored, cut off at their edges. A unit's saliency is the sum of the squares of its entries' saliencies; other
aggregates are there to be compared with it (docs/RESULTS.md), and no command offers them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from lota.config import GRANULARITIES as GRANULARITIES
from lota.masks import Mask
from lota.masks.extract.saliency import SaliencyStream, uniform
from lota.masks.extract.topk import Progress
from lota.models.chunks import Span, in_order, spans
from lota.models.scope import ScopedTensor

BLOCK_SIZES = (16, 256)  # smallest and largest side of a block
DEFAULT_BLOCK = 64


@dataclass(frozen=True)
class Aggregate:
    """What makes one saliency of those of a unit's entries."""

    of_entry: np.ufunc  # of a saliency, in fp64: what is joined
    join: np.ufunc  # of two values; 0 changes nothing
    per_entry: bool = False  # divided by the number of entries in the end


AGGREGATES = {
    "sum_squares": Aggregate(np.square, np.add),
    "mean_squares": Aggregate(np.square, np.add, per_entry=True),
    "sum": Aggregate(np.positive, np.add),
    "max": Aggregate(np.positive, np.maximum),
}
DEFAULT_AGGREGATE = "sum_squares"


@dataclass(frozen=True)
class Units:
    """The units of one parameter, numbered by matrix, then from top to bottom, then from left to right.

    The parameter is seen as stored: `stacks` matrices of `height` lines of `width` entries.
    """

    stacks: int
    height: int
    width: int
    tall: int  # lines of a unit; the last ones of a matrix may have fewer
    wide: int  # entries of each of its lines; the last ones of a line may have fewer

    @property
    def grid(self) -> tuple[int, int, int]:
        """Matrices, units below each other, units beside each other."""
        return self.stacks, math.ceil(self.height / self.tall), math.ceil(self.width / self.wide)

    @property
    def count(self) -> int:
        return math.prod(self.grid)

    @property
    def size(self) -> int:
        """Entries of all of them."""
        return self.stacks * self.height * self.width

    @property
    def lengths(self) -> np.ndarray:
        """Entries of each unit, int64 (count,)."""
        stacks, down, across = self.grid
        lines = np.minimum(self.tall, self.height - self.tall * np.arange(down))
        entries = np.minimum(self.wide, self.width - self.wide * np.arange(across))
        return np.tile(np.outer(lines, entries).reshape(-1), stacks)

    def joined(self, start: int, values: np.ndarray, join: np.ufunc = np.add) -> tuple[int, np.ndarray]:
        """Returns (first unit, fp64 sums (units,) from it on) of the entries (n,) from `start` on.

        They are whole rows of units; what they hold outside of these entries counts as 0.
        join: np.add, or np.maximum for the largest of entries that are not negative.
        """
        first, stop = start // self.width, (start + len(values) - 1) // self.width + 1
        flat = np.zeros((stop - first) * self.width)  # zeros for what the first and the last line lack
        flat[start - first * self.width :][: len(values)] = values
        lines = flat.reshape(-1, self.width)
        if self.wide > 1:
            lines = join.reduceat(lines, np.arange(0, self.width, self.wide), axis=1)
        down, across = self.grid[1:]
        matrix, line = np.divmod(np.arange(first, stop), self.height)
        row = matrix * down + line // self.tall  # of units, that each line belongs to
        edges = np.flatnonzero(np.diff(row, prepend=-1))
        return int(row[0]) * across, join.reduceat(lines, edges, axis=0).reshape(-1)

    def packed(self, chosen: np.ndarray) -> np.ndarray:
        """Returns the packed bits of the parameter's entries, set for the chosen units: bool (count,)."""
        grid = chosen.reshape(self.grid)
        lines = np.repeat(grid, self.tall, axis=1)[:, : self.height]
        return np.packbits(np.repeat(lines, self.wide, axis=2)[:, :, : self.width])

    def touched(self, packed: np.ndarray) -> np.ndarray:
        """Returns bool (count,): the units with at least one of these packed bits set."""
        flat = np.unpackbits(packed, count=self.size)
        flags = flat.reshape(self.stacks, self.height, self.width)
        lines = np.bitwise_or.reduceat(flags, np.arange(0, self.height, self.tall), axis=1)
        grid = np.bitwise_or.reduceat(lines, np.arange(0, self.width, self.wide), axis=2)
        return grid.reshape(-1).astype(np.bool_)


def units_of(name: str, tensor: ScopedTensor, granularity: str, block: int = DEFAULT_BLOCK) -> Units:
    """A parameter's rows, columns or blocks. Raises ValueError if it is no matrix or stack of matrices."""
    stacked = len(tensor.shape) == 3 and re.search("expert|linear$", tensor.module_type, re.IGNORECASE)
    if len(tensor.shape) != 2 and not stacked:
        raise ValueError(
            f"granularity={granularity} needs weight matrices or experts' stacks of them, but {name} has the "
            f"shape {tensor.shape}: leave it out of the scope"
        )
    *stacks, height, width = tensor.shape
    if granularity == "block":
        tall, wide = block, block
    else:
        tall, wide = (1, width) if (granularity == "row") != tensor.transposed else (height, 1)
    return Units(math.prod(stacks), height, width, tall, wide)


def units_of_scope(scope: Mapping[str, ScopedTensor], granularity: str, block: int) -> dict[str, Units]:
    """Name -> its units; empty if single entries are chosen. Errors: as `units_of`."""
    if granularity == "element":
        return {}
    return {name: units_of(name, tensor, granularity, block) for name, tensor in scope.items()}


def widened(mask: Mask, units: Mapping[str, Units]) -> Mask:
    """The mask of all units of which the mask keeps an entry; without units the mask itself."""
    if not units:
        return mask
    bits = {
        name: torch.from_numpy(units[name].packed(units[name].touched(packed.numpy())))
        if name in units
        else packed
        for name, packed in mask.bits.items()
    }
    return Mask(bits, mask.shapes, mask.meta)


class Cutoff(NamedTuple):
    """Where a selection ends."""

    threshold: float | None  # saliency of the last kept; 0 if too few are above 0, None if none is asked for
    shortfall: int  # entries that were asked for and are not kept
    by_size: bool = False  # they are missing only because no unit that is left is small enough


def choose(
    saliencies: np.ndarray, lengths: np.ndarray, budget: int, smallest: bool
) -> tuple[np.ndarray, Cutoff]:
    """Returns the best units, as many as fit into `budget` entries, as bool (units,), and where the cut lies.

    saliencies, lengths: (units,), a unit's saliency and its number of entries. Equal ones go to the first
    unit, a saliency of 0 is never chosen. A unit that no longer fits is passed over for the next that does,
    so that fewer entries are missing than the shortest unit left has.
    """
    order = np.argsort(saliencies if smallest else -saliencies, kind="stable")
    order = order[saliencies[order] > 0]
    chosen = np.zeros(len(saliencies), np.bool_)
    left, last = budget, None
    while len(order):
        # Take the units up to the first that does not fit, then go on behind it with those that still fit.
        fitting = np.cumsum(lengths[order]) <= left
        n = len(order) if fitting.all() else int(np.argmin(fitting))
        chosen[order[:n]] = True
        last = order[n - 1] if n else last
        left -= int(lengths[order[:n]].sum())
        order = order[n:]
        order = order[lengths[order] <= left]
    if budget == 0:
        return chosen, Cutoff(None, 0)
    by_size = bool(left) and bool(((saliencies > 0) & ~chosen).any())
    threshold = float(saliencies[last]) if last is not None and (by_size or not left) else 0.0
    return chosen, Cutoff(threshold, left, by_size)


def top_units(
    stream: SaliencyStream,
    units: Mapping[str, Units],
    counts: Sequence[int],
    read_order: Sequence[str],
    progress: Progress | None = None,
    aggregate: str = DEFAULT_AGGREGATE,
) -> list[tuple[dict[str, np.ndarray], Cutoff]]:
    """Returns, for each budget of entries, name -> packed bits of the best units, and where the cut lies.

    units: in the order that decides ties. aggregate: a name of AGGREGATES. One pass over the entries; memory:
    8 bytes per unit, and a byte per entry of one parameter at a time. Under `random` each unit has one number
    (a sum would prefer long units).
    """
    found = {name: np.zeros(each.count) for name, each in units.items()}  # fp64 (units,)
    if stream.saliency == "random":
        for name, each in units.items():
            found[name][:] = uniform(Span(name, 0, each.count), stream.seed)
            if name in stream.taken:
                found[name][each.touched(stream.taken[name])] = 0
    else:
        _aggregate(stream, units, found, read_order, AGGREGATES[aggregate])
    if progress:
        progress(2 * sum(each.size for each in units.values()))
    # All units in one line, (units of all parameters,), to be ranked together and split again.
    saliencies = np.concatenate(list(found.values()))
    lengths = np.concatenate([each.lengths for each in units.values()])
    ends = np.cumsum([each.count for each in units.values()])[:-1]
    results = []
    for budget in counts:
        chosen, cutoff = choose(saliencies, lengths, budget, stream.smallest)
        parts = zip(units.items(), np.split(chosen, ends), strict=True)
        results.append(({name: each.packed(part) for (name, each), part in parts}, cutoff))
    return results


def _aggregate(
    stream: SaliencyStream,
    units: Mapping[str, Units],
    found: Mapping[str, np.ndarray],
    order: Sequence[str],
    how: Aggregate,
) -> None:
    """Write each unit's saliency into `found`: name -> fp64 zeros (units,)."""

    def part(span: Span) -> tuple[int, np.ndarray]:
        values = how.of_entry(stream.saliencies(span), dtype=np.float64)
        return units[span.name].joined(span.start, values, how.join)

    sizes = {name: each.size for name, each in units.items()}
    for span, (first, values) in in_order(part, spans(sizes, order)):  # in order: the same sums at every run
        stretch = found[span.name][first : first + len(values)]
        how.join(stretch, values, out=stretch)
    if how.per_entry:
        for name, each in units.items():
            found[name][:] /= each.lengths
