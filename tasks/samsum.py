r"""SAMSum: messenger dialogues and their summaries (arXiv 1911.12237, CC BY-NC-ND 4.0).

A row:
    {"id": "13730479", "dialogue": "Kent: duuude i failed the quiz\r\nClark: heyyy me too XD\r\nKent: xD\r\n
     Clark: *hi five*\r\nKent: *hi five* ..", "summary": "Kent and Clark both failed the quiz. "}
"""

from __future__ import annotations

from collections.abc import Iterator

from tasks.base import HubSet, Row, text_of
from tasks.rouge import RougeTask


class SAMSum(RougeTask):
    name = "samsum"
    splits = ("train", "validation", "test")
    hub = HubSet(
        path="knkarthick/samsum",
        revision="f8040674894a743112febaddde2b32264c07bb20",
        splits={"train": "train", "validation": "validation", "test": "test"},
    )
    closing = "\n\nSummary:\n"
    stop = ("\n\n", "\nDialogue:")
    max_new_tokens = 128

    def prompt(self, row: Row) -> str:
        return f"Dialogue:\n{row['dialogue']}{self.closing}"

    def target(self, row: Row) -> str:
        return row["summary"]

    def gold(self, row: Row) -> str | None:
        return row["summary"]

    def extract(self, completion: str) -> str | None:
        """The first paragraph, in one line."""
        paragraphs = completion.strip().split("\n\n")
        return " ".join(paragraphs[0].split()) or None

    def unpack(self, entry: Row) -> Iterator[Row]:
        dialogue = "\n".join(text_of(entry, "dialogue", empty=False).strip().splitlines())
        summary = " ".join(text_of(entry, "summary", empty=False).split())
        yield {"dialogue": dialogue, "summary": summary}


TASK = SAMSum()
