"""How much task vectors have in common, pair by pair: entries, signs, direction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from torch import Tensor

ROW = "{:<9} {:>14} {:>10} {:>14} {:>15} {:>8} {:>8}".format


class Statistics:
    """Counts over whole models, gathered tensor by tensor."""

    def __init__(self, ids: Sequence[str]):
        self.ids = list(ids)
        self.entries = 0
        self.changed = [0] * len(ids)
        self.squares = [0.0] * len(ids)
        self.pairs = {
            pair: {"overlap": 0, "by_chance": 0.0, "sign_conflicts": 0, "dot": 0.0}
            for pair in combinations(range(len(ids)), 2)
        }

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
            pair["overlap"] += int(both.sum())
            pair["by_chance"] += counts[i] * counts[j] / numel
            pair["sign_conflicts"] += int((both & ((vectors[i] < 0) != (vectors[j] < 0))).sum())
            pair["dot"] += float(vectors[i].dot(vectors[j]))

    def skip(self, numel: int) -> None:
        """A tensor that no vector changes."""
        self.entries += numel

    def to_dict(self) -> dict[str, Any]:
        """Plain values; shares and cosines are None where they are 0 over 0."""
        vectors = [
            {"path": path, "changed": n, "share": _share(n, self.entries), "norm": math.sqrt(square)}
            for path, n, square in zip(self.ids, self.changed, self.squares, strict=True)
        ]
        return {
            "entries": self.entries,
            "vectors": vectors,
            "pairs": [self._pair(i, j) for i, j in self.pairs],
        }

    def _pair(self, i: int, j: int) -> dict[str, Any]:
        pair = self.pairs[i, j]
        norms = math.sqrt(self.squares[i]) * math.sqrt(self.squares[j])
        return {
            "vectors": [i, j],
            "overlap": pair["overlap"],
            "overlap_share": _share(pair["overlap"], min(self.changed[i], self.changed[j])),
            "by_chance": pair["by_chance"],
            "sign_conflicts": pair["sign_conflicts"],
            "sign_conflict_share": _share(pair["sign_conflicts"], pair["overlap"]),
            "cosine": pair["dot"] / norms if norms else None,
        }

    def table(self) -> str:
        """What `to_dict` says, as text."""
        stats = self.to_dict()
        lines = [
            f"{i}: {v['path']} changes {v['changed']:,} of {self.entries:,} entries, {_percent(v['share'])}"
            for i, v in enumerate(stats["vectors"], 1)
        ]
        if stats["pairs"]:
            lines += [
                "",
                ROW("pair", "in both", "of smaller", "by chance", "signs differ", "of both", "cosine"),
            ]
        for p in stats["pairs"]:
            cosine = "-" if p["cosine"] is None else f"{p['cosine']:.3f}"
            shares = _percent(p["overlap_share"]), _percent(p["sign_conflict_share"])
            pair = " and ".join(str(i + 1) for i in p["vectors"])
            counts = f"{p['overlap']:,}", f"{p['by_chance']:,.0f}", f"{p['sign_conflicts']:,}"
            lines.append(ROW(pair, counts[0], shares[0], counts[1], counts[2], shares[1], cosine))
        return "\n".join(lines)


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"
