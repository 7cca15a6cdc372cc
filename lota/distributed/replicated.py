"""Every process holds the whole model: compact gradients of kept entries are summed in a few flat buckets.

A bucket holds the fp32 gradients of some parameters, one behind the other in the order in which a backward
pass completes them, and a flag for each: whether this process has a gradient of it. A bucket is sent as soon
as all of it is complete, always in the same order, while the backward pass goes on. Sums are bitwise the same
on every process, so that equal replicas stay equal.

What a process sends per step, with a ring of n processes: 2 (n-1)/n x 4 bytes x (kept entries + trained
tensors).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist

from lota.distributed.processes import Processes, lost
from lota.optim.masked import MaskedOptimizer

BUCKET = 1 << 24  # entries: 64 MiB


@dataclass
class _Bucket:
    """Parameters whose gradients are sent together."""

    parameters: list[nn.Parameter]
    flat: Tensor  # fp32 (entries, then flags)
    complete: set[nn.Parameter] = field(default_factory=set)
    work: dist.Work | None = None

    @property
    def flags(self) -> Tensor:
        """1 for each parameter that has a gradient, summed over processes once it was sent."""
        return self.flat[-len(self.parameters) :]


class Replicated:
    """The peers of a masked optimizer whose parameters every process holds whole (lota/optim/peers.py)."""

    parts = False

    def __init__(self, optimizer: MaskedOptimizer, processes: Processes, most: int = BUCKET):
        """most: entries of a bucket, unless one parameter has more."""
        self.processes, self.names = processes, list(optimizer.names)
        self.sent_bytes = 0  # by this process, so far
        self.buckets: list[_Bucket] = []
        self.slots: dict[nn.Parameter, Tensor] = {}  # (kept,) inside of a bucket
        self._in: dict[nn.Parameter, _Bucket] = {}
        self._next = 0  # bucket to send
        group: list[nn.Parameter] = []
        for p in reversed(self.names):  # the last layer's gradients come first
            size = sum(optimizer.kept[q].count for q in group)
            if group and (size + optimizer.kept[p].count > most or p.device != group[0].device):
                self._add(group, optimizer)
                group = []
            group.append(p)
        self._add(group, optimizer)

    def _add(self, group: list[nn.Parameter], optimizer: MaskedOptimizer) -> None:
        ends = [0, *np.cumsum([optimizer.kept[p].count for p in group]).tolist()]
        bucket = _Bucket(group, torch.zeros(ends[-1] + len(group), device=group[0].device))
        self.buckets.append(bucket)
        for p, (start, stop) in zip(group, pairwise(ends), strict=True):
            self.slots[p], self._in[p] = bucket.flat[start:stop], bucket

    def begin(self, p: nn.Parameter, grad: Tensor) -> Tensor:
        return self.slots[p].copy_(grad)

    def complete(self, p: nn.Parameter) -> None:
        self._in[p].complete.add(p)
        while self._next < len(self.buckets):
            bucket = self.buckets[self._next]
            if len(bucket.complete) < len(bucket.parameters):
                break
            bucket.flags.fill_(1.0)
            self._send(bucket)

    def _send(self, bucket: _Bucket) -> None:
        with lost():
            bucket.work = dist.all_reduce(bucket.flat, async_op=True)
        n = self.processes.count
        self.sent_bytes += 2 * (n - 1) * bucket.flat.nbytes // n
        self._next += 1

    def gradients(self, grads: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        for bucket in self.buckets[self._next :]:
            self._fill(bucket, grads)
            self._send(bucket)
        for bucket in self.buckets:
            assert bucket.work is not None
            with lost():
                bucket.work.wait()
            bucket.work = None
            bucket.complete.clear()
        self._next = 0
        elsewhere = self._elsewhere(grads)
        return {p: self.slots[p] for p in self.names if p in grads or p in elsewhere}

    def _fill(self, bucket: _Bucket, grads: dict[nn.Parameter, Tensor]) -> None:
        """Make ready a bucket of which this process may have some gradients only."""
        for p in bucket.parameters:
            slot = self.slots[p]
            if p not in grads:
                slot.zero_()
            elif grads[p].data_ptr() != slot.data_ptr():
                slot.copy_(grads[p])
        own = [float(p in grads) for p in bucket.parameters]
        bucket.flags.copy_(torch.tensor(own))

    def _elsewhere(self, grads: dict[nn.Parameter, Tensor]) -> set[nn.Parameter]:
        """Parameters of which other processes only have a gradient. Flags are read where that can be."""
        found: set[nn.Parameter] = set()
        for bucket in self.buckets:
            if any(p not in grads for p in bucket.parameters):
                flags = bucket.flags.tolist()
                found |= {p for p, flag in zip(bucket.parameters, flags, strict=True) if flag}
        return found

    def squares(self, squares: Tensor) -> Tensor:
        raise AssertionError("replicas hold whole tensors")


def refuse_difference(
    weights: Mapping[str, Tensor],
    optimizer: MaskedOptimizer,
    processes: Processes,
    step: int,
    holders: int = 1,
) -> None:
    """Raise ValueError, naming the parameter, unless all processes hold the same weights and trained values.

    weights: all that this process holds, frozen ones too. holders: processes that hold a replica together,
    one after the other by rank.
    """
    values = [*weights.items(), *((name, exact) for name, _, exact in optimizer.kept_values())]
    hashes = processes.gather([hashlib.sha256(_bytes(value)).hexdigest() for _, value in values])
    for at, (name, _) in enumerate(values):
        for rank, other in enumerate(hashes):
            first = rank % holders
            if other[at] != hashes[first][at]:
                raise ValueError(
                    f"after step {step} process {rank} holds other values of {name} than process {first}: a "
                    "replica has gone astray, by its hardware or its software. Checkpoints written before "
                    "are as they were: start the same command again to continue from the newest one"
                )


def _bytes(values: Tensor) -> memoryview:  # of bits, whatever the dtype
    return values.detach().cpu().reshape(-1).view(torch.uint8).numpy().data
