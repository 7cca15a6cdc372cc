"""Word problems answered by a number, for evaluation: AddSub, MultiArith, SingleEq, SVAMP and mawps.

AddSub, MultiArith, SingleEq (arXiv 1608.01413; 395, 600 and 508 problems) in the layout of LLM-Adapters
(arXiv 2304.01933), whose solutions were written by a model and are not all right:
    {"instruction": " Nancy and her mom were picking carrots from their garden. Nancy picked 38 and her mother
     picked 47. If only 71 of the carrots were good, how many bad carrots did they have? ", "input": "",
     "output": "Nancy picked 38 carrots and her mother picked 47. ... The answer is 14.", "answer": [14.0]}
SVAMP (arXiv 2103.07191, MIT licence):
    {"Body": "There are 87 oranges and 290 bananas in Philip's collection. If the bananas are organized into 2
     groups and oranges are organized into 93 groups", "Question": "How big is each group of bananas?",
     "Equation": "( 290.0 / 2.0 )", "Answer": "145.0"}
mawps (github.com/sroy9/mawps, MIT licence) as MU-NLPC/Calc-mawps has it:
    {"question": "Fred has 40 blue marbles. Fred has 5 times more blue marbles than Tim. How many blue marbles
     does Tim have?", "result": "8", "result_float": 8.0}

Prompt, target and extraction are those of gsm8k, so that a model trained on gsm8k or mathinstruct knows them.
Answers are right within 1e-3, as LLM-Adapters counts them: published ones are rounded, such as 0.3333.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation

from tasks.base import HubSet, Row, text_of
from tasks.gsm8k import MARKER, NumberTask, find_answer

LLM_ADAPTERS = "https://raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters"
LLM_ADAPTERS_COMMIT = "816657208af4db747803f87ba40a4c71383fed7a"
TOLERANCE = Decimal("0.001")


class WordProblems(NumberTask):
    """Rows {question, solution, answer}, answer being a number in normal form."""

    version = 2  # 1: answers were compared as text

    def __init__(self, name: str, hub: HubSet) -> None:
        self.name, self.hub = name, hub
        self.splits = tuple(hub.splits)

    def target(self, row: Row) -> str:
        """The solution, if it comes to the row's answer, and the answer."""
        answer = f"{MARKER} {row['answer']}"
        return f"{row['solution']}\n{answer}" if find_answer(row["solution"]) == row["answer"] else answer

    def gold(self, row: Row) -> str | None:
        return row["answer"]

    def score(self, extracted: str | None, gold: str | None) -> float:
        if extracted is None or gold is None:
            return 0.0
        return float(abs(Decimal(extracted) - Decimal(gold)) <= TOLERANCE)

    def unpack(self, entry: Row) -> Iterator[Row]:
        if "instruction" in entry:
            question, solution = text_of(entry, "instruction"), text_of(entry, "output")
        elif "Body" in entry:
            # a body without its full stop runs into the question
            body = text_of(entry, "Body").strip()
            question = f"{body}{'' if body.endswith(('.', ',', '?')) else ','} {text_of(entry, 'Question')}"
            solution = ""
        else:
            question, solution = text_of(entry, "question", empty=False), ""
        field = next((field for field in ("answer", "Answer", "result") if field in entry), "answer")
        question = re.sub(r"\s+", " ", question).strip()
        if not question:
            raise ValueError("the question is empty")
        yield {"question": question, "solution": solution.strip(), "answer": _number(entry, field)}


def _number(entry: Row, field: str) -> str:
    """A number, as itself, as text or alone in a list, in normal form."""
    value = entry.get(field)
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    try:
        number = Decimal(str(value).replace(",", "").strip())
        if not number.is_finite():
            raise InvalidOperation
    except InvalidOperation:
        raise ValueError(f"field {field!r} should be a number, is {value!r:.60}") from None
    return find_answer(f"{MARKER} {number:f}") or ""


def _adapters(name: str) -> HubSet:
    return HubSet(LLM_ADAPTERS, LLM_ADAPTERS_COMMIT, {"test": "test"}, file=f"dataset/{name}/{{split}}.json")


SVAMP = HubSet(
    path="ChilleD/SVAMP",
    revision="5e0bf1e5e7c0e9c4bc39180d224f41f3f801b7ef",
    splits={"train": "train", "test": "test"},
)
MAWPS = HubSet(
    path="MU-NLPC/Calc-mawps",
    revision="38c10053efeafd20ab6ff4e08c3ec17de26c19b7",
    splits={"train": "train", "validation": "validation", "test": "test"},
)
TASKS = {
    **{name: WordProblems(name, _adapters(name)) for name in ("AddSub", "MultiArith", "SingleEq")},
    "SVAMP": WordProblems("SVAMP", SVAMP),
    "mawps": WordProblems("mawps", MAWPS),
}
