"""Rules that merge task vectors (tuned - base): tensors in, tensors out.

A rule has two parts. First each vector is thinned: `keep_largest` or `keep_random` say which of its entries
stay. Then the vectors of one tensor become one, entry by entry: `weighted_sum` or `consensus`. The second
part looks at one entry at a time, so a rule gives the same numbers whether it is handed whole tensors or only
the entries that some vector changes.

Sums run from the first vector to the last in float32, never through a tree, so that an entry's result does
not depend on where it lies in memory.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DRAW_CHUNK = 1 << 20  # entries whose drop is drawn at a time


@dataclass(frozen=True)
class Method:
    """What a method does before and while it adds. thin: largest, random or None; source: who says so."""

    thin: str | None
    consensus: bool
    normalize: bool
    source: str


METHODS = {
    "sum": Method(None, False, False, "task arithmetic with weight 1"),
    "task_arithmetic": Method(None, False, False, "Ilharco et al. 2022, arXiv 2212.04089"),
    "ties": Method("largest", True, True, "Yadav et al. 2023, arXiv 2306.01708"),
    "dare": Method("random", False, False, "Yu et al. 2023, arXiv 2311.03099"),
    "dare_ties": Method("random", True, True, "arXiv 2311.03099 before 2306.01708"),
    "magnitude_prune": Method("largest", False, False, "the first step of 2306.01708, then 2212.04089"),
}


def kept_of(density: float, numel: int) -> int:
    """Entries that density d keeps of n: max(1, floor(d n)), mergekit's count."""
    return max(1, int(density * numel)) if numel else 0


def keep_largest(values: Tensor, density: float, numel: int | None = None) -> Tensor:
    """Which entries are among the `kept_of(density, numel)` largest by magnitude: bool, shape of `values`.

    The trimming of TIES (2306.01708, section 3, step 1), tensor by tensor. values: 1-D; numel: entries of the
    whole tensor where `values` lists only some of them and all others are 0. Of equal magnitudes the earliest
    stay; a 0 may be reported as not kept, which changes no sum.
    """
    count = kept_of(density, values.numel() if numel is None else numel)
    if density >= 1 or count >= values.numel():
        return torch.ones_like(values, dtype=torch.bool)
    size = values.abs()
    threshold = size.kthvalue(values.numel() - count + 1).values
    kept = size > threshold
    if threshold > 0:
        ties = (size == threshold).nonzero().flatten()
        kept[ties[: count - int(kept.sum())]] = True
    return kept


def keep_random(
    density: float, numel: int, generator: torch.Generator, positions: Tensor | None = None
) -> Tensor:
    """Which entries of a tensor survive when each stays with probability `density`: bool.

    DARE's m of 2311.03099, equation 1, with drop rate p = 1 - density. All `numel` draws are made, in order;
    positions: 1-D ascending, the entries whose outcome is wanted (None: all). The draws are those of
    `torch.bernoulli` over a whole float32 tensor.
    """
    if density >= 1:
        return torch.ones(numel if positions is None else positions.numel(), dtype=torch.bool)
    parts = []
    for start in range(0, numel, DRAW_CHUNK):
        stop = min(start + DRAW_CHUNK, numel)
        drawn = torch.bernoulli(torch.full((stop - start,), density), generator=generator).bool()
        if positions is not None:
            low, high = torch.searchsorted(positions, torch.tensor([start, stop])).tolist()
            drawn = drawn[positions[low:high] - start]
        parts.append(drawn)
    return torch.cat(parts) if parts else torch.ones(0, dtype=torch.bool)


def weighted_sum(vectors: Sequence[Tensor], weights: Sequence[float], normalize: bool = False) -> Tensor:
    """sum_i w_i tau_i (2212.04089, section 2); normalize: over sum_i w_i, where that is not 0."""
    total = torch.zeros_like(vectors[0])
    for vector, weight in zip(vectors, weights, strict=True):
        total += vector * weight
    divisor = torch.tensor(weights, dtype=torch.float32).sum()
    return total / divisor if normalize and divisor.abs() >= 1e-8 else total


def consensus(vectors: Sequence[Tensor], weights: Sequence[float], normalize: bool = True) -> Tensor:
    """TIES (2306.01708, section 3, steps 2 and 3): elect a sign per entry, average what agrees with it.

    The elected sign is that of sum_i w_i tau_i, + where the sum is 0. normalize=True: the mean of the
    agreeing nonzero entries, weighted by w_i (the paper's disjoint mean); False: their weighted sum.
    """
    weighted = [vector * weight for vector, weight in zip(vectors, weights, strict=True)]
    positive = sum(weighted[1:], weighted[0].clone()) >= 0
    total, divisor = torch.zeros_like(weighted[0]), torch.zeros_like(weighted[0])
    for value, weight in zip(weighted, weights, strict=True):
        agrees = torch.where(positive, value > 0, value < 0)
        total += value * agrees
        divisor += agrees * weight
    if not normalize:
        return total
    return total / torch.where(divisor == 0, 1.0, divisor)


@dataclass(frozen=True)
class Rule:
    """A method with its numbers; made by `make_rule`. scale: the merged vector's factor (lambda)."""

    method: str
    weights: tuple[float, ...]
    densities: tuple[float, ...]
    normalize: bool
    scale: float = 1.0
    seed: int = 0

    def generator(self) -> torch.Generator:
        """The draws of one merge, one stream through its tensors, which come in the order of sorted names.

        It is the stream of `mergekit-yaml --random-seed`.
        """
        return torch.Generator().manual_seed(self.seed)

    def merge(
        self,
        vectors: Sequence[Tensor],
        generator: torch.Generator,
        numel: int | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """One float32 vector out of as many 1-D ones as there are weights.

        numel, positions: entries of the whole tensor, and which of them the vectors list (ascending), where
        they do not list all.
        """
        numel = vectors[0].numel() if numel is None else numel
        thinned = self._thinned(vectors, generator, numel, positions)
        if METHODS[self.method].consensus:
            merged = consensus(thinned, self.weights, self.normalize)
        else:
            merged = weighted_sum(thinned, self.weights, self.normalize)
        return merged if self.scale == 1 else merged * self.scale

    def skip(self, generator: torch.Generator, numel: int) -> None:
        """Pass over a tensor that no vector changes, so that later draws are what they would have been."""
        if METHODS[self.method].thin == "random":
            nothing = torch.empty(0, dtype=torch.int64)
            self._thinned([torch.empty(0)] * len(self.weights), generator, numel, nothing)

    def _thinned(
        self, vectors: Sequence[Tensor], generator: torch.Generator, numel: int, positions: Tensor | None
    ) -> list[Tensor]:
        how, thinned = METHODS[self.method].thin, []
        for vector, density in zip(vectors, self.densities, strict=True):
            if how is None or density >= 1:
                thinned.append(vector)
            elif how == "largest":
                thinned.append(vector * keep_largest(vector, density, numel))
            else:  # rescaled by 1/density, which leaves the expectation as it was (2311.03099, equation 1)
                kept = keep_random(density, numel, generator, positions)
                thinned.append(vector * kept * (1 / density))
        return thinned


def make_rule(
    method: str,
    count: int,
    *,
    weights: Sequence[float] | None = None,
    density: Sequence[float] | None = None,
    normalize: bool | None = None,
    scale: float = 1.0,
    seed: int | None = None,
) -> Rule:
    """The rule for `count` task vectors. weights: default 1 each; density: one, or one each, default 1.

    normalize: None is the method's own. Raises one ValueError with everything that cannot be honoured.
    """
    if method not in METHODS:
        near = difflib.get_close_matches(method, METHODS, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"--method {method}: not one of {', '.join(METHODS)}{hint}")
    thin = METHODS[method].thin
    weights = [1.0] * count if weights is None else list(weights)
    densities = list(density or [1.0])
    densities = densities * count if len(densities) == 1 else densities
    problems = []
    if len(weights) != count:
        problems.append(f"--weights has {len(weights)} numbers for {count} task vectors: give one each")
    if not all(math.isfinite(number) for number in [*weights, scale]):
        problems.append(f"--weights {_shown(weights)} --lambda {scale:g}: every one must be a finite number")
    if len(densities) != count:
        problems.append(
            f"--density has {len(densities)} numbers for {count} task vectors: give one, or one each"
        )
    wrong = list(dict.fromkeys(number for number in densities if not 0 < number <= 1))
    if wrong:
        problems.append(f"--density {_shown(wrong)}: the share that stays must be above 0 and at most 1")
    elif thin is None and min(densities) < 1:
        problems.append(
            f"--density {_shown(density)}: {method} keeps every entry; leave it out, or use magnitude_prune"
        )
    if method == "sum" and (set(weights) != {1.0} or scale != 1 or normalize):
        problems.append(
            "sum adds every vector with weight 1: use task_arithmetic for --weights, --lambda, --normalize"
        )
    if seed is not None and thin != "random":
        problems.append(f"--seed {seed}: {method} draws nothing; leave it out")
    if problems:
        raise ValueError("\n".join(problems))
    chosen = METHODS[method].normalize if normalize is None else normalize
    return Rule(method, tuple(weights), tuple(densities), chosen, scale, seed or 0)


def _shown(numbers: Sequence[float]) -> str:
    return " ".join(f"{number:g}" for number in numbers)
