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
from typing import Literal

import torch
from torch import Tensor

DRAW_CHUNK = 1 << 20  # entries whose drop is drawn at a time


@dataclass(frozen=True)
class MergeMethod:
    """What a method does before and while it adds."""

    thin: Literal["largest", "random"] | None  # which entries of a vector stay
    consensus: bool  # elect a sign per entry and average what agrees; else a weighted sum
    normalize: bool  # by default: divide by the weights


METHODS = {
    "sum": MergeMethod(None, consensus=False, normalize=False),
    "task_arithmetic": MergeMethod(None, consensus=False, normalize=False),  # Ilharco et al., 2212.04089
    "ties": MergeMethod("largest", consensus=True, normalize=True),  # Yadav et al., 2306.01708
    "dare": MergeMethod("random", consensus=False, normalize=False),  # Yu et al., 2311.03099
    "dare_ties": MergeMethod("random", consensus=True, normalize=True),  # 2311.03099, then 2306.01708
    "magnitude_prune": MergeMethod("largest", consensus=False, normalize=False),  # first step of 2306.01708
}


def keep_largest(values: Tensor, density: float, numel: int | None = None) -> Tensor:
    """Which entries are among the max(1, floor(density * numel)) largest by magnitude: bool, as `values`.

    The trimming of TIES (2306.01708, section 3, step 1) per tensor, with mergekit's count. values: 1-D.
    numel: entries of the whole tensor, if `values` lists only some of them and all others are 0. Of equal
    magnitudes the earliest stay; a 0 may be reported as not kept, which changes no sum.
    """
    numel = values.numel() if numel is None else numel
    count = max(1, int(density * numel)) if numel else 0
    if density >= 1 or count >= values.numel():
        return torch.ones_like(values, dtype=torch.bool)
    size = values.abs()
    # the count-th largest magnitude: all above it stay, and of those equal to it as many as still fit
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
            # all are drawn; kept are the outcomes of the listed positions in [start, stop)
            low, high = torch.searchsorted(positions, torch.tensor([start, stop])).tolist()
            drawn = drawn[positions[low:high] - start]
        parts.append(drawn)
    return torch.cat(parts) if parts else torch.ones(0, dtype=torch.bool)


def weighted_sum(vectors: Sequence[Tensor], weights: Sequence[float], normalize: bool) -> Tensor:
    """sum_i w_i tau_i (2212.04089, section 2); normalize: over sum_i w_i, unless that is 0."""
    total = torch.zeros_like(vectors[0])
    for vector, weight in zip(vectors, weights, strict=True):
        total += vector * weight
    divisor = torch.tensor(weights, dtype=torch.float32).sum()
    return total / divisor if normalize and divisor.abs() >= 1e-8 else total


def consensus(vectors: Sequence[Tensor], weights: Sequence[float], normalize: bool) -> Tensor:
    """TIES (2306.01708, section 3, steps 2 and 3): elect a sign per entry, average what agrees with it.

    The elected sign is that of sum_i w_i tau_i, + if the sum is 0. normalize=True: the mean of the
    agreeing nonzero entries, weighted by w_i (the paper's disjoint mean); False: their weighted sum.
    """
    weighted = [vector * weight for vector, weight in zip(vectors, weights, strict=True)]
    # elect: the sign with the larger weighted mass, per entry; all tensors are (entries,) float32
    positive = sum(weighted[1:], weighted[0].clone()) >= 0
    # average: of each entry's weighted values those that have the elected sign; a 0 has neither
    total, divisor = torch.zeros_like(weighted[0]), torch.zeros_like(weighted[0])
    for value, weight in zip(weighted, weights, strict=True):
        agrees = torch.where(positive, value > 0, value < 0)
        total += value * agrees
        divisor += agrees * weight
    if not normalize:
        return total
    return total / torch.where(divisor == 0, 1.0, divisor)


@dataclass(frozen=True)
class MergeRule:
    """A method with its numbers; made by `make_rule`."""

    method: str  # of METHODS
    weights: tuple[float, ...]  # one per task vector
    densities: tuple[float, ...]  # share of entries that stay, one per task vector
    normalize: bool
    scale: float = 1.0  # factor of the merged vector (lambda)
    seed: int = 0  # of the draws

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

        numel, positions: entries of the whole tensor, and which of them the vectors list (ascending), if they
        do not list all.
        """
        method, thinned = METHODS[self.method], []
        numel = vectors[0].numel() if numel is None else numel
        for vector, density in zip(vectors, self.densities, strict=True):
            if method.thin == "largest" and density < 1:
                vector = vector * keep_largest(vector, density, numel)
            elif method.thin == "random" and density < 1:
                # rescaled by 1/density, which leaves the expectation as it was (2311.03099, equation 1)
                vector = vector * keep_random(density, numel, generator, positions) * (1 / density)
            thinned.append(vector)
        combine = consensus if method.consensus else weighted_sum
        merged = combine(thinned, self.weights, self.normalize)
        return merged if self.scale == 1 else merged * self.scale


def make_rule(
    method: str,
    count: int,
    *,
    weights: Sequence[float] | None = None,
    density: Sequence[float] | None = None,
    normalize: bool | None = None,
    scale: float = 1.0,
    seed: int | None = None,
) -> MergeRule:
    """The rule for `count` task vectors. weights: default 1 each; density: one, or one each, default 1.

    normalize: None is the method's own. Raises one ValueError with everything that is invalid.
    """
    if method not in METHODS:
        near = difflib.get_close_matches(method, METHODS, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"method={method}: not one of {', '.join(METHODS)}{hint}")
    thin = METHODS[method].thin
    weights = [1.0] * count if weights is None else list(weights)
    densities = list(density or [1.0])
    densities = densities * count if len(densities) == 1 else densities
    problems = []
    if len(weights) != count:
        problems.append(f"weights={_shown(weights)}: give one each for the {count} task vectors")
    if not all(math.isfinite(number) for number in [*weights, scale]):
        problems.append(f"weights={_shown(weights)} scale={scale:g}: every one must be a finite number")
    if len(weights) == count and not any(weights):
        problems.append(f"weights={_shown(weights)}: nothing would be added; give one that is not 0")
    if scale == 0:
        problems.append("scale=0: nothing would be added; give another factor")
    if len(densities) != count:
        problems.append(f"density={_shown(densities)}: give one, or one each for the {count} task vectors")
    wrong = list(dict.fromkeys(number for number in densities if not 0 < number <= 1))
    if wrong:
        problems.append(f"density={_shown(wrong)}: the share that stays must be above 0 and at most 1")
    elif thin is None and min(densities) < 1:
        problems.append(
            f"density={_shown(densities)}: {method} keeps every entry; leave it out, or use magnitude_prune"
        )
    if method == "sum" and (set(weights) != {1.0} or scale != 1 or normalize):
        problems.append("method=sum adds every vector with weight 1: use task_arithmetic for other weights")
    if seed is not None and thin != "random":
        problems.append(f"seed={seed}: {method} draws nothing; leave it out")
    if problems:
        raise ValueError("\n".join(problems))
    normalize = METHODS[method].normalize if normalize is None else normalize
    return MergeRule(method, tuple(weights), tuple(densities), normalize, scale, seed or 0)


def _shown(numbers: Sequence[float]) -> str:
    return " ".join(f"{number:g}" for number in numbers)
