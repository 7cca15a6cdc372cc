r"""GSM8K: grade-school word problems with worked solutions (arXiv 2110.14168, MIT licence).

A row:
    {"question": "Weng earns $12 an hour for babysitting. Yesterday, she just did 50 minutes of babysitting.
                  How much did she earn?",
     "answer": "Weng earns 12/60 = $<<12/60=0.2>>0.2 per minute.\nWorking 50 minutes, she earned 0.2 x 50 =
                $<<0.2*50=10>>10.\n#### 10"}

The target is the worked solution without the calculator notes `<<...>>`, which nothing executes here, and
with its last line `#### N`.
"""

from __future__ import annotations

import re
import unicodedata

from tasks.base import HubSet, QuestionTask, Row, text_of

MARKER = "####"
# Groups of thousands (also lakhs: 1,00,000), or plain digits, or a fraction that starts at its point.
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{2,3})*,[0-9]{3}(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+"
# A minus directly after a word, digit or bracket is a dash or a subtraction: "10-5" ends in 5.
_NUMBER = re.compile(rf"(?P<sign>(?<![\w)\].])[-+])?[$€£]?(?P<inner>(?<=[$€£])[-+])?(?P<digits>{_DIGITS})")
# Narrow and no-break blanks group thousands; a plain blank may as well stand between two numbers.
_NARROW_BLANKS = re.compile(r"(?<=\d)[\u202f\u2009\u00a0](?=\d{3}(?!\d))")
_BOX = re.compile(r"\\boxed\s*\{([^{}]*)\}")


def plain_text(text: str) -> str:
    """Text with every decimal digit as 0-9, minus signs as "-", LaTeX's "{,}" as "," and "\\$" as "$".

    Only true digits (Unicode category Nd) are replaced; the superscript of a square or a one-half sign is
    none.
    """
    text = text.replace("\u2212", "-").replace("{,}", ",").replace("\\$", "$")
    if text.isascii():
        return text
    text = _NARROW_BLANKS.sub(",", text.replace("\uff0c", ","))
    return "".join(str(unicodedata.decimal(c)) if unicodedata.category(c) == "Nd" else c for c in text)


def normal_form(match: re.Match[str]) -> str:
    """A matched number without separators, plus sign and outer zeros: -1,000.50 -> -1000.5, +3.0 -> 3.

    It is text and no float: exact at any length, without inf and nan.
    """
    whole, _, fraction = match["digits"].replace(",", "").partition(".")
    whole, fraction = whole.lstrip("0") or "0", fraction.rstrip("0")
    number = f"{whole}.{fraction}" if fraction else whole
    negative = "-" in (match["sign"], match["inner"]) and number != "0"
    return f"-{number}" if negative else number


def find_answer(text: str) -> str | None:
    """The number that a solution gives as its answer, in normal form, or None.

    1. the number right after the first `####` that is followed by one: what comes later is a new problem;
    2. else the last number in the last \\boxed{} that holds one; 3. else the last number.
    Words ("twelve", "inf"), fractions of two numbers and powers of ten are not read as one number.
    """
    text = plain_text(text)
    for part in text.split(MARKER)[1:]:
        if match := _NUMBER.match(part.lstrip(" \t*:=")):
            return normal_form(match)
    for part in [*reversed(_BOX.findall(text)), text]:
        if found := list(_NUMBER.finditer(part)):
            return normal_form(found[-1])
    return None


class NumberTask(QuestionTask):
    """Rows with a `question`, answered by a solution that comes to a number."""

    max_new_tokens = 400

    def extract(self, completion: str) -> str | None:
        return find_answer(completion)


class GSM8K(NumberTask):
    name = "gsm8k"
    hub = HubSet(
        path="openai/gsm8k",
        name="main",
        revision="e53f048856ff4f594e959d75785d2c2d37b678ee",
        splits={"train": "train", "test": "test"},
    )

    def target(self, row: Row) -> str:
        return re.sub(r"<<[^<>]*>>", "", row["answer"])

    def gold(self, row: Row) -> str | None:
        return find_answer(MARKER + row["answer"].rpartition(MARKER)[2])

    def check(self, row: Row) -> None:
        text_of(row, "question", empty=False)
        _, marker, last = text_of(row, "answer").rpartition(MARKER)
        if not marker or not _NUMBER.match(plain_text(last).strip()):
            raise ValueError(f"field 'answer' has no number after {MARKER}: {row['answer'][-40:]!r}")


TASK = GSM8K()
