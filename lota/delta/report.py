"""What a delta file holds, as text: metadata, size against the entropy, changes per kind of weight."""

from __future__ import annotations

import math
import os
import re
from collections import Counter

from lota.delta.reader import Delta

SHOWN = ("task", "base", "base_hash", "tuned", "tuned_hash", "dtype", "sparsity", "kept", "chat_template")


def report(path: str | os.PathLike) -> str:
    """Lines on a delta file. Raises ValueError unless it is whole."""
    delta = Delta.open(path)
    lines = [f"{delta.path}: {delta.n_changed:,} of {delta.meta['entries']:,} entries changed"]
    lines += [f"  {key:13} {delta.meta[key]}" for key in SHOWN if delta.meta.get(key) is not None]
    size, bound = delta.path.stat().st_size, entropy_bytes(delta)
    each = f", {8 * size / delta.n_changed:.1f} bits for each changed entry" if delta.n_changed else ""
    lines.append(f"  {'size':13} {size:,} bytes{each}")
    if bound:
        lines.append(f"  {'':13} {size / bound:.3f} of the entropy of the positions + the values as they are")
    changed, entries = Counter(), Counter()
    for parameter in delta.parameters.values():
        kind = re.sub(r"\.\d+\.", ".*.", parameter.name)
        changed[kind] += parameter.changed
        entries[kind] += parameter.numel
    lines += [f"  {100 * changed[k] / entries[k]:8.4f} %  {k}" for k in entries if changed[k]]
    return "\n".join(lines)


def entropy_bytes(delta: Delta) -> float:
    """Bytes that the changes take if nothing is known of them but how many there are.

    The entropy of their positions among the entries of the parameters that changed, and every value in full.
    """
    parameters = [delta.parameters[name] for name in delta.names]
    values = sum(p.changed * p.dtype.itemsize for p in parameters)
    return entropy_bits(sum(p.numel for p in parameters), delta.n_changed) / 8 + values


def entropy_bits(n: int, changed: int) -> float:
    """Entropy of n independent entries of which that share changed."""
    p = changed / n if n else 0.0
    return -sum(q * math.log2(q) for q in (p, 1 - p) if q > 0) * n
