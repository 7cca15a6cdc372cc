"""Rounding to bf16 by lot, up with the probability of what is cut off: sums stay right on average.

To the nearest value, an increment below half of bf16's last place (a relative 1/512 to 1/256) is lost,
however often it comes. Rounded by lot, each is lost or counts too much, and their mean is exact. Sources:
Gupta et al., arXiv 1502.02551; for training in bf16, Zamirai et al., arXiv 2010.06192.

The lot of an entry is a hash of a key and of its position. So it is the same on every device, in whatever
pieces a tensor is rounded, and after a resume, without a generator whose state would have to be saved.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator

import torch
from torch import Tensor

from lota.system import device_kind

# Entries that are widened to fp32 at once: few enough for a CPU's cache, enough to fill a GPU.
CPU_PIECE, PIECE = 2**18, 2**23


def piece_size(device: torch.device) -> int:
    return CPU_PIECE if device_kind(device) == "cpu" else PIECE


def pieces(count: int, device: torch.device) -> Iterator[slice]:
    """Stretches of a tensor (count,) that are small enough to be widened to fp32."""
    size = piece_size(device)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def hashed(key: str, start: int, count: int, device: torch.device) -> Tensor:
    """32 bits, int32 (count,), as a function of the key and of the positions start, start + 1, ... alone.

    Positions that differ by a multiple of 2^32 have the same. Mixing: two rounds of xor-shift and
    multiplication, constants of Ellis' and Wellons' search for low bias; as int32 wraps, modulo 2^32.
    """
    first, second = struct.unpack("<ii", hashlib.blake2b(key.encode(), digest_size=8).digest())
    x = torch.arange(count, dtype=torch.int32, device=device)
    x += (start + 2**31) % 2**32 - 2**31
    x ^= first
    x ^= (x >> 16).bitwise_and_(0xFFFF)  # the shift brings in the sign; the mask takes it out
    x *= 0x21F0AAAD
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x ^= second
    x *= 0x735A2D97
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    return x


class Lots:
    """Lots of the entries of a piece, for one tensor after the other.

    key: names everything else that they depend on: seed, parameter, step. start: position of the first entry.
    """

    def __init__(self, key: str, start: int, count: int, device: torch.device):
        self.key, self.start, self.count, self.device = key, start, count, device
        self.drawn = 0
        self.bits: Tensor | None = None

    def draw(self) -> Tensor:
        """Numbers of 0 to 65535, int32 (count,): a half of a hash at a time."""
        self.drawn += 1
        if self.bits is None:
            self.bits = hashed(f"{self.key}/{self.drawn}", self.start, self.count, self.device)
            return self.bits & 0xFFFF
        high, self.bits = (self.bits >> 16).bitwise_and_(0xFFFF), None
        return high

    def rounded(self, values: Tensor) -> Tensor:
        """fp32 (count,) to bf16 (count,), each to one of its two neighbours, with its own value as the mean.

        What bf16 holds exactly stays, as do infinity and NaN.
        """
        # A bf16 is the upper half of an fp32's bits. A lot below 2^16 carries over into it as often as the
        # lower half is large.
        bits = self.draw().add_(values.view(torch.int32))
        rounded = (bits >> 16).to(torch.int16).view(torch.bfloat16)
        return torch.where(values.isnan(), torch.nan, rounded)


def add_by_lot_(total: Tensor, added: Tensor, key: str, squared: bool = False) -> None:
    """Add `added`, or its squares, to a contiguous bf16 tensor of the same shape; sums are rounded by lot."""
    sums, terms = total.view(-1), added.reshape(-1)
    for piece in pieces(sums.numel(), sums.device):
        term = terms[piece].float()
        wide = sums[piece].float().add_(term.square() if squared else term)
        sums[piece] = Lots(key, piece.start, len(wide), wide.device).rounded(wide)
