"""Scores: how an entry of a parameter is rated, from files on disk or from gradients collected before.

A larger score is kept. Entries are rated span by span (lota/streaming.py), so that a model need not fit into
memory to be ranked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lota.models import chunks as streaming
from lota.models.hashing import StreamingHash
from lota.models.pair import ModelPair

_INFINITY = 0x7F800000  # bit pattern of fp32 infinity; NaNs lie above it
# a source's role -> fp32 entries of the span, which are not to be written to
Read = Callable[[str], np.ndarray]


def _task_vector(read: Read, span: streaming.Span, seed: int) -> np.ndarray:
    """|tuned - base| in fp32."""
    base, tuned = read("base"), read("tuned")
    np.subtract(tuned, base, out=tuned)
    return np.abs(tuned, out=tuned)


def _magnitude(read: Read, span: streaming.Span, seed: int) -> np.ndarray:
    """|base|."""
    return np.abs(read("base"))


def _random(read: Read, span: streaming.Span, seed: int) -> np.ndarray:
    """Uniform on (0, 1], a function of seed, parameter name and position only (counter-based Philox)."""
    return uniform(span, seed)


def _collected(read: Read, span: streaming.Span, seed: int) -> np.ndarray:
    """|what was collected|: the sum of the gradients, or of their squares."""
    return np.abs(read("collected"))


def _snip(read: Read, span: streaming.Span, seed: int) -> np.ndarray:
    """|base * sum of the gradients|: to first order, what the loss changes by when the entry is removed
    (SNIP, arXiv 1810.02340, without its normalization).
    """
    product = np.multiply(read("base"), read("collected"))
    return np.abs(product, out=product)


@dataclass(frozen=True)
class Saliency:
    """A way to rate entries. compute: fp32, not negative; needs: the roles it reads; collects: what of the
    gradients has to be summed before (`sum` or `squares`, see lota/gradient_scores.py), None for nothing.
    """

    compute: Callable[[Read, streaming.Span, int], np.ndarray]
    needs: tuple[str, ...]
    collects: str | None = None


# A new one is a function above and a line here; what it reads besides base and tuned joins
# `ModelPair.sources`.
SALIENCIES = {
    "task_vector": Saliency(_task_vector, ("base", "tuned")),
    "magnitude": Saliency(_magnitude, ("base",)),
    "random": Saliency(_random, ()),
    "gradient": Saliency(_collected, ("collected",), collects="sum"),
    "fisher": Saliency(_collected, ("collected",), collects="squares"),
    "snip": Saliency(_snip, ("base", "collected"), collects="sum"),
}
DATA_DRIVEN = tuple(name for name, score in SALIENCIES.items() if score.collects)


def uniform(span: streaming.Span, seed: int | str) -> np.ndarray:
    """fp32 numbers on (0, 1], the same for a position however the spans are cut; others for another seed."""
    key = hashlib.sha256(f"{seed}:{span.name}".encode()).digest()[:16]
    generator = np.random.Philox(key=int.from_bytes(key, "little"))
    generator.advance(span.start // 8)  # one step of the counter gives 4 x 64 bits: eight entries
    n = span.stop - span.start
    bits = generator.random_raw((n + 1) // 2).view(np.uint32)[:n]
    return ((bits >> 8) + 1).astype(np.float32) / np.float32(1 << 24)


@dataclass
class SaliencyStream:
    """Scores of a span from the sources of a pair; called, their keys (see lota/topk.py).

    score: a name of SALIENCIES; smallest: keys order the other way round; taken: packed bits of entries that
    must not be chosen, and so score 0.
    """

    pair: ModelPair
    score: str
    smallest: bool = False
    seed: int = 0
    digest: StreamingHash | None = None
    taken: Mapping[str, np.ndarray] = field(default_factory=dict)
    scratch: streaming.Scratch = field(default_factory=streaming.Scratch)
    checked: set[streaming.Span] = field(default_factory=set)

    def __call__(self, span: streaming.Span) -> np.ndarray:
        """int32 keys; 0 where an entry must not be chosen. Raises ValueError for NaN and infinity."""
        keys = self.scores(span).view(np.int32)
        return np.where(keys > 0, _INFINITY - keys, 0) if self.smallest else keys

    def scores(self, span: streaming.Span) -> np.ndarray:
        """fp32 scores, not negative. Raises ValueError for NaN and infinity."""
        with np.errstate(over="ignore", invalid="ignore"):
            scores = SALIENCIES[self.score].compute(lambda role: self._read(role, span), span, self.seed)
        if span not in self.checked:  # a second pass reads the same spans again
            keys = scores.view(np.int32)
            if keys.size and keys.max() >= _INFINITY:
                self._refuse_not_finite(span)
            self.checked.add(span)
        if span.name in self.taken:
            packed = self.taken[span.name][span.start // 8 : (span.stop + 7) // 8]
            scores[np.unpackbits(packed, count=len(scores)).view(bool)] = 0
        return scores

    def score_of(self, key: int | None) -> float | None:
        """The score that a key stands for."""
        if not key:
            return key if key is None else 0.0
        bits = _INFINITY - key if self.smallest else key
        return float(np.int32(bits).view(np.float32))

    def _read(self, role: str, span: streaming.Span) -> np.ndarray:
        source = self.pair.sources[role]
        n = span.stop - span.start
        if role == "base" and self.digest is not None and self.digest.wants(*span):
            part = source.read_flat(*span)
            self.digest.put(*span, part)
        else:
            buffer = self.scratch.get(f"{role} bytes", n * source.dtype(span.name).itemsize, np.uint8)
            part = source.read_flat(*span, out=buffer)
        return as_float32(part, self.scratch.get(role, n, np.float32))

    def _refuse_not_finite(self, span: streaming.Span) -> None:
        for role in SALIENCIES[self.score].needs:
            if not np.isfinite(as_float32(self.pair.sources[role].read_flat(*span))).all():
                raise ValueError(f"{span.name} of {self.pair.sources[role].id} holds NaN or infinity")
        raise ValueError(f"{span.name}: its scores are too large for fp32")


def as_float32(part: Tensor, out: np.ndarray | None = None) -> np.ndarray:
    """A tensor's values in fp32: itself where it is fp32, else in `out`. Runs in the calling thread only."""
    if part.dtype == torch.float32:
        return part.numpy()
    out = np.empty(part.numel(), np.float32) if out is None else out
    if part.dtype == torch.bfloat16:
        wide = out.view(np.uint32)
        np.copyto(wide, part.view(torch.uint16).numpy())
        np.left_shift(wide, 16, out=wide)
    elif part.dtype in (torch.float16, torch.float64):
        np.copyto(out, part.numpy(), casting="same_kind")
    else:
        out[:] = part.to(torch.float32).numpy()
    return out
