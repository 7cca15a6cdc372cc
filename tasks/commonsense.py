"""Commonsense reasoning: the 170k training mix, and the eight tasks that it is evaluated on.

All rows have the layout of LLM-Adapters (arXiv 2304.01933), in which a choice is a word. ARC-Challenge:
    {"instruction": "Please choose the correct answer to the question: George wants to warm his hands quickly
     by rubbing them. Which skin surface will produce the most heat?\\n\\nAnswer1: dry palms Answer2: wet
     palms Answer3: palms covered with oil Answer4: palms covered with lotion\\n\\nAnswer format:
     answer1/answer2/answer3/answer4", "input": "", "output": "the correct answer is answer1",
     "answer": "answer1"}
Rows of the sets on the hub are brought into that layout, so that prompts are the same. The test split is what
the literature reports on: the published validation split if the test answers are secret (all but ARC-* and
openbookqa). Sources: boolq arXiv 1905.10044, piqa 1911.11641, social_i_qa 1904.09728, ARC-* 1803.05457,
openbookqa 1809.02789, hellaswag 1905.07830, winogrande 1907.10641.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from tasks.base import HubSet, Row, Task, text_of
from tasks.choices import find_label, labelled_choices
from tasks.math_word import LLM_ADAPTERS, LLM_ADAPTERS_COMMIT

# No digit or letter may follow: "answer12" and "trueish" name no choice.
_NUMBERED = r"\b{}\s?[1-5](?![0-9A-Za-z])"
_WORDS = "(?:answer|solution|option|ending)"
_TRUTH = r"\b(?:true|false)\b"


class Commonsense(Task):
    """Rows {instruction, input, output, answer}; label: pattern of what names a choice."""

    version = 2  # 1: "isn't true" was true
    scoring = ("generation", "loglik")
    fields = ("instruction", "output", "answer")
    closing = "\n\nAnswer:\n"
    stop = ("\n\n",)
    max_new_tokens = 32
    label = f"{_TRUTH}|{_NUMBERED.format(_WORDS)}"

    def prompt(self, row: Row) -> str:
        given = row.get("input", "").strip()
        return "\n\n".join(filter(None, (row["instruction"].strip(), given))) + self.closing

    def target(self, row: Row) -> str:
        return row["output"].strip()

    def gold(self, row: Row) -> str | None:
        return row["answer"]

    def extract(self, completion: str) -> str | None:
        return find_label(completion, self.label)

    def choices(self, row: Row) -> list[str]:
        return [_statement(label) for label in labels_of(row)]

    def choice(self, row: Row) -> int:
        return labels_of(row).index(row["answer"])

    def check(self, row: Row) -> None:
        super().check(row)
        labels = labels_of(row)
        if row["answer"] not in labels:
            raise ValueError(f"field 'answer' is {row['answer']!r:.60}, none of {'/'.join(labels)}")
        if self.extract(row["output"]) != row["answer"]:
            raise ValueError(f"field 'output' is {row['output']!r:.60}, but 'answer' {row['answer']!r}")


def _statement(label: str) -> str:
    return f"the correct answer is {label}"


def labels_of(row: Row) -> list[str]:
    """The choices of a row, as its instruction lists them last: "Answer format: true/false"."""
    found = re.search(r"Answer format:\s*([a-z0-9]+(?:/[a-z0-9]+)+)\s*\Z", row["instruction"])
    if found is None:
        raise ValueError("field 'instruction' should end with 'Answer format: ' and the choices, as in a/b")
    return found[1].split("/")


class Mix(Commonsense):
    name = "commonsense"
    splits = ("train",)
    held_out = None
    hub = HubSet(
        LLM_ADAPTERS, LLM_ADAPTERS_COMMIT, {"train": "train"}, file="ft-training_set/commonsense_170k.json"
    )


class OneOfEight(Commonsense):
    """word: what its choices are called, None for true/false; convert: from a row of the hub set."""

    def __init__(self, name: str, word: str | None, hub: HubSet, convert: Callable[[Row], Row]) -> None:
        self.name, self.hub, self._convert = name, hub, convert
        self.label = _NUMBERED.format(word) if word else _TRUTH

    def unpack(self, entry: Row) -> Iterator[Row]:
        yield entry if "instruction" in entry else self._convert(entry)


def _row(request: str, labels: Sequence[str], answer: str) -> Row:
    """A row of the layout."""
    instruction = f"{request}\n\nAnswer format: {'/'.join(labels)}"
    return {"instruction": instruction, "input": "", "output": _statement(answer), "answer": answer}


def _numbered_row(request: str, word: str, texts: Sequence[str], answer: int, between: str = " ") -> Row:
    """A row of the layout for numbered choices; answer: place of the right one."""
    if not 0 <= answer < len(texts):
        raise ValueError(f"the right choice is {answer + 1} of {len(texts)}")
    labels = [f"{word}{number}" for number in range(1, len(texts) + 1)]
    listed = between.join(f"{label.capitalize()}: {text}" for label, text in zip(labels, texts, strict=True))
    return _row(f"{request}\n\n{listed}", labels, labels[answer])


def _place(entry: Row, field: str, first: int) -> int:
    """The place in a field that counts from `first`; hub sets write it as text or number."""
    value = entry.get(field)
    if isinstance(value, bool) or not re.fullmatch(r"[0-9]+", str(value)):
        raise ValueError(f"field {field!r} should be the number of a choice, is {value!r:.60}")
    return int(str(value)) - first


def _texts(entry: Row, *fields: str) -> list[str]:
    return [text_of(entry, field).strip() for field in fields]


def _boolq(entry: Row) -> Row:
    if not isinstance(entry.get("answer"), bool):
        raise ValueError(f"field 'answer' should be true or false, is {entry.get('answer')!r:.60}")
    (question,) = _texts(entry, "question")
    request = f"Please answer the following question with true or false, question: {question}?"
    return _row(request, ("true", "false"), str(entry["answer"]).lower())


def _piqa(entry: Row) -> Row:
    goal, *solutions = _texts(entry, "goal", "sol1", "sol2")
    request = f"Please choose the correct solution to the question: {goal}"
    return _numbered_row(request, "solution", solutions, _place(entry, "label", 0), between="\n\n")


def _social_i_qa(entry: Row) -> Row:
    context, question, *answers = _texts(entry, "context", "question", "answerA", "answerB", "answerC")
    request = f"Please choose the correct answer to the question: {context} {question}"
    return _numbered_row(request, "answer", answers, _place(entry, "label", 1))


def _science(entry: Row) -> Row:
    """ARC and OpenBookQA."""
    (question,) = _texts(entry, "question_stem" if "question_stem" in entry else "question")
    request = f"Please choose the correct answer to the question: {question}"
    return _numbered_row(request, "answer", *labelled_choices(entry))


def _hellaswag(entry: Row) -> Row:
    about, context = _texts(entry, "activity_label", "ctx")
    endings = entry.get("endings")
    if not isinstance(endings, list):
        raise ValueError(f"field 'endings' should be a list of texts, is {endings!r:.60}")
    request = "Please choose the correct ending to complete the given sentence: "
    cleaned = [_without_marks(str(ending)) for ending in endings]
    request += f"{about}: {_without_marks(context)}"
    return _numbered_row(request, "ending", cleaned, _place(entry, "label", 0))


def _without_marks(text: str) -> str:
    """Text without WikiHow's "[title]", "[step]" and the like."""
    return re.sub(r"\s+", " ", re.sub(r"\[\w+\]", " ", text)).strip()


def _winogrande(entry: Row) -> Row:
    sentence, *options = _texts(entry, "sentence", "option1", "option2")
    request = "Please choose the correct answer to fill in the blank to complete the given sentence: "
    return _numbered_row(request + sentence, "option", options, _place(entry, "answer", 1))


_VALIDATION = {"train": "train", "test": "validation"}
_TEST = {"train": "train", "test": "test"}
_ARC = ("allenai/ai2_arc", "210d026faf9955653af8916fad021475a3f00453", _TEST)
_BOOLQ = HubSet("google/boolq", "35b264d03638db9f4ce671b711558bf7ff0f80d5", _VALIDATION)
# the commit of refs/convert/parquet: the main branch holds a loading script
_PIQA = HubSet("ybisk/piqa", "142c51238b3ca2bc61e9a075913871b8b600e8e1", _VALIDATION, name="plain_text")
_SIQA = HubSet("lighteval/siqa", "54c6a1f8cb6daf4f5abf24a601852612fb35eb25", _VALIDATION)
_OPENBOOK = HubSet("allenai/openbookqa", "388097ea7776314e93a529163e0fea805b8a6454", _TEST, name="main")
_HELLASWAG = HubSet("Rowan/hellaswag", "218ec52e09a7e7462a5400043bb9a69a41d06b76", _VALIDATION)
_WINOGRANDE = HubSet(
    "allenai/winogrande", "01e74176c63542e6b0bcb004dcdea22d94fb67b5", _VALIDATION, name="winogrande_xl"
)

EIGHT = (
    OneOfEight("boolq", None, _BOOLQ, _boolq),
    OneOfEight("piqa", "solution", _PIQA, _piqa),
    OneOfEight("social_i_qa", "answer", _SIQA, _social_i_qa),
    OneOfEight("ARC-Challenge", "answer", HubSet(*_ARC, name="ARC-Challenge"), _science),
    OneOfEight("ARC-Easy", "answer", HubSet(*_ARC, name="ARC-Easy"), _science),
    OneOfEight("openbookqa", "answer", _OPENBOOK, _science),
    OneOfEight("hellaswag", "ending", _HELLASWAG, _hellaswag),
    OneOfEight("winogrande", "option", _WINOGRANDE, _winogrande),
)
TASKS = {task.name: task for task in (Mix(), *EIGHT)}
