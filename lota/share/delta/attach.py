"""Deltas on a loaded model: attached, detached and switched in time proportional to the changed entries.

    sql, samsum = Delta.open("sql.safetensors"), Delta.open("samsum.safetensors")
    lota.attach(model, sql)      # bit for bit the model that learnt sql
    lota.switch(model, samsum)   # now the one that learnt samsum
    lota.detach(model)           # the base again, bit for bit

Every entry that a delta changes is compared with what it was taken of; if one differs, the model stays as it
was. So a second delta may come on top of a first one that changes other entries, and on no other model. At
the first use this is the checksum in the file (`entry_checksum`). From then on the delta keeps positions and
values of base and tuned model on the model's device (8 bytes per entry in bf16): a switch reads the entries,
compares them bit by bit and writes the others, parameter by parameter while that lies in the cache.
"""

from __future__ import annotations

import os
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lota.models.chunks import by_threads
from lota.models.policy import unwrapped
from lota.share.delta.format import as_integers, checksum_digits, common_dtype, entry_checksum
from lota.share.delta.reader import Delta, Entries

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


class _Exchange(NamedTuple):
    """One parameter whose entries go from a delta's `role` to the other."""

    delta: Delta
    number: int  # of the parameter, among all of the delta's
    parameter: Tensor
    name: str
    role: Role  # base: the delta is attached; tuned: it is taken off
    others: list[Delta]  # what is attached then besides
    known: bool  # whether `delta.known` has the entries


class _Done(NamedTuple):
    """An exchange that has been made, or was just beginning."""

    exchange: _Exchange
    entries: Entries


def _bring_to(model: nn.Module, wanted: list[Delta]) -> None:
    """Bring the model from what is attached to `wanted`, or leave it as it was."""
    twice = next((delta for i, delta in enumerate(wanted) if delta in wanted[:i]), None)
    if twice is not None:
        raise ValueError(f"{twice.path} is attached already")
    parameters = {unwrapped(name): parameter.detach() for name, parameter in model.named_parameters()}
    now = attached(model)
    exchanges: list[_Exchange] = []
    for delta in (delta for delta in now if delta not in wanted):
        now = [other for other in now if other != delta]
        exchanges += _exchanges(delta, "tuned", parameters, now)
    for delta in (delta for delta in wanted if delta not in now):
        exchanges += _exchanges(delta, "base", parameters, now)
        now = [*now, delta]
    done: list[_Done] = []
    try:
        _exchange_all(exchanges, done)
        _check_new(done)
    except BaseException:
        for exchange, entries in reversed(done):
            _write(exchange, entries.positions.long(), getattr(entries, exchange.role))
        raise
    for exchange, entries in done:
        exchange.delta.known[exchange.parameter.device, exchange.name] = entries
    _attached[model] = now


def _exchanges(
    delta: Delta, role: Role, parameters: Mapping[str, Tensor], others: list[Delta]
) -> list[_Exchange]:
    """What has to be done for a delta. Raises ValueError if the model lacks what it changes."""
    found = {name: _checked_parameter(delta, parameters, name) for name in delta.names}
    known = all((parameter.device, name) in delta.known for name, parameter in found.items())
    return [
        _Exchange(delta, number, found[name], name, role, others, known)
        for number, name in enumerate(delta.parameters)
        if name in found
    ]


def _exchange_all(exchanges: list[_Exchange], done: list[_Done]) -> None:
    """Make all exchanges, noting each in `done`: on a CPU by several threads, each of a parameter at a time.

    Raises ValueError at entries that are not those of the role.
    """
    of_parameter: dict[str, list[_Exchange]] = {}
    for exchange in exchanges:
        of_parameter.setdefault(exchange.name, []).append(exchange)
    inference = torch.is_inference_mode_enabled()  # which is each thread's own

    def work(parts: list[_Exchange]) -> None:
        with torch.inference_mode(inference):
            for exchange in parts:
                bits = as_integers(exchange.parameter)
                look = _compared if exchange.known else _first_found
                entries, positions = look(exchange, bits)
                done.append(_Done(exchange, entries))
                _write(exchange, positions, entries.tuned if exchange.role == "base" else entries.base)

    if any(exchange.parameter.device.type != "cpu" for exchange in exchanges):
        for parts in of_parameter.values():
            work(parts)
    else:
        by_threads(work, of_parameter.values())


def _compared(exchange: _Exchange, bits: Tensor) -> tuple[Entries, Tensor]:
    """The entries, which the delta knows, and their positions as int64.

    bits: the parameter's, flat, as integers. Raises ValueError if it holds others there.
    """
    entries = exchange.delta.known[exchange.parameter.device, exchange.name]
    positions = entries.positions.long()
    held = bits.gather(0, positions)
    if not _equal(held, _in_model(exchange, getattr(entries, exchange.role))):
        raise ValueError(_mismatch(exchange))
    return entries, positions


def _first_found(exchange: _Exchange, bits: Tensor) -> tuple[Entries, Tensor]:
    """The same as the model holds them and as the delta changes them; `_check_new` compares them."""
    delta, known = exchange.delta, exchange.delta.parameters[exchange.name]
    positions, xors = (part.to(bits.device) for part in delta.changes(exchange.name))
    held = bits.gather(0, positions)
    here = held.view(exchange.parameter.dtype).to(known.dtype)
    if not _equal(_in_model(exchange, here), held):  # values that the delta's dtype does not have
        raise ValueError(_mismatch(exchange))
    there = (as_integers(here) ^ xors).view(known.dtype)
    base, tuned = (here, there) if exchange.role == "base" else (there, here)
    return Entries(positions.int() if known.numel <= 1 << 31 else positions, base, tuned), positions


def _check_new(done: list[_Done]) -> None:
    """Raise ValueError unless what was read for the first time was the delta's role and became the other."""
    new = [each for each in done if not each.exchange.known]
    totals: Counter[tuple[Delta, str]] = Counter()
    for exchange, entries in new:
        positions = entries.positions.long()
        for role, values in (("base", entries.base), ("tuned", entries.tuned)):
            total = entry_checksum(exchange.number, positions, as_integers(values))
            totals[exchange.delta, role] += total
    for exchange, _ in new:
        delta = exchange.delta
        wrong = [
            role
            for role in ("base", "tuned")
            if checksum_digits(totals[delta, role]) != delta.meta[f"{role}_fingerprint"]
        ]
        if exchange.role in wrong:
            raise ValueError(_mismatch(exchange))
        if wrong:
            raise ValueError(
                f"{delta.path} does not turn {delta.meta['base']} into {delta.meta['tuned']}: it is damaged"
            )


def _write(exchange: _Exchange, positions: Tensor, values: Tensor) -> None:
    as_integers(exchange.parameter).scatter_(0, positions, _in_model(exchange, values))


def _in_model(exchange: _Exchange, values: Tensor) -> Tensor:
    """The bits, as integers, of values in the dtype that the model has them in."""
    return as_integers(values.to(exchange.parameter.dtype))


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.device.type != "cpu":
        return torch.equal(a, b)
    return np.array_equal(a.numpy(), b.numpy())  # in a fifth of torch's time


def _mismatch(exchange: _Exchange) -> str:
    """Why a delta's entries are not those of its role."""
    delta = exchange.delta
    if exchange.role == "tuned":
        return (
            f"entries that {delta.path} changed were changed again since, by training or another tool, which "
            "cannot be undone: load the base again"
        )
    for other in exchange.others:
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
