"""The live bytes of tensors while a step is traced: their peak in each segment of it, and what they are."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

# What bytes are of, in the order of tables.
KINDS = ("weights", "reference", "state", "activations", "logits", "gradients", "temporary", "saved")
# An operation whose result has a size that only data tell, and what stands for that result.
StandIns = dict[Any, Callable[..., Any]]


@dataclass
class Segment:
    """A stretch of a run between two marks."""

    name: tuple[Any, ...]  # phase, and where in it
    began: int  # how many tensors had been counted
    peaked: int = 0  # ... and when it had its peak
    peak: int = 0  # bytes
    parts: Counter[str] = field(default_factory=Counter)  # kind -> bytes, at that peak


class Tracker(TorchDispatchMode):
    """Counts the memory of every tensor that an operation makes while this is entered.

    A tensor's bytes are those of its storage, from the operation that made it until nobody holds it. It works
    on fake and real tensors; what kernels take and give back inside of one operation is not seen.
    """

    def __init__(self, stand_ins: StandIns | None = None):
        super().__init__()
        self.stand_ins = stand_ins or {}
        self.kind: str | None = None  # of what is made now; None: what autograd is doing tells
        self.in_backward = False
        self.parts: Counter[str] = Counter()
        self.total = 0
        self._counted = 0
        self.segments: list[Segment] = []
        self._known: dict[
            int, tuple[weakref.ref[Any], list[Any]]
        ] = {}  # storage -> it, [kind, bytes, number]
        self.mark("load")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        stand_in = self.stand_ins.get(func)
        result = func(*args, **(kwargs or {})) if stand_in is None else stand_in(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self.count(value)
        return result

    # Time

    def mark(self, *name: Any) -> None:
        """A new segment begins."""
        self.segments.append(Segment(name, self._counted))
        self._note_peak()

    @contextlib.contextmanager
    def making(self, kind: str) -> Iterator[None]:
        """What is made inside is of this kind."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def _kind_of_now(self) -> str:
        if self.kind is not None:
            return self.kind
        # without gradients enabled, it is a formula of the backward pass; else the forward pass, or a block's
        # that is computed again
        if self.in_backward and not torch.is_grad_enabled():
            return "temporary"
        return "activations"

    # Memory

    def count(self, tensor: Tensor, kind: str | None = None) -> None:
        """Count a tensor's storage, if it is not counted yet; give it another kind, if one is named."""
        if tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._known.get(key)
        if known is not None:
            entry = known[1]
            if kind is not None and entry[0] != kind:
                self._rename(entry, kind)
            return
        self._counted += 1
        entry = [kind or self._kind_of_now(), storage.nbytes(), self._counted]
        self._known[key] = weakref.ref(storage, lambda _: self._forget(key)), entry
        self.parts[entry[0]] += entry[1]
        self.total += entry[1]
        self._note_peak()

    def _rename(self, entry: list[Any], kind: str) -> None:
        """A tensor is of another kind than was known, also at the peaks that it was there for."""
        old, size, number = entry
        shares = [self.parts]
        for segment in reversed(self.segments):
            if segment.peaked >= number:
                shares.append(segment.parts)
            if segment.began < number:
                break
        for parts in shares:
            parts[old] -= size
            parts[kind] += size
        entry[0] = kind

    def _forget(self, key: int) -> None:
        kind, size, _ = self._known.pop(key)[1]
        self.parts[kind] -= size
        self.total -= size

    def _note_peak(self) -> None:
        segment = self.segments[-1]
        if self.total >= segment.peak:
            segment.peak, segment.peaked, segment.parts = self.total, self._counted, self.parts.copy()
