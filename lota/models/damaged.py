"""What a file really is that should hold weights or JSON and does not, in words that say what to do."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lota.storage import parse_json

_WEB_PAGE = (b"<!doctype", b"<html", b"<head", b"<?xml")


def refuse_stranger(path: Path) -> None:
    """Raise ValueError for a file that is empty, a Git LFS pointer or a web page, by its first bytes."""
    with open(path, "rb") as file:
        start = file.read(512).lstrip().lower()
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: copy or download it again")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{path} is a Git LFS pointer, not the file that it stands for: run `git lfs pull` in its folder"
        )
    if start.startswith(_WEB_PAGE):
        raise ValueError(
            f"{path} is a web page, such as a server answers with in place of a file: download it again"
        )


def refuse_damaged_json(folder: Path, names: Iterable[str]) -> None:
    """Raise ValueError for the first of these files of a folder that is no JSON object."""
    for path in (folder / name for name in names):
        if path.is_file():
            refuse_stranger(path)
            try:
                content = parse_json(path.read_bytes())
            except ValueError as error:
                raise ValueError(
                    f"{path} is damaged: {one_line(error)}; copy or download it again"
                ) from error
            if not isinstance(content, dict):
                raise ValueError(f"{path} is damaged: it holds no JSON object; copy or download it again")


def one_line(error: Exception) -> str:
    """An error of another library in one line, with its kind if it says little."""
    text = " ".join(str(error).split())[:300]
    return text if len(text) > 20 else f"{type(error).__name__}: {text}"
