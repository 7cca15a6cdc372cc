"""A base and a tuned model on disk -> a delta file, in the memory of a few segments."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lota.masks import Mask
from lota.models.chunks import in_order
from lota.models.hashing import StreamingHash
from lota.models.pair import open_whole
from lota.models.provenance import run_settings, trained_prompts
from lota.models.scope import meta_model
from lota.models.tensor_files import config_folder
from lota.models.weights import WeightSource, refuse_not_finite
from lota.places import holding
from lota.share.delta.codec import Array, Coding, encode
from lota.share.delta.format import check_target, checksum_digits, entry_checksum, write_delta
from lota.share.delta.index import SEGMENT, Parameter, Piece, Segment, segments
from lota.share.hf_weights import check_writable
from lota.storage import naming


class Tuned(Protocol):
    """What a tuned model is read from: `WeightSource`, a model on disk, or `Overlay`, a base with changes."""

    id: str

    def dtype(self, name: str) -> torch.dtype: ...

    def read_flat(self, name: str, start: int, stop: int) -> Tensor: ...


def extract(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    mask: Mask | str | os.PathLike[str] | None = None,
    task: str | None = None,
    model: str | os.PathLike[str] | None = None,
    tuned_id: str | None = None,
) -> dict[str, Any]:
    """Write the changes from base to tuned as a delta file; returns its metadata.

    base, tuned: Hugging Face folders, hub ids or policy.pt files. The tuned model is taken as the converter
    would write it, in the dtypes of the base's files. mask: nothing may have changed outside of it. task: a
    name for the metadata, by default the data sets of its run. model: folder whose config gives the names,
    if neither side has one. tuned_id: what the metadata call the tuned model, by default its path.
    Raises ValueError for models that do not belong together, a grown vocabulary, changes outside the mask, an
    `out` that is something else than a delta file, or a base folder that could not be written as it was read.
    """
    out = Path(out).expanduser()
    check_target(out)
    mask = mask if mask is None or isinstance(mask, Mask) else Mask.load(mask)
    before, after = open_whole(base, tuned, model)
    if folder := config_folder(base):
        check_writable(before, meta_model(folder))  # else nothing could apply the file
    run = {
        "tuned": tuned_id or after.id,
        "task": task or ",".join(run_settings(Path(tuned)).datasets) or None,
        **trained_prompts(tuned),
    }
    return write_changes(before, after, out, run, mask)


def write_changes(
    base: WeightSource,
    tuned: Tuned,
    out: Path,
    meta: Mapping[str, Any],
    mask: Mask | None = None,
    tuned_hash: str | None = None,
) -> dict[str, Any]:
    """Write what differs between two models of the same names and shapes; returns the file's metadata.

    meta: what the metadata say besides what is counted here. tuned_hash: which content hash the tuned model
    must have. Errors: as `extract`.
    """
    check_target(out)
    comparison = _Comparison(base, tuned, mask)
    with holding(out), naming(out), TemporaryFile(dir=out.parent) as data:
        check_target(out)
        codings = []
        for _, (coding, code) in in_order(comparison.code, segments(comparison.parameters)):
            codings.append(coding)
            data.write(code)
        comparison.check_mask()
        parameters = [replace(p, changed=comparison.changed[p.name]) for p in comparison.parameters]
        whole = {"base": base.id, **meta, **comparison.metadata()}
        if tuned_hash is not None and whole["tuned_hash"] != tuned_hash:
            raise ValueError(
                f"{tuned.id} does not give the model that it names: it is damaged; copy it again"
            )
        return write_delta(out, parameters, codings, data, whole)


class _Comparison:
    """Base and tuned model, compared segment by segment from several threads, and what was counted."""

    def __init__(self, base: WeightSource, tuned: Tuned, mask: Mask | None):
        self.base, self.tuned, self.mask = base, tuned, mask
        names = sorted(base.names())
        if mask is not None:
            mask.check({name: base.shape(name) for name in names})
        self.parameters = [Parameter(name, base.dtype(name), base.shape(name)) for name in names]
        self.number = {name: i for i, name in enumerate(names)}
        # both of what is put in, which has the base's names, shapes and dtypes
        self.hashes = [StreamingHash(base, names, SEGMENT) for _ in ("base", "tuned")]
        self.changed: Counter[str] = Counter()  # parameter -> changed entries
        self.outside: Counter[str] = Counter()  # parameter -> those of them that the mask does not keep
        self.checksums = [0, 0]  # `entry_checksum`, of the changed entries in the base and in the tuned model
        self._lock = threading.Lock()  # of these three

    def code(self, segment: Segment) -> tuple[Coding, bytes]:
        """Read a segment of both models, hash it, count and code what differs."""
        # 1. bit patterns: [base or tuned, entry of the segment]
        sides = np.empty((2, segment.n), segment.unsigned)
        for piece in segment.pieces:
            for side, part, digest in zip(sides, self._read(piece), self.hashes, strict=True):
                digest.put(piece.name, piece.start, piece.stop, part)
                side[piece.offset :][: len(part)] = part.view(torch.uint8).numpy().view(segment.unsigned)
        # 2. changed entries: positions (c,), their bits (2, c)
        positions = np.flatnonzero(sides[0] != sides[1])
        bits = sides[:, positions]
        # 3. per parameter: its changed entries are [low, high) of the segment's
        for piece in segment.pieces:
            low, high = np.searchsorted(positions, [piece.offset, piece.offset + piece.stop - piece.start])
            self._count(piece.name, positions[low:high] - piece.offset + piece.start, bits[:, low:high])
        return encode(segment.n, positions, bits[0] ^ bits[1])

    def _read(self, piece: Piece) -> tuple[Tensor, Tensor]:
        """A piece of both models, of the tuned one as the converter would write it: in the base's dtype."""
        base = self.base.read_flat(piece.name, piece.start, piece.stop)
        tuned = self.tuned.read_flat(piece.name, piece.start, piece.stop).to(base.dtype)
        refuse_not_finite(base, piece.name, self.base.id)
        refuse_not_finite(tuned, piece.name, self.tuned.id)
        return base, tuned

    def _count(self, name: str, positions: Array, bits: Array) -> None:
        """Count entries of a parameter that changed. positions: (c,) in it, flattened; bits: (2, c)."""
        if self.mask is None:
            kept = len(positions)
        elif name in self.mask:
            packed = self.mask.bits[name].numpy()  # entry i is bit 7 - i % 8 of byte i // 8
            kept = int((packed[positions >> 3] >> (7 - (positions & 7)) & 1).sum())
        else:
            kept = 0
        places, signed = torch.from_numpy(positions), torch.from_numpy(bits.view(f"i{bits.itemsize}"))
        sums = [entry_checksum(self.number[name], places, side) for side in signed]
        with self._lock:
            self.changed[name] += len(positions)
            self.outside[name] += len(positions) - kept
            self.checksums = [total + part for total, part in zip(self.checksums, sums, strict=True)]

    def check_mask(self) -> None:
        """Raise ValueError if entries outside the mask changed."""
        if not self.outside.total():
            return
        name, count = self.outside.most_common(1)[0]
        why = "give the mask it was trained with, or none"
        if any(self.tuned.dtype(p.name).itemsize < p.dtype.itemsize for p in self.parameters):
            why = (
                "it is stored in a narrower dtype than the base: train with model.policy_dtype as the base's"
            )
        raise ValueError(
            f"{self.tuned.id}: {self.outside.total():,} entries changed outside the mask, most of them "
            f"({count:,}) in {name}; {why}"
        )

    def metadata(self) -> dict[str, Any]:
        """What the file says of both models, once all segments are counted."""
        density = self.changed.total() / self.base.n_entries if self.mask is None else self.mask.density
        return {
            "base_hash": self.hashes[0].finish(),
            "tuned_hash": self.hashes[1].finish(),
            "base_fingerprint": checksum_digits(self.checksums[0]),
            "tuned_fingerprint": checksum_digits(self.checksums[1]),
            "dtype": str(self.base.main_dtype).removeprefix("torch."),
            "sparsity": round(1 - density, 12),
            "kept": None if self.mask is None else self.mask.n_kept,
        }
