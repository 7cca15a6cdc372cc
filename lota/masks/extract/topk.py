"""Exact top-k over a stream of scores that does not fit into memory, for several k at once.

Scores enter as keys: the bit pattern of a non-negative fp32 number as int32, which orders as the number does.
Key 0 is never chosen. Equal keys at the threshold go to the earliest positions.

At most two passes over the stream, shared by every k. A sample of a few per cent, drawn in blocks from all
over the stream, brackets each threshold. The first pass marks and counts the keys above the bracket and
collects those inside it, which give the exact threshold and how many of its ties are admitted. Where few lie
inside, they are remembered with their positions and nothing is read again; where many do (coarse dtypes have
heavy ties), only a histogram of them is, and a second pass writes the bits. A bracket that misses its
threshold is noticed, because all counts are exact; only then are two passes more made, the first of which is
a histogram of all keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from lota.models import chunks as streaming
from lota.models.chunks import Scratch, Span, in_order, spans

MAX_KEY = 0x7F7FFFFF  # the largest finite fp32
SAMPLE_BLOCK = 1 << 13  # entries, several rows of a weight
SAMPLE_SHARE = 16  # one entry in so many at most
SAMPLE_BLOCKS = 1024  # at most, 16 at least
REMEMBERED = 1 << 22  # entries inside a bracket whose key and position (8 bytes) are kept, for each k
REMEMBERED_SHARE = 256  # or one entry in so many, if that is more
SAMPLE_STRIDE = 7  # of a block's entries every seventh is looked at
BRACKET_SIGMAS = 4  # standard errors of the sampled rank on either side
COARSE_SHIFT = 16  # bits of the key that the fallback histogram leaves out


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
    that decides ties. read_order: names in the order of the first pass. progress: called with numbers
    of entries that add up to twice the whole.
    """
    bits = [{name: np.empty((n + 7) // 8, np.uint8) for name, n in sizes.items()} for _ in counts]
    cuts: list[Cut | None] = [None] * len(counts)
    unwritten: list[int] = []
    first = spans(sizes, read_order)
    with ThreadPoolExecutor(streaming.worker_count()) as pool:
        brackets = _sampled_brackets(pool, keys, sizes, counts)
        while None in cuts:
            todo = [i for i, cut in enumerate(cuts) if cut is None]
            if brackets is None:
                brackets = _coarse_brackets(pool, keys, first, [counts[i] for i in todo])
            passes = [_Search(counts[i], b, bits[i]) for i, b in zip(todo, brackets, strict=True)]
            _first_pass(pool, keys, first, passes, progress if len(todo) == len(cuts) else None)
            for i, search in zip(todo, passes, strict=True):
                cuts[i] = search.cut()
                if cuts[i] is not None and not search.finish(cuts[i], list(sizes)):
                    unwritten.append(i)
            brackets = None
        if unwritten:
            _write_bits(pool, keys, sizes, [(cuts[i], bits[i]) for i in unwritten], progress)
        elif progress:
            progress(sum(sizes.values()))
    return bits, [cut for cut in cuts if cut is not None]


class _Search:
    """The threshold of one k: what the first pass finds for it."""

    def __init__(self, k: int, bracket: Bracket, bits: dict[str, np.ndarray]):
        self.k, self.bracket, self.bits = k, bracket, bits
        self.n_above = 0
        self.values, self.numbers = np.empty(0, np.int32), np.empty(0, np.int64)
        self.parts: list[tuple[Span, np.ndarray, np.ndarray]] = []  # span, positions in it, keys
        self.n_inside = 0  # in `parts`
        self.limit = max(REMEMBERED, 8 * sum(len(b) for b in bits.values()) // REMEMBERED_SHARE)
        self.forgot = False

    def add(self, span: Span, n_above: int, packed: np.ndarray, places: np.ndarray, keys: np.ndarray) -> None:
        self.n_above += n_above
        self.bits[span.name][span.start // 8 : span.start // 8 + len(packed)] = packed
        if len(keys):
            self.parts.append((span, places, keys))
            self.n_inside += len(keys)
        if self.n_inside > self.limit:
            self._forget_places()

    def _forget_places(self) -> None:
        """Merge what was collected into the histogram; memory then grows with distinct keys only."""
        values, numbers = np.unique(np.concatenate([keys for _, _, keys in self.parts]), return_counts=True)
        merged = np.unique(np.concatenate([self.values, values]))
        total = np.zeros(len(merged), np.int64)
        total[np.searchsorted(merged, self.values)] += self.numbers
        total[np.searchsorted(merged, values)] += numbers
        self.values, self.numbers = merged, total
        self.parts, self.n_inside, self.forgot = [], 0, True

    def cut(self) -> Cut | None:
        """Where the threshold lies; None where it is outside of the bracket."""
        if self.forgot and self.parts:
            self._forget_places()
        values, numbers = self.values, self.numbers
        if self.parts:
            inside = np.concatenate([keys for _, _, keys in self.parts])
            values, numbers = np.unique(inside, return_counts=True)
        return _cut(self.k, self.bracket, self.n_above, values[::-1], numbers[::-1])

    def finish(self, cut: Cut, order: list[str]) -> bool:
        """Add the chosen ones among the remembered entries to the bits; False where they were too many."""
        if self.forgot:
            return False
        rank = {name: i for i, name in enumerate(order)}
        ties = cut.ties
        for span, places, keys in sorted(self.parts, key=lambda part: (rank[part[0].name], part[0].start)):
            chosen = keys > cut.above
            if ties:
                equal = np.flatnonzero(keys == cut.above)[:ties]
                chosen[equal] = True
                ties -= len(equal)
            flags = np.zeros(span.stop - span.start, np.bool_)
            flags[places[chosen]] = True
            packed = np.packbits(flags)
            self.bits[span.name][span.start // 8 : span.start // 8 + len(packed)] |= packed
        if self.k == 0:
            for packed in self.bits.values():
                packed[:] = 0
        return True


def _first_pass(
    pool: ThreadPoolExecutor, keys: Keys, todo: list[Span], searches: list[_Search], progress: Progress | None
) -> None:
    scratch = Scratch()

    def look(span: Span) -> list[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
        found = keys(span)
        return [_above_and_inside(found, search.bracket, scratch) for search in searches]

    for span, results in in_order(pool, look, todo):
        for search, result in zip(searches, results, strict=True):
            search.add(span, *result)
        if progress:
            progress(span.stop - span.start)


def _above_and_inside(
    keys: np.ndarray, bracket: Bracket, scratch: Scratch
) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """Number and packed bits of the keys above the bracket; places and keys of those inside it."""
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


def _sampled_brackets(
    pool: ThreadPoolExecutor, keys: Keys, sizes: Mapping[str, int], counts: list[int]
) -> list[Bracket]:
    """Where each threshold lies, from blocks spread over the stream.

    The error of a sampled rank comes from how the share above it differs between blocks (cluster sampling),
    so weights that differ from row to row or layer to layer widen the bracket.
    """
    total = sum(sizes.values())
    blocks = list(pool.map(lambda span: keys(span)[::SAMPLE_STRIDE].copy(), _sample_spans(sizes, total)))
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
    wanted: list[tuple[Cut, dict[str, np.ndarray]]],
    progress: Progress | None,
) -> None:
    """The second pass: every bit of each cut."""
    ties_left = [cut.ties for cut, _ in wanted]
    scratch = Scratch()

    def look(span: Span) -> list[tuple[np.ndarray, np.ndarray | None]]:
        found = keys(span)
        flags = scratch.get("flags", len(found), np.bool_)
        results = []
        for i, (cut, _) in enumerate(wanted):
            packed = np.packbits(np.greater(found, cut.above, out=flags))
            # ties_left only falls, and stays at 0: seeing an old value costs time, not correctness
            equal = np.packbits(np.equal(found, cut.above, out=flags)) if ties_left[i] else None
            results.append((packed, equal))
        return results

    for span, results in in_order(pool, look, spans(sizes)):
        for i, (packed, equal) in enumerate(results):
            if ties_left[i] and equal is not None:
                admitted = _first_bits(equal, ties_left[i])
                packed |= admitted
                ties_left[i] -= int(np.bitwise_count(admitted).sum(dtype=np.int64))
            wanted[i][1][span.name][span.start // 8 : span.start // 8 + len(packed)] = packed
        if progress:
            progress(span.stop - span.start)


def _first_bits(packed: np.ndarray, n: int) -> np.ndarray:
    """The first n set bits of a packed array; all of them where there are fewer."""
    if int(np.bitwise_count(packed).sum(dtype=np.int64)) <= n:
        return packed
    flags = np.unpackbits(packed)
    flags[np.flatnonzero(flags)[n:]] = 0
    return np.packbits(flags)
