"""What the studies compare: methods of adaptation, each at the best learning rate of one grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scripts.cells import Record

RATES = tuple(digit * 10.0**power for power in range(-5, 1) for digit in (1, 2, 5))


@dataclass(frozen=True)
class Method:
    """What trains, and how."""

    name: str  # a line of a figure: the same at every sparsity
    sparsity: float | None = None  # of the mask, or of the mask whose entries LoRA's count is to match
    saliency: str | None = None  # of the mask
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the run, `Config`'s keys
    lora: bool = False
    passes: int = 1  # length over that of the workload's run
    budget: int | None = None  # steps that the mask's saliency comes from; None: as many as a run has
    start: float = 1e-3  # rate that the search begins with
    granularity: str = "element"
    block: int = 64
    rule: Mapping[str, Any] = field(default_factory=dict)  # further fields of the mask's `Rule`

    @property
    def key(self) -> Record:
        """What tells its runs from others."""
        return {"method": self.name, "sparsity": self.sparsity}


DENSE = Method("full fine-tuning", start=1e-3)
# of what masks choose from: embeddings and head stay, as they do with masks and LoRA
SCOPE = Method("full fine-tuning of attention and MLP", 0.0, "magnitude", start=1e-3)


def best_rate(rates: Sequence[float], start: float, loss: Callable[[float], float]) -> float:
    """The rate with the least loss of those around `start` and around the best; its neighbours are worse,
    unless the grid ends.
    """
    best = min(range(len(rates)), key=lambda i: abs(rates[i] - start))
    tried: dict[int, float] = {}
    while wanted := {i for i in (best - 1, best, best + 1) if 0 <= i < len(rates)} - tried.keys():
        tried |= {i: loss(rates[i]) for i in sorted(wanted)}
        best = min(tried, key=lambda i: tried[i])
    return rates[best]
