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
    with pytest.raises(ValueError, match="larger than what it can hold"):
        decode(500, np.uint16, row, data)
    for rice in (11, 63, 10**15):  # 10 bits tell 1000 entries apart
        with pytest.raises(ValueError, match="does not describe"):
            decode(1000, np.uint16, [row[0], rice, *row[2:]], data)
    compressible = encode(100_000, np.arange(50_000), np.ones(50_000, np.uint16))
    with pytest.raises(ValueError):
        decode(100_000, np.uint16, compressible[0], bytes(len(compressible[1])))


def test_exactly_half_is_coded_as_the_changed_ones():
    positions = np.arange(1, 64, 2)
    row, data = encode(64, positions, np.ones(32, np.uint8))
    assert row[3] == 8  # unary: 32 gaps of one entry, two bits each
    assert decode(64, np.uint8, row, data)[0].tolist() == positions.tolist()
    assert slow_decode(64, 1, row, data)[0] == positions.tolist()


def test_parts_are_compressed_as_the_format_says():
    """Level 3, with the size of the content and without a checksum; parts below 24 bytes never."""
    xors = np.repeat(np.arange(1, 9, dtype=np.uint16), 400) * 300
    row, data = encode(40_000, np.arange(0, 32_000, 10), xors)
    compressor = zstandard.ZstdCompressor(level=3, write_content_size=True, write_checksum=False)
    last = xors.view(np.uint8).reshape(-1, 2)[:, 1].tobytes()
    assert data.endswith(compressor.compress(last)) and row[-1] == -len(compressor.compress(last))
    for n, sign in ((23, 1), (24, -1), (25, -1)):
        row, _ = encode(1000, np.arange(n), np.ones(n, np.uint8))
        assert math.copysign(1, row[-1]) == sign and (row[-1] == n) == (sign > 0)
    noise = np.random.default_rng(0).integers(1, 256, 5000, dtype=np.uint8)
    row, data = encode(10_000, np.arange(5000), noise)
    assert row[-1] == 5000 and data.endswith(noise.tobytes())  # compressed it would be longer


@pytest.mark.parametrize("gap", [*range(70), 127, 128, 255, 256, 4095, 4096, 65_535])
def test_the_rice_parameter_of_equal_gaps(gap):
    bits = [k + 1 + (gap >> k) for k in range(30)]
    assert rice_parameter(np.full(5, gap)) == bits.index(min(bits))


def test_the_rice_parameter_of_uneven_gaps_is_the_best_of_all():
    generator = np.random.default_rng(1)
    for rare in (0.5, 0.1, 0.02, 0.004):
        for size in (10, 1000, 50_000):
            gaps = np.where(generator.random(2000) < rare, generator.integers(0, size, 2000), 0)
            near = math.floor(math.log2(sum(gaps.tolist()) / 2000 + 1))
            bits = [sum(k + 1 + (gap >> k) for gap in gaps.tolist()) for k in range(20)]
            assert rice_parameter(gaps) == bits.index(min(bits))
            assert abs(rice_parameter(gaps) - near) <= 1
    assert rice_parameter(np.array([8] * 8 + [24] * 2)) == 4  # 42 bits and the ends; with 3, 44
    assert rice_parameter(np.zeros(0, np.int64)) == 0


SMALL = ([1, 0, 0, 0, 1], b"\x07")  # the only entry of one, with XOR 7


@pytest.mark.parametrize(
    ("coding", "words"),
    [
        ([2, 0, 0, 0, 1], "does not describe 1 bytes"),  # more than n
        ([-1, 0, 0, 0, 1], "does not describe"),
        ([1, 64, 0, 0, 1], "does not describe"),
        ([1, -1, 0, 0, 1], "does not describe"),
        ([1, 0, 0, 1], "does not describe"),  # a part too few
        ([1, 0, 0, 0, 0, 1], "does not describe"),
        ([1, 0, 0, 0, 2], "does not describe"),
        ([1, 0, 0, 0, 0], "does not describe"),
        ([1, 0, 0, 0, -1], "content size"),
        ([1, 0, 0, 1, 0], "3 gaps instead of 0"),
        ([1, 0, 1, 0, 0], "larger than what it can hold"),
        ([1, 2, 0, 0, 1], "does not describe"),  # the Rice parameter of 3 entries and more
    ],
)
def test_numbers_that_do_not_fit_the_bytes(coding, words):
    assert [found.tolist() for found in decode(1, np.uint8, *SMALL)] == [[0], [7]]
    with pytest.raises(ValueError, match=words):
        decode(1, np.uint8, coding, b"\x07")


def test_positions_beyond_the_end_are_refused():
    row, data = encode(1000, np.array([5, 999]), np.array([1, 2], np.uint8))
    assert decode(1000, np.uint8, row, data)[0].tolist() == [5, 999]
    with pytest.raises(ValueError, match="position 999 of 999 entries"):
        decode(999, np.uint8, row, data)
    assert encode(5, np.zeros(0, np.int64), np.zeros(0, np.uint8)) == ([0, 0, 0, 0, 0], b"")
    assert decode(0, np.uint8, *encode(0, np.zeros(0, np.int64), np.zeros(0, np.uint8)))[0].tolist() == []


@pytest.mark.parametrize(("n", "density"), [(1000, 0.1), (4099, 0.01), (64, 0.9), (9, 0.0), (16, 1.0)])
def test_a_part_takes_no_more_memory_than_it_can_hold(n, density):
    """A small file could claim terabytes. Counted with the gaps themselves, at their worst."""
    positions, xors = sample(n, density, 2, seed=5)
    (count, k, *lengths), data = encode(n, positions, xors)
    listed = min(count, n - count)
    worst = [0] * (listed - 1) + [n - listed] if listed else []  # all unlisted entries before the last one
    bits = sum((gap >> k) + 1 for gap in worst) if listed else n >> k
    most = [math.ceil(listed / 8) * k, math.ceil(bits / 8), count, count]
    begins = np.cumsum([0, *map(abs, lengths)])
    for i, size in enumerate(most):
        for more in (0, 1):
            part = zstandard.ZstdCompressor().compress(bytes(size + more))
            lengths_now = [*lengths[:i], -len(part), *lengths[i + 1 :]]
            data_now = data[: begins[i]] + part + data[begins[i + 1] :]
            try:
                decode(n, np.uint16, [count, k, *lengths_now], data_now)
                refused = False
            except ValueError as error:
                refused = "larger than what it can hold" in str(error)
            assert refused == bool(more)
