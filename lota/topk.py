"""Exact top-k over a stream of scores that does not fit into memory, for several k at once.

Scores enter as keys: the bit pattern of a non-negative fp32 number as int32, which orders as the number does.
Key 0 is never chosen. Equal keys at the threshold go to the earliest positions.

Two passes over the stream, shared by every k. A sample of a few per cent at most, drawn in blocks from all
over the stream, brackets each threshold; the first pass counts the keys above the bracket and makes
an exact histogram of the keys inside it, which gives the exact threshold and how many of its ties are
admitted; the second writes one bit per entry. A bracket that misses its threshold is noticed, because all
counts are exact; only then are two more passes made, the first of which is a histogram of all keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from lota import streaming
from lota.streaming import Scratch, Span, in_order, spans

MAX_KEY = 0x7F7FFFFF  # the largest finite fp32
SAMPLE_BLOCK = 1 << 13  # entries, several rows of a weight
SAMPLE_SHARE = 16  # one entry in so many at most
SAMPLE_BLOCKS = 1024  # at most, 16 at least
SAMPLE_STRIDE = 7  # of a block's entries every seventh is looked at
BRACKET_SIGMAS = 4  # standard errors of the sampled rank on either side
COARSE_SHIFT = 16  # bits of the key that the fallback histogram leaves out
COMPACT_AT = 1 << 21  # collected keys that are merged into a histogram


class Bracket(NamedTuple):
    """Keys low..high, both included, among which a threshold is expected."""

    low: int
    high: int


class Cut(NamedTuple):
    """Keys above `above` are kept, and the first `ties` of those equal to it.

    threshold: smallest kept key; 0 where there were too few keys above 0, None where nothing is asked for.
    shortfall: entries that were asked for and do not exist.
    """

    above: int
    ties: int
    threshold: int | None
    shortfall: int


Keys = Callable[[Span], np.ndarray]
Progress = Callable[[int], object]


def top_bits(
    keys: Keys,
    sizes: Mapping[str, int],
    counts: list[int],
    read_order: Iterable[str] | None = None,
    progress: Progress | None = None,
) -> tuple[list[dict[str, np.ndarray]], list[Cut]]:
    """For each k in `counts`: name -> packed bits of its k largest keys, and where the cut lies.

    keys: called from several threads, gives the int32 keys of a span; they may be overwritten by the same
    thread's next call. sizes: name -> entries, in the order
    that decides ties. read_order: names in the order of the first pass. progress: called with the number of
    entries each time a span is done, in each pass.
    """
    with ThreadPoolExecutor(streaming.worker_count()) as pool:
        first = spans(sizes, read_order)
        cuts = _find_cuts(pool, keys, sizes, first, counts, progress)
        return _write_bits(pool, keys, sizes, cuts, progress), cuts


def _find_cuts(
    pool: ThreadPoolExecutor,
    keys: Keys,
    sizes: Mapping[str, int],
    todo: list[Span],
    counts: list[int],
    progress: Progress | None,
) -> list[Cut]:
    brackets = _sampled_brackets(keys, sizes, counts)
    cuts = _cuts_inside(pool, keys, todo, counts, brackets, progress)
    missed = [i for i, cut in enumerate(cuts) if cut is None]
    if missed:
        missed_counts = [counts[i] for i in missed]
        brackets = _coarse_brackets(pool, keys, todo, missed_counts)
        found = _cuts_inside(pool, keys, todo, missed_counts, brackets, None)
        for i, cut in zip(missed, found, strict=True):
            cuts[i] = cut
    return cuts


def _cuts_inside(
    pool: ThreadPoolExecutor,
    keys: Keys,
    todo: list[Span],
    counts: list[int],
    brackets: list[Bracket],
    progress: Progress | None,
) -> list[Cut | None]:
    """One pass: the cut of each k, None where it lies outside of its bracket."""

    scratch = Scratch()

    def look(span: Span) -> list[tuple[int, np.ndarray]]:
        found = keys(span)
        return [_above_and_inside(found, bracket, scratch) for bracket in brackets]

    n_above = [0] * len(counts)
    inside = [_Histogram() for _ in counts]
    for span, results in in_order(pool, look, todo):
        for i, (n, picked) in enumerate(results):
            n_above[i] += n
            inside[i].add(picked)
        if progress:
            progress(span.stop - span.start)
    return [
        _cut(k, bracket, n, *histogram.result())
        for k, bracket, n, histogram in zip(counts, brackets, n_above, inside, strict=True)
    ]


def _above_and_inside(keys: np.ndarray, bracket: Bracket, scratch: Scratch) -> tuple[int, np.ndarray]:
    flags = scratch.get("flags", len(keys), np.bool_)
    n_above = int(np.count_nonzero(np.greater(keys, bracket.high, out=flags)))
    if bracket.high < bracket.low:
        return n_above, np.empty(0, np.int32)
    # unsigned: keys below the bracket wrap around to large numbers, one comparison instead of two
    offset = scratch.get("offset", len(keys), np.uint32)
    np.subtract(keys.view(np.uint32), np.uint32(bracket.low), out=offset)
    np.less_equal(offset, np.uint32(bracket.high - bracket.low), out=flags)
    return n_above, np.compress(flags, keys)


def _cut(k: int, bracket: Bracket, n_above: int, values: np.ndarray, numbers: np.ndarray) -> Cut | None:
    """values: distinct keys inside the bracket, descending; numbers: how often each occurs."""
    if k == 0:
        return Cut(MAX_KEY, 0, None, 0)
    need, total = k - n_above, int(numbers.sum())
    if need > total:
        return Cut(0, 0, 0, need - total) if bracket.low == 1 else None
    if need <= 0:
        return None
    cumulative = np.cumsum(numbers)
    i = int(np.searchsorted(cumulative, need))
    threshold, n_equal = int(values[i]), int(numbers[i])
    admitted = need - int(cumulative[i] - n_equal)
    if admitted == n_equal:
        return Cut(threshold - 1, 0, threshold, 0)
    return Cut(threshold, admitted, threshold, 0)


class _Histogram:
    """How often each key occurs; memory grows with the number of distinct keys."""

    def __init__(self) -> None:
        self.values = np.empty(0, np.int32)
        self.numbers = np.empty(0, np.int64)
        self._new: list[np.ndarray] = []
        self._n_new = 0

    def add(self, keys: np.ndarray) -> None:
        if keys.size:
            self._new.append(keys)
            self._n_new += keys.size
        if self._n_new >= COMPACT_AT:
            self._compact()

    def _compact(self) -> None:
        values, numbers = np.unique(np.concatenate(self._new), return_counts=True)
        self._new, self._n_new = [], 0
        if len(self.values):
            merged = np.unique(np.concatenate([self.values, values]))
            total = np.zeros(len(merged), np.int64)
            total[np.searchsorted(merged, self.values)] += self.numbers
            total[np.searchsorted(merged, values)] += numbers
            values, numbers = merged, total
        self.values, self.numbers = values, numbers

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Distinct keys, descending, and their numbers."""
        if self._new:
            self._compact()
        return self.values[::-1], self.numbers[::-1]


def _sampled_brackets(keys: Keys, sizes: Mapping[str, int], counts: list[int]) -> list[Bracket]:
    """Where each threshold lies, from blocks spread over the stream.

    The error of a sampled rank comes from how the share above it differs between blocks (cluster sampling),
    so weights that differ from row to row or layer to layer widen the bracket.
    """
    total = sum(sizes.values())
    blocks = [keys(span)[::SAMPLE_STRIDE].copy() for span in _sample_spans(sizes, total)]
    if not blocks:
        return [Bracket(1, 0) for _ in counts]
    sample = np.sort(np.concatenate(blocks))[::-1]
    brackets = []
    for k in counts:
        rank = k / total * len(sample)
        centre = sample[min(int(rank), len(sample) - 1)]
        share = np.array([np.count_nonzero(block >= centre) / len(block) for block in blocks])
        margin = BRACKET_SIGMAS * share.std() / len(blocks) ** 0.5 * len(sample) + 10
        first, last = int(rank - margin), int(rank + margin)
        high = int(sample[first]) if first >= 0 else MAX_KEY
        low = int(sample[last]) if last < len(sample) else 1
        brackets.append(Bracket(max(low, 1), high))
    return brackets


def _sample_spans(sizes: Mapping[str, int], total: int) -> Iterator[Span]:
    """One block at a random place in each of equally long stretches (seeded: the same every time)."""
    n_blocks = min(max(total // (SAMPLE_SHARE * SAMPLE_BLOCK), 16), SAMPLE_BLOCKS)
    stretch = max(total / n_blocks, SAMPLE_BLOCK)
    jitter = np.random.default_rng(0).random(n_blocks)
    names, ends = list(sizes), np.cumsum(list(sizes.values()), dtype=np.int64)
    for block in range(min(n_blocks, -(-total // SAMPLE_BLOCK))):
        position = int(block * stretch + jitter[block] * (stretch - SAMPLE_BLOCK))
        index = int(np.searchsorted(ends, position, side="right"))
        size = sizes[names[index]]
        start = (position - int(ends[index]) + size) // 8 * 8
        yield Span(names[index], start, min(start + SAMPLE_BLOCK, size))


def _coarse_brackets(
    pool: ThreadPoolExecutor, keys: Keys, todo: list[Span], counts: list[int]
) -> list[Bracket]:
    """Brackets that cannot miss, from a histogram of the high bits of every key."""
    n_bins = (MAX_KEY >> COARSE_SHIFT) + 1

    def look(span: Span) -> np.ndarray:
        return np.bincount(keys(span) >> COARSE_SHIFT, minlength=n_bins)

    histogram = np.zeros(n_bins, np.int64)
    for _, found in in_order(pool, look, todo):
        histogram += found
    at_least = np.cumsum(histogram[::-1])  # keys in this bin and all higher ones, from the highest bin down
    brackets = []
    for k in counts:
        bin_index = n_bins - 1 - min(int(np.searchsorted(at_least, k)), n_bins - 1)
        low = bin_index << COARSE_SHIFT
        brackets.append(Bracket(max(low, 1), low + (1 << COARSE_SHIFT) - 1))
    return brackets


def _write_bits(
    pool: ThreadPoolExecutor,
    keys: Keys,
    sizes: Mapping[str, int],
    cuts: list[Cut],
    progress: Progress | None,
) -> list[dict[str, np.ndarray]]:
    ties_left = [cut.ties for cut in cuts]
    scratch = Scratch()

    def look(span: Span) -> list[tuple[np.ndarray, np.ndarray | None]]:
        found = keys(span)
        flags = scratch.get("flags", len(found), np.bool_)
        results = []
        for i, cut in enumerate(cuts):
            packed = np.packbits(np.greater(found, cut.above, out=flags))
            # ties_left only falls, and stays at 0: seeing an old value costs time, not correctness
            equal = np.packbits(np.equal(found, cut.above, out=flags)) if ties_left[i] else None
            results.append((packed, equal))
        return results

    bits = [{name: np.empty((n + 7) // 8, np.uint8) for name, n in sizes.items()} for _ in cuts]
    for span, results in in_order(pool, look, spans(sizes)):
        for i, (packed, equal) in enumerate(results):
            if ties_left[i] and equal is not None:
                admitted = _first_bits(equal, ties_left[i])
                packed |= admitted
                ties_left[i] -= int(np.bitwise_count(admitted).sum(dtype=np.int64))
            bits[i][span.name][span.start // 8 : span.start // 8 + len(packed)] = packed
        if progress:
            progress(span.stop - span.start)
    return bits


def _first_bits(packed: np.ndarray, n: int) -> np.ndarray:
    """The first n set bits of a packed array; all of them where there are fewer."""
    if int(np.bitwise_count(packed).sum(dtype=np.int64)) <= n:
        return packed
    flags = np.unpackbits(packed)
    flags[np.flatnonzero(flags)[n:]] = 0
    return np.packbits(flags)
