r"""Multiple-choice word problems with rationales, for evaluation: AQuA and mathqa.

AQuA (arXiv 1705.04146, Apache-2.0):
    {"question": "What is 60% of 30% of 1400 grams?", "options": ["A)450 gms", "B)100 gms", "C)252 gms",
     "D)240 gms", "E)None of these"], "rationale": "...", "correct": "C"}
mathqa (arXiv 1905.13319, Apache-2.0):
    {"Problem": "the banker ' s gain of a certain sum due 3 years hence at 10 % per annum is rs . 36 . what is
     the present worth ?", "Rationale": "explanation : t = 3 years ...", "options": "a ) rs . 400 , b ) rs .
     300 , c ) rs . 500 , d ) rs . 350 , e ) none of these", "correct": "a"}
Either may also come in the layout of LLM-Adapters (arXiv 2304.01933), whose rationales a model wrote:
    {"instruction": "What is 60% ... grams? Answer Choices: (A) 450 gms (B) 100 gms (C) 252 gms (D) 240 gms
     (E) None of these", "input": "", "output": "60% of ... = 252 gms.The answer is (C).", "answer": "C"}
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from tasks.base import HubSet, Row, text_of
from tasks.choices import LetterTask, letter_row
from tasks.hub import UNPINNED

_MARK = r"(?:\A|[\s,\['\"(])\(?([A-Ea-e])\s*\)"


class MathChoice(LetterTask):
    rationales = True
    max_new_tokens = 400

    def __init__(self, name: str, hub: HubSet) -> None:
        self.name, self.hub = name, hub
        self.splits = tuple(hub.splits)

    def unpack(self, entry: Row) -> Iterator[Row]:
        options: object  # as text or as a list
        if "instruction" in entry:
            question, _, listed = text_of(entry, "instruction").partition("Answer Choices:")
            rationale, options, correct = text_of(entry, "output"), listed, entry.get("answer")
        else:
            problem = "Problem" if "Problem" in entry else "question"
            reason = "Rationale" if "Rationale" in entry else "rationale"
            question, rationale = text_of(entry, problem, empty=False), text_of(entry, reason)
            options, correct = entry.get("options"), entry.get("correct")
        yield letter_row(question, *_options(options, correct), rationale.strip().strip('"'))


def _options(listed: object, correct: object) -> tuple[list[str], int]:
    """Texts of the options, and the place of the right one, from "a ) x , b ) y" or ["A)x", "B)y"]."""
    text = " , ".join(map(str, listed)) if isinstance(listed, list) else str(listed)
    parts = re.split(_MARK, text)
    letters = [letter.upper() for letter in parts[1::2]]
    texts = [part.strip(" ,'\"]") for part in parts[2::2]]
    if len(letters) < 2 or letters != list("ABCDE"[: len(letters)]):
        raise ValueError(f"field 'options' should list A) to E), is {text!r:.60}")
    answer = correct[0] if isinstance(correct, list) and correct else correct
    if str(answer).upper() not in letters:
        raise ValueError(f"field 'correct' should be one of {', '.join(letters)}, is {correct!r:.60}")
    return texts, letters.index(str(answer).upper())


AQUA = HubSet(
    path="deepmind/aqua_rat",
    name="raw",
    revision="33301c6a050c96af81f63cad5562cb5363e88971",
    splits={"train": "train", "validation": "validation", "test": "test"},
)
# Only the first seven digits of its one commit with data could be confirmed, 74791dc, but the hub's libraries
# take whole hashes only. Its rows are counted instead.
MATH_QA = HubSet(
    path="regisss/math_qa",
    revision=UNPINNED,
    splits={"train": "train", "validation": "validation", "test": "test"},
    n_rows={"train": 29837, "validation": 4475, "test": 2985},
)
TASKS = {task.name: task for task in (MathChoice("AQuA", AQUA), MathChoice("mathqa", MATH_QA))}
