"""Merge task vectors into their base: a Hugging Face folder, tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lota.models.hashing import content_hash
from lota.models.provenance import MERGE_RECORD
from lota.models.scope import meta_model
from lota.models.tensor_files import checkpoint_files
from lota.models.weights import WeightSource, open_weights
from lota.share.hf_weights import check_shard_size, check_writable, write_like
from lota.share.merge.inputs import Entries, Vector, open_vectors, prompt_settings
from lota.share.merge.rules import Rule
from lota.share.merge.statistics import Statistics
from lota.system import versions
from lota.utils import atomic_path, write_json


@dataclass
class Merged:
    """What was written. shared: entries that several vectors change; exact: `sum` where there are none.

    prompts: settings by which the inputs' runs wrote prompts -> the values that they had.
    """

    folder: Path
    statistics: Statistics
    shared: int
    exact: bool
    prompts: dict[str, list[Any]]


@dataclass
class Merge:
    """A merge whose inputs fit together; made by `plan_merge`, which reads no weights."""

    base: str
    out: Path
    rule: Rule
    source: WeightSource
    model: PreTrainedModel
    vectors: list[Vector]
    base_hash: str | None
    max_shard_size: str

    @property
    def entries(self) -> int:
        return sum(self.source.numel(name) for name in self.source.names())

    def run(self, progress: Callable[[int], object] | None = None) -> Merged:
        """Write the folder, whole or not at all, and `merge.json` in it.

        progress: called with numbers of entries that add up to `entries`. Raises ValueError when the deltas'
        base has other weights than this one, OSError when the disk is full; `out` then stays as it was.
        """
        digest = content_hash(self.source) if self.base_hash is not None else None
        if digest != self.base_hash:
            raise ValueError(
                f"--base {self.base} is not what the deltas were taken from: its weights hash to {digest[:9]}"
                f" and theirs to {self.base_hash[:9]}"
            )
        pass_ = _Pass(self, progress or (lambda entries: None))
        with atomic_path(self.out) as folder:
            folder.mkdir()
            write_like(self.base, self.source, self.model, folder, pass_.value_of, self.max_shard_size)
            exact = self.rule.method == "sum" and pass_.shared == 0
            prompts = prompt_settings(self.vectors)
            merged = Merged(self.out, pass_.statistics, pass_.shared, exact, prompts)
            write_json(folder / MERGE_RECORD, self._record(merged))
        return merged

    def _record(self, merged: Merged) -> dict[str, Any]:
        return {
            "base": self.base,
            "base_hash": self.base_hash,
            "rule": asdict(self.rule),
            "shared": merged.shared,
            "exact": merged.exact,
            # evaluation renders and cuts prompts as the runs did, where they did alike
            **{name: found[0] if len(found) == 1 else None for name, found in merged.prompts.items()},
            **merged.statistics.to_dict(),
            "versions": versions(torch.device("cpu")),
        }


def plan_merge(
    base: str | os.PathLike,
    paths: Sequence[str | os.PathLike],
    rule: Rule,
    out: str | os.PathLike,
    max_shard_size: str = "2GB",
) -> Merge:
    """Open everything and check that it fits together; no weights are read, nothing is written.

    base: Hugging Face folder or hub id. paths: delta files, folders, hub ids or policy.pt's, one per weight
    of the rule. Raises one ValueError with everything that does not fit.
    """
    folder = Path(out).expanduser().resolve()
    problems = []
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        problems.append(f"--out {out} exists and is not empty: name a new folder")
    source = vectors = digest = None
    try:
        check_shard_size(max_shard_size)
        source, model = _open_base(base)
        vectors, digest = open_vectors(paths, source)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return Merge(str(base), folder, rule, source, model, vectors, digest, max_shard_size)


def _open_base(base: str | os.PathLike) -> tuple[WeightSource, PreTrainedModel]:
    _, folder = checkpoint_files(base)
    if folder is None or not (folder / "config.json").is_file():
        raise ValueError(f"--base {base} has no config.json: give the Hugging Face folder or hub id")
    model = meta_model(folder)
    source = open_weights(base, model)
    absent = [name for name, _ in model.named_parameters() if name not in source]
    quantized = [name for name in source.names() if not source.dtype(name).is_floating_point]
    if absent:
        raise ValueError(f"--base {base} is incomplete: it lacks {len(absent)} weights, {absent[0]} first")
    if quantized:
        raise ValueError(
            f"--base {base}: {quantized[0]} is {source.dtype(quantized[0])}; give unquantized weights"
        )
    check_writable(source, model)
    return source, model


class _Pass:
    """Parameter by parameter: read, count, merge."""

    def __init__(self, merge: Merge, progress: Callable[[int], object]):
        self.merge, self.progress = merge, progress
        self.statistics = Statistics([vector.id for vector in merge.vectors])
        self.generator = merge.rule.generator()
        self.shared = 0

    def value_of(self, name: str) -> Tensor:
        """The merged parameter, in the base's dtype."""
        base = self.merge.source.read(name)
        parts = [vector.entries(name, base) for vector in self.merge.vectors]
        self.progress(base.numel())
        if all(part is None for part in parts):
            self.statistics.skip(base.numel())
            self.merge.rule.skip(self.generator, base.numel())
            return base
        positions, vectors, touches = align(parts, base.numel())
        self.statistics.add(vectors, base.numel())
        self.shared += int((touches > 1).sum())
        change = self.merge.rule.merge(vectors, self.generator, base.numel(), positions)
        merged = add(base, change, positions)
        if self.merge.rule.method == "sum":
            put_sole(merged, parts, touches, positions)
        return merged


def align(parts: Sequence[Entries | None], numel: int) -> tuple[Tensor | None, list[Tensor], Tensor]:
    """(positions, a float32 value of each part for each of them, how many parts change each).

    positions: the union of what the parts list, ascending; None where one lists everything.
    """
    listed = [part.positions for part in parts if part is not None]
    positions = None if any(one is None for one in listed) else torch.unique(torch.cat(listed))
    size = numel if positions is None else positions.numel()
    vectors, touches = [], torch.zeros(size, dtype=torch.int16)
    for part in parts:
        if part is None:
            vectors.append(torch.zeros(size))
            continue
        where = places(part, positions)
        touches[where] += part.changed.to(torch.int16)
        if part.positions is None:  # it lists everything, in order
            vectors.append(part.values)
        else:
            vectors.append(torch.zeros(size))
            vectors[-1][where] = part.values
    return positions, vectors, touches


def places(part: Entries, positions: Tensor | None) -> Tensor | slice:
    """Where the entries of `part` stand among `positions`."""
    if part.positions is None:
        return slice(None)
    return part.positions if positions is None else torch.searchsorted(positions, part.positions)


def add(base: Tensor, change: Tensor, positions: Tensor | None) -> Tensor:
    """base + change in float32, rounded once to the base's dtype; where the change is 0, the base's bits."""
    merged = base.clone()
    flat = merged.reshape(-1)
    before = flat if positions is None else flat[positions]
    after = torch.where(change == 0, before, (before.float() + change).to(base.dtype))
    flat[slice(None) if positions is None else positions] = after
    return merged


def put_sole(
    merged: Tensor, parts: Sequence[Entries | None], touches: Tensor, positions: Tensor | None
) -> None:
    """Give every entry that one vector alone changes that vector's tuned value, bit for bit.

    base + (tuned - base) can miss it: differences of floating-point numbers are rounded.
    """
    flat = merged.reshape(-1)
    for part in parts:
        if part is not None:
            where = places(part, positions)
            sole = part.changed & (touches[where] == 1)
            own = sole.nonzero().flatten()
            flat[own if part.positions is None else part.positions[own]] = part.tuned[own]
