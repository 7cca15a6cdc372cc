"""Rows and columns: whole output or input neurons as what a mask keeps, instead of single entries.

A row is one output neuron and a column one input neuron, whatever the storage: `nn.Linear` stores (out, in),
GPT-2's `Conv1D` (in, out), stacks of expert matrices (experts, out, in), or (experts, in, out) where they
are transposed; there a row is one (expert, output) pair. A unit's score is the sum of its entries' scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lota.masks.extract.saliency import SaliencyStream, uniform
from lota.masks.extract.topk import Progress
from lota.models import chunks as streaming
from lota.models.scope import ScopedTensor

GRANULARITIES = ("element", "row", "column")


@dataclass(frozen=True)
class Units:
    """The rows or columns of one parameter, numbered in the order of their first entries.

    The parameter is seen as `stacks` matrices of `height` x `width` as stored; runs: a unit is one line of
    consecutive entries, else it is one entry of each line.
    """

    stacks: int
    height: int
    width: int
    runs: bool

    @property
    def count(self) -> int:
        return self.stacks * (self.height if self.runs else self.width)

    @property
    def length(self) -> int:
        """Entries of a unit."""
        return self.width if self.runs else self.height

    def sums(self, start: int, scores: np.ndarray) -> tuple[int, np.ndarray]:
        """(first unit, sums in fp64 from it on) of the scores of the entries from `start` on."""
        if self.runs:
            first = start // self.width
            edges = np.arange(first * self.width, start + len(scores), self.width) - start
            edges[0] = 0
            return first, np.add.reduceat(scores, edges, dtype=np.float64)
        matrix = self.height * self.width
        first, last = start // matrix, (start + len(scores) - 1) // matrix
        sums = np.zeros((last + 1 - first, self.width))
        for i, total in enumerate(sums):
            low = max((first + i) * matrix - start, 0)
            self._add_lines(total, (start + low) % self.width, scores[low : (first + i + 1) * matrix - start])
        return first * self.width, sums.reshape(-1)

    def _add_lines(self, total: np.ndarray, column: int, scores: np.ndarray) -> None:
        """Add entries of one matrix that begin in `column` to their columns' sums (width,)."""
        head = min(-column % self.width, len(scores))
        whole = (len(scores) - head) // self.width * self.width
        total[column : column + head] += scores[:head]
        total += scores[head : head + whole].reshape(-1, self.width).sum(axis=0, dtype=np.float64)
        rest = scores[head + whole :]
        total[: len(rest)] += rest

    def packed(self, chosen: np.ndarray) -> np.ndarray:
        """Bits of the parameter's entries, those of the chosen units set. chosen: bool (count,)."""
        by_line = chosen.reshape(self.stacks, -1, 1) if self.runs else chosen.reshape(self.stacks, 1, -1)
        return np.packbits(np.broadcast_to(by_line, (self.stacks, self.height, self.width)))

    def touched(self, packed: np.ndarray) -> np.ndarray:
        """Bool (count,): units with at least one of these bits set."""
        flags = np.unpackbits(packed, count=self.stacks * self.height * self.width)
        return flags.reshape(self.stacks, self.height, self.width).any(2 if self.runs else 1).reshape(-1)


def units_of(name: str, tensor: ScopedTensor, granularity: str) -> Units:
    """The rows or columns of a parameter. Raises ValueError for one that is no matrix or stack of them."""
    stacked = len(tensor.shape) == 3 and "expert" in tensor.module_type.lower()
    if len(tensor.shape) != 2 and not stacked:
        raise ValueError(
            f"granularity={granularity} needs weight matrices or experts' stacks of them, but {name} has the "
            f"shape {tensor.shape}: leave it out of the scope"
        )
    *stacks, height, width = tensor.shape
    return Units(stacks[0] if stacks else 1, height, width, (granularity == "row") != tensor.transposed)


class UnitCut(NamedTuple):
    """threshold: the last kept unit's score; 0 where too few are above 0, None where nothing is asked for.
    shortfall: entries that were asked for and are not kept. by_size: whether only because no unit that is
    left is small enough.
    """

    threshold: float | None
    shortfall: int
    by_size: bool


def choose(
    scores: np.ndarray, lengths: np.ndarray, budget: int, smallest: bool
) -> tuple[np.ndarray, UnitCut]:
    """Units by score, as many as fit into `budget` entries: bool (units,), and where the cut lies.

    Equal scores go to the first unit, a score of 0 is never chosen. A unit that no longer fits is passed
    over for the next that does, so that fewer entries are missing than the shortest unit left has.
    """
    order = np.argsort(scores if smallest else -scores, kind="stable")
    order = order[scores[order] > 0]
    chosen = np.zeros(len(scores), np.bool_)
    left, last = budget, None
    while len(order):
        fitting = np.cumsum(lengths[order]) <= left
        n = len(order) if fitting.all() else int(np.argmin(fitting))
        chosen[order[:n]] = True
        last = order[n - 1] if n else last
        left -= int(lengths[order[:n]].sum())
        order = order[n:]
        order = order[lengths[order] <= left]
    by_size = bool(left) and bool(((scores > 0) & ~chosen).any())
    if budget == 0:
        return chosen, UnitCut(None, 0, False)
    threshold = float(scores[last]) if last is not None and (by_size or not left) else 0.0
    return chosen, UnitCut(threshold, left, by_size)


def top_units(
    stream: SaliencyStream,
    units: Mapping[str, Units],
    counts: Sequence[int],
    read_order: Sequence[str],
    progress: Progress | None = None,
) -> tuple[list[dict[str, np.ndarray]], list[UnitCut]]:
    """For each budget of entries: name -> packed bits of the best units, and where the cut lies.

    units: in the order that decides ties. One pass over the scores; memory: 8 bytes per unit, and a byte per
    entry of one parameter at a time. Under `random` each unit has one number (a sum would prefer long units).
    """
    sums = {name: np.zeros(each.count) for name, each in units.items()}
    if stream.score == "random":
        for name, each in units.items():
            sums[name][:] = uniform(streaming.Span(name, 0, each.count), stream.seed)
            if name in stream.taken:
                sums[name][each.touched(stream.taken[name])] = 0
    else:
        _sum_scores(stream, units, sums, read_order)
    if progress:
        progress(2 * sum(each.count * each.length for each in units.values()))
    scores = np.concatenate(list(sums.values()))
    lengths = np.concatenate([np.full(each.count, each.length) for each in units.values()])
    ends = np.cumsum([each.count for each in units.values()])[:-1]
    bits, cuts = [], []
    for k in counts:
        chosen, cut = choose(scores, lengths, k, stream.smallest)
        parts = zip(units.items(), np.split(chosen, ends), strict=True)
        bits.append({name: each.packed(part) for (name, each), part in parts})
        cuts.append(cut)
    return bits, cuts


def _sum_scores(
    stream: SaliencyStream, units: Mapping[str, Units], sums: Mapping[str, np.ndarray], order: Sequence[str]
) -> None:
    def part(span: streaming.Span) -> tuple[int, np.ndarray]:
        return units[span.name].sums(span.start, stream.scores(span))

    sizes = {name: each.count * each.length for name, each in units.items()}
    with ThreadPoolExecutor(streaming.worker_count()) as pool:
        parts = streaming.in_order(pool, part, streaming.spans(sizes, order))
        for span, (first, found) in parts:  # added in order: the sums are the same at every run
            sums[span.name][first : first + len(found)] += found
