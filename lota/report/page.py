"""A page of figures, tables and notes in one HTML file that needs nothing else, and its figures as files."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lota.plots import png
from lota.utils import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure


PAGE = "index.html"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222; }
h2 { margin-top: 2em; border-bottom: 1px solid #ccc; }
img { max-width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; margin: 1em 0; }
th, td { padding: 0.2em 0.8em; text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
"""


@dataclass(frozen=True)
class Section:
    """A part of the page. file: name of the picture, no ending; table: lines of cells, the header first."""

    title: str
    text: str = ""
    figure: Figure | None = None
    file: str = ""
    table: Sequence[Sequence[str]] = field(default_factory=list)
    items: Sequence[str] = field(default_factory=list)


def file_name(*words: str) -> str:
    """The words as the name of a file."""
    return re.sub(r"[^\w.-]+", "_", "_".join(words))


def write_report(folder: Path, title: str, sections: Sequence[Section]) -> list[Path]:
    """Write index.html and a PNG per figure; returns their paths, the page first.

    All is drawn before anything is written. Each file replaces one of its name; others in the folder stay.
    """
    pictures = [png(section.figure) if section.figure is not None else None for section in sections]
    files = []
    for section, picture in zip(sections, pictures, strict=True):
        if picture is not None:
            files.append(folder / f"{section.file}.png")
            with atomic_path(files[-1]) as temporary:
                temporary.write_bytes(picture)
    with atomic_path(folder / PAGE) as temporary:
        temporary.write_text(page(title, sections, pictures), encoding="utf-8")
    return [folder / PAGE, *files]


def page(title: str, sections: Sequence[Section], pictures: Sequence[bytes | None]) -> str:
    """The HTML text; pictures: PNG content per section, embedded."""
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
    ]
    for section, picture in zip(sections, pictures, strict=True):
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        if section.text:
            parts.append(f"<p>{html.escape(section.text)}</p>")
        if picture is not None:
            content = base64.b64encode(picture).decode()
            alt = html.escape(section.title, quote=True)
            parts.append(f'<p><img alt="{alt}" src="data:image/png;base64,{content}"></p>')
        if section.table:
            parts.append(_table(section.table))
        if section.items:
            parts.append(
                "<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in section.items) + "</ul>"
            )
    return "\n".join([*parts, "</body></html>", ""])


def _table(lines: Sequence[Sequence[str]]) -> str:
    rows = []
    for at, line in enumerate(lines):
        tag = "td" if at else "th"
        rows.append("<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line) + "</tr>")
    return '<div class="wide"><table>' + "\n".join(rows) + "</table></div>"
