"""Delta: the changes in a delta file, parameter by parameter."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lota.models.hub import DELTA_FILE, local_copy
from lota.share.delta.codec import decode
from lota.share.delta.format import DeltaIndex, as_integers, common_dtype, read_index, xor_
from lota.share.delta.index import unsigned


class Changes(NamedTuple):
    """Changed entries of a parameter, or of a part of it."""

    positions: Tensor  # (c,) int64, ascending, in the flattened parameter
    xors: Tensor  # (c,) signed integers of the parameter's width: bit patterns of base ^ tuned


class Entries(NamedTuple):
    """Changed entries of a parameter, as a model held them that was found to be the base or the tuned one."""

    positions: Tensor  # (c,) ascending, in the flattened parameter; int32, or int64 where that is too small
    base: Tensor  # (c,) values in the base, in the dtype of its file
    tuned: Tensor  # (c,) values in the tuned model


class Delta:
    """The changes that turn a base into a tuned model, read from a file piece by piece; made by `open`.

    An entry is listed if its bits changed: one that was trained and came back to its value is not.
    """

    def __init__(self, path: Path, index: DeltaIndex):
        self.path = path
        self.checksum = index.checksum  # of the file: copies have the same
        self.meta = dict(index.meta)  # lota/share/delta/format.py lists the keys
        # every parameter of the base, in sorted order; names as in the loaded model's `named_parameters()`
        self.parameters = {parameter.name: parameter for parameter in index.parameters}
        self.names = [p.name for p in index.parameters if p.changed]  # of the parameters with changes
        self._index = index
        self.known: dict[tuple[torch.device, str], Entries] = {}  # by parameter, on devices of models
        self._lock = threading.Lock()
        # neighbouring parameters and parts share segments: the last two are kept
        self._decoded = functools.lru_cache(maxsize=2)(self._decode)

    def __eq__(self, other: object) -> bool:
        """Whether the same changes are there, be it from another copy of the file."""
        return isinstance(other, Delta) and other.checksum == self.checksum

    def __hash__(self) -> int:
        return hash(self.checksum)

    def __repr__(self) -> str:
        return f"Delta({str(self.path)!r}, {len(self.names)} tensors, {self.n_changed:,} entries changed)"

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Delta:
        """Read a delta file's index. Raises ValueError unless every byte of the file is as it was written.

        path: of a file, or a repository of the hub, `org/name[@revision]` (lota/models/hub.py).
        """
        path = local_copy(path, DELTA_FILE, bare=True)
        return cls(path, read_index(path))

    @property
    def widest(self) -> torch.dtype:
        """The narrowest dtype that holds the values of every parameter that changes."""
        return functools.reduce(common_dtype, (self.parameters[name].dtype for name in self.names))

    @property
    def n_changed(self) -> int:
        return int(self.meta["changed"])

    def changed(self, name: str) -> int:
        """Changed entries of the parameter; 0 for one that is not listed."""
        return self.parameters[name].changed if name in self.parameters else 0

    def changes(self, name: str, start: int = 0, stop: int | None = None) -> Changes:
        """Changed entries in [start, stop) of the flattened parameter, positions counted from `start`."""
        stop = self.parameters[name].numel if stop is None else stop
        nothing = as_integers(torch.empty(0, dtype=self.parameters[name].dtype))
        parts = [Changes(torch.empty(0, dtype=torch.int64), nothing), *self._parts(name, start, stop)]
        positions, xors = zip(*parts, strict=True)
        return Changes(torch.cat(positions), torch.cat(xors))

    def positions(self, name: str) -> Tensor:
        """Flat positions of the changed entries, ascending, int64; empty for a name that is not listed."""
        return self.changes(name).positions if self.changed(name) else torch.empty(0, dtype=torch.int64)

    def _parts(self, name: str, start: int, stop: int) -> Iterator[Changes]:
        """The changes in [start, stop) segment by segment, positions counted from `start`."""
        if not self.changed(name):
            return
        for i, piece in self._index.layout.pieces(self.parameters[name], start, stop):
            with self._lock:
                positions, xors = self._decoded(i)
            shift = piece.offset - piece.start  # position in the segment minus position in the parameter
            bounds = torch.tensor([max(start, piece.start), min(stop, piece.stop)]) + shift
            low, high = torch.searchsorted(positions, bounds).tolist()
            yield Changes(positions[low:high] - (shift + start), xors[low:high])

    def _decode(self, i: int) -> Changes:
        """All changes of segment `i`, positions counted from its begin."""
        layout, found = self._index.layout, self._index.codings[i]
        bits = unsigned(layout.dtype(i))
        coding, begin = found or ([0] * (4 + bits.itemsize), 0)
        with open(self.path, "rb") as file:
            file.seek(self._index.data + begin)
            data = file.read(sum(map(abs, coding[2:])))
        try:
            positions, xors = decode(layout.entries(i), bits, coding, data)
        except ValueError as error:
            raise ValueError(f"{self.path} is damaged: {error}") from error
        return Changes(torch.from_numpy(positions), torch.from_numpy(xors.view(f"i{xors.itemsize}")))

    def overlap(self, other: Delta) -> int:
        """Entries that both change."""
        names = [name for name in self.names if other.changed(name)]
        return sum(
            int(torch.isin(self.positions(n), other.positions(n), assume_unique=True).sum()) for n in names
        )

    def flip_(self, name: str, values: Tensor, start: int = 0) -> None:
        """Turn entries of a parameter from the base's into the tuned ones in place, or back.

        values: contiguous, on the CPU, in the base's dtype: entries of the parameter from `start` on.
        """
        for positions, xors in self._parts(name, start, start + values.numel()):
            xor_(values, positions, xors)

    def tuned(self, name: str, base: Tensor) -> Tensor:
        """The tuned parameter, bit for bit, in memory of its own.

        base: the parameter of the base, in its file's dtype; ValueError for another shape or dtype.
        """
        if name not in self.parameters:
            raise ValueError(f"{self.path}: the base has no parameter {name}")
        known = self.parameters[name]
        if tuple(base.shape) != known.shape or base.dtype != known.dtype:
            raise ValueError(
                f"{self.path} changes {name} as {known.dtype}{list(known.shape)}, not as "
                f"{base.dtype}{list(base.shape)}: give the base in the dtype of its files (dtype='auto')"
            )
        result = base.detach().cpu().clone(memory_format=torch.contiguous_format)
        self.flip_(name, result)
        return result
