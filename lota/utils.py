"""Problems reported together, and text."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
LONGEST_NAME = 200  # bytes of a file's or folder's name; file systems allow 255, and endings are added to it


# Problems


class Problems:
    """What went wrong in several checks, each of which may raise ValueError."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def attempt(self, check: Callable[..., T], *arguments: Any, **named: Any) -> T | None:
        """Returns the check's result, or None if it raised ValueError, whose message is kept."""
        try:
            return check(*arguments, **named)
        except ValueError as error:
            self.found.append(str(error))
            return None

    def refuse(self) -> None:
        """Raise one ValueError with every message once, if there is any."""
        if self.found:
            raise ValueError("\n".join(dict.fromkeys(self.found)))


# Text


def first_few(items: Sequence[object], shown: int = 5) -> str:
    """The first few of a list, and how many more there are."""
    more = f" ... and {len(items) - shown} more" if len(items) > shown else ""
    return ", ".join(str(item) for item in items[:shown]) + more


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


def name_problem(name: str) -> str:
    """Why a name, of one part or several with slashes between them, cannot be that of a folder inside another
    one; empty if it can.
    """
    parts = Path(name).parts
    if not parts:
        return "must name a folder"
    if Path(name).is_absolute() or ".." in parts:
        return "must be a name inside the folder, not a path that leads out of it"
    if any(part.startswith(".") for part in parts):
        return "no part may begin with a dot, as temporary files do"
    if not name.isprintable():
        return "must have printable characters only"
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in parts):
        return f"no part may be longer than {LONGEST_NAME} bytes"
    return ""


def with_flags(error: Exception, args: argparse.Namespace, **flags: str) -> str:
    """An error of the library, which names arguments (`seed=3`), with a command's flags instead (`--seed 3`).

    args: the command's parsed arguments. flags: for arguments whose flag is another word.
    """
    names = "|".join([*vars(args), *flags])
    return re.sub(rf"(?<![^\s(])({names})=", lambda found: f"--{flags.get(found[1], found[1])} ", str(error))


def short_names(paths: Sequence[str | os.PathLike[str]], alike: bool = True) -> list[str]:
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
