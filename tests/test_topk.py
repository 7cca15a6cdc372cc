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
    monkeypatch.setattr(topk, "_sampled_brackets", lambda *args: [topk.Bracket(*guess)] * 4)
    rng = np.random.default_rng(3)
    keys = {f"t{i}": float_keys(rng, 20_000, kind) for i in range(2)}
    assert_equals_brute_force(keys, [20, 4_000, 20_000, 40_000])


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
