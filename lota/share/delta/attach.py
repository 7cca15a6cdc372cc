"""Deltas on a loaded model: attached, detached and switched in time proportional to the changed entries.

    sql, samsum = Delta.open("sql.safetensors"), Delta.open("samsum.safetensors")
    lota.attach(model, sql)      # bit for bit the model that learnt sql
    lota.switch(model, samsum)   # now the one that learnt samsum
    lota.detach(model)           # the base again, bit for bit

A delta keeps its changes on the model's device after its first use (6 bytes per entry in bf16). The entries
that it changes are compared, by `entry_checksum`, with those that it was taken of; if they differ, the model
stays as it was. So a second delta may come on top of a first one that changes other entries, and on no other
model.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from lota.models.policy import unwrapped
from lota.share.delta.format import as_integers, checksum_digits, common_dtype, entry_checksum
from lota.share.delta.reader import Delta

DeltaFile = Delta | str | os.PathLike[str]
Role = Literal["base", "tuned"]
_attached: weakref.WeakKeyDictionary[nn.Module, list[Delta]] = weakref.WeakKeyDictionary()


def attach(model: nn.Module, *deltas: DeltaFile) -> None:
    """Change the model's weights in place to those of the tuned model; of several deltas one after the other.

    The model: the deltas' base, in the dtype of its files or in one that holds all their values (bf16 files
    loaded as fp32), on any device. Deltas must change different entries. Raises ValueError, with the model as
    it was, for another model, a narrower dtype, and a delta that is attached or overlaps with one that is.
    """
    _bring_to(model, [*attached(model), *_open_all(deltas)])


def detach(model: nn.Module, *deltas: DeltaFile) -> None:
    """Undo `attach`, bit for bit, for these deltas or all. Raises ValueError for one that is not attached, or
    whose entries were changed by something else since.
    """
    present, unwanted = attached(model), _open_all(deltas)
    absent = [delta for delta in unwanted if delta not in present]
    if absent:
        there = ", ".join(str(delta.path) for delta in present) or "none"
        raise ValueError(f"{absent[0].path} is not attached to this model; attached: {there}")
    _bring_to(model, [delta for delta in present if unwanted and delta not in unwanted])


def switch(model: nn.Module, *deltas: DeltaFile) -> None:
    """Attach these deltas and detach all others; one that is attached already stays. Errors: as `attach`."""
    wanted = _open_all(deltas)
    stay = [delta for delta in attached(model) if delta in wanted]
    _bring_to(model, [*stay, *(delta for delta in wanted if delta not in stay)])


def attached(model: nn.Module) -> list[Delta]:
    """What is attached, in the order in which it was."""
    return list(_attached.get(model, ()))


def _open_all(deltas: Iterable[DeltaFile]) -> list[Delta]:
    return [delta if isinstance(delta, Delta) else Delta.open(delta) for delta in deltas]


@torch.no_grad()
def _bring_to(model: nn.Module, wanted: list[Delta]) -> None:
    """Bring the model from what is attached to `wanted`, or leave it as it was."""
    twice = next((delta for i, delta in enumerate(wanted) if delta in wanted[:i]), None)
    if twice is not None:
        raise ValueError(f"{twice.path} is attached already")
    parameters = {unwrapped(name): parameter for name, parameter in model.named_parameters()}
    now = attached(model)
    off = [delta for delta in now if delta not in wanted]
    on = [delta for delta in wanted if delta not in now]
    flipped: list[tuple[Delta, str]] = []
    try:
        for delta in off:
            _flip_all(delta, parameters, "tuned", now, flipped)
            now = [other for other in now if other != delta]
        for delta in on:
            _flip_all(delta, parameters, "base", now, flipped)
            now = [*now, delta]
    except BaseException:
        for delta, name in reversed(flipped):
            _flip(delta, name, parameters[name])
        raise
    _attached[model] = now


def _flip_all(
    delta: Delta,
    parameters: Mapping[str, Tensor],
    role: Role,
    now: list[Delta],
    flipped: list[tuple[Delta, str]],
) -> None:
    """Flip every parameter that a delta changes, noting each in `flipped`.

    Raises ValueError unless the entries were those of the delta's `role`. Each is read once: they are summed
    up as they are changed, and compared at the end.
    """
    changing = {name: _checked_parameter(delta, parameters, name) for name in delta.names}
    total = 0
    for number, name in enumerate(delta.parameters):
        if name in changing:
            before = _flip(delta, name, changing[name])
            if before is None:
                raise ValueError(_mismatch(delta, role, now))
            flipped.append((delta, name))
            total += entry_checksum(number, *before)
    if checksum_digits(total) != delta.meta[f"{role}_fingerprint"]:
        raise ValueError(_mismatch(delta, role, now))


def _flip(delta: Delta, name: str, parameter: Tensor) -> tuple[Tensor, Tensor] | None:
    """XOR the entries that the delta changes; returns (positions, what their bits were in the delta's dtype).

    None, with nothing done, if they hold values that the delta's dtype does not have.
    """
    whole = as_integers(parameter)  # gathered and scattered as integers, which torch can do for every dtype
    positions, xors = delta.changes_on(parameter.device, name)
    # (c,) bits in the model's dtype; the delta's may be narrower
    held = whole.index_select(0, positions)
    stored = held.view(parameter.dtype).to(delta.parameters[name].dtype)
    if not torch.equal(as_integers(stored.to(parameter.dtype)), held):
        return None
    bits = as_integers(stored)
    flipped = (bits ^ xors).view(stored.dtype).to(parameter.dtype)
    whole.index_copy_(0, positions, as_integers(flipped))
    return positions, bits


def _mismatch(delta: Delta, role: Role, now: list[Delta]) -> str:
    """Why a delta's entries are not those of its role."""
    if role == "tuned":
        return (
            f"entries that {delta.path} changed were changed again since, by training or another tool, which "
            "cannot be undone: load the base again"
        )
    for other in now:
        if shared := delta.overlap(other):
            return f"{delta.path} changes {shared:,} entries of {other.path}, which is attached"
    return (
        f"this model is not the base of {delta.path}: the entries that it changes have other values than in "
        f"{delta.meta['base']}"
    )


def _checked_parameter(delta: Delta, parameters: Mapping[str, Tensor], name: str) -> Tensor:
    """The model's parameter. Raises ValueError if it is not one that the delta can change."""
    known = delta.parameters[name]
    found = parameters.get(name)
    if found is None or tuple(found.shape) != known.shape:
        what = "has no such parameter" if found is None else f"has it as {list(found.shape)}"
        raise ValueError(
            f"{delta.path} changes {name} {list(known.shape)}; the model {what}. Is it the base?"
        )
    if found.is_meta or not found.is_contiguous():
        raise ValueError(f"{delta.path} changes {name}, which the model does not hold as one piece of memory")
    if common_dtype(found.dtype, known.dtype) != found.dtype:
        raise ValueError(
            f"{delta.path} changes {name} in {known.dtype}, which the model's {found.dtype} cannot hold: "
            f"load it with dtype={known.dtype}, or load what `python -m lota.delta apply` writes in any dtype"
        )
    return found
