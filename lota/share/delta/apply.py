"""A model's folder + a delta file -> the tuned model's folder, or back: bit for bit, in little memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from lota.models.hashing import StreamingHash, content_hash
from lota.models.provenance import PROMPT_SETTINGS
from lota.models.weights import WeightSource, open_weights
from lota.share.delta.index import SEGMENT
from lota.share.delta.reader import Delta
from lota.share.hf_folder import check_replaceable, new_model_files
from lota.share.hf_weights import check_shard_size, open_folder, write_like


def apply(
    model: str | os.PathLike[str],
    delta: str | os.PathLike[str],
    out: str | os.PathLike[str],
    max_shard_size: str = "2GB",
) -> Path:
    """Write the folder `out`: the base `model` (folder or hub id) with the delta's changes.

    First it is checked that the file is whole and that the model is its base, to the last bit; what was
    written is read again before it gets its name. Raises ValueError, and leaves nothing, if that fails.
    """
    return _write(model, Delta.open(delta), out, ("base", "tuned"), max_shard_size)


def revert(
    model: str | os.PathLike[str],
    delta: str | os.PathLike[str],
    out: str | os.PathLike[str],
    max_shard_size: str = "2GB",
) -> Path:
    """Write the folder `out`: the base, from the tuned `model`; otherwise as `apply`."""
    return _write(model, Delta.open(delta), out, ("tuned", "base"), max_shard_size)


def verify(base: str | os.PathLike[str], delta: str | os.PathLike[str]) -> dict[str, Any]:
    """Check the file, that `base` is its base, and that the two give the tuned model; returns the metadata.

    Raises ValueError naming what does not hold.
    """
    found = Delta.open(delta)
    source = open_weights(base)
    check_model(source, found, "base")
    if flipped_hash(source, found) != found.meta["tuned_hash"]:
        raise ValueError(f"{found.path} does not turn {source.id} into the model that it was taken of")
    return found.meta


def flipped_hash(source: WeightSource, delta: Delta) -> str:
    """The content hash that the model would have with the delta's changes, or with them undone."""
    digest = StreamingHash(source, source.names(), SEGMENT)
    for name in sorted(source.names()):
        for start in range(0, source.numel(name), SEGMENT):
            stop = min(start + SEGMENT, source.numel(name))
            part = source.read_flat(name, start, stop)
            delta.flip_(name, part, start)
            digest.put(name, start, stop, part)
    return digest.finish()


def check_model(source: WeightSource, delta: Delta, role: str) -> None:
    """Raise ValueError unless the model is the delta's `role` (base or tuned), to the last bit."""
    other = {"base": "tuned", "tuned": "base"}[role]
    found = content_hash(source)
    if found == delta.meta[f"{role}_hash"]:
        return
    if found == delta.meta[f"{other}_hash"]:
        raise ValueError(f"{source.id} is not the {role} but the {other} model of {delta.path}")
    raise ValueError(
        f"{source.id} is not the {role} model of {delta.path}: its weights have the hash {found[:12]}, not "
        f"{delta.meta[f'{role}_hash'][:12]} (it was taken between {delta.meta['base']} and "
        f"{delta.meta['tuned']})"
    )


def _write(
    model: str | os.PathLike[str],
    delta: Delta,
    out: str | os.PathLike[str],
    roles: tuple[str, str],
    max_shard_size: str,
) -> Path:
    """roles: what `model` must be, and what is written."""
    folder = Path(out).expanduser().resolve()
    check_shard_size(max_shard_size)
    check_replaceable("out", folder, model)
    source, structure = open_folder(model)
    check_model(source, delta, roles[0])

    def flipped(name: str) -> Tensor:
        value = source.read(name)
        delta.flip_(name, value)
        return value

    record = {roles[0]: str(model), "delta": str(delta.path), "task": delta.meta.get("task")}
    if roles[1] == "tuned":
        # evaluation renders and cuts prompts as the run did
        record |= {name: delta.meta.get(name) for name in PROMPT_SETTINGS}
    with new_model_files("out", folder, model, record) as staged:
        write_like(str(model), source, structure, staged, flipped, max_shard_size)
        written = content_hash(open_weights(staged, structure))
        if written != delta.meta[f"{roles[1]}_hash"]:
            raise ValueError(
                f"{folder} was not written: what came out is not the {roles[1]} model of {delta.path}"
            )
    return folder
