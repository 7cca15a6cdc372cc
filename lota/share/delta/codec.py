"""Changed entries of a stretch of weights <-> bytes, near the entropy of their positions, vectorised.

Positions: the gaps between them in Golomb-Rice code: the low k bits of each at a fixed width, the rest in
unary (Rice, "Some practical universal noiseless coding techniques", 1979). For gaps of random positions that
is within 3 % of the entropy. If more entries changed than not, the unchanged ones are coded instead.
Values: XORs of bit patterns, one part per byte of the entry. A part is compressed if that makes it smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

LEVEL = 3  # of zstandard: higher ones take longer and gain below 1 % on XORs
_LEAST = 24  # bytes: nothing shorter becomes shorter
Array = npt.NDArray[Any]
# What `decode` needs besides the bytes: changed entries, k, and the length in bytes of each part: low bits of
# the gaps, their unary rest, byte 0 of the XORs, byte 1, ... A length is negative if the part is compressed.
Coding = list[int]


def encode(n: int, positions: Array, xors: Array) -> tuple[Coding, bytes]:
    """Code the changed entries of n.

    positions: (c,) ascending integers in [0, n); xors: (c,) unsigned integers of the entries' width.
    """
    # 1. Of the c changed and n - c unchanged positions, the fewer ones are coded: listed, (m,) int64.
    listed = _complement(n, positions) if 2 * len(positions) > n else positions
    # 2. Positions become gaps, (m,): the entries skipped before each. They are near 0 if many are listed.
    gaps = np.diff(listed, prepend=-1) - 1
    # 3. Each gap is split into its low k bits, which are nearly random, and gap >> k, which is mostly 0 or 1.
    k = rice_parameter(gaps)
    # 4. XORs become (c, width) uint8. Bytes of sign and exponent are mostly zeros and compress, the others do
    #    not, so that each byte of the entries is a part (a plane) of its own.
    planes = np.ascontiguousarray(xors).view(np.uint8).reshape(len(xors), xors.itemsize)
    parts = [
        pack_low_bits(gaps, k),
        pack_unary(gaps >> k),
        *(planes[:, j].tobytes() for j in range(xors.itemsize)),
    ]
    # 5. Structure that the gaps do not show (whole rows, columns or blocks) is left to zstandard.
    compressor = zstandard.ZstdCompressor(level=LEVEL, write_content_size=True, write_checksum=False)
    coding, stored = [len(positions), k], []
    for part in parts:
        compressed = compressor.compress(part) if len(part) >= _LEAST else part
        smaller = len(compressed) < len(part)
        coding.append(-len(compressed) if smaller else len(part))
        stored.append(compressed if smaller else part)
    return coding, b"".join(stored)


def decode(n: int, dtype: npt.DTypeLike, coding: Sequence[int], data: bytes) -> tuple[Array, Array]:
    """Returns (positions (c,) int64, xors (c,) of the unsigned `dtype`).

    Raises ValueError for what `encode` never wrote; no number of `coding` sizes an allocation unchecked.
    """
    width = np.dtype(dtype).itemsize
    try:
        count, k, *lengths = coding
        possible = len(lengths) == 2 + width and 0 <= count <= n and 0 <= k <= n.bit_length()
        if not possible or sum(map(abs, lengths)) != len(data):
            raise ValueError(f"segment {list(coding)} does not describe {len(data)} bytes")
        m = n - count if 2 * count > n else count  # positions that are listed, as in `encode`
        # The gaps add up to n - m at most, and their high bits to that >> k, each gap with a 1 at its end.
        most = [-(-m // 8) * k, (m + (n - m >> k) + 7) // 8, *[count] * width]
        low, unary, *planes = _parts(lengths, data, most)
        gaps = (unpack_unary(unary, m) << k) | unpack_low_bits(low, k, m)
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


def _parts(lengths: Sequence[int], data: bytes, most: Sequence[int]) -> list[bytes]:
    """The parts of a segment, decompressed. Raises ValueError for one of more bytes than `most` says."""
    parts, start = [], 0
    for length, most_here in zip(lengths, most, strict=True):
        part = data[start : start + abs(length)]
        start += abs(length)
        if (zstandard.frame_content_size(part) if length < 0 else length) > most_here:
            raise ValueError("a part is larger than what it can hold")
        if length < 0:
            part = zstandard.ZstdDecompressor().decompress(part)
        parts.append(part)
    return parts


def _complement(n: int, positions: Array) -> Array:
    """The positions in [0, n) that are not listed, int64."""
    rest = np.ones(n, bool)
    rest[positions] = False
    return np.flatnonzero(rest)


def rice_parameter(gaps: Array) -> int:
    """The k with the fewest bits for these gaps: a gap takes k + 1 + (gap >> k) bits."""
    if not len(gaps):
        return 0
    # The best k is floor(log2(mean + 1)) or a neighbour: below, halving the rest saves over one bit per gap;
    # above, less.
    near = int(gaps.mean() + 1).bit_length()
    return min(range(max(0, near - 2), near + 1), key=lambda k: len(gaps) * k + int((gaps >> k).sum()))


def pack_unary(numbers: Array) -> bytes:
    """Each number as that many 0 bits and a 1, highest bit of a byte first."""
    ends = np.cumsum(numbers + 1) - 1  # place of each number's 1 in the stream of bits
    bits = np.zeros(int(ends[-1]) + 1 if len(ends) else 0, bool)
    bits[ends] = True
    return np.packbits(bits).tobytes()


def unpack_unary(data: bytes, count: int) -> Array:
    """Returns `count` numbers, int64."""
    ends = np.flatnonzero(np.unpackbits(np.frombuffer(data, np.uint8)).view(bool))
    if len(ends) != count:
        raise ValueError(f"{len(ends)} gaps instead of {count}")
    return np.diff(ends, prepend=-1) - 1


def pack_low_bits(numbers: Array, k: int) -> bytes:
    """The low k bits of each number: bits 0-7 of all numbers, then bits 8-15 of all, ..., each as `_pack`."""
    steps = [(shift, min(8, k - shift)) for shift in range(0, k, 8)]
    return b"".join(_pack((numbers >> shift) & ((1 << bits) - 1), bits) for shift, bits in steps)


def unpack_low_bits(data: bytes, k: int, count: int) -> Array:
    """Returns `count` numbers of k bits, int64."""
    numbers, start = np.zeros(count, np.int64), 0
    for shift in range(0, k, 8):
        bits = min(8, k - shift)
        length = -(-count // 8) * bits
        numbers |= _unpack(data[start : start + length], bits, count) << shift
        start += length
    if start != len(data):
        raise ValueError(f"{len(data)} bytes instead of {start} for {count} gaps")
    return numbers


def _pack(numbers: Array, bits: int) -> bytes:
    """Numbers of 1 to 8 bits: eight of them in `bits` bytes, the first lowest; zeros fill the last eight.

    A shift per place among the eight is several times as fast as np.packbits on a (n, bits) array.
    """
    eights = np.zeros((-(-len(numbers) // 8), 8), np.uint64)
    eights.reshape(-1)[: len(numbers)] = numbers
    words = np.zeros(len(eights), np.uint64)  # eight numbers each, in its lowest 8 * bits bits
    for j in range(8):
        words |= eights[:, j] << np.uint64(bits * j)
    return words.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :bits].tobytes()


def _unpack(data: bytes, bits: int, count: int) -> Array:
    """Returns the first `count` numbers, int64."""
    octets = np.zeros((-(-count // 8), 8), np.uint8)
    octets[:, :bits] = np.frombuffer(data, np.uint8).reshape(-1, bits)
    words = octets.view("<u8").reshape(-1)
    mask = np.uint64((1 << bits) - 1)
    numbers = np.empty((len(words), 8), np.int64)
    for j in range(8):
        numbers[:, j] = (words >> np.uint64(bits * j)) & mask
    return numbers.reshape(-1)[:count]
