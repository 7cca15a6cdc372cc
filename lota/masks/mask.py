"""Masks: which entries of which parameters may change.

A mask lists, per parameter name, the *kept* positions (those that train). A parameter that a mask does
not list is frozen; the names it lists are its scope, also those with nothing kept. Bits are packed eight to
a byte (first entry = highest bit, the order of `numpy.packbits`), so a mask costs N/8 bytes in memory and
on disk.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lota.masks import files as mask_files
from lota.masks.files import pack, unpack
from lota.utils import first_few

SCOPE = ("scope", "scope_share", "left_out")  # metadata of what a mask was chosen over
ORIGIN = (*SCOPE, "base", "base_hash", "score", "flipped")  # metadata of where a mask comes from


def kept_count(sparsity: float, n_entries: int) -> int:
    """Entries that sparsity s keeps out of N: `round((1 - s) * N)`.

    Raises ValueError for a sparsity outside [0, 1).
    """
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity={sparsity}: must be at least 0 (everything trains) and below 1")
    return round((1 - sparsity) * n_entries)


class Mask:
    """Kept positions per parameter, bit-packed.

    bits: name -> uint8 tensor of ceil(numel / 8) bytes on the CPU; unused low bits of the last byte are 0.
    shapes: name -> shape of the parameter.
    meta: plain values only (str, number, bool, None, list, dict); `scope` is None where the file did not say.
    """

    def __init__(
        self,
        bits: Mapping[str, Tensor],
        shapes: Mapping[str, Iterable[int]],
        meta: Mapping[str, Any] | None = None,
    ):
        self.bits = dict(bits)
        self.shapes = {name: tuple(int(d) for d in shapes[name]) for name in self.bits}
        self.meta: dict[str, Any] = {"scope": None, **(meta or {})}
        self._kept: dict[str, int] = {}
        for name, packed in self.bits.items():
            mask_files.check_bits(name, packed, self.shapes[name])

    # construction
    @classmethod
    def from_dense(cls, kept: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None) -> Mask:
        """From name -> bool tensor of the parameter's shape, True = kept."""
        bits = {name: pack(value) for name, value in kept.items()}
        return cls(bits, {name: value.shape for name, value in kept.items()}, meta)

    @classmethod
    def from_positions(
        cls,
        positions: Mapping[str, Tensor],
        shapes: Mapping[str, Iterable[int]],
        meta: Mapping[str, Any] | None = None,
    ) -> Mask:
        """From name -> 1-D integer tensor of flat kept positions (any order)."""
        kept = {name: torch.zeros(tuple(shapes[name]), dtype=torch.bool) for name in positions}
        for name, index in positions.items():
            kept[name].view(-1)[index.long()] = True
        return cls.from_dense(kept, meta)

    # reading
    def __contains__(self, name: str) -> bool:
        return name in self.bits

    def __repr__(self) -> str:
        return f"Mask({len(self.bits)} tensors, {self.n_kept:,} of {self.n_total:,} entries kept)"

    @property
    def names(self) -> list[str]:
        """Listed parameter names, in the order in which they were listed."""
        return list(self.bits)

    def numel(self, name: str) -> int:
        """Entries of the parameter, kept or not."""
        return math.prod(self.shapes[name])

    def kept(self, name: str) -> int:
        """Kept entries of the parameter; 0 for a name that is not listed."""
        if name not in self.bits:
            return 0
        if name not in self._kept:
            self._kept[name] = int(np.bitwise_count(self.bits[name].numpy()).sum(dtype=np.int64))
        return self._kept[name]

    def dense(self, name: str) -> Tensor:
        """Bool tensor of the parameter's shape, True = kept."""
        flat = unpack(self.bits[name], self.numel(name))
        return torch.from_numpy(flat).bool().reshape(self.shapes[name])

    def positions(self, name: str) -> Tensor:
        """Flat kept positions, ascending, int64; empty for a name that is not listed."""
        if name not in self.bits:
            return torch.empty(0, dtype=torch.int64)
        return torch.from_numpy(np.flatnonzero(unpack(self.bits[name], self.numel(name))))

    @property
    def n_kept(self) -> int:
        return sum(self.kept(name) for name in self.bits)

    @property
    def n_total(self) -> int:
        """Entries of the listed parameters."""
        return sum(self.numel(name) for name in self.bits)

    @property
    def density(self) -> float:
        """Kept share of the listed entries; 0 for an empty mask."""
        return self.n_kept / self.n_total if self.n_total else 0.0

    def fingerprint(self) -> str:
        """Returns a SHA-256 over names, shapes and bits: equal for equal kept entries."""
        digest = hashlib.sha256()
        for name in sorted(self.bits):
            digest.update(f"{name}{self.shapes[name]}".encode())
            digest.update(self.bits[name].numpy().tobytes())
        return digest.hexdigest()

    # checks
    def check(self, model: nn.Module | Mapping[str, Iterable[int]]) -> None:
        """Raise ValueError unless every listed name is in `model` (or in name -> shape) with that shape."""
        if isinstance(model, nn.Module):
            shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        else:
            shapes = {name: tuple(shape) for name, shape in model.items()}
        unknown = [name for name in self.bits if name not in shapes]
        wrong = [
            f"{name}: mask {self.shapes[name]}, model {shapes[name]}"
            for name in self.bits
            if name in shapes and shapes[name] != self.shapes[name]
        ]
        if not unknown and not wrong:
            return
        problems = ["the mask does not belong to this model:"]
        if unknown:
            unlisted = [name for name in shapes if name not in self.bits]
            problems.append(f"  {len(unknown)} names of the mask are not in the model: {first_few(unknown)}")
            problems.append(
                f"  {len(unlisted)} names of the model are not in the mask: {first_few(unlisted)}"
            )
        if wrong:
            problems.append(f"  {len(wrong)} shapes differ: {first_few(wrong)}")
        problems.append("  extract a mask from this model, or name the model that the mask came from")
        raise ValueError("\n".join(problems))

    # set algebra
    def flip(self, scope: Iterable[str] | None = None) -> Mask:
        """The complement within the scope: what was frozen there trains, what trained is frozen.

        scope: parameter names; by default the names that the mask lists. Names outside stay frozen.
        Raises ValueError for a mask read from the older layout, which lists every parameter, without `scope`.
        """
        if scope is None and self.meta.get("layout") == "dense":
            raise ValueError(
                "this mask file does not record its scope; pass the names that may be flipped "
                "(lota.find_scope(model))"
            )
        names = set(self.bits) if scope is None else set(scope)
        bits = {}
        for name in (name for name in self.bits if name in names):
            bits[name] = ~self.bits[name]
            if self.numel(name) % 8:
                bits[name][-1] &= 0xFF << (8 - self.numel(name) % 8) & 0xFF  # unused bits stay 0
        flipped = {"flipped": not self.meta.get("flipped", False)}
        return Mask(bits, self.shapes, self._meta_of_result() | flipped)

    def only(self, names: Iterable[str]) -> Mask:
        """The mask of these parameters; all others are frozen."""
        chosen = [name for name in names if name in self.bits]
        bits = {name: self.bits[name] for name in chosen}
        if len(chosen) == len(self.bits):
            return Mask(bits, self.shapes, self.meta)
        kept = {key: value for key, value in self._meta_of_result().items() if key not in SCOPE}
        return Mask(bits, self.shapes, kept)

    def part(self, spans: Mapping[str, tuple[int, int]], shapes: Mapping[str, Iterable[int]]) -> Mask:
        """The mask of a stretch of each parameter, as a process holds it of a sharded model.

        spans: name -> (first, last + 1) of the flat entries; shapes: name -> shape of that stretch. Other
        names are left out.
        """
        bits = {}
        for name in (name for name in self.bits if name in spans):
            start, stop = spans[name]
            first = start // 8  # the byte that the stretch begins in
            covering = self.bits[name][first : math.ceil(stop / 8)]
            if start % 8:  # bits move to other places of their bytes
                covering = pack(torch.from_numpy(unpack(covering, stop - 8 * first)[start % 8 :]).bool())
            elif stop % 8 and stop > start:
                covering = covering.clone()
                covering[-1] &= 0xFF << (8 - stop % 8) & 0xFF  # unused bits are 0
            bits[name] = covering
        return Mask(bits, shapes, self._meta_of_result())

    def minus(self, other: Mask) -> Mask:
        """Kept here and not kept there."""
        return self._combine(other, lambda mine, theirs: mine & ~theirs, self.names)

    def intersect(self, other: Mask) -> Mask:
        """Kept in both."""
        return self._combine(other, np.bitwise_and, [n for n in self.bits if n in other.bits])

    def union(self, other: Mask) -> Mask:
        """Kept in either."""
        names = self.names + [name for name in other.bits if name not in self.bits]
        return self._combine(other, np.bitwise_or, names)

    def overlap(self, other: Mask) -> int:
        """Number of entries kept in both."""
        return self.intersect(other).n_kept

    def check_same_model(self, other: Mask) -> None:
        """Raise ValueError when the two cannot be masks of one model.

        Shapes of shared names agree. Masks of the same scope list the same names, and so do two of the older
        layout; others share some.
        """
        self._check_shapes(other)
        scopes = {self.meta["scope"], other.meta["scope"]}
        layouts = {self.meta.get("layout"), other.meta.get("layout")}
        same_names = layouts == {"dense"} or (len(scopes) == 1 and None not in scopes)
        mine, theirs = set(self.bits), set(other.bits)
        strange = mine ^ theirs if same_names or (None in scopes and not mine & theirs) else set()
        if strange:
            raise ValueError(
                "masks of different models: only one of them lists "
                f"{first_few([name for name in [*self.bits, *other.bits] if name in strange])}"
            )

    def _check_shapes(self, other: Mask) -> None:
        wrong = [n for n in self.bits if n in other.bits and self.shapes[n] != other.shapes[n]]
        if wrong:
            raise ValueError(
                f"masks of different models: {wrong[0]} has shape {self.shapes[wrong[0]]} in one "
                f"and {other.shapes[wrong[0]]} in the other"
            )

    def _combine(
        self, other: Mask, operation: Callable[[np.ndarray, np.ndarray], np.ndarray], names: list[str]
    ) -> Mask:
        """The mask of `names`, whose packed bytes are the operation of both sides'."""
        self._check_shapes(other)
        shapes = {**other.shapes, **self.shapes}
        bits = {}
        for name in names:
            mine, theirs = self._bytes(name, shapes[name]), other._bytes(name, shapes[name])
            bits[name] = torch.from_numpy(operation(mine, theirs))
        meta = self._meta_of_result(other)
        if any(m.meta.get("layout") == "dense" and set(m.bits) <= set(names) for m in (self, other)):
            meta["layout"] = "dense"  # norms and embeddings are listed too
        return Mask(bits, {name: shapes[name] for name in names}, meta)

    def _meta_of_result(self, *others: Mask) -> dict[str, Any]:
        """What stays true of a mask made of these: the origin that all of them share."""
        return {
            key: self.meta[key]
            for key in ORIGIN
            if key in self.meta and all(other.meta.get(key) == self.meta[key] for other in others)
        }

    def _bytes(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name in self.bits:
            return self.bits[name].numpy()
        return np.zeros((math.prod(shape) + 7) // 8, dtype=np.uint8)

    # files
    def save(
        self,
        path: str | os.PathLike[str],
        format: str = "packed",
        all_shapes: Mapping[str, Iterable[int]] | None = None,
    ) -> None:
        """Write the mask atomically.

        format: `packed` (bits and metadata) or `dense`, the older layout: name -> bool tensor, True = frozen,
        for every parameter of the model, whose shapes `all_shapes` gives; names that the mask does not list
        are all True.
        """
        if format not in ("packed", "dense"):
            raise ValueError(f"format={format!r}: choose packed or dense")
        shapes = {**(all_shapes or {}), **self.shapes} if format == "dense" else None
        mask_files.write(path, mask_files.Content(self.bits, self.shapes, self.meta), shapes)

    @classmethod
    def load(cls, path: str | os.PathLike[str], mapped: bool = False) -> Mask:
        """Read a mask file of either layout (see masks/README.md). Raises ValueError for anything else.

        mapped: leave the bits on disk until they are looked at; the file must not change meanwhile.
        """
        return cls(*mask_files.read(path, mapped))
