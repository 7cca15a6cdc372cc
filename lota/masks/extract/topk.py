"""Exact top-k over a stream of saliencies that does not fit into memory, for several k at once.

Saliencies enter as keys: the bit pattern of a non-negative fp32 number as int32, which orders as the number
does. Key 0 is never chosen. Equal keys at the threshold go to the earliest positions.

At most two passes over the stream, shared by every k:

1. A sample of a few per cent, drawn in blocks from all over the stream, brackets each threshold.
2. The first pass marks and counts the keys above the bracket and collects those inside it, which give the
   exact threshold and how many of its ties are admitted.
3. If few lie inside, they are remembered with their positions and nothing is read again. If many do (coarse
   dtypes have heavy ties), only a histogram of them is, and a second pass writes the bits.

A bracket that misses its threshold is noticed, because all counts are exact. Then two passes more are made,
the first of which is a histogram of all keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from lota.models.chunks import Scratch, Span, in_order, spans

MAX_KEY = 0x7F7FFFFF  # the largest finite fp32
SAMPLE_BLOCK = 1 << 13  # entries, several rows of a weight
SAMPLE_SHARE = 16  # one entry in so many at most
SAMPLE_BLOCKS = 1024  # at most, 16 at least
SAMPLE_STRIDE = 7  # of a block's entries every seventh is looked at
BRACKET_SIGMAS = 4  # standard errors of the sampled rank on either side
REMEMBERED = 1 << 22  # entries inside a bracket whose key and position (8 bytes) are kept, for each k
REMEMBERED_SHARE = 256  # or one entry in so many, if that is more
COARSE_SHIFT = 16  # bits of the key that the fallback histogram leaves out

Keys = Callable[[Span], np.ndarray]
Progress = Callable[[int], object]


class Bracket(NamedTuple):
    """Keys low..high, both included, among which a threshold is expected."""

    low: int
    high: int


class Cut(NamedTuple):
    """Keys above `above` are kept, and the first `ties` of those equal to it."""

    above: int
    ties: int
    threshold: int | None  # smallest kept key; 0 if too few keys are above 0, None if nothing is asked for
    shortfall: int  # entries that were asked for and do not exist


def top_bits(
    keys: Keys,
    sizes: Mapping[str, int],
    counts: list[int],
    read_order: Iterable[str] | None = None,
    progress: Progress | None = None,
) -> tuple[list[dict[str, np.ndarray]], list[Cut]]:
    """Returns, for each k in `counts`, name -> packed bits of its k largest keys, and where the cut lies.

    keys: called from several threads, gives the int32 keys of a span; the same thread's next call may
    overwrite them. sizes: name -> entries, in the order that decides ties. read_order: names in the order of
    the first pass. progress: called with numbers of entries that add up to twice the whole.
    """
    first = spans(sizes, read_order)
    brackets = _sampled_brackets(keys, sizes, counts)
    searches = [
        _Search(k, bracket, {name: np.empty((n + 7) // 8, np.uint8) for name, n in sizes.items()})
        for k, bracket in zip(counts, brackets, strict=True)
    ]
    _first_pass(keys, first, searches, progress)
    missed = [i for i, search in enumerate(searches) if search.has_missed]
    if missed:
        brackets = _coarse_brackets(keys, first, [counts[i] for i in missed])
        for i, bracket in zip(missed, brackets, strict=True):
            searches[i] = _Search(counts[i], bracket, searches[i].bits)
        _first_pass(keys, first, [searches[i] for i in missed])
    unwritten = [search for search in searches if search.has_forgotten]
    if unwritten:
        _write_bits(keys, spans(sizes), unwritten, progress)
    elif progress:
        progress(sum(sizes.values()))
    return [search.bits for search in searches], [search.cut for search in searches]


class _Search:
    """The search for one k: what the first pass finds around its bracket, and the bits that it can set."""

    def __init__(self, k: int, bracket: Bracket, bits: dict[str, np.ndarray]):
        self.k, self.bracket, self.bits = k, bracket, bits
        self.cut: Cut  # which `finish` finds
        self.has_missed = False  # the threshold is outside of the bracket
        self.n_above = 0
        # Keys inside the bracket. While they are few: (span, places in it, keys there) ...
        self.parts: list[tuple[Span, np.ndarray, np.ndarray]] = []
        self.n_inside = 0  # in `parts`
        self.limit = max(REMEMBERED, 8 * sum(len(b) for b in bits.values()) // REMEMBERED_SHARE)
        # ... else a histogram: distinct keys, ascending, and how often each was seen.
        self.values, self.numbers = np.empty(0, np.int32), np.empty(0, np.int64)
        self.has_forgotten = False

    def add(self, span: Span, n_above: int, packed: np.ndarray, places: np.ndarray, keys: np.ndarray) -> None:
        """Take in what `_above_and_inside` found in a span."""
        self.n_above += n_above
        self.bits[span.name][span.packed] = packed
        if len(keys):
            self.parts.append((span, places, keys))
            self.n_inside += len(keys)
        if self.n_inside > self.limit:  # from here on memory grows with distinct keys only
            self.values, self.numbers = self._histogram()
            self.parts, self.n_inside, self.has_forgotten = [], 0, True

    def _histogram(self) -> tuple[np.ndarray, np.ndarray]:
        """All distinct keys inside the bracket so far, ascending, and how often each was seen."""
        if not self.parts:
            return self.values, self.numbers
        inside = np.concatenate([keys for _, _, keys in self.parts])
        values, numbers = np.unique(inside, return_counts=True)
        if not len(self.values):
            return values, numbers
        merged = np.union1d(self.values, values)
        total = np.zeros(len(merged), np.int64)
        total[np.searchsorted(merged, self.values)] += self.numbers
        total[np.searchsorted(merged, values)] += numbers
        return merged, total

    def finish(self) -> None:
        """Find the cut; if the places inside the bracket are remembered, complete the bits."""
        values, numbers = self._histogram()
        cut = _cut(self.k, self.bracket, self.n_above, values[::-1], numbers[::-1])
        if cut is None:
            self.has_missed = True
            return
        self.cut = cut
        if self.has_forgotten:
            return
        rank = {name: i for i, name in enumerate(self.bits)}  # the order that decides ties
        ties = self.cut.ties
        for span, places, keys in sorted(self.parts, key=lambda part: (rank[part[0].name], part[0].start)):
            chosen = keys > self.cut.above
            equal = np.flatnonzero(keys == self.cut.above)[:ties]  # the earliest
            chosen[equal] = True
            ties -= len(equal)
            flags = np.zeros(span.stop - span.start, np.bool_)
            flags[places[chosen]] = True
            self.bits[span.name][span.packed] |= np.packbits(flags)
        if self.k == 0:  # no bracket lies above all keys
            for packed in self.bits.values():
                packed[:] = 0


def _first_pass(
    keys: Keys, todo: list[Span], searches: list[_Search], progress: Progress | None = None
) -> None:
    scratch = Scratch()

    def look(span: Span) -> list[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
        found = keys(span)
        return [_above_and_inside(found, search.bracket, scratch) for search in searches]

    for span, results in in_order(look, todo):
        for search, result in zip(searches, results, strict=True):
            search.add(span, *result)
        if progress:
            progress(span.stop - span.start)
    for search in searches:
        search.finish()


def _above_and_inside(
    keys: np.ndarray, bracket: Bracket, scratch: Scratch
) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """Number and packed bits of the keys (n,) above the bracket; places and keys of those inside it."""
    flags = scratch.get("flags", len(keys), np.bool_)
    n_above = int(np.count_nonzero(np.greater(keys, bracket.high, out=flags)))
    packed = np.packbits(flags)
    if bracket.high < bracket.low:
        return n_above, packed, np.empty(0, np.uint32), np.empty(0, np.int32)
    # unsigned: keys below the bracket wrap around to large numbers, one comparison instead of two
    offset = scratch.get("offset", len(keys), np.uint32)
    np.subtract(keys.view(np.uint32), np.uint32(bracket.low), out=offset)
    np.less_equal(offset, np.uint32(bracket.high - bracket.low), out=flags)
    places = np.flatnonzero(flags)
    return n_above, packed, places.astype(np.uint32), keys[places]


def _cut(k: int, bracket: Bracket, n_above: int, values: np.ndarray, numbers: np.ndarray) -> Cut | None:
    """Where the threshold lies; None if it is outside of the bracket.

    values: distinct keys inside the bracket, descending. numbers: how often each occurs.
    """
    if k == 0:
        return Cut(MAX_KEY, 0, None, 0)
    need, total = k - n_above, int(numbers.sum())
    if need > total:  # a bracket that reaches down to key 1 holds all that can be chosen
        return Cut(0, 0, 0, need - total) if bracket.low == 1 else None
    if need <= 0:
        return None
    # The threshold is the first key at which enough are counted; some of its ties may be one too many.
    cumulative = np.cumsum(numbers)
    i = int(np.searchsorted(cumulative, need))
    threshold, n_equal = int(values[i]), int(numbers[i])
    admitted = need - int(cumulative[i] - n_equal)
    if admitted == n_equal:
        return Cut(threshold - 1, 0, threshold, 0)
    return Cut(threshold, admitted, threshold, 0)


def _sampled_brackets(keys: Keys, sizes: Mapping[str, int], counts: list[int]) -> list[Bracket]:
    """Where each threshold lies, from blocks spread over the stream.

    The error of a sampled rank comes from how the share above it differs between blocks (cluster sampling),
    so weights that differ from row to row or layer to layer widen the bracket.
    """
    total = sum(sizes.values())
    in_blocks = in_order(lambda span: keys(span)[::SAMPLE_STRIDE].copy(), _sample_spans(sizes, total))
    blocks = [block for _, block in in_blocks]
    if not blocks:
        return [Bracket(1, 0) for _ in counts]
    sample = np.sort(np.concatenate(blocks))[::-1]  # descending, so that an index is a rank
    brackets = []
    for k in counts:
        rank = k / total * len(sample)
        centre = sample[min(int(rank), len(sample) - 1)]
        share = np.array([np.count_nonzero(block >= centre) / len(block) for block in blocks])
        # standard error of the mean of the blocks' shares, as a number of ranks; 10 more for tiny samples
        margin = BRACKET_SIGMAS * share.std() / len(blocks) ** 0.5 * len(sample) + 10
        first, last = int(rank - margin), int(rank + margin)
        high = int(sample[first]) if first >= 0 else MAX_KEY
        low = max(int(sample[last]), 1) if last < len(sample) else 1
        brackets.append(Bracket(low, high))
    return brackets


def _sample_spans(sizes: Mapping[str, int], total: int) -> Iterator[Span]:
    """One block at a random place in each of equally long stretches (seeded: the same every time)."""
    n_blocks = min(max(total // (SAMPLE_SHARE * SAMPLE_BLOCK), 16), SAMPLE_BLOCKS)
    stretch = max(total / n_blocks, SAMPLE_BLOCK)
    jitter = np.random.default_rng(0).random(n_blocks)
    names, ends = list(sizes), np.cumsum(list(sizes.values()), dtype=np.int64)
    for block in range(min(n_blocks, -(-total // SAMPLE_BLOCK))):
        # from a position in the stream to a tensor and a start in it, at a whole byte of its packed bits
        position = int(block * stretch + jitter[block] * (stretch - SAMPLE_BLOCK))
        index = int(np.searchsorted(ends, position, side="right"))
        size = sizes[names[index]]
        start = (position - int(ends[index]) + size) // 8 * 8
        yield Span(names[index], start, min(start + SAMPLE_BLOCK, size))


def _coarse_brackets(keys: Keys, todo: list[Span], counts: list[int]) -> list[Bracket]:
    """Brackets that cannot miss, from a histogram of the high bits of every key."""
    n_bins = (MAX_KEY >> COARSE_SHIFT) + 1
    histogram = np.zeros(n_bins, np.int64)
    for _, found in in_order(lambda span: np.bincount(keys(span) >> COARSE_SHIFT, minlength=n_bins), todo):
        histogram += found
    at_least = np.cumsum(histogram[::-1])  # keys in this bin and all higher ones, from the highest bin down
    brackets = []
    for k in counts:
        low = (n_bins - 1 - min(int(np.searchsorted(at_least, k)), n_bins - 1)) << COARSE_SHIFT
        brackets.append(Bracket(max(low, 1), low + (1 << COARSE_SHIFT) - 1))
    return brackets


def _write_bits(keys: Keys, todo: list[Span], searches: list[_Search], progress: Progress | None) -> None:
    """The second pass: every bit of each search. todo: in the order that decides ties."""
    ties_left = [search.cut.ties for search in searches]
    scratch = Scratch()

    def look(span: Span) -> list[tuple[np.ndarray, np.ndarray | None]]:
        found = keys(span)
        flags = scratch.get("flags", len(found), np.bool_)
        results = []
        for i, search in enumerate(searches):
            packed = np.packbits(np.greater(found, search.cut.above, out=flags))
            # ties_left only falls, and stays at 0: seeing an old value costs time, not correctness
            equal = np.packbits(np.equal(found, search.cut.above, out=flags)) if ties_left[i] else None
            results.append((packed, equal))
        return results

    for span, results in in_order(look, todo):
        for i, (packed, equal) in enumerate(results):
            if equal is not None:
                admitted = _first_bits(equal, ties_left[i])
                packed |= admitted
                ties_left[i] -= int(np.bitwise_count(admitted).sum(dtype=np.int64))
            searches[i].bits[span.name][span.packed] = packed
        if progress:
            progress(span.stop - span.start)


def _first_bits(packed: np.ndarray, n: int) -> np.ndarray:
    """The first n set bits of a packed array; all of them if there are fewer."""
    if int(np.bitwise_count(packed).sum(dtype=np.int64)) <= n:
        return packed
    flags = np.unpackbits(packed)
    flags[np.flatnonzero(flags)[n:]] = 0
    return np.packbits(flags)
