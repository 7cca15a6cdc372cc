"""Numbers over examples and how sure they are: means, perplexities, paired differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A number computed from examples."""

    value: float
    # example number -> how far that example pulls the value; for a mean: its score minus the mean
    influence: Mapping[int, float]

    @property
    def n(self) -> int:
        return len(self.influence)

    @property
    def stderr(self) -> float | None:
        """Sample deviation of the pulls over sqrt(n); None for one example."""
        return _stderr(list(self.influence.values()))

    def minus(self, other: Estimate) -> Estimate:
        """The paired difference; both must be over the same examples."""
        influence = {i: value - other.influence[i] for i, value in self.influence.items()}
        return Estimate(self.value - other.value, influence)

    def to_dict(self) -> dict[str, float | int | None]:
        return {"score": self.value, "stderr": self.stderr, "n": self.n}


def mean_and_stderr(scores: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and sample deviation (n - 1) over sqrt(n); the latter is None for a single score."""
    return statistics.fmean(scores), _stderr(scores)


def _stderr(values: Sequence[float]) -> float | None:
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    return statistics.stdev(values) / math.sqrt(len(values))


def mean(scores: Mapping[int, float]) -> Estimate:
    """The mean of scores by example number."""
    value = statistics.fmean(scores.values())
    return Estimate(value, {i: score - value for i, score in scores.items()})


def perplexity(nats: float, count: float) -> float:
    """exp(nats / count); inf if that is too large for a float."""
    try:
        return math.exp(nats / count)
    except OverflowError:
        return math.inf


def ratio(totals: Mapping[int, float], counts: Mapping[int, float]) -> Estimate:
    """Total over total count, such as nats per token; errors by linearisation of the ratio (delta method)."""
    rate = sum(totals.values()) / sum(counts.values())
    mean_count = sum(counts.values()) / len(counts)
    return Estimate(rate, {i: (totals[i] - rate * counts[i]) / mean_count for i in totals})


def corpus_perplexity(nats: Mapping[int, float], counts: Mapping[int, float]) -> Estimate:
    """exp(total nats / total count) over texts; errors by the delta method."""
    rate = ratio(nats, counts)
    value = perplexity(rate.value, 1)
    return Estimate(value, {i: value * pull for i, pull in rate.influence.items()})


def mean_of(estimates: Sequence[Estimate]) -> tuple[float, float | None]:
    """Mean over tasks, each counting the same, and its standard error (examples are independent)."""
    value = statistics.fmean(estimate.value for estimate in estimates)
    errors = [estimate.stderr for estimate in estimates if estimate.stderr is not None]
    if len(errors) < len(estimates):
        return value, None
    return value, math.sqrt(sum(error**2 for error in errors)) / len(errors)
