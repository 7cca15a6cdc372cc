"""WikiText-2: Wikipedia articles, for the perplexity of held-out text (arXiv 1609.07843, CC BY-SA 3.0).

A row is an article, put together from the lines of file or hub set, which stay as they are, blanks and all:
    {"text": " = Homarus gammarus = \\n \\n Homarus gammarus , known as the European lobster or common
     lobster , is a species of <unk> lobster from the eastern Atlantic Ocean , ..."}

Word perplexity is over `n_words`: what blanks separate, and one more per line for its end, as is usual for
this set. A row is learnt or scored as text: its prompt is empty.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence

from tasks.base import HubSet, Row, Task

_HEADING = re.compile(r" ?= [^=].* = ?\n?\Z")


class WikiText(Task):
    name = "wikitext"
    metric = "word_perplexity"
    more_metrics = ("token_perplexity",)
    scoring = ("perplexity",)
    splits = ("train", "validation", "test")
    held_out = "validation"
    hub = HubSet(
        path="Salesforce/wikitext",
        name="wikitext-2-v1",
        revision="b08601e04326c79dfdd32d625aee71d232d685c3",
        splits={"train": "train", "validation": "validation", "test": "test"},
    )
    fields = ("text",)

    def prompt(self, row: Row) -> str:
        return ""

    def target(self, row: Row) -> str:
        return row["text"]

    def n_words(self, row: Row) -> int:
        return len(row["text"].split()) + row["text"].count("\n")

    def load(self, split: str, data_dir: str | os.PathLike[str]) -> list[Row]:
        """The articles of a split; errors as `Task.load`."""
        return articles([row["text"] for row in super().load(split, data_dir)])


def articles(lines: Sequence[str]) -> list[Row]:
    """Rows of one article each: it starts at a heading of the first level that stands between empty lines."""
    lines = [line.removesuffix("\n") for line in lines]
    blank = [not line.strip() for line in ["", *lines, ""]]
    starts = [i for i, line in enumerate(lines) if _HEADING.match(line) and blank[i] and blank[i + 2]]
    bounds = [0, *(start for start in starts if any(not empty for empty in blank[1 : start + 1])), len(lines)]
    texts = ["".join(f"{line}\n" for line in lines[a:b]) for a, b in itertools.pairwise(bounds)]
    return [{"text": text} for text in texts]


TASK = WikiText()
