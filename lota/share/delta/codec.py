"""Changed entries of a stretch of weights <-> bytes, near the entropy of their positions, vectorised.

Positions: the gaps between them in Golomb-Rice code, the low k bits of each at a fixed width, the rest in
unary (Rice, "Some practical universal noiseless coding techniques", 1979). For gaps of random positions that
is within 3 % of the entropy. Where more entries changed than not, the unchanged ones are coded instead.
Values: XORs of bit patterns, one part per byte of the entry. Each part is compressed where that pays.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import zstandard

LEVEL = 3  # of zstandard: higher ones take longer and gain below 1 % on XORs
_LEAST = 24  # bytes: nothing shorter becomes shorter
Row = list[int]  # [changed entries, k, length of each part in bytes, negative where it is compressed]


def encode(n: int, positions: np.ndarray, xors: np.ndarray) -> tuple[Row, bytes]:
    """Code the changed entries of n.

    positions: ascending integers in [0, n); xors: as many unsigned integers. Returns what `decode` needs.
    """
    listed = _complement(n, positions) if 2 * len(positions) > n else positions
    gaps = np.diff(listed, prepend=-1) - 1
    k = rice_parameter(gaps)
    planes = np.ascontiguousarray(xors).view(np.uint8).reshape(len(xors), xors.itemsize)
    parts = [
        pack_low(gaps, k),
        pack_unary(gaps >> k),
        *(planes[:, j].tobytes() for j in range(xors.itemsize)),
    ]
    compressor = zstandard.ZstdCompressor(level=LEVEL, write_content_size=True, write_checksum=False)
    row, stored = [len(positions), k], []
    for part in parts:
        smaller = compressor.compress(part) if len(part) >= _LEAST else part
        worth = len(smaller) < len(part)
        row.append(-len(smaller) if worth else len(part))
        stored.append(smaller if worth else part)
    return row, b"".join(stored)


def decode(n: int, dtype: np.dtype, row: Sequence[int], data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """(positions int64, xors of the unsigned `dtype`). Raises ValueError for what `encode` never wrote."""
    width = np.dtype(dtype).itemsize
    try:
        count, k, *lengths = row
        if len(lengths) != 2 + width or sum(map(abs, lengths)) != len(data) or not 0 <= count <= n or k < 0:
            raise ValueError(f"segment {list(row)} does not describe {len(data)} bytes")
        low, unary, *planes = _parts(lengths, data, most=max(8 * n, 64))
        m = n - count if 2 * count > n else count
        gaps = (unpack_unary(unary, m) << k) | unpack_low(low, k, m)
        listed = np.cumsum(gaps + 1) - 1
        if m and listed[-1] >= n:
            raise ValueError(f"position {listed[-1]} of {n} entries")
        xors = np.empty((count, width), np.uint8)
        for j, plane in enumerate(planes):
            xors[:, j] = np.frombuffer(plane, np.uint8)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
    positions = _complement(n, listed) if 2 * count > n else listed
    return positions, xors.view(dtype).reshape(count)


def _parts(lengths: Sequence[int], data: bytes, most: int) -> list[bytes]:
    parts, start = [], 0
    for length in lengths:
        part = data[start : start + abs(length)]
        start += abs(length)
        if length < 0:
            if zstandard.frame_content_size(part) > most:
                raise ValueError("a part is larger than what it can hold")
            part = zstandard.ZstdDecompressor().decompress(part)
        parts.append(part)
    return parts


def _complement(n: int, positions: np.ndarray) -> np.ndarray:
    """The positions in [0, n) that are not listed, int64."""
    rest = np.ones(n, bool)
    rest[positions] = False
    return np.flatnonzero(rest)


def rice_parameter(gaps: np.ndarray) -> int:
    """The k with the fewest bits for these gaps."""
    if not len(gaps):
        return 0
    near = int(gaps.mean() + 1).bit_length() - 1
    return min(range(max(0, near - 2), near + 2), key=lambda k: len(gaps) * (k + 1) + int((gaps >> k).sum()))


def pack_unary(numbers: np.ndarray) -> bytes:
    """Each number as that many 0 bits and a 1, highest bit of a byte first."""
    ends = np.cumsum(numbers + 1) - 1
    bits = np.zeros(int(ends[-1]) + 1 if len(ends) else 0, np.uint8)
    bits[ends] = 1
    return np.packbits(bits).tobytes()


def unpack_unary(data: bytes, count: int) -> np.ndarray:
    """`count` numbers, int64."""
    ends = np.flatnonzero(np.unpackbits(np.frombuffer(data, np.uint8)).view(bool))
    if len(ends) != count:
        raise ValueError(f"{len(ends)} gaps instead of {count}")
    return np.diff(ends, prepend=-1) - 1


def pack_low(numbers: np.ndarray, k: int) -> bytes:
    """The low k bits of each number: eight bits at a time, first the lowest, each as `_pack`."""
    steps = [(shift, min(8, k - shift)) for shift in range(0, k, 8)]
    return b"".join(_pack((numbers >> shift) & ((1 << bits) - 1), bits) for shift, bits in steps)


def unpack_low(data: bytes, k: int, count: int) -> np.ndarray:
    """`count` numbers of k bits, int64."""
    numbers, start = np.zeros(count, np.int64), 0
    for shift in range(0, k, 8):
        bits = min(8, k - shift)
        length = -(-count // 8) * bits
        numbers |= _unpack(data[start : start + length], bits, count) << shift
        start += length
    if start != len(data):
        raise ValueError(f"{len(data)} bytes instead of {start} for {count} gaps")
    return numbers


def _pack(numbers: np.ndarray, bits: int) -> bytes:
    """Numbers of 1 to 8 bits: eight of them in `bits` bytes, the first lowest; zeros fill the last eight."""
    groups = np.zeros((-(-len(numbers) // 8), 8), np.uint64)
    groups.reshape(-1)[: len(numbers)] = numbers
    words = np.zeros(len(groups), np.uint64)
    for j in range(8):
        words |= groups[:, j] << np.uint64(bits * j)
    return words.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :bits].tobytes()


def _unpack(data: bytes, bits: int, count: int) -> np.ndarray:
    octets = np.zeros((-(-count // 8), 8), np.uint8)
    octets[:, :bits] = np.frombuffer(data, np.uint8).reshape(-1, bits)
    words = octets.view("<u8").reshape(-1)
    mask = np.uint64((1 << bits) - 1)
    numbers = np.empty((len(words), 8), np.int64)
    for j in range(8):
        numbers[:, j] = (words >> np.uint64(bits * j)) & mask
    return numbers.reshape(-1)[:count]
