"""Delta: the changes in a delta file, parameter by parameter."""

from __future__ import annotations

import functools
import os
import threading
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lota.delta import container
from lota.delta.codec import decode
from lota.delta.layout import SEGMENT, UNSIGNED, Piece, segments


class Delta:
    """The changes that turn a base into a tuned model, read from a file piece by piece; made by `open`.

    meta: format, version, base and tuned (ids), base_hash and tuned_hash (`lota.weights.content_hash`, the
    tuned model in the base's dtypes), dtype (of most entries), sparsity (of the mask; without one, the
    unchanged share), changed and entries (how many); kept where a mask was given, task where one was named.
    names: parameters with changes, as in the loaded model's `named_parameters()`; shapes: theirs.
    An entry is listed when its bits changed: one that was trained and came back to its value is not.
    """

    def __init__(self, path: Path, content: container.Content):
        self.path, self.meta = path, dict(content.meta)
        self.parameters = {parameter.name: parameter for parameter in content.parameters}
        self.names = [p.name for p in content.parameters if p.changed]
        self.shapes = {name: self.parameters[name].shape for name in self.names}
        self._segments = segments(content.parameters)
        self._rows, self._starts = content.rows, content.starts
        self._pieces: dict[str, list[tuple[int, Piece]]] = {}
        for i, segment in enumerate(self._segments):
            for piece in segment.pieces:
                self._pieces.setdefault(piece.name, []).append((i, piece))
        self._lock = threading.Lock()
        self._decoded = functools.lru_cache(maxsize=2)(self._decode)

    def __repr__(self) -> str:
        return (
            f"Delta({str(self.path)!r}, {len(self.names)} tensors, {self.meta['changed']:,} entries changed)"
        )

    @classmethod
    def open(cls, path: str | os.PathLike) -> Delta:
        """Read a delta file's index. Raises ValueError unless every byte of the file is as it was written."""
        path = Path(path).expanduser()
        return cls(path, container.read(path))

    @property
    def n_changed(self) -> int:
        return self.meta["changed"]

    def changed(self, name: str) -> int:
        """Changed entries of the parameter; 0 for one that is not listed."""
        return self.parameters[name].changed if name in self.parameters else 0

    def changes(self, name: str, start: int = 0, stop: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Changed entries in [start, stop) of the flattened parameter, and their XORs.

        Positions int64, ascending, counted from `start`; XORs unsigned integers of the parameter's width.
        """
        if not self.changed(name):
            width = self.parameters[name].dtype.itemsize if name in self.parameters else 1
            return np.empty(0, np.int64), np.empty(0, UNSIGNED[width])
        stop = self.parameters[name].numel if stop is None else stop
        overlapping = [(i, p) for i, p in self._pieces[name] if p.start < stop and p.stop > start]
        found = [self._of_piece(i, piece, start, stop) for i, piece in overlapping]
        positions, xors = zip(*found, strict=True)
        return np.concatenate(positions), np.concatenate(xors)

    def _of_piece(self, i: int, piece: Piece, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        with self._lock:
            positions, xors = self._decoded(i)
        shift = piece.offset - piece.start  # position in the segment minus position in the parameter
        low, high = np.searchsorted(
            positions, [max(start, piece.start) + shift, min(stop, piece.stop) + shift]
        )
        return positions[low:high] - (shift + start), xors[low:high]

    def _decode(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        with open(self.path, "rb") as file:
            file.seek(self._starts[i])
            data = file.read(self._starts[i + 1] - self._starts[i])
        segment = self._segments[i]
        try:
            return decode(segment.n, segment.unsigned, self._rows[i], data)
        except ValueError as error:
            raise ValueError(f"{self.path} is damaged: {error}") from error

    def positions(self, name: str) -> Tensor:
        """Flat positions of the changed entries, ascending, int64; empty for a name that is not listed."""
        return torch.from_numpy(self.changes(name)[0])

    def tuned(self, name: str, base: Tensor) -> Tensor:
        """The tuned parameter, bit for bit, in memory of its own. base: the base's, in its file's dtype."""
        self.check_fits(name, base)
        result = base.detach().cpu().contiguous().clone()
        self.flip_(name, result)
        return result

    def flip_(self, name: str, value: Tensor) -> None:
        """Turn a contiguous CPU tensor from the base's into the tuned parameter in place, or back."""
        flat = value.view(-1)
        for start in range(0, flat.numel(), SEGMENT):
            part = flat[start : start + SEGMENT]
            xor_(part, *self.changes(name, start, start + part.numel()))

    def differences(self, name: str, base: Tensor) -> tuple[Tensor, Tensor]:
        """(positions, tuned - base there in fp32): the task vector's entries that are not 0."""
        self.check_fits(name, base)
        positions, xors = self.changes(name)
        index = torch.from_numpy(positions)
        before = base.detach().cpu().reshape(-1)[index]
        after = before.clone()
        xor_(after, np.arange(len(positions)), xors)
        return index, after.float() - before.float()

    def check_fits(self, name: str, base: Tensor) -> None:
        """Raise ValueError unless `base` has the shape and dtype of the parameter of the delta's base."""
        if name not in self.parameters:
            raise ValueError(f"{self.path}: the base has no parameter {name}")
        known = self.parameters[name]
        if tuple(base.shape) != known.shape or base.dtype != known.dtype:
            raise ValueError(
                f"{self.path} changes {name} as {known.dtype}{list(known.shape)}, not as "
                f"{base.dtype}{list(base.shape)}: give the base in the dtype of its files (dtype='auto')"
            )


def xor_(tensor: Tensor, positions: np.ndarray, xors: np.ndarray) -> None:
    """XOR bit patterns of a contiguous CPU tensor at flat positions, in place; twice is nothing."""
    bits = tensor.view(-1).view(torch.uint8).numpy().view(xors.dtype)
    bits[positions] ^= xors
