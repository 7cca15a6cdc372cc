"""Scores -> masks: which entries of a pair of models to keep, exactly and without loading either.

    masks = lota.extract("base/", "run/epoch-1/policy.pt", [0.5, 0.9, 0.99])
    masks[0.9].save("masks/gsm8k/0.9_mask.pt")

Both sides are read in chunks, at most twice (see lota/topk.py); memory is N/8 bytes per sparsity and buffers.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lota import streaming, topk
from lota.masks import Mask, kept_count
from lota.pairing import Pair, open_pair
from lota.weights import StreamingHash

logger = logging.getLogger(__name__)

_INFINITY = 0x7F800000  # bit pattern of fp32 infinity; NaNs lie above it
DEFAULT_SCOPE = "attention and MLP weights"

# "base" or "tuned" -> fp32 entries of the span; base is shared with the hash and must not be written to
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
    key = hashlib.sha256(f"{seed}:{span.name}".encode()).digest()[:16]
    generator = np.random.Philox(key=int.from_bytes(key, "little"))
    generator.advance(span.start // 8)  # one step of the counter gives 4 x 64 bits: eight entries
    n = span.stop - span.start
    bits = generator.random_raw((n + 1) // 2).view(np.uint32)[:n]
    return ((bits >> 8) + 1).astype(np.float32) / np.float32(1 << 24)


@dataclass(frozen=True)
class Score:
    """A way to rate entries: larger is kept. compute: fp32, not negative; needs: what it reads."""

    compute: Callable[[Read, streaming.Span, int], np.ndarray]
    needs: tuple[str, ...]


# A new score is a function above and a line here; what it reads besides base and tuned joins `Pair.sources`.
SCORES = {
    "task_vector": Score(_task_vector, ("base", "tuned")),
    "magnitude": Score(_magnitude, ("base",)),
    "random": Score(_random, ()),
}


@dataclass(frozen=True)
class Rule:
    """How entries are chosen. per: `global` (one threshold) or `tensor`; smallest: the smallest nonzero
    scores instead of the largest; protect: masks whose kept entries are not available.
    """

    score: str = "task_vector"
    per: str = "global"
    smallest: bool = False
    seed: int = 0
    protect: Sequence[Mask] = ()

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            near = difflib.get_close_matches(self.score, SCORES, 1, 0)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"score={self.score!r}: choose one of {', '.join(SCORES)}{hint}")
        if self.per not in ("global", "tensor"):
            raise ValueError(f"per={self.per!r}: choose global or tensor")


@dataclass
class ScoreStream:
    """Keys of a span (see lota/topk.py) from the files of a pair."""

    pair: Pair
    rule: Rule
    digest: StreamingHash | None = None
    taken: Mapping[str, np.ndarray] = field(default_factory=dict)
    scratch: streaming.Scratch = field(default_factory=streaming.Scratch)
    checked: set[streaming.Span] = field(default_factory=set)

    def __call__(self, span: streaming.Span) -> np.ndarray:
        """int32 keys; 0 where an entry must not be chosen. Raises ValueError for NaN and infinity."""
        with np.errstate(over="ignore", invalid="ignore"):
            scores = SCORES[self.rule.score].compute(
                lambda role: self._read(role, span), span, self.rule.seed
            )
        keys = scores.view(np.int32)
        if span not in self.checked:  # a second pass reads the same spans again
            if keys.size and keys.max() >= _INFINITY:
                self._refuse_not_finite(span)
            self.checked.add(span)
        if self.rule.smallest:
            keys = np.where(keys > 0, _INFINITY - keys, 0)
        if span.name in self.taken:
            packed = self.taken[span.name][span.start // 8 : (span.stop + 7) // 8]
            keys[np.unpackbits(packed, count=len(keys)).view(bool)] = 0
        return keys

    def score_of(self, key: int | None) -> float | None:
        """The score that a key stands for."""
        if not key:
            return key if key is None else 0.0
        bits = _INFINITY - key if self.rule.smallest else key
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
        for role in SCORES[self.rule.score].needs:
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


def extract(
    base: str | os.PathLike,
    tuned: str | os.PathLike | None = None,
    sparsities: Iterable[float] = (0.9,),
    *,
    scope: str | None = None,
    score: str = "task_vector",
    per: str = "global",
    smallest: bool = False,
    seed: int = 0,
    protect: Sequence[Mask | str | os.PathLike] = (),
    model: str | os.PathLike | None = None,
) -> dict[float, Mask]:
    """One mask per sparsity from a base and a fine-tuned model on disk.

    base, tuned: Hugging Face folders, hub ids or policy.pt files; tuned is read by task_vector only.
    scope: regular expression over parameter names, by default attention and MLP weights.
    model: folder whose config gives the structure, needed where neither side is a folder.
    protect: masks (or files) whose kept entries are left alone; the sparsity still counts the whole scope.
    Raises ValueError for what does not exist, does not belong together, or cannot hold the share asked for.
    """
    wanted = check_sparsities(sparsities)
    masks = [m if isinstance(m, Mask) else Mask.load(m) for m in protect]
    rule = Rule(score, per, smallest, seed, masks)
    pair = open_pair(base, tuned, scope=scope, model=model, needs=SCORES[score].needs)
    return select(pair, wanted, rule)


def check_sparsities(sparsities: Iterable[float]) -> list[float]:
    """The distinct sparsities as floats. Raises ValueError for one that is no number in [0, 1)."""
    wanted = []
    for sparsity in sparsities:
        try:
            wanted.append(float(sparsity))
        except (TypeError, ValueError) as error:
            raise ValueError(f"sparsity {sparsity!r} is not a number") from error
        kept_count(wanted[-1], 0)
    if not wanted:
        raise ValueError("no sparsity given")
    return list(dict.fromkeys(wanted))


def select(
    pair: Pair,
    sparsities: Sequence[float],
    rule: Rule,
    progress: topk.Progress | None = None,
    with_hash: bool = True,
) -> dict[float, Mask]:
    """One mask per sparsity over `pair.scope`. progress: see `topk.top_bits`; with_hash: of the base."""
    sizes = {name: int(np.prod(tensor.shape, dtype=np.int64)) for name, tensor in pair.scope.items()}
    stream = ScoreStream(pair, rule, taken=_taken(rule.protect, pair))
    groups = [list(sizes)] if rule.per == "global" else [[name] for name in sorted(sizes)]
    counts = [[kept_count(s, sum(sizes[n] for n in group)) for s in sparsities] for group in groups]
    for group, numbers in zip(groups, counts, strict=True):
        _check_capacity(group, sizes, stream.taken, dict(zip(sparsities, numbers, strict=True)))
    if with_hash:
        shared = sizes if "base" in SCORES[rule.score].needs else ()
        stream.digest = StreamingHash(pair.sources["base"], shared, streaming.CHUNK)
    bits: list[dict[str, np.ndarray]] = [{} for _ in sparsities]
    cuts: list[dict[str, topk.Cut]] = [{} for _ in sparsities]
    for group, numbers in zip(groups, counts, strict=True):
        members = {name: sizes[name] for name in group}
        found, group_cuts = topk.top_bits(stream, members, numbers, sorted(group), progress)
        for i, cut in enumerate(group_cuts):
            bits[i].update(found[i])
            cuts[i][group[0]] = cut
    base_hash = stream.digest.finish() if stream.digest else None
    shapes = {name: tensor.shape for name, tensor in pair.scope.items()}
    masks = {}
    for i, sparsity in enumerate(sparsities):
        meta = _meta(pair, rule, sparsity, cuts[i], stream) | {"base_hash": base_hash}
        mask = Mask({name: torch.from_numpy(bits[i][name]) for name in sizes}, shapes, meta)
        mask.meta["kept"] = mask.n_kept
        masks[sparsity] = mask
    return masks


def _meta(
    pair: Pair, rule: Rule, sparsity: float, cuts: Mapping[str, topk.Cut], stream: ScoreStream
) -> dict[str, Any]:
    thresholds = {name: stream.score_of(cut.threshold) for name, cut in cuts.items()}
    shortfall = sum(cut.shortfall for cut in cuts.values())
    if shortfall:
        logger.warning(
            "sparsity %s: %d entries fewer than asked for are kept, because their score is 0 "
            "or they are protected",
            sparsity,
            shortfall,
        )
    return {
        "scope": pair.pattern or DEFAULT_SCOPE,
        "sparsity": sparsity,
        "score": rule.score,
        "per": rule.per,
        "smallest": rule.smallest,
        "seed": rule.seed if rule.score == "random" else None,
        "protected": sum(int(np.bitwise_count(t).sum(dtype=np.int64)) for t in stream.taken.values()),
        "threshold": next(iter(thresholds.values())) if rule.per == "global" else thresholds,
        "shortfall": shortfall,
        "base": pair.sources["base"].id,
        "tuned": pair.sources["tuned"].id if "tuned" in pair.sources else None,
    }


def _taken(protect: Sequence[Mask], pair: Pair) -> dict[str, np.ndarray]:
    """Packed bits of the entries that the protect masks keep, inside the scope."""
    taken: dict[str, np.ndarray] = {}
    shapes = {**pair.shapes, **{name: tensor.shape for name, tensor in pair.scope.items()}}
    for mask in protect:
        mask.check(shapes)
        for name in pair.scope:
            if name in mask and mask.kept(name):
                bits = mask.bits[name].numpy()
                taken[name] = taken[name] | bits if name in taken else bits
    return taken


def _check_capacity(
    group: list[str], sizes: Mapping[str, int], taken: Mapping[str, np.ndarray], wanted: Mapping[float, int]
) -> None:
    total = sum(sizes[name] for name in group)
    used = sum(int(np.bitwise_count(taken[name]).sum(dtype=np.int64)) for name in group if name in taken)
    for sparsity, k in wanted.items():
        if k > total - used:
            where = group[0] if len(group) == 1 else "the scope"
            raise ValueError(
                f"sparsity {sparsity} keeps {k:,} of the {total:,} entries of {where}, but the protected "
                f"masks leave {total - used:,} free: choose a sparsity of at least {used / total:.4g}"
            )
