"""Delta: the changes in a delta file, parameter by parameter."""

from __future__ import annotations

import functools
import os
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lota.share.delta import format as container
from lota.share.delta.codec import decode
from lota.share.delta.format import SEGMENT, Piece, as_integers, segments, xor_


class Changes(NamedTuple):
    """Flat positions, int64, ascending, and XORs as signed integers of the parameter's width."""

    positions: Tensor
    xors: Tensor


class Delta:
    """The changes that turn a base into a tuned model, read from a file piece by piece; made by `open`.

    meta: format, version, base and tuned (ids), base_hash and tuned_hash (`lota.weights.content_hash`, the
    tuned model in the base's dtypes), dtype (of most entries), sparsity (of the mask; without one, the
    unchanged share), changed and entries (how many); kept where a mask was given, task where one was named.
    names: parameters with changes, as in the loaded model's `named_parameters()`; shapes: theirs.
    An entry is listed when its bits changed: one that was trained and came back to its value is not.
    """

    def __init__(self, path: Path, content: container.Content):
        self.path, self.checksum, self.meta = path, content.checksum, dict(content.meta)
        self.parameters = {parameter.name: parameter for parameter in content.parameters}
        self.names = [p.name for p in content.parameters if p.changed]
        self.shapes = {name: self.parameters[name].shape for name in self.names}
        self._segments = segments(content.parameters)
        self._rows, self._starts = content.rows, content.starts
        self._pieces: dict[str, list[tuple[int, Piece]]] = {}
        for i, segment in enumerate(self._segments):
            for piece in segment.pieces:
                self._pieces.setdefault(piece.name, []).append((i, piece))
        self._loaded: dict[tuple[str, str], Changes] = {}
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

    def dtype(self, name: str) -> torch.dtype:
        """Of the parameter in the base's file."""
        return self.parameters[name].dtype

    @property
    def widest(self) -> torch.dtype:
        """The narrowest dtype that holds the values of every parameter that changes."""
        return functools.reduce(torch.promote_types, map(self.dtype, self.names))

    @property
    def n_changed(self) -> int:
        return self.meta["changed"]

    def changed(self, name: str) -> int:
        """Changed entries of the parameter; 0 for one that is not listed."""
        return self.parameters[name].changed if name in self.parameters else 0

    def changes(self, name: str, start: int = 0, stop: int | None = None) -> Changes:
        """Changed entries in [start, stop) of the flattened parameter, positions counted from `start`."""
        stop = self.parameters[name].numel if stop is None else stop
        overlapping = [(i, p) for i, p in self._pieces.get(name, ()) if p.start < stop and p.stop > start]
        if not self.changed(name) or not overlapping:
            return Changes(
                torch.empty(0, dtype=torch.int64), as_integers(torch.empty(0, dtype=self.dtype(name)))
            )
        found = [self._of_piece(i, piece, start, stop) for i, piece in overlapping]
        positions, xors = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return Changes(torch.from_numpy(positions), torch.from_numpy(xors.view(f"i{xors.itemsize}")))

    def on(self, device: torch.device | str, name: str) -> Changes:
        """All changes of a parameter on a device, where they stay (positions as int32) for the next time."""
        key = (str(device), name)
        if key not in self._loaded:
            positions, xors = (part.to(device) for part in self.changes(name))
            small = self.parameters[name].numel <= 1 << 31
            self._loaded[key] = Changes(positions.int() if small else positions, xors)
        positions, xors = self._loaded[key]
        return Changes(positions.long(), xors)

    def _of_piece(self, i: int, piece: Piece, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        with self._lock:
            positions, xors = self._decoded(i)
        shift = piece.offset - piece.start  # position in the segment minus position in the parameter
        bounds = [max(start, piece.start) + shift, min(stop, piece.stop) + shift]
        low, high = np.searchsorted(positions, bounds)
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
        return self.changes(name).positions if self.changed(name) else torch.empty(0, dtype=torch.int64)

    def overlap(self, other: Delta) -> int:
        """Entries that both change."""
        names = [name for name in self.names if other.changed(name)]
        return sum(
            int(torch.isin(self.positions(n), other.positions(n), assume_unique=True).sum()) for n in names
        )

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
        before = base.detach().cpu().reshape(-1)[positions]
        after = (as_integers(before) ^ xors).view(before.dtype)
        return positions, after.float() - before.float()

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
