"""Deltas on a loaded model: attached, detached and switched in time proportional to the changed entries.

    sql, samsum = Delta.open("sql.safetensors"), Delta.open("samsum.safetensors")
    lota.attach(model, sql)      # bit for bit the model that learnt sql
    lota.switch(model, samsum)   # now the one that learnt samsum
    lota.detach(model)           # the base again, bit for bit

A delta keeps its changes on the model's device after its first use (6 bytes per entry in bf16). Before
anything is changed, the entries that it changes are compared, by a fingerprint, with those that it was taken
of; so a second delta may come on top of a first one that changes other entries, and on no other model.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lota.models.policy import unwrapped
from lota.share.delta.format import as_hex, as_integers, fingerprint, weight
from lota.share.delta.reader import Delta

_attached: weakref.WeakKeyDictionary[nn.Module, list[Delta]] = weakref.WeakKeyDictionary()


def attach(model: nn.Module, *deltas: Delta | str | os.PathLike) -> None:
    """Change the model's weights in place to those of the tuned model; of several deltas one after the other.

    The model: the deltas' base, in the dtype of its files or in one that holds all their values (bf16 files
    loaded as fp32), on any device. Deltas must change different entries. Raises ValueError, with the model as
    it was, for another model, a narrower dtype, and a delta that is attached or overlaps with one that is.
    """
    _change(model, [*attached(model), *_opened(deltas)])


def detach(model: nn.Module, *deltas: Delta | str | os.PathLike) -> None:
    """Undo `attach`, bit for bit, for these deltas or all. Raises ValueError for one that is not attached, or
    whose entries were changed by something else since.
    """
    present, unwanted = attached(model), _opened(deltas)
    absent = [delta for delta in unwanted if not _among(delta, present)]
    if absent:
        there = ", ".join(str(delta.path) for delta in present) or "none"
        raise ValueError(f"{absent[0].path} is not attached to this model; attached: {there}")
    _change(model, [delta for delta in present if unwanted and not _among(delta, unwanted)])


def switch(model: nn.Module, *deltas: Delta | str | os.PathLike) -> None:
    """Attach these deltas and detach all others; one that is attached already stays. Errors: as `attach`."""
    wanted = _opened(deltas)
    present = [delta for delta in attached(model) if _among(delta, wanted)]
    _change(model, [*present, *(delta for delta in wanted if not _among(delta, present))])


def attached(model: nn.Module) -> list[Delta]:
    """What is attached, in the order in which it was."""
    return list(_attached.get(model, ()))


def _opened(deltas: Iterable[Delta | str | os.PathLike]) -> list[Delta]:
    return [delta if isinstance(delta, Delta) else Delta.open(delta) for delta in deltas]


def _among(delta: Delta, deltas: Iterable[Delta]) -> bool:
    """Whether the same changes are there, be it from another copy of the file."""
    return any(delta.checksum == other.checksum for other in deltas)


@torch.no_grad()
def _change(model: nn.Module, wanted: list[Delta]) -> None:
    """Bring the model from what is attached to `wanted`, or leave it as it was."""
    twice = next((delta for i, delta in enumerate(wanted) if _among(delta, wanted[:i])), None)
    if twice is not None:
        raise ValueError(f"{twice.path} is attached already")
    parameters = {unwrapped(name): parameter for name, parameter in model.named_parameters()}
    present = attached(model)
    steps = [(delta, "tuned") for delta in present if not _among(delta, wanted)]
    steps += [(delta, "base") for delta in wanted if not _among(delta, present)]
    done: list[Delta] = []
    now = present
    try:
        for delta, role in steps:
            _turn(delta, parameters, role, now)
            done.append(delta)
            now = [other for other in now if other is not delta] if role == "tuned" else [*now, delta]
    except BaseException:
        for delta in reversed(done):
            for name in delta.names:
                _flip(delta, name, parameters[name])
        raise
    _attached[model] = now


def _turn(delta: Delta, parameters: Mapping[str, Tensor], role: str, now: list[Delta]) -> None:
    """Change a delta's entries; where they are not those of its `role` (base or tuned) change them back and
    raise ValueError. Checking and changing in one pass reads every entry once.
    """
    found = {name: _parameter(delta, parameters, name) for name in delta.names}
    total, turned = 0, []
    try:
        for number, name in enumerate(delta.parameters):
            if name not in found:
                continue
            sum_ = _flip(delta, name, found[name])
            if sum_ is None:
                break
            turned.append(name)
            total += weight(number) * sum_
        if len(turned) < len(found) or as_hex(total) != delta.meta[f"{role}_fingerprint"]:
            raise ValueError(_why_not(delta, role, now))
    except BaseException:
        for name in turned:
            _flip(delta, name, found[name])
        raise


def _flip(delta: Delta, name: str, parameter: Tensor) -> int | None:
    """XOR a parameter's entries; returns the fingerprint of what they were. Nothing happens, and None is
    returned, where they hold values that the delta's dtype does not have.
    """
    flat = parameter.view(-1)
    positions, xors = delta.on(flat.device, name)
    values = flat.index_select(0, positions)
    stored = values.to(delta.dtype(name))
    if stored is not values and not torch.equal(as_integers(stored.to(values.dtype)), as_integers(values)):
        return None
    bits = as_integers(stored)
    flat.index_copy_(0, positions, (bits ^ xors).view(stored.dtype).to(flat.dtype))
    return fingerprint(positions, bits)


def _why_not(delta: Delta, role: str, now: list[Delta]) -> str:
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


def _parameter(delta: Delta, parameters: Mapping[str, Tensor], name: str) -> Tensor:
    """The model's parameter. Raises ValueError where it is not one that the delta can change."""
    known = delta.parameters[name]
    found = parameters.get(name)
    if found is None or tuple(found.shape) != known.shape:
        what = "has no such parameter" if found is None else f"has it as {list(found.shape)}"
        raise ValueError(
            f"{delta.path} changes {name} {list(known.shape)}; the model {what}. Is it the base?"
        )
    if found.is_meta or not found.is_contiguous():
        raise ValueError(f"{delta.path} changes {name}, which the model does not hold as one piece of memory")
    if found.dtype != known.dtype and torch.promote_types(found.dtype, known.dtype) != found.dtype:
        raise ValueError(
            f"{delta.path} changes {name} in {known.dtype}, which the model's {found.dtype} cannot hold: "
            f"load it with dtype={known.dtype}, or load what `python -m lota.delta apply` writes in any dtype"
        )
    return found
