"""A page of figures, tables and notes in one HTML file that needs nothing else, and its figures as files."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from lota.plots import is_drawn_here, png
from lota.storage import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "index.html"
HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em;
  color: #222; }}
h2 {{ margin-top: 2em; border-bottom: 1px solid #ccc; }}
img {{ max-width: 100%; height: auto; }}
.figure {{ display: inline-block; margin: 0.5em 0; vertical-align: top; }}
.wide {{ overflow-x: auto; }}
li {{ overflow-wrap: anywhere; }}
table {{ border-collapse: collapse; font-size: 13px; margin: 1em 0; }}
th, td {{ padding: 0.2em 0.8em; text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
</style></head><body>
<h1>{title}</h1>"""


Lines = Sequence[Sequence[str]]  # a table: lines of cells, the header first


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    title: str
    text: str = ""  # paragraphs, parted by empty lines
    figure: Figure | None = None
    file: str = ""  # name of the picture, without its ending; "": it is in the page alone
    table: Lines = ()
    items: Sequence[str] = ()
    level: int = 2  # of the heading; "" as title: none, the section goes on with the one before
    alt: str = ""  # what the figure shows, for who cannot see it; "": the title


def markdown(table: Lines) -> str:
    """The table in Markdown."""
    header, *lines = ([cell.replace("|", "\\|") for cell in line] for line in table)
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines))


def file_name(*words: str) -> str:
    """The words as the name of a file."""
    return re.sub(r"[^\w.-]+", "_", "_".join(words))


def cell(value: float | None, fmt: str, stderr: float | None = None) -> str:
    """A number, with its standard error if that is known, as a cell of a table; "-" for None."""
    if value is None:
        return "-"
    return f"{value:{fmt}}" + ("" if stderr is None else f" ± {stderr:{fmt}}")


def write_page(folder: Path, title: str, sections: Sequence[Section], name: str = PAGE) -> list[Path]:
    """Write the page and a PNG per figure that has a file; returns their paths, the page first.

    All is drawn before anything is written. Each file replaces one of its name that an earlier page was made
    of; others in the folder stay. Raises ValueError if a file of its name is somebody else's.
    """
    pictures = [png(section.figure) if section.figure is not None else None for section in sections]
    parts = [HEAD.format(title=escape(title))]
    files = {}
    for section, picture in zip(sections, pictures, strict=True):
        parts += _html(section, picture)
        if picture is not None and section.file:
            files[folder / f"{section.file}.png"] = picture
    _refuse_foreign(folder / name, files)
    files = {folder / name: "\n".join([*parts, "</body></html>", ""]).encode(), **files}
    for path, content in files.items():
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
    return list(files)


def _refuse_foreign(page: Path, pictures: Iterable[Path]) -> None:
    """Raise ValueError for files in the way that no earlier page wrote.

    A page has our heading; a picture says what drew it, or stands in the page beside it.
    """
    text = page.read_text(encoding="utf-8", errors="replace") if page.is_file() else ""
    before, style, _ = HEAD.format(title="\0").split("\0")
    start = "\n".join(style.split("\n")[:2])  # of the style; the rest differs between versions
    own_page = text.startswith(before) and start in text
    foreign = [page] if page.exists() and not own_page else []
    for picture in filter(Path.exists, pictures):
        content = picture.read_bytes() if picture.is_file() else b""
        own = bool(content) and is_drawn_here(picture)
        if not own and not (own_page and content and base64.b64encode(content).decode() in text):
            foreign.append(picture)
    if foreign:
        names = ", ".join(path.name for path in foreign)
        raise ValueError(f"{page.parent} holds {names}, which no page of runs wrote: give another --out")


def _html(section: Section, picture: bytes | None) -> Iterator[str]:
    """picture: content of a PNG file, which is embedded."""
    if section.title:
        yield f"<h{section.level}>{escape(section.title)}</h{section.level}>"
    for paragraph in filter(None, section.text.split("\n\n")):
        yield f"<p>{escape(paragraph)}</p>"
    if picture is not None and section.figure is not None:
        width = round(96 * section.figure.get_figwidth())  # as large as drawn: its letters are those of text
        source = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
        alt = escape(section.alt or section.title)
        yield f'<p class="figure"><img alt="{alt}" width="{width}" src="{source}"></p>'
    if section.table:
        yield '<div class="wide"><table>'
        for tag, line in zip(["th", *["td"] * len(section.table)], section.table, strict=False):
            yield "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in line) + "</tr>"
        yield "</table></div>"
    if section.items:
        yield "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in section.items) + "</ul>"
