"""Rows and columns: whole output or input neurons as what a mask keeps, instead of single entries.

A row is one output neuron and a column one input neuron, whatever the storage: `nn.Linear` stores (out, in),
GPT-2's `Conv1D` (in, out), stacks of expert matrices (experts, out, in), or (experts, in, out) if they are
transposed; there a row is one pair of expert and output. A unit's saliency is the sum of its entries'.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lota.masks.extract.saliency import SaliencyStream, uniform
from lota.masks.extract.topk import Progress
from lota.models.chunks import Span, in_order, spans
from lota.models.scope import ScopedTensor

GRANULARITIES = ("element", "row", "column")


@dataclass(frozen=True)
class Units:
    """The rows or columns of one parameter, numbered in the order of their first entries.

    The parameter is seen as stored: `stacks` matrices of `height` lines of `width` entries.
    """

    stacks: int
    height: int
    width: int
    is_line: bool  # a unit is one line of consecutive entries; else it is one entry of each line of a matrix

    @property
    def count(self) -> int:
        return self.stacks * (self.height if self.is_line else self.width)

    @property
    def length(self) -> int:
        """Entries of a unit."""
        return self.width if self.is_line else self.height

    def sums(self, start: int, saliencies: np.ndarray) -> tuple[int, np.ndarray]:
        """Returns (first unit, fp64 sums (units,) from it on) of the entries (n,) from `start` on.

        The first and the last unit may continue outside of these entries; their sums are parts of the whole.
        """
        if self.is_line:
            # Unit u holds entries [u * width, (u + 1) * width): add up between the edges inside the span.
            first = start // self.width
            edges = np.arange(first * self.width, start + len(saliencies), self.width) - start
            edges[0] = 0  # the first line may have begun before the span
            return first, np.add.reduceat(saliencies, edges, dtype=np.float64)
        # Unit u = (matrix, column): each matrix that the span touches adds to `width` sums of its own.
        matrix = self.height * self.width
        first, last = start // matrix, (start + len(saliencies) - 1) // matrix
        sums = np.zeros((last + 1 - first, self.width))
        for i, total in enumerate(sums):
            low, high = max((first + i) * matrix - start, 0), (first + i + 1) * matrix - start
            self._add_lines(total, (start + low) % self.width, saliencies[low:high])
        return first * self.width, sums.reshape(-1)

    def _add_lines(self, total: np.ndarray, column: int, saliencies: np.ndarray) -> None:
        """Add entries of one matrix that begin in `column` to their columns' sums `total` (width,)."""
        # the rest of a line that began before, whole lines as (lines, width), the start of a last line
        head = min(-column % self.width, len(saliencies))
        whole = (len(saliencies) - head) // self.width * self.width
        total[column : column + head] += saliencies[:head]
        total += saliencies[head : head + whole].reshape(-1, self.width).sum(axis=0, dtype=np.float64)
        rest = saliencies[head + whole :]
        total[: len(rest)] += rest

    def packed(self, chosen: np.ndarray) -> np.ndarray:
        """Returns the packed bits of the parameter's entries, set for the chosen units: bool (count,)."""
        by_line = chosen.reshape(self.stacks, -1, 1) if self.is_line else chosen.reshape(self.stacks, 1, -1)
        return np.packbits(np.broadcast_to(by_line, (self.stacks, self.height, self.width)))

    def touched(self, packed: np.ndarray) -> np.ndarray:
        """Returns bool (count,): the units with at least one of these packed bits set."""
        flags = np.unpackbits(packed, count=self.stacks * self.height * self.width)
        return flags.reshape(self.stacks, self.height, self.width).any(2 if self.is_line else 1).reshape(-1)


def units_of(name: str, tensor: ScopedTensor, granularity: str) -> Units:
    """Returns a parameter's rows or columns. Raises ValueError if it is no matrix or stack of matrices."""
    stacked = len(tensor.shape) == 3 and re.search("expert|linear$", tensor.module_type, re.IGNORECASE)
    if len(tensor.shape) != 2 and not stacked:
        raise ValueError(
            f"granularity={granularity} needs weight matrices or experts' stacks of them, but {name} has the "
            f"shape {tensor.shape}: leave it out of the scope"
        )
    *stacks, height, width = tensor.shape
    return Units(math.prod(stacks), height, width, (granularity == "row") != tensor.transposed)


class Cutoff(NamedTuple):
    """Where a selection ends."""

    threshold: float | None  # saliency of the last kept; 0 if too few are above 0, None if none is asked for
    shortfall: int  # entries that were asked for and are not kept
    by_size: bool = False  # they are missing only because no unit that is left is small enough


def choose(
    saliencies: np.ndarray, lengths: np.ndarray, budget: int, smallest: bool
) -> tuple[np.ndarray, Cutoff]:
    """Returns the best units, as many as fit into `budget` entries, as bool (units,), and where the cut lies.

    saliencies, lengths: (units,), a unit's sum and its number of entries. Equal sums go to the first unit, a
    sum of 0 is never chosen. A unit that no longer fits is passed over for the next that does, so that fewer
    entries are missing than the shortest unit left has.
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
) -> list[tuple[dict[str, np.ndarray], Cutoff]]:
    """Returns, for each budget of entries, name -> packed bits of the best units, and where the cut lies.

    units: in the order that decides ties. One pass over the entries; memory: 8 bytes per unit, and a byte per
    entry of one parameter at a time. Under `random` each unit has one number (a sum would prefer long units).
    """
    sums = {name: np.zeros(each.count) for name, each in units.items()}  # fp64 (units,)
    if stream.saliency == "random":
        for name, each in units.items():
            sums[name][:] = uniform(Span(name, 0, each.count), stream.seed)
            if name in stream.taken:
                sums[name][each.touched(stream.taken[name])] = 0
    else:
        _sum_saliencies(stream, units, sums, read_order)
    if progress:
        progress(2 * sum(each.count * each.length for each in units.values()))
    # All units in one line, (units of all parameters,), to be ranked together and split again.
    saliencies = np.concatenate(list(sums.values()))
    lengths = np.concatenate([np.full(each.count, each.length) for each in units.values()])
    ends = np.cumsum([each.count for each in units.values()])[:-1]
    results = []
    for budget in counts:
        chosen, cutoff = choose(saliencies, lengths, budget, stream.smallest)
        parts = zip(units.items(), np.split(chosen, ends), strict=True)
        results.append(({name: each.packed(part) for (name, each), part in parts}, cutoff))
    return results


def _sum_saliencies(
    stream: SaliencyStream, units: Mapping[str, Units], sums: Mapping[str, np.ndarray], order: Sequence[str]
) -> None:
    def part(span: Span) -> tuple[int, np.ndarray]:
        return units[span.name].sums(span.start, stream.saliencies(span))

    sizes = {name: each.count * each.length for name, each in units.items()}
    for span, (first, found) in in_order(part, spans(sizes, order)):  # in order: the same sums at every run
        sums[span.name][first : first + len(found)] += found
