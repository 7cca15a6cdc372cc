"""Tables as text, and short names for the files and folders that stand in them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def aligned(lines: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of cells as lines of text: the first `left` columns to the left, all others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if at < left else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def short_names(paths: Sequence[str | os.PathLike]) -> list[str]:
    """For each path its last parts, as few as tell all of them apart, joined by slashes.

    Equal paths get equal names.
    """
    parts = [Path(os.path.abspath(path)).parts[1:] for path in paths]
    different = len(set(parts))
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == different:
            return names
    return ["/".join(part) for part in parts]
