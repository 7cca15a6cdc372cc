"""How much task vectors have in common, pair by pair: entries, signs, direction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from torch import Tensor

from lota.utils import aligned


@dataclass
class _PairCounts:
    """What two vectors have in common."""

    overlap: int = 0  # entries that both change
    by_chance: float = 0.0  # the overlap to expect of as many entries drawn at random, tensor by tensor
    sign_conflicts: int = 0  # entries that both change, in opposite directions
    dot: float = 0.0


class VectorStatistics:
    """Counts over whole models, gathered tensor by tensor."""

    def __init__(self, ids: Sequence[str]):
        self.ids = list(ids)
        self.entries = 0
        self.changed = [0] * len(ids)  # entries that are not 0, per vector
        self.squares = [0.0] * len(ids)  # sums of squares, per vector
        self.pairs = {pair: _PairCounts() for pair in combinations(range(len(ids)), 2)}

    def add(self, vectors: Sequence[Tensor], numel: int) -> None:
        """One tensor's aligned parts, 1-D float32. numel: its entries; those not listed are 0 in all."""
        self.entries += numel
        present = [vector != 0 for vector in vectors]
        counts = [int(mask.sum()) for mask in present]
        for i, vector in enumerate(vectors):
            self.changed[i] += counts[i]
            self.squares[i] += float(vector.dot(vector))
        for (i, j), pair in self.pairs.items():
            both = present[i] & present[j]
            pair.overlap += int(both.sum())
            pair.by_chance += counts[i] * counts[j] / numel
            pair.sign_conflicts += int((both & ((vectors[i] < 0) != (vectors[j] < 0))).sum())
            pair.dot += float(vectors[i].dot(vectors[j]))

    def to_dict(self) -> dict[str, Any]:
        """Plain values; shares and cosines are None if they are 0 over 0."""
        norms = [math.sqrt(square) for square in self.squares]
        return {
            "entries": self.entries,
            "vectors": [
                {"path": path, "changed": n, "share": _share(n, self.entries), "norm": norm}
                for path, n, norm in zip(self.ids, self.changed, norms, strict=True)
            ],
            "pairs": [
                {
                    "vectors": [i, j],
                    "overlap": pair.overlap,
                    "overlap_share": _share(pair.overlap, min(self.changed[i], self.changed[j])),
                    "by_chance": pair.by_chance,
                    "sign_conflicts": pair.sign_conflicts,
                    "sign_conflict_share": _share(pair.sign_conflicts, pair.overlap),
                    "cosine": _share(pair.dot, norms[i] * norms[j]),
                }
                for (i, j), pair in self.pairs.items()
            ],
        }

    def table(self) -> str:
        """What `to_dict` says, as text."""
        stats = self.to_dict()
        lines = [
            f"{i}: {v['path']} changes {v['changed']:,} of {self.entries:,} entries, {_percent(v['share'])}"
            for i, v in enumerate(stats["vectors"], 1)
        ]
        cells = [("pair", "in both", "of smaller", "by chance", "signs differ", "of both", "cosine")]
        for pair in stats["pairs"]:
            cells.append(
                (
                    " and ".join(str(i + 1) for i in pair["vectors"]),
                    f"{pair['overlap']:,}",
                    _percent(pair["overlap_share"]),
                    f"{pair['by_chance']:,.0f}",
                    f"{pair['sign_conflicts']:,}",
                    _percent(pair["sign_conflict_share"]),
                    "-" if pair["cosine"] is None else f"{pair['cosine']:.3f}",
                )
            )
        return "\n".join(lines if len(cells) == 1 else [*lines, "", *aligned(cells)])


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"
