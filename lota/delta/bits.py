"""Bit patterns of tensors: seen as integers, XORed at positions, summed up to recognise them."""

from __future__ import annotations

import torch
from torch import Tensor

_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MODULUS = 1 << 64


def as_integers(tensor: Tensor) -> Tensor:
    """A contiguous tensor's entries as signed integers of the same width; the same memory, 1-D."""
    return tensor.view(-1).view(_SIGNED[tensor.element_size()])


def xor_(tensor: Tensor, positions: Tensor, xors: Tensor) -> None:
    """XOR bit patterns of a contiguous tensor at flat positions, in place; twice is nothing.

    positions: int64; xors: signed integers of the tensor's width; on the tensor's device.
    """
    bits = as_integers(tensor)
    bits.index_copy_(0, positions, bits.index_select(0, positions) ^ xors)


def fingerprint(positions: Tensor, bits: Tensor) -> int:
    """The sum of bits * (2 * position + 1): modulo 2^64 another value at one position is another sum.

    Parts of a parameter add up; those of several parameters are multiplied by `weight` first. positions:
    int64; bits: signed integers, taken as unsigned ones.
    """
    wide = bits.to(torch.int64)
    if bits.element_size() < 8:
        wide &= (1 << 8 * bits.element_size()) - 1
    # int64 wraps around, which keeps the remainder; only a CPU has a dot product of integers
    products = wide.dot(positions) if wide.device.type == "cpu" else (wide * positions).sum()
    return 2 * int(products) + int(wide.sum())


def weight(number: int) -> int:
    """Odd, and another one for each parameter."""
    return 2 * number + 1


def as_hex(total: int) -> str:
    """A sum of fingerprints modulo 2^64."""
    return f"{total % _MODULUS:016x}"
