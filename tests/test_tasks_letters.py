"""Lettered choices: which letter a completion names; arc, AQuA and mathqa."""

from __future__ import annotations

import pytest

from tasks import get_task
from tasks.choices import find_letter

LETTERS = [
    ("B", "B"),
    (" B\n", "B"),
    ("B. wet palms", "B"),
    ("B) wet palms", "B"),
    ("B)21", "B"),
    ("(B)", "B"),
    ("**B**", "B"),
    ("B: because it rubs", "B"),
    ("B\n\nC. dry", "B"),
    ("The answer is B.", "B"),
    ("the ANSWER is: B", "B"),
    ("Answer: (b) 21", "B"),
    ("so the correct answer is **B**", "B"),
    ("the answer is option B, as shown", "B"),
    (r"The answer is $\boxed{B}$", "B"),
    (r"The answer is \(\text{B}\).", "B"),
    (r"thus \boxed{\text{B}}", "B"),
    (r"\boxed{B}", "B"),
    ("It cannot be cold, so I choose option C", "C"),
    ("I would pick (D) here", "D"),
    ("(A) is wrong and so the answer is (C)", "C"),
    ("The answer is A because it is dry", "A"),
    ("The answer is A", "A"),
    ("The answer is B. The answer is C.", "B"),  # the marker twice: what follows is a new problem
    ("The answer is not A. It is (C)", "C"),
    ("not (A) but (C)", "C"),
    ("A or B", None),
    ("B, C", None),
    ("(A) or (B)", None),
    ("(A) and (B) look alike", None),
    ("The answer is A or B", None),
    ("The answer is A/B", None),
    ("A planet rotates", None),
    ("The answer is a planet", None),
    ("The answer is A planet", None),
    ("Vitamin D is good", None),
    ("5 C", None),
    ("E.g. the moon", None),
    ("Because it is hot", None),
    ("D's palms", None),
    ("1", None),
    ("wet palms", None),
    ("\uff12", None),
    ("no idea", None),
    ("", None),
    ("\n", None),
]


@pytest.mark.parametrize(("completion", "expected"), LETTERS)
def test_letters(completion: str, expected: str | None):
    assert find_letter(completion) == expected
    for name in ("arc", "AQuA", "mathqa"):
        assert get_task(name).extract(completion) == expected


ARC_ROW = {
    "question": " Which palms?",
    "choices": {"text": ["dry", "wet palms"], "label": ["1", "2"]},
    "answerKey": "2",
}


def test_arc_shows_letters_for_numbered_choices():
    task = get_task("arc")
    (row,) = task.unpack(ARC_ROW)
    assert task.prompt(row) == "Question: Which palms?\nA. dry\nB. wet palms\nAnswer:\n"
    assert (task.target(row), task.gold(row)) == ("B. wet palms", "B")
    assert (task.choices(row), task.choice(row)) == (["A. dry", "B. wet palms"], 1)
    assert task.messages(row) == [{"role": "user", "content": "Question: Which palms?\nA. dry\nB. wet palms"}]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"answerKey": "C"}, "'answerKey' is 'C', none of the labels 1, 2"),
        ({"answerKey": 2}, "'answerKey' should be text"),
        ({"choices": ["dry", "wet"]}, "'choices' should hold text and label"),
        ({"choices": {"text": ["dry"], "label": ["1", "2"]}}, "1 texts and 2 labels"),
        ({"question": " "}, "'question' is empty"),
    ],
)
def test_malformed_arc_rows(change: dict, words: str):
    with pytest.raises(ValueError, match=words):
        list(get_task("arc").unpack({**ARC_ROW, **change}))


def test_arc_real_rows(shared):
    """1,119 + 1,172 rows, some with numbers for letters, and every target is read as its own gold answer."""
    task = get_task("arc")
    for split, n, keys in (("train", 1119, 23), ("test", 1172, 22)):
        rows = task.load(split, shared / "data")
        assert len(rows) == n
        assert {task.gold(row) for row in rows} == set("ABCD")
        assert all(task.extract(task.target(row)) == task.gold(row) for row in rows)
        path = shared / f"data/tasks/arc/{split}.jsonl"
        assert sum('"label":["1"' in line for line in path.read_text().splitlines()) == keys


AQUA = {
    "question": "What is 60% of 30% of 1400 grams?",
    "options": ["A)450 gms", "B)100 gms", "C)252 gms", "D)240 gms", "E)None of these"],
    "rationale": "0.6 * 0.3 * 1400 = 252\nC",
    "correct": "C",
}
MATH_QA = {
    "Problem": "the banker ' s gain is rs . 36 . what is the present worth ?",
    "Rationale": '"explanation : t = 3 years . answer : option a"',
    "options": "a ) rs . 1,400 , b ) rs . 300 , c ) ( 5 ) , d ) rs . 350 , e ) none of these",
    "correct": "a",
}
ADAPTERS = {
    "instruction": "What is it? Answer Choices: (A) f(x) (B) 100 gms (C) 252 gms (D) 240 (E) None of these",
    "input": "",
    "output": "It is 252.The answer is (B).",
    "answer": ["C"],
}


def test_math_choice_layouts():
    task = get_task("AQuA")
    (row,) = task.unpack(AQUA)
    assert task.prompt(row) == (
        "Question: What is 60% of 30% of 1400 grams?\nA. 450 gms\nB. 100 gms\nC. 252 gms\nD. 240 gms\n"
        "E. None of these\nAnswer:\n"
    )
    assert task.target(row) == "0.6 * 0.3 * 1400 = 252\nC\nThe answer is C."
    (row,) = get_task("mathqa").unpack(MATH_QA)
    assert row["options"] == ["rs . 1,400", "rs . 300", "( 5 )", "rs . 350", "none of these"]
    assert task.extract(task.target(row)) == "A"
    (row,) = task.unpack(ADAPTERS)
    assert row["question"] == "What is it?"
    assert row["options"] == ["f(x)", "100 gms", "252 gms", "240", "None of these"]
    assert task.target(row) == "The answer is C."  # its solution says B


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"correct": "F"}, "'correct' should be one of A, B, C, D, E, is 'F'"),
        ({"options": ["A)1", "C)2"]}, r"should list A\) to E\)"),
        ({"options": None}, "'options' should list"),
        ({"question": ""}, "'question' is empty"),
        ({"rationale": None}, "'rationale' should be text"),
    ],
)
def test_malformed_math_choice(change: dict, words: str):
    with pytest.raises(ValueError, match=words):
        list(get_task("AQuA").unpack({**AQUA, **change}))
