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


def short_names(paths: Sequence[str | os.PathLike], alike: bool = True) -> list[str]:
    """For each path its last parts, as few as tell all of them apart, joined by slashes.

    alike: all names have as many parts; else each has as few as it can. Equal paths get equal names.
    """
    parts = [Path(os.path.abspath(path)).parts[1:] for path in paths]
    lengths = [_telling_length(part, parts) for part in parts]
    return ["/".join(part[-(max(lengths) if alike else n) :]) for part, n in zip(parts, lengths, strict=True)]


def _telling_length(part: tuple[str, ...], parts: Sequence[tuple[str, ...]]) -> int:
    others = {other for other in parts if other != part}
    lengths = range(1, len(part) + 1)
    return next((n for n in lengths if all(other[-n:] != part[-n:] for other in others)), len(part) or 1)
