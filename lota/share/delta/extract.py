"""A base and a tuned model on disk -> a delta file, in the memory of a few segments."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lota.masks import Mask
from lota.models.chunks import in_order, worker_count
from lota.models.hashing import StreamingHash
from lota.models.pair import open_whole
from lota.models.provenance import run_settings, trained_prompts
from lota.models.weights import WeightSource
from lota.share.delta import format as container
from lota.share.delta.codec import Row, encode
from lota.share.delta.format import SEGMENT, Parameter, Piece, Segment, as_hex, fingerprint, segments, weight


class InDtypesOf:
    """A tuned model as the converter would write it: each parameter in the dtype that the base's file has."""

    def __init__(self, base: WeightSource, tuned: WeightSource):
        self._base, self._tuned = base, tuned
        self.id, self.names, self.shape, self.numel, self.dtype = (
            tuned.id, base.names, base.shape, base.numel, base.dtype,
        )  # fmt: skip

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        return self._tuned.read_flat(name, start, stop).to(self._base.dtype(name))


class Coded(NamedTuple):
    """A coded segment. changed: entries by parameter; outside: those of them that the mask does not keep;
    sums: fingerprints (lota/delta/bits.py) of the changed entries in base and tuned model.
    """

    row: Row
    data: bytes
    changed: dict[str, int]
    outside: dict[str, int]
    sums: tuple[int, int]


def extract(
    base: str | os.PathLike,
    tuned: str | os.PathLike,
    out: str | os.PathLike,
    *,
    mask: Mask | str | os.PathLike | None = None,
    task: str | None = None,
    model: str | os.PathLike | None = None,
    tuned_id: str | None = None,
) -> dict[str, Any]:
    """Write the changes from base to tuned as a delta file; returns its metadata.

    base, tuned: Hugging Face folders, hub ids or policy.pt files. The tuned model is taken as the converter
    would write it, in the dtypes of the base's files. mask: nothing may have changed outside of it. task: a
    name for the metadata, by default the data sets of its run. model: folder whose config gives the names,
    where neither side has one. tuned_id: what the metadata call the tuned model, by default its path.
    Raises ValueError for models that do not belong together, a grown vocabulary, changes outside the mask, or
    an `out` that is something else than a delta file.
    """
    out = Path(out).expanduser()
    container.check_target(out)
    mask = Mask.load(mask) if isinstance(mask, str | os.PathLike) else mask
    before, after = open_whole(base, tuned, model)
    encoder = _Encoder(before, after, mask)
    meta = {
        "base": before.id,
        "tuned": tuned_id or after.id,
        "task": task or ",".join(run_settings(Path(tuned)).datasets) or None,
        **trained_prompts(tuned),
    }
    return container.write(out, encoder.parameters, encoder.coded(), lambda: encoder.finish(meta))


class _Encoder:
    def __init__(self, base: WeightSource, tuned: WeightSource, mask: Mask | None):
        self.base, self.tuned, self.mask = base, InDtypesOf(base, tuned), mask
        self._narrow = [
            name for name in base.names() if tuned.dtype(name).itemsize < base.dtype(name).itemsize
        ]
        if mask is not None:
            mask.check({name: base.shape(name) for name in base.names()})
        names = sorted(base.names())
        self.parameters = [Parameter(name, base.dtype(name), base.shape(name)) for name in names]
        self.hashes = [StreamingHash(source, names, SEGMENT) for source in (self.base, self.tuned)]
        self._order = {name: i for i, name in enumerate(names)}
        self.changed: Counter[str] = Counter()
        self.outside: Counter[str] = Counter()
        self.sums = (0, 0)

    def coded(self) -> Iterator[tuple[Row, bytes]]:
        """A pair per segment, a few of them worked on at a time."""
        with ThreadPoolExecutor(worker_count()) as pool:
            for _, done in in_order(pool, self._code, segments(self.parameters)):
                self.changed.update(done.changed)
                self.outside.update(done.outside)
                self.sums = (self.sums[0] + done.sums[0], self.sums[1] + done.sums[1])
                yield done.row, done.data

    def _code(self, segment: Segment) -> Coded:
        sides = np.empty((2, segment.n), segment.unsigned)
        for piece in segment.pieces:
            for bits, source, digest in zip(sides, (self.base, self.tuned), self.hashes, strict=True):
                part = source.read_flat(*piece[:3])
                digest.put(*piece[:3], part)
                values = part.view(torch.uint8).numpy().view(segment.unsigned)
                bits[piece.offset : piece.offset + len(values)] = values
        positions = np.flatnonzero(sides[0] != sides[1])
        listed = sides[:, positions]
        row, data = encode(segment.n, positions, listed[0] ^ listed[1])
        changed, outside, sums = {}, {}, [0, 0]
        for piece in segment.pieces:
            low, high = np.searchsorted(positions, [piece.offset, piece.offset + piece.stop - piece.start])
            changed[piece.name] = int(high - low)
            own = positions[low:high] - piece.offset
            for i, bits in enumerate(listed[:, low:high]):
                sums[i] += self._fingerprint(piece, own, bits)
            if self.mask is not None:
                outside[piece.name] = self._outside(piece, own)
        return Coded(row, data, changed, outside, tuple(sums))

    def _fingerprint(self, piece: Piece, positions: np.ndarray, bits: np.ndarray) -> int:
        signed = torch.from_numpy(bits.view(f"i{bits.itemsize}"))
        place = torch.from_numpy(positions + piece.start)
        return weight(self._order[piece.name]) * fingerprint(place, signed)

    def _outside(self, piece: Piece, positions: np.ndarray) -> int:
        if piece.name not in self.mask:
            return len(positions)
        packed = self.mask.bits[piece.name].numpy()[piece.start // 8 : (piece.stop + 7) // 8]
        return len(positions) - int(np.unpackbits(packed)[positions].sum(dtype=np.int64))

    def finish(self, meta: dict[str, Any]) -> tuple[dict[str, int], dict[str, Any]]:
        """What `container.write` asks for after the last segment."""
        if self.outside.total():
            self._refuse_outside()
        kept, sparsity = None, 1 - self.changed.total() / sum(p.numel for p in self.parameters)
        if self.mask is not None:
            kept, sparsity = self.mask.n_kept, 1 - self.mask.density
        entries: Counter[str] = Counter()
        for parameter in self.parameters:
            entries[str(parameter.dtype).removeprefix("torch.")] += parameter.numel
        base_hash, tuned_hash = (digest.finish() for digest in self.hashes)
        return self.changed, {
            **meta,
            "base_hash": base_hash,
            "tuned_hash": tuned_hash,
            "base_fingerprint": as_hex(self.sums[0]),
            "tuned_fingerprint": as_hex(self.sums[1]),
            "dtype": entries.most_common(1)[0][0],
            "sparsity": round(sparsity, 12),
            "kept": kept,
        }

    def _refuse_outside(self) -> None:
        name, count = self.outside.most_common(1)[0]
        why = "give the mask it was trained with, or none"
        if self._narrow:
            why = (
                "it is stored in a narrower dtype than the base: train with the base's as model.policy_dtype"
            )
        raise ValueError(
            f"{self.tuned.id}: {self.outside.total():,} entries changed outside the mask, most of them "
            f"({count:,}) in {name}; {why}"
        )
