"""Where task vectors come from: delta files, and fine-tuned models read beside their base.

Either gives one tensor's part of its vector at a time: the entries that it changes where those are few, all
of them where they are many.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lota.models.pair import open_whole
from lota.models.provenance import PROMPT_SETTINGS, trained_prompts
from lota.models.tensor_files import is_delta
from lota.models.weights import WeightSource
from lota.share.delta.format import as_integers
from lota.share.delta.reader import Delta

SPARSE_BELOW = 1 / 3  # a listed entry takes three times the memory of one that is not (position and value)
SHOWN = 3


@dataclass(frozen=True)
class Entries:
    """One tensor's part of a task vector.

    positions: 1-D int64, ascending, of the changed entries; None: every entry is listed, changed or not.
    values: 1-D float32, tuned - base there. tuned: the tuned values there, in the base's dtype.
    changed: bool, which of the listed entries have other bits than the base's.
    """

    positions: Tensor | None
    values: Tensor
    tuned: Tensor
    changed: Tensor


class Vector(Protocol):
    """A task vector that is read tensor by tensor. prompts: how its run wrote them, None where not known."""

    id: str
    prompts: dict[str, Any]

    def entries(self, name: str, base: Tensor) -> Entries | None:
        """The part in the parameter `name`, whose base value is given; None where nothing changes."""
        ...


class DeltaVector:
    """A delta file, in the memory of its changed entries of one tensor."""

    def __init__(self, delta: Delta):
        self.delta, self.id = delta, str(delta.path)
        self.prompts = {name: delta.meta.get(name) for name in PROMPT_SETTINGS}

    def entries(self, name: str, base: Tensor) -> Entries | None:
        if not self.delta.changed(name):
            return None
        positions, xors = self.delta.changes(name)
        before = base.reshape(-1)[positions]
        tuned = (as_integers(before) ^ xors).view(base.dtype)
        changed = torch.ones(len(positions), dtype=torch.bool)
        return Entries(positions, tuned.float() - before.float(), tuned, changed)


class ModelVector:
    """A fine-tuned model on disk: Hugging Face folder, hub id or policy.pt."""

    def __init__(self, source: WeightSource):
        self.source, self.id = source, source.id
        self.prompts = trained_prompts(self.id)

    def entries(self, name: str, base: Tensor) -> Entries | None:
        before, after = base.reshape(-1), self.source.read(name).reshape(-1)
        if after.dtype == before.dtype and torch.equal(as_integers(after), as_integers(before)):
            return None
        values, tuned = after.float() - before.float(), after.to(base.dtype)
        changed = (values != 0) | (as_integers(tuned) != as_integers(before))
        n_changed = int(changed.sum())
        if n_changed == 0:
            return None
        if n_changed >= SPARSE_BELOW * changed.numel():
            return Entries(None, values, tuned, changed)
        positions = changed.nonzero().flatten()
        return Entries(positions, values[positions], tuned[positions], changed[positions])


def open_vectors(paths: Sequence[str | os.PathLike], base: WeightSource) -> tuple[list[Vector], str | None]:
    """The task vectors at `paths`, checked against the base, and the base's hash where delta files name it.

    Nothing but headers is read. Raises one ValueError with everything that does not fit.
    """
    vectors: list[Vector] = []
    problems: list[str] = []
    for path in paths:
        try:
            vectors.append(_open(path, base))
        except ValueError as error:
            problems.append(str(error))
    hashes = {v.id: v.delta.meta["base_hash"] for v in vectors if isinstance(v, DeltaVector)}
    if len(set(hashes.values())) > 1:
        named = ", ".join(f"{path} of {digest[:9]}" for path, digest in hashes.items())
        problems.append(f"the deltas are of different bases ({named}): merge those of one base")
    if problems:
        raise ValueError("\n".join(problems))
    return vectors, next(iter(hashes.values()), None)


def prompt_settings(vectors: Sequence[Vector]) -> dict[str, list[Any]]:
    """PROMPT_SETTINGS -> the values that the vectors' runs had, each once, where they are known."""
    return {
        name: list(dict.fromkeys(v.prompts[name] for v in vectors if v.prompts[name] is not None))
        for name in PROMPT_SETTINGS
    }


def _open(path: str | os.PathLike, base: WeightSource) -> Vector:
    """A delta file, or a folder with one and no model (RUN/epoch-1 unconverted), as such; else a model."""
    local = Path(path).expanduser()
    if local.is_dir() and not (local / "config.json").is_file() and (local / "delta.safetensors").is_file():
        local = local / "delta.safetensors"
    if not (local.is_file() and (local.suffix == ".safetensors" or is_delta(local))):
        return ModelVector(open_whole(base.id, path)[1])
    delta = Delta.open(local)
    taken = {name: (parameter.shape, parameter.dtype) for name, parameter in delta.parameters.items()}
    here = {name: (base.shape(name), base.dtype(name)) for name in base.names()}
    differing = [name for name in {**here, **taken} if taken.get(name) != here.get(name)]
    if differing:
        shown = [
            f"{name} ({_shown(taken.get(name))} there, {_shown(here.get(name))} in the base)"
            for name in differing[:SHOWN]
        ]
        raise ValueError(
            f"{path} was not taken from the base {base.id}; {len(differing)} parameters differ:"
            f" {', '.join(shown)}"
        )
    return DeltaVector(delta)


def _shown(parameter: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "none" if parameter is None else f"{str(parameter[1]).removeprefix('torch.')} {list(parameter[0])}"
