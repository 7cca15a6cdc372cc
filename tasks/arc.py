"""ARC-Challenge: school science questions with three to five choices (arXiv 1803.05457, CC BY-SA 4.0).

A row:
    {"id": "Mercury_SC_415702", "question": "George wants to warm his hands quickly by rubbing them. Which
     skin surface will produce the most heat?", "choices": {"text": ["dry palms", "wet palms", "palms covered
     with oil", "palms covered with lotion"], "label": ["A", "B", "C", "D"]}, "answerKey": "A"}

Some rows label their choices 1 to 4; all are shown with letters here. The target is "A. dry palms".
"""

from __future__ import annotations

from collections.abc import Iterator

from tasks.base import HubSet, Row, text_of
from tasks.choices import LetterTask, labelled_choices, letter_row


class ARC(LetterTask):
    name = "arc"
    hub = HubSet(
        path="allenai/ai2_arc",
        name="ARC-Challenge",
        revision="210d026faf9955653af8916fad021475a3f00453",
        splits={"train": "train", "test": "test"},
    )

    def unpack(self, entry: Row) -> Iterator[Row]:
        options, answer = labelled_choices(entry)
        yield letter_row(text_of(entry, "question", empty=False), options, answer)


TASK = ARC()
