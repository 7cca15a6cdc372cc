"""What masks look like: density by layer and module, overlap of two masks against chance."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lota.masks import Mask

_LAYER = re.compile(r"^(.*?)\.(\d+)\.(.*)$")
OUTSIDE = "outside"  # of the layers


@dataclass(frozen=True)
class Density:
    """Kept and all entries, layers x modules; 0 entries where a layer has no such module."""

    layers: list[str]
    modules: list[str]
    kept: np.ndarray
    entries: np.ndarray

    @property
    def shares(self) -> np.ndarray:
        """Kept share of the entries, nan where there are none."""
        return _share(self.kept, self.entries)

    def with_totals(self) -> Density:
        """With a last row and a last column "all"."""
        kept, entries = (
            np.block([[part, part.sum(1, keepdims=True)], [part.sum(0), part.sum()]])
            for part in (self.kept, self.entries)
        )
        return Density([*self.layers, "all"], [*self.modules, "all"], kept, entries)


def density(mask: Mask) -> Density:
    """Density by layer and module type, read from the parameters' names.

    The layer is the first number in a name, the module what follows it (its last part only, where that is
    enough to tell the modules apart). Rows are in the order of the layers, columns in that of the names;
    what lies outside of the layers comes last.
    """
    places = {name: _place(name) for name in mask.names}
    stacks = {stack for stack, number, _ in places.values() if number is not None}
    rows = sorted({place[:2] for place in places.values()}, key=lambda row: (row[1] is None, row[0], row[1]))
    inside_first = sorted(places.values(), key=lambda place: place[1] is None)
    columns = list(dict.fromkeys(module for *_, module in inside_first))
    kept = np.zeros((len(rows), len(columns)), np.int64)
    entries = np.zeros_like(kept)
    for name, (stack, number, module) in places.items():
        cell = rows.index((stack, number)), columns.index(module)
        kept[cell] += mask.kept(name)
        entries[cell] += mask.numel(name)
    layers = [
        OUTSIDE if number is None else f"{stack}.{number}" if len(stacks) > 1 else str(number)
        for stack, number in rows
    ]
    return Density(layers, _last_parts(columns), kept, entries)


def _place(name: str) -> tuple[str, int | None, str]:
    """(stack of layers, layer, module) of a parameter's name; the layer is None outside of any stack."""
    found = _LAYER.match(name.removesuffix(".weight"))
    return (found[1], int(found[2]), found[3]) if found else ("", None, name.removesuffix(".weight"))


def _last_parts(modules: Sequence[str]) -> list[str]:
    short = [module.rpartition(".")[2] for module in modules]
    return short if len(set(short)) == len(modules) else list(modules)


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(whole.shape, math.nan), where=whole > 0)


@dataclass(frozen=True)
class Overlap:
    """Entries that two masks keep: the first, the second, both.

    expected, deviation: mean and standard deviation of `both` for two random masks that keep as many entries
    of each tensor as these do (hypergeometric, tensor by tensor; `random_like` draws such masks).
    """

    first: int
    second: int
    both: int
    expected: float
    deviation: float

    @property
    def iou(self) -> float:
        """Intersection over union, nan for two empty masks."""
        return self._over_union(self.both)

    @property
    def expected_iou(self) -> float:
        """What chance would give: the expected intersection over the union that goes with it."""
        return self._over_union(self.expected)

    def _over_union(self, both: float) -> float:
        union = self.first + self.second - both
        return both / union if union else math.nan


def overlap(first: Mask, second: Mask) -> Overlap:
    """Overlap of two masks of one model, in the memory of a tensor's bits. Raises ValueError for others."""
    first.check_same_model(second)
    both, expected, variance = 0, 0.0, 0.0
    for name in (name for name in first.names if name in second):
        a, b, n = first.kept(name), second.kept(name), first.numel(name)
        if not a or not b:
            continue
        shared = np.bitwise_and(first.bits[name].numpy(), second.bits[name].numpy())
        both += int(np.bitwise_count(shared).sum(dtype=np.int64))
        expected += a * b / n
        variance += a * b * (n - a) * (n - b) / (n * n * max(n - 1, 1))
    return Overlap(first.n_kept, second.n_kept, both, expected, math.sqrt(variance))
