"""Rounding to bf16 by lot: right on average, and the same lot for a position however a tensor is cut."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch

from lota.rounding import Lots, add_by_lot_, hashed

CPU = torch.device("cpu")


def rounded(values: torch.Tensor, key: str = "key", start: int = 0) -> torch.Tensor:
    return Lots(key, start, len(values), values.device).rounded(values)


@pytest.mark.parametrize("start", [0, 5, 2**31 - 3, 2**32 - 2, 2**33 + 1])
def test_the_hash_is_that_of_unsigned_arithmetic(start):
    """Where int32 overflows, and at positions beyond 2^32, too."""
    first, second = np.frombuffer(hashlib.blake2b(b"0/w/1", digest_size=8).digest(), "<u4")
    x = np.arange(start, start + 1000, dtype=np.uint64).astype(np.uint32) ^ first
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x21F0AAAD)
    x ^= x >> np.uint32(15)
    x ^= second
    x *= np.uint32(0x735A2D97)
    x ^= x >> np.uint32(15)
    assert np.array_equal(hashed("0/w/1", start, 1000, CPU).numpy().view(np.uint32), x)


def test_lots_are_even_and_independent():
    """All 2^16 values alike; tensors, keys (steps) and neighbouring positions have nothing to do with each
    other.
    """
    n = 2**20
    one, other = Lots("0/w/1", 0, n, CPU), Lots("0/w/2", 0, n, CPU)
    drawn = [one.draw(), one.draw(), one.draw(), other.draw(), hashed("0/w/1/1", 1, n, CPU) & 0xFFFF]
    for lots in drawn:
        counts = torch.bincount(lots >> 8, minlength=256), torch.bincount(lots & 0xFF, minlength=256)
        for count in counts:
            assert len(count) == 256
            chi = ((count - n / 256).square() / (n / 256)).sum().item()
            assert abs(chi - 255) < 5 * math.sqrt(2 * 255)
    correlations = np.corrcoef(torch.stack(drawn).double().numpy())[np.triu_indices(len(drawn), 1)]
    assert np.abs(correlations).max() < 5 / math.sqrt(n)
    steps = torch.cat([Lots(f"0/w/{step}", 77, 1, CPU).draw() for step in range(4000)]).double().numpy()
    assert abs(np.corrcoef(steps[1:], steps[:-1])[0, 1]) < 5 / math.sqrt(4000)
    assert abs(steps.mean() - 32767.5) < 5 * 65536 / math.sqrt(12 * 4000)


@pytest.mark.parametrize("value", [1.0 + 0.3 / 128, -1.0 - 0.001 / 128, 3e-39, 1e30, -0.9999])
def test_the_mean_is_the_value_and_only_its_neighbours_occur(value):
    n = 2**20
    values = torch.full((n,), value)
    found = rounded(values).double()
    exact = values[0].double().item()
    bits = values[:1].view(torch.int32) & ~0xFFFF
    below, above = (b.view(torch.float32).double().item() for b in (bits, bits + 0x10000))  # in size
    assert set(found.unique().tolist()) == {below, above}
    share = (exact - below) / (above - below)
    sigma = abs(above - below) * math.sqrt(share * (1 - share) / n)
    assert abs(found.mean().item() - exact) < 5 * sigma


def test_what_is_exact_stays_and_so_do_infinity_and_nan():
    exact = torch.randn(4096).bfloat16()
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf])
    assert torch.equal(rounded(exact.float()), exact)
    assert torch.equal(rounded(special).view(torch.int16), special.bfloat16().view(torch.int16))
    # the smallest and the largest bit patterns of NaN: a lot carries the latter over into -0
    patterns = [0x7F800001, 0x7FFFFFFF, -1, 0x7FC00000, -(2**23) + 1]
    nans = torch.tensor(patterns, dtype=torch.int32).view(torch.float32)
    assert nans.isnan().all()
    for key in "abcd":
        assert rounded(nans, key).isnan().all()


def test_pieces_have_the_lots_of_the_whole():
    values = torch.randn(1000)
    cut = [rounded(values[a:b], start=a) for a, b in ((0, 1), (1, 640), (640, 1000))]
    assert torch.equal(torch.cat(cut), rounded(values))
    assert not torch.equal(rounded(values, start=1), rounded(values))
    assert not torch.equal(rounded(values, "another key"), rounded(values))


@pytest.mark.parametrize("squared", [False, True])
def test_sums_of_small_terms(squared):
    """500 terms of a thousandth of the sum: to the nearest value they would all be lost."""
    total = torch.ones(64, 64, dtype=torch.bfloat16)
    term = torch.full((64, 64), math.sqrt(1e-3) if squared else 1e-3, dtype=torch.bfloat16)
    exact = 1 + 500 * (term.double() ** 2 if squared else term.double())[0, 0].item()
    for step in range(500):
        add_by_lot_(total, term, f"w/{step}", squared)
    # a step up of 2^-7 comes in a share of 1e-3 x 2^7 of the steps
    sigma = 2**-7 * math.sqrt(500 * 0.128)
    assert abs(total.double().mean().item() - exact) < 5 * sigma / 64
    assert (total.double() - exact).abs().max().item() < 6 * sigma
