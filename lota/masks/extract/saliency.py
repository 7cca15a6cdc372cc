"""Saliencies: how an entry of a parameter is rated, from files on disk or from collected gradients.

Entries with the largest saliency are kept. They are rated span by span (lota/models/chunks.py), so a model
need not fit into memory to be ranked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lota.models.chunks import Scratch, Span
from lota.models.hashing import StreamingHash

_INFINITY = 0x7F800000  # bit pattern of fp32 infinity; NaNs lie above it
# role of a source -> fp32 entries of the span, which the caller must not overwrite, except those of "tuned"
Read = Callable[[str], NDArray[np.float32]]


class Source(Protocol):
    """What entries are read from: `WeightSource`, a model on disk, or `Collected`, sums of gradients."""

    id: str

    def dtype(self, name: str) -> torch.dtype: ...

    def read_flat(self, name: str, start: int, stop: int, out: NDArray[np.uint8] | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Saliency:
    """A way to rate entries."""

    compute: Callable[[Read, Span, int], np.ndarray]  # (read, span, seed) -> fp32 (entries,), not negative
    needs: tuple[str, ...]  # roles of the sources that it reads
    collects: str = ""  # what is summed of the gradients beforehand, `sum` or `squares`; empty: nothing


def _task_vector(read: Read, span: Span, seed: int) -> np.ndarray:
    """|tuned - base| in fp32; the base rounded to tuned's dtype if that is narrower, as training started."""
    base, tuned = read("base"), read("tuned")
    np.subtract(tuned, base, out=tuned)
    return np.abs(tuned, out=tuned)


def _snip(read: Read, span: Span, seed: int) -> np.ndarray:
    """|base * sum of the gradients|: to first order, what the loss changes by if the entry is removed
    (SNIP, arXiv 1810.02340, without its normalization).
    """
    product = np.multiply(read("base"), read("collected"))
    return np.abs(product, out=product)


def _size_of(role: str) -> Callable[[Read, Span, int], np.ndarray]:
    return lambda read, span, seed: np.abs(read(role))


# masks/README.md explains each. A new one is a function above and a line here.
SALIENCIES = {
    "task_vector": Saliency(_task_vector, ("base", "tuned")),
    "magnitude": Saliency(_size_of("base"), ("base",)),
    "random": Saliency(lambda read, span, seed: uniform(span, seed), ()),
    "gradient": Saliency(_size_of("collected"), ("collected",), collects="sum"),
    "fisher": Saliency(_size_of("collected"), ("collected",), collects="squares"),
    "snip": Saliency(_snip, ("base", "collected"), collects="sum"),
}
DATA_DRIVEN = tuple(name for name, saliency in SALIENCIES.items() if saliency.collects)


def uniform(span: Span, seed: int | str) -> np.ndarray:
    """Returns fp32 numbers on (0, 1], the same for a position however the spans are cut.

    They are a function of seed, parameter name and position only (counter-based Philox).
    """
    key = hashlib.sha256(f"{seed}:{span.name}".encode()).digest()[:16]
    generator = np.random.Philox(key=int.from_bytes(key, "little"))
    generator.advance(span.start // 8)  # one step of the counter gives 4 x 64 bits: eight entries
    n = span.stop - span.start
    bits = generator.random_raw((n + 1) // 2).view(np.uint32)[:n]
    return ((bits >> 8) + 1).astype(np.float32) / np.float32(1 << 24)  # 24 bits: what fp32 holds exactly


@dataclass
class SaliencyStream:
    """Saliencies of any span, from the sources that they are computed from. Safe to call from threads."""

    sources: Mapping[str, Source]  # role -> where entries are read
    saliency: str  # a name of SALIENCIES
    smallest: bool = False  # keys order the other way round
    seed: int = 0  # of `random`
    digest: StreamingHash | None = None  # of the base, fed with what is read
    taken: Mapping[str, np.ndarray] = field(default_factory=dict)  # name -> packed bits: saliency 0 there
    scratch: Scratch = field(default_factory=Scratch)
    avoid: float = 0.0  # saliencies are divided by sqrt(1 + avoid * what the source `avoid` has)
    checked: set[Span] = field(default_factory=set)  # spans without NaN and infinity

    def keys(self, span: Span) -> np.ndarray:
        """Returns int32 keys (entries,) as topk.py takes them: 0 if an entry must not be chosen."""
        # The bit patterns of non-negative fp32 numbers order as the numbers do.
        keys = self.saliencies(span).view(np.int32)
        return np.where(keys > 0, _INFINITY - keys, 0) if self.smallest else keys

    def saliency_of(self, key: int | None) -> float | None:
        """Returns the saliency that a key stands for."""
        if not key:
            return key if key is None else 0.0
        bits = _INFINITY - key if self.smallest else key
        return float(np.int32(bits).view(np.float32))

    def saliencies(self, span: Span) -> np.ndarray:
        """Returns fp32 saliencies (entries,), not negative. Raises ValueError for NaN and infinity."""
        with np.errstate(over="ignore", invalid="ignore"):
            found = SALIENCIES[self.saliency].compute(lambda role: self._read(role, span), span, self.seed)
            if self.avoid:
                found /= np.sqrt(1 + np.float32(self.avoid) * self._importance(span))
        if span not in self.checked:  # a second pass reads the same spans again
            # one comparison of integers finds infinities and NaNs of either sign bit: abs() cleared it
            bits = found.view(np.int32)
            if bits.size and bits.max() >= _INFINITY:
                self._refuse_not_finite(span)
            self.checked.add(span)
        if span.name in self.taken:
            packed = self.taken[span.name][
                span.start // 8 : (span.stop + 7) // 8
            ]  # starts are multiples of 8
            found[np.unpackbits(packed, count=len(found)).view(bool)] = 0
        return found

    def _importance(self, span: Span) -> np.ndarray:
        """What entries matter elsewhere, fp32 (entries,). Raises ValueError unless it is finite and not
        negative.
        """
        found = self._read("avoid", span)
        if span not in self.checked and not (np.isfinite(found) & (found >= 0)).all():
            raise ValueError(f"{span.name}: importance to avoid is negative, NaN or infinite")
        return found

    def _read(self, role: str, span: Span) -> np.ndarray:
        """fp32 entries of a source, in buffers that this thread uses again for the next span."""
        source = self.sources[role]
        n = span.stop - span.start
        if role == "base" and self.digest is not None and self.digest.wants(*span):
            part = source.read_flat(*span)  # in memory of its own: it may wait there for its turn
            self.digest.put(*span, part)
        else:
            buffer = self.scratch.get(f"{role} bytes", n * source.dtype(span.name).itemsize, np.uint8)
            part = source.read_flat(*span, out=buffer)
        if role == "base" and self.saliency == "task_vector":
            started = self.sources["tuned"].dtype(span.name)
            if started.itemsize < part.element_size():  # what rounding alone has changed is no task vector
                part = part.to(started)
        return as_float32(part, self.scratch.get(role, n, np.float32))

    def _refuse_not_finite(self, span: Span) -> None:
        for role in SALIENCIES[self.saliency].needs:
            if not np.isfinite(as_float32(self.sources[role].read_flat(*span))).all():
                raise ValueError(f"{span.name} of {self.sources[role].id} holds NaN or infinity")
        raise ValueError(f"{span.name}: its saliencies are too large for fp32")


def as_float32(part: Tensor, out: np.ndarray | None = None) -> np.ndarray:
    """Returns a tensor's values in fp32: itself if it is fp32, else in `out`.

    torch's own conversion would start threads inside each reading thread; these run in the caller's only.
    """
    if part.dtype == torch.float32:
        return part.numpy()
    out = np.empty(part.numel(), np.float32) if out is None else out
    if part.dtype == torch.bfloat16:  # the upper half of an fp32's bits
        wide = out.view(np.uint32)
        np.copyto(wide, part.view(torch.uint16).numpy())
        np.left_shift(wide, 16, out=wide)
    elif part.dtype in (torch.float16, torch.float64):
        np.copyto(out, part.numpy(), casting="same_kind")
    else:
        out[:] = part.to(torch.float32).numpy()
    return out
