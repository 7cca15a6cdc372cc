"""The coding of a delta against one written bit by bit, and its size against the entropy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import zstandard

from lota.share.delta.codec import decode, encode, rice_parameter

WIDTHS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def slow_decode(n: int, width: int, row: list[int], data: bytes) -> tuple[list[int], list[int]]:
    """As the module's docstrings describe it, in plain Python."""
    count, k, *lengths = row
    parts, start = [], 0
    for length in lengths:
        part = data[start : start + abs(length)]
        parts.append(zstandard.ZstdDecompressor().decompress(part) if length < 0 else part)
        start += abs(length)
    low, unary, *planes = parts
    listed = n - count if 2 * count > n else count
    remainders, place = [0] * listed, 0
    for shift in range(0, k, 8):
        width_here = min(8, k - shift)
        bits = [byte >> i & 1 for byte in low[place:] for i in range(8)]
        for i in range(listed):
            number = sum(bits[i * width_here + j] << j for j in range(width_here))
            remainders[i] |= number << shift
        place += (listed + 7) // 8 * width_here
    positions, position, zeros, i = [], -1, 0, 0
    for bit in "".join(f"{byte:08b}" for byte in unary):
        if i == listed:
            break
        if bit == "0":
            zeros += 1
            continue
        position += (zeros << k | remainders[i]) + 1
        positions.append(position)
        zeros, i = 0, i + 1
    if 2 * count > n:
        positions = sorted(set(range(n)) - set(positions))
    xors = [sum(plane[i] << 8 * j for j, plane in enumerate(planes)) for i in range(count)]
    return positions, xors


def sample(n: int, density: float, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    positions = np.flatnonzero(generator.random(n) < density)
    return positions, generator.integers(1, 1 << 8 * width, len(positions), dtype=WIDTHS[width])


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("density", [0, 0.003, 0.1, 0.5, 0.7, 1])
def test_what_is_decoded_is_what_was_coded(density, width):
    for seed, n in enumerate((1, 2, 7, 8, 9, 64, 1000, 5003)):
        positions, xors = sample(n, density, width, seed)
        row, data = encode(n, positions, xors)
        again = decode(n, WIDTHS[width], row, data)
        assert again[0].dtype == np.int64 and again[1].dtype == WIDTHS[width]
        assert again[0].tolist() == positions.tolist() and again[1].tolist() == xors.tolist()
        assert slow_decode(n, width, row, data) == (positions.tolist(), xors.tolist())


@pytest.mark.parametrize("last", [0, 1, 255, 256, 65535, 99_999])
def test_single_entries_and_huge_gaps(last):
    for positions in ([last], sorted({0, last}), sorted({0, 1, 2, 3, 4, 5, 6, 7, 8, last})):
        xors = np.arange(1, len(positions) + 1, dtype=np.uint16)
        row, data = encode(100_000, np.array(positions), xors)
        again = decode(100_000, np.uint16, row, data)
        assert again[0].tolist() == positions and again[1].tolist() == xors.tolist()
        assert slow_decode(100_000, 2, row, data)[0] == positions


def test_whole_rows_and_columns_cost_next_to_nothing():
    square = np.zeros((512, 512), bool)
    square[100:200], square[:, 30:60] = True, True
    positions = np.flatnonzero(square)
    row, _ = encode(square.size, positions, np.ones(len(positions), np.uint16))
    assert sum(map(abs, row[2:])) < 0.01 * len(positions)


def entropy(n: int, density: float) -> float:
    """Bits of n independent entries, changed with that probability."""
    return -n * (density * math.log2(density) + (1 - density) * math.log2(1 - density))


@pytest.mark.parametrize("density", [0.001, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("width", [2, 4])
def test_random_positions_and_values_take_their_entropy(density, width):
    n = 1 << 20
    positions, xors = sample(n, density, width, seed=1)
    row, data = encode(n, positions, xors)
    bits = 8 * len(data)
    assert bits <= 1.01 * (entropy(n, len(positions) / n) + 8 * width * len(positions))
    coded = 8 * (abs(row[2]) + abs(row[3]))
    assert coded <= 1.03 * entropy(n, len(positions) / n)  # the positions alone


def test_the_rice_parameter_is_the_best_one():
    generator = np.random.default_rng(0)
    for density in (0.001, 0.01, 0.1, 0.3, 0.6):
        gaps = generator.geometric(density, 3000) - 1
        bits = [len(gaps) * (k + 1) + int((gaps >> k).sum()) for k in range(20)]
        assert rice_parameter(gaps) == int(np.argmin(bits))


def test_bytes_that_were_never_coded_are_refused():
    positions, xors = sample(1000, 0.1, 2, seed=3)
    row, data = encode(1000, positions, xors)
    for bad in (
        row[:-1],
        [row[0] + 1, *row[1:]],
        [-1, *row[1:]],
        [row[0], row[1] + 1, *row[2:]],
        [row[0], 10**9, *row[2:]],
    ):
        with pytest.raises(ValueError):
            decode(1000, np.uint16, bad, data)
    with pytest.raises(ValueError):
        decode(1000, np.uint16, row, data[:-1])
    with pytest.raises(ValueError, match="of 500 entries"):
        decode(500, np.uint16, row, data)
    compressible = encode(100_000, np.arange(50_000), np.ones(50_000, np.uint16))
    with pytest.raises(ValueError):
        decode(100_000, np.uint16, compressible[0], bytes(len(compressible[1])))
