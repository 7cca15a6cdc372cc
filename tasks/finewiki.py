"""The first 100 articles of FineWiki's English Wikipedia (CC BY-SA 4.0), which show what a model forgets.

A row: {"text": "Article text ..."}. PEFT's comparison of methods on MetaMathQA reads the same rows, of each
the first 768 tokens (scripts/metamathqa.py).
"""

from __future__ import annotations

from tasks.base import HubSet, Row, Task
from tasks.hub import UNPINNED

N_ROWS = 100


class FineWiki(Task):
    name = "finewiki"
    metric = "word_perplexity"
    more_metrics = ("token_perplexity",)
    scoring = ("perplexity",)
    splits = ("test",)
    hub = HubSet(
        path="HuggingFaceFW/finewiki",
        revision=UNPINNED,
        splits={"test": "train"},
        first=N_ROWS,
        n_rows={"test": N_ROWS},
    )
    fields = ("text",)

    def prompt(self, row: Row) -> str:
        return ""

    def target(self, row: Row) -> str:
        return row["text"]

    def n_words(self, row: Row) -> int:
        return len(row["text"].split())


TASK = FineWiki()
