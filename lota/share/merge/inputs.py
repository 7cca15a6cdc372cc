"""Where task vectors come from: delta files, and fine-tuned models read beside their base.

Either gives one tensor's part of its vector at a time: the entries that it changes if those are few, all of
them if they are many.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lota.models.hub import DELTA_FILE, fetch, hub_file, is_hub_reference, local_copy
from lota.models.pair import open_whole, same_place
from lota.models.provenance import PROMPT_SETTINGS, trained_prompts
from lota.models.tensor_files import is_delta
from lota.models.weights import WeightSource
from lota.share.delta.format import as_integers
from lota.share.delta.reader import Delta
from lota.utils import Problems

SPARSE_BELOW = 1 / 3  # a listed entry takes three times the memory of one that is not (position and value)
SHOWN = 3


@dataclass(frozen=True)
class Entries:
    """One tensor's part of a task vector; (n,) are the entries that it lists."""

    positions: Tensor | None  # (n,) int64, ascending, of the changed entries; None: every entry is listed
    values: Tensor  # (n,) float32, tuned - base
    tuned: Tensor  # (n,) the tuned values, in the base's dtype
    changed: Tensor  # (n,) bool, which of the listed entries have other bits than the base's

    def places(self, positions: Tensor | None) -> Tensor | slice:
        """Where these entries stand among `positions`, which list at least as much (None: everything)."""
        if self.positions is None:
            return slice(None)
        return self.positions if positions is None else torch.searchsorted(positions, self.positions)


class TaskVector(Protocol):
    """A task vector that is read tensor by tensor."""

    id: str
    prompts: dict[str, Any]  # PROMPT_SETTINGS of its run, None if not known

    def entries(self, name: str, base: Tensor) -> Entries | None:
        """The part in the parameter `name`, whose base value is given; None if nothing changes."""
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
        # in float32, or in the bits of the base's dtype, to which the tuned value is rounded
        values, tuned = after.float() - before.float(), after.to(base.dtype)
        changed = (values != 0) | (as_integers(tuned) != as_integers(before))
        n_changed = int(changed.sum())
        if n_changed == 0:
            return None
        if n_changed >= SPARSE_BELOW * changed.numel():
            return Entries(None, values, tuned, changed)
        positions = changed.nonzero().flatten()
        return Entries(positions, values[positions], tuned[positions], changed[positions])


def open_vectors(
    paths: Sequence[str | os.PathLike[str]], base: WeightSource
) -> tuple[list[TaskVector], str | None]:
    """The task vectors at `paths`, checked against the base, and the base's hash if delta files name it.

    Nothing but headers is read. Raises one ValueError with everything that does not fit.
    """
    problems = Problems()
    problems.attempt(_refuse_twice, paths, base)
    vectors = [problems.attempt(_open_vector, path, base) for path in paths]
    opened = [vector for vector in vectors if vector is not None]
    hashes = {v.id: v.delta.meta["base_hash"] for v in opened if isinstance(v, DeltaVector)}
    if len(set(hashes.values())) > 1:
        named = ", ".join(f"{path} of {digest[:9]}" for path, digest in hashes.items())
        problems.found.append(f"the deltas are of different bases ({named}): merge those of one base")
    deltas = [vector for vector in opened if isinstance(vector, DeltaVector)]
    for i, vector in enumerate(deltas):
        if not vector.delta.names:
            problems.found.append(f"{vector.id} changes nothing: leave it out")
        copies = [other.id for other in deltas[:i] if other.delta == vector.delta and other.id != vector.id]
        if copies:
            problems.found.append(f"{copies[0]} and {vector.id} are copies of one delta: name it once")
    problems.refuse()
    return opened, next(iter(hashes.values()), None)


def prompt_settings(vectors: Sequence[TaskVector]) -> dict[str, list[Any]]:
    """PROMPT_SETTINGS -> the values that the vectors' runs had, each once, as far as they are known."""
    return {
        name: list(dict.fromkeys(v.prompts[name] for v in vectors if v.prompts[name] is not None))
        for name in PROMPT_SETTINGS
    }


def _refuse_twice(paths: Sequence[str | os.PathLike[str]], base: WeightSource) -> None:
    """Raise ValueError for a path that is named twice, or that is the base."""
    for i, path in enumerate(paths):
        if any(same_place(path, other) for other in paths[:i]):
            raise ValueError(f"{path} is named twice: its changes would count double; give it a weight of 2")
        if same_place(path, base.id):
            raise ValueError(f"{path} is the base itself: name what was trained from it")


def _open_vector(path: str | os.PathLike[str], base: WeightSource) -> TaskVector:
    """A delta file, or a folder or repository of the hub with one and no model, as such; else a model."""
    local = Path(path).expanduser()
    if local.is_dir() and not (local / "config.json").is_file() and (local / "delta.safetensors").is_file():
        local = local / "delta.safetensors"
    if not local.exists():
        local = _fetched_delta(path) or local
    if not (local.is_file() and (local.suffix == ".safetensors" or is_delta(local))):
        return ModelVector(open_whole(base.id, path)[1])
    delta = Delta.open(local)
    taken = {name: _form(p.dtype, p.shape) for name, p in delta.parameters.items()}
    here = {name: _form(base.dtype(name), base.shape(name)) for name in base.names()}
    differing = [
        f"{name} ({taken.get(name, 'none')} there, {here.get(name, 'none')} in the base)"
        for name in {**here, **taken}
        if taken.get(name) != here.get(name)
    ]
    if differing:
        raise ValueError(
            f"{path} was not taken from the base {base.id}; {len(differing)} parameters differ:"
            f" {', '.join(differing[:SHOWN])}"
        )
    return DeltaVector(delta)


def _fetched_delta(path: str | os.PathLike[str]) -> Path | None:
    """The delta in a repository of the hub that holds one and no model, or that `hub:` names; else None."""
    if is_hub_reference(path):
        return local_copy(path, DELTA_FILE)
    named = hub_file(path, DELTA_FILE)
    if named is None:
        return None
    with contextlib.suppress(
        ValueError
    ):  # what is wrong with a repository is told when it is opened as a model
        fetch(replace(named, file="config.json"))
        return None
    with contextlib.suppress(ValueError):
        return fetch(named)
    return None


def _form(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
