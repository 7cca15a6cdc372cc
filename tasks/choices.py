"""Multiple choice: what counts as naming a choice in a completion, and tasks whose choices are lettered.

One rule for all: the first choice that the completion states as its answer ("the answer is X", "answer: X");
else the only one that it marks. Two different marked choices are no answer, nor is one of several joined by
"or", "and", "/" or ",", nor one after "not", "never" or a word in "n't".
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from tasks.base import QuestionTask, Row, text_of
from tasks.gsm8k import plain_text

LETTERS = string.ascii_uppercase[:10]
_STATES = r"(?i:\banswer(?:\s+is\b\s*:?|\s*:)|\b(?:option|choice)\s+is\b\s*:?)"
# What may stand between "answer is" and the choice: blanks, markdown, quotes, brackets, LaTeX.
_NEGATED = r"(?<!\bnot\s)(?<!\bnot\sbe\s)(?<!\bnever\s)(?<!n['\u2019]t\s)(?<!n['\u2019]t\sbe\s)"
_OPEN = r"""(?:[\s*_"'(\[{$]|\\[(\[]|\\boxed|\\text(?:bf|rm)?|\\mathrm|(?i:option|choice)\s)*"""


def _joined(choice: str) -> str:
    """Pattern of what must not follow: another choice, joined to this one."""
    return rf"(?!\s*[)*\]]*\s*(?:(?i:or|and)\b|/|,|&)\s*[(*\[]*(?:{choice}))"


def find_label(text: str, label: str) -> str | None:
    """The choice that a completion names by a word such as "answer3" or "true" (pattern label), or None.

    Any case, and a blank before the number: "Answer 3" is answer3. Any mention counts as a mark.
    """
    text = plain_text(text)
    label = rf"(?i:{label})"
    stated = re.search(rf"{_STATES}{_OPEN}(?P<choice>{label}){_joined(label)}", text)
    found = [stated["choice"]] if stated else re.findall(rf"{_NEGATED}({label})", text)
    choices = {re.sub(r"\s", "", choice).lower() for choice in found}
    return choices.pop() if len(choices) == 1 else None


# "A" before a lower-case word is the article and "I" the pronoun, unless that word gives an answer's reason.
_REASONS = r"because\b|since\b|as\b|for\b|which\b|so\b|and\b|but\b|if\b|by\b"
_LETTER = rf"(?:[AI](?!\s+(?!{_REASONS})[a-z])|[B-HJ]|[a-j](?=\s*\)))(?![\w'\u2019])"
_STATED = re.compile(rf"{_STATES}{_OPEN}(?P<choice>{_LETTER}){_joined(_LETTER)}")
_LEADING = re.compile(  # "I, personally" is none
    rf"""[\s*_"'(\[]*(?!I,)(?P<choice>[A-J])(?=[)\]*"]|['.:,](?!\w)|\s*$|\s*\n){_joined(_LETTER)}"""
)
_CHOOSING = r"(?i:choos(?:e|ing)|chose|pick(?:ed)?|select(?:ed)?|go(?:ing)?\s(?:with|for))"
_MARKED = re.compile(
    rf"""{_NEGATED}(?<!\bor\s)(?<!\band\s)(?:\((?P<a>[A-Ja-j])\)|(?i:\b(?:option|choice))\s+[(*]*(?P<b>[A-J])\b|
    \b{_CHOOSING}\s+[(*]*(?P<c>{_LETTER})|
    \*\*\(?(?P<d>[A-J])\b|\\boxed\s*\{{(?:\\text\w*\s*\{{)?\s*\(?(?P<e>[A-J])\b){_joined(_LETTER)}""",
    re.VERBOSE,
)


def find_letter(text: str) -> str | None:
    """The letter that a completion gives as its answer, or None.

    After the statement and before the marks - (B), option B, choose B, **B**, \\boxed{B} - comes a letter
    that the completion starts with: "B", "B. dry palms", "(B)". Lower-case letters count only before a
    bracket; letters elsewhere ("vitamin D", "A planet", "I, personally") do not count.
    """
    text = plain_text(text)
    if found := _STATED.search(text) or _LEADING.match(text):
        return found["choice"].upper()
    choices = {next(filter(None, match.groups())).upper() for match in _MARKED.finditer(text)}
    return choices.pop() if len(choices) == 1 else None


class LetterTask(QuestionTask):
    """Rows {question, options, answer, rationale}: options are texts, answer is the letter of the right one.

    The prompt lists the options; a completion names one, after a rationale if the task has them.
    """

    version = 2  # 1: "I, personally" was choice I, and "choose B" was none
    scoring = ("generation", "loglik")
    max_new_tokens = 64
    rationales = False  # whether targets reason before they answer

    def question(self, row: Row) -> str:
        return "\n".join([row["question"], *self.choices(row)])

    def target(self, row: Row) -> str:
        if not self.rationales:
            return self.choices(row)[self.choice(row)]
        answer = f"The answer is {row['answer']}."
        reasoned = f"{row['rationale']}\n{answer}"
        # some published rationales state another answer than the row does
        return reasoned if row["rationale"] and self.extract(reasoned) == row["answer"] else answer

    def gold(self, row: Row) -> str | None:
        return row["answer"]

    def extract(self, completion: str) -> str | None:
        return find_letter(completion)

    def choices(self, row: Row) -> list[str]:
        """The options with their letters: "B. wet palms"."""
        return [f"{letter}. {text}" for letter, text in zip(LETTERS, row["options"], strict=False)]

    def choice(self, row: Row) -> int:
        return LETTERS.index(row["answer"])


def letter_row(question: str, options: Sequence[str], answer: int, rationale: str = "") -> Row:
    """A row of a LetterTask; answer: place of the right option."""
    options = [" ".join(str(option).split()) for option in options]
    return {
        "question": question.strip(),
        "options": options,
        "answer": LETTERS[answer],
        "rationale": rationale.strip(),
    }


def labelled_choices(entry: Row) -> tuple[list[str], int]:
    """Options and place of the right one, from choices {text, label} and answerKey (letters or numbers)."""
    choices = entry.get("choices")
    if not isinstance(choices, dict) or not {"text", "label"} <= choices.keys():
        raise ValueError(f"field 'choices' should hold text and label, is {choices!r:.60}")
    texts, labels, key = choices["text"], choices["label"], text_of(entry, "answerKey")
    if len(texts) != len(labels) or not 2 <= len(texts) <= len(LETTERS):
        raise ValueError(f"field 'choices' holds {len(texts)} texts and {len(labels)} labels")
    if key not in labels:
        raise ValueError(f"field 'answerKey' is {key!r}, none of the labels {', '.join(map(str, labels))}")
    return list(texts), list(labels).index(key)
