"""Exact streaming top-k against a stable sort of everything."""

from __future__ import annotations

import numpy as np
import pytest

from lota.masks.extract import topk
from lota.models import chunks as streaming


def brute_force(keys: dict[str, np.ndarray], k: int) -> dict[str, np.ndarray]:
    """Kept flags of the k largest nonzero keys; equal ones by position (stable sort)."""
    flat = np.concatenate(list(keys.values())).astype(np.int64)
    order = np.argsort(-flat, kind="stable")[:k]
    order = order[flat[order] > 0]
    kept = np.zeros(len(flat), bool)
    kept[order] = True
    return dict(zip(keys, np.split(kept, np.cumsum([len(v) for v in keys.values()])[:-1]), strict=True))


def run(keys: dict[str, np.ndarray], counts: list[int], **options):
    reads = []

    def read(span):
        reads.append(span)
        return keys[span.name][span.start : span.stop].copy()

    sizes = {name: len(value) for name, value in keys.items()}
    bits, cuts = topk.top_bits(read, sizes, counts, **options)
    return bits, cuts, reads


def assert_equals_brute_force(keys, counts, **options):
    bits, cuts, reads = run(keys, counts, **options)
    for k, found, cut in zip(counts, bits, cuts, strict=True):
        expected = brute_force(keys, k)
        for name, flags in expected.items():
            unpacked = np.unpackbits(found[name], count=len(flags)).astype(bool)
            assert np.array_equal(unpacked, flags), (k, name, cut)
            assert np.array_equal(found[name], np.packbits(flags))  # nothing set behind the last entry
        kept = sum(int(flags.sum()) for flags in expected.values())
        assert cut.shortfall == k - kept
        if kept and not cut.shortfall:
            lowest = min(int(keys[n][f].min()) for n, f in expected.items() if f.any())
            assert cut.threshold == lowest
    return reads


def float_keys(rng, n: int, kind: str) -> np.ndarray:
    values = {
        "normal": lambda: np.abs(rng.standard_normal(n)),
        "ties": lambda: rng.integers(0, 6, n) / 4,
        "all_equal": lambda: np.full(n, 0.5),
        "mostly_zero": lambda: np.where(rng.random(n) < 0.97, 0, rng.random(n)),
        "zeros": lambda: np.zeros(n),
        "subnormal": lambda: rng.integers(0, 50, n) * 1e-45,
        "heavy_tails": lambda: np.minimum(np.exp(rng.standard_normal(n) * 20), 3e38),
        "sorted": lambda: np.sort(rng.random(n)),
    }[kind]()
    return values.astype(np.float32).view(np.int32)


KINDS = ["normal", "ties", "all_equal", "mostly_zero", "zeros", "subnormal", "heavy_tails", "sorted"]


@pytest.mark.parametrize("kind", KINDS)
def test_equals_a_stable_sort(kind, monkeypatch):
    monkeypatch.setattr(streaming, "CHUNK", 1 << 12)
    rng = np.random.default_rng(1)
    keys = {f"t{i}": float_keys(rng, n, kind) for i, n in enumerate([5, 40_000, 1, 12_345, 8, 0, 30_001])}
    total = sum(len(v) for v in keys.values())
    assert_equals_brute_force(keys, [0, 1, 7, total // 100, total // 10, total // 2, total - 1, total])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_large_stream_is_read_once(kind, monkeypatch):
    """Enough entries that the sample is a small part of them."""
    rng = np.random.default_rng(2)
    scale = np.repeat(rng.random(300).astype(np.float32) + 0.1, 10_000)  # differs from row to row
    values = float_keys(rng, 3_000_000, kind).view(np.float32) * scale
    keys = {"a": values[:1_000_001].view(np.int32), "b": values[1_000_001:].view(np.int32)}
    counts = [round(0.5 * 3e6), round(0.1 * 3e6), round(0.01 * 3e6), 3]
    reads = assert_equals_brute_force(keys, counts)
    total = sum(span.stop - span.start for span in reads)
    assert 3_000_000 < total <= (1 + 1 / topk.SAMPLE_SHARE) * 3_000_000


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guess", [(1, 0), (topk.MAX_KEY, topk.MAX_KEY), (5, 6)])
def test_wrong_brackets_are_noticed(kind, guess, monkeypatch):
    monkeypatch.setattr(streaming, "CHUNK", 1 << 12)
    monkeypatch.setattr(topk, "_sampled_brackets", lambda *args: [topk.Bracket(*guess)] * 5)
    rng = np.random.default_rng(3)
    keys = {f"t{i}": float_keys(rng, 20_000, kind) for i in range(2)}
    assert_equals_brute_force(keys, [0, 20, 4_000, 20_000, 40_000])


def test_first_pass_follows_the_read_order_and_progress_counts_both(monkeypatch):
    monkeypatch.setattr(streaming, "CHUNK", 1 << 10)
    monkeypatch.setattr(streaming, "worker_count", lambda: 1)
    keys = {name: float_keys(np.random.default_rng(4), 3_000, "ties") for name in "bca"}
    done = []
    reads = assert_equals_brute_force(keys, [500], read_order="abc", progress=done.append)
    names = "".join(span.name for span in reads[-9:])  # after the sample
    assert names == "aaabbbccc"
    assert sum(done) == 2 * 9_000


def test_an_error_in_a_reader_reaches_the_caller():
    def read(span):
        raise ValueError("tensor t: NaN")

    with pytest.raises(ValueError, match="tensor t: NaN"):
        topk.top_bits(read, {"t": 1000}, [10])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_entries_inside_a_bracket_take_a_second_pass(kind, monkeypatch):
    monkeypatch.setattr(streaming, "CHUNK", 1 << 12)
    monkeypatch.setattr(topk, "REMEMBERED", 3_000)
    monkeypatch.setattr(topk, "_sampled_brackets", lambda *args: [topk.Bracket(1, topk.MAX_KEY)] * 3)
    keys = {f"t{i}": float_keys(np.random.default_rng(i), 20_000, kind) for i in range(2)}
    reads = assert_equals_brute_force(keys, [20, 4_000, 39_999], read_order=["t1", "t0"])
    n_nonzero = sum(int((value > 0).sum()) for value in keys.values())
    passes = 2 if n_nonzero > 3_000 else 1
    assert sum(span.stop - span.start for span in reads) == passes * 40_000


def test_memory_of_a_search_grows_with_distinct_keys_only(monkeypatch):
    monkeypatch.setattr(topk, "REMEMBERED", 100)
    rng = np.random.default_rng(5)
    search = topk._Search(700, topk.Bracket(1, 9), {"t": np.zeros(8, np.uint8)})
    parts = [rng.integers(1, 9, 60).astype(np.int32) for _ in range(20)]
    for part in parts:
        search.add(topk.Span("t", 0, 60), 0, np.zeros(8, np.uint8), np.arange(60), part)
        assert len(search.values) <= 8 and search.n_inside <= 100
    search.finish()
    ordered = np.sort(np.concatenate(parts))[::-1]
    assert search.cut.threshold == ordered[699]
    assert search.cut.ties in (0, 700 - int((ordered > ordered[699]).sum()))


@pytest.mark.parametrize("kind", ["normal", "ties", "all_equal", "mostly_zero"])
@pytest.mark.parametrize("inside", [(1, topk.MAX_KEY), None], ids=["all", "sampled"])
def test_a_second_pass_over_a_short_stream(kind, inside, monkeypatch):
    monkeypatch.setattr(streaming, "CHUNK", 1 << 8)
    monkeypatch.setattr(topk, "REMEMBERED", 100)
    if inside:
        monkeypatch.setattr(topk, "_sampled_brackets", lambda *args: [topk.Bracket(*inside)] * 4)
    keys = {f"t{i}": float_keys(np.random.default_rng(i), 2_005, kind) for i in range(2)}
    done = []
    assert_equals_brute_force(keys, [0, 20, 401, 4_009], read_order=["t1", "t0"], progress=done.append)
    assert sum(done) == 2 * 4_010


def test_a_stream_is_read_once_and_the_sample(monkeypatch):
    """Readers may use one buffer per thread again and again."""
    buffers = streaming.Scratch()
    keys = {"a": float_keys(np.random.default_rng(6), 300_000, "normal")}
    reads = []

    def read(span):
        reads.append(span.stop - span.start)
        found = buffers.get("keys", reads[-1], np.int32)
        found[:] = keys["a"][span.start : span.stop]
        return found

    (bits,), (cut,) = topk.top_bits(read, {"a": 300_000}, [30_000])
    assert np.array_equal(np.unpackbits(bits["a"]).astype(bool), brute_force(keys, 30_000)["a"])
    assert cut == topk.Cut(cut.threshold - 1, 0, np.sort(keys["a"])[-30_000], 0)
    assert sum(reads) == 300_000 + 16 * topk.SAMPLE_BLOCK


@pytest.mark.parametrize(
    ("total", "blocks"),
    [(0, 0), (1, 1), (8_192, 1), (8_193, 2), (50_000, 7), (131_072, 16), (131_073, 16), (16 * 131_072, 16),
     (20 * 131_072, 20), (1_024 * 131_072, 1_024), (5_000 * 131_072, 1_024)],
)  # fmt: skip
def test_the_sample_is_spread_over_the_stream(total, blocks):
    """One entry in 16, in 16 to 1024 blocks of 8192; each block is somewhere in a stretch of its own."""
    sizes = {"a": total // 3, "empty": 0, "b": total - total // 3}
    starts = {"a": 0, "b": total // 3}
    found = list(topk._sample_spans(sizes, total))
    assert len(found) == blocks
    stretch = max(total / max(blocks, 16), 8_192)
    for i, span in enumerate(found):
        assert span.start % 8 == 0 and 0 <= span.start < span.stop <= sizes[span.name]
        assert span.stop - span.start == 8_192 or span.stop == sizes[span.name]
        place = starts[span.name] + span.start
        assert i * stretch - 8 < place <= (i + 1) * stretch - min(8_192, stretch) + 1
    offsets = [starts[span.name] + span.start - i * stretch for i, span in enumerate(found)]
    if blocks >= 16 and stretch > 10 * 8_192:  # not always at the same place of a stretch
        assert min(offsets) < 0.3 * stretch and max(offsets) > 0.6 * stretch
    assert found == list(topk._sample_spans(sizes, total))


def test_brackets_are_ranks_of_the_sample_and_four_standard_errors(monkeypatch):
    """The standard error is that of the mean over blocks, since neighbours are alike."""
    rng = np.random.default_rng(7)
    rows = np.repeat(rng.random(40) + 0.2, 10_000)  # differs from row to row
    keys = (rng.random(400_000) * rows).astype(np.float32).view(np.int32)
    sizes = {"a": 150_000, "b": 250_000}
    counts = [0, 1, 400, 40_000, 200_000, 399_900, 400_000]
    whole = {"a": keys[:150_000], "b": keys[150_000:]}
    brackets = topk._sampled_brackets(lambda span: whole[span.name][span.start : span.stop], sizes, counts)
    blocks = [
        whole[span.name][span.start : span.stop][::7].tolist() for span in topk._sample_spans(sizes, 400_000)
    ]
    descending = sorted((key for block in blocks for key in block), reverse=True)
    n = len(descending)
    for k, bracket in zip(counts, brackets, strict=True):
        rank = k * n / 400_000
        centre = descending[min(int(rank), n - 1)]
        shares = [sum(key >= centre for key in block) / len(block) for block in blocks]
        mean = sum(shares) / len(shares)
        error = (sum((s - mean) ** 2 for s in shares) / len(shares) / len(shares)) ** 0.5 * n
        low, high = int(rank + 4 * error + 10), int(rank - 4 * error - 10)
        assert bracket.low == (descending[low] if low < n else 1)
        assert bracket.high == (descending[high] if rank >= 4 * error + 10 else topk.MAX_KEY)
        assert bracket.low <= np.sort(keys)[::-1][max(k - 1, 0)] <= bracket.high
    assert topk._sampled_brackets(lambda span: np.zeros(0, np.int32), {"a": 0}, [0, 0]) == [(1, 0)] * 2
    ranks = np.arange(7_000, 0, -1).astype(np.int32)  # one block: no error but ten ranks, of 1000 sampled
    for k, bracket in (
        (63, (6_867, topk.MAX_KEY)),
        (70, (6_860, 7_000)),
        (6_923, (7, 147)),
        (6_930, (1, 140)),
    ):
        assert topk._sampled_brackets(lambda span: ranks, {"a": 7_000}, [k]) == [bracket]
    assert np.float32(np.finfo(np.float32).max).view(np.int32) == topk.MAX_KEY
    zeros = topk._sampled_brackets(lambda span: np.zeros(9_000, np.int32), {"a": 9_000}, [4_000])
    assert zeros == [(1, 0)]  # key 0 is never chosen


@pytest.mark.parametrize("k", [0, 1, 2, 50, 999, 1_000, 1_300])
def test_brackets_that_cannot_miss(k):
    keys = np.random.default_rng(8).integers(0, 1 << 24, 1_000).astype(np.int32)
    todo = streaming.spans({"a": 1_000})
    (found,) = topk._coarse_brackets(lambda span: keys[span.start : span.stop], todo, [k])
    if k == 0:
        assert found == (topk.MAX_KEY >> 16 << 16, topk.MAX_KEY | 0xFFFF)
    else:  # the bin of 2^16 keys with the k-th largest; for more than there are, the lowest bin
        threshold = int(np.sort(keys)[::-1][k - 1]) if k <= 1_000 else 0
        assert found == (max(threshold >> 16 << 16, 1), threshold | 0xFFFF)


def test_how_many_entries_are_remembered(monkeypatch):
    bits = {"a": np.zeros(64_000, np.uint8), "b": np.zeros(3_200, np.uint8)}
    assert topk._Search(1, topk.Bracket(1, 2), bits).limit == 1 << 22
    monkeypatch.setattr(topk, "REMEMBERED", 100)
    assert topk._Search(1, topk.Bracket(1, 2), bits).limit == 8 * 67_200 // 256
    search = topk._Search(1, topk.Bracket(1, 2), bits)
    for n, forgotten in ((2_100, False), (1, True)):  # exactly the limit is remembered
        search.add(
            topk.Span("a", 0, n), 0, np.zeros((n + 7) // 8, np.uint8), np.arange(n), np.ones(n, np.int32)
        )
        assert search.has_forgotten == forgotten and search.n_inside == (0 if forgotten else 2_100)
    assert (search.values.tolist(), search.numbers.tolist(), search.parts) == ([1], [2_101], [])


@pytest.mark.parametrize("low", [1, 3, 6])
@pytest.mark.parametrize("high", [2, 3, 5, 6, 9])
def test_cuts_of_all_counts(low, high):
    keys = np.array([9, 9, 7, 6, 6, 6, 5, 3, 3, 2, 1, 1, 0, 0], np.int32)
    bracket, scratch = topk.Bracket(low, high), streaming.Scratch()
    n_above, packed, places, inside = topk._above_and_inside(keys, bracket, scratch)
    assert n_above == (keys > high).sum()
    assert np.array_equal(packed, np.packbits(keys > high))
    assert places.tolist() == np.flatnonzero((keys >= low) & (keys <= high)).tolist()
    assert np.array_equal(inside, keys[places])
    values, numbers = np.unique(inside, return_counts=True)
    for k in range(15):
        cut = topk._cut(k, bracket, n_above, values[::-1], numbers[::-1])
        if k == 0:
            assert cut == topk.Cut(topk.MAX_KEY, 0, None, 0)
        elif k > 12 or not low <= keys[k - 1] <= high:
            short = low == 1 and k - 12 > 0 and low <= high
            assert cut == (topk.Cut(0, 0, 0, k - 12) if short else None)
        else:
            threshold = keys[k - 1]
            ties, above = int((keys == threshold).sum()), int((keys > threshold).sum())
            if k == above + ties:
                assert cut == topk.Cut(threshold - 1, 0, threshold, 0)
            else:
                assert cut == topk.Cut(threshold, k - above, threshold, 0)


@pytest.mark.parametrize("n", [0, 1, 3, 5, 6, 100])
def test_the_first_bits_that_are_set(n):
    flags = np.array([0, 1, 0, 1, 1, 0, 0, 0, 1, 0, 1], bool)
    found = np.unpackbits(topk._first_bits(np.packbits(flags), n))
    assert np.flatnonzero(found).tolist() == [1, 3, 4, 8, 10][:n]
