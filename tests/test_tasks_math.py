"""Word problems answered by a number: layouts, targets, and what counts as the number of a completion."""

from __future__ import annotations

import pytest

from tasks import get_task

NAMES = ("AddSub", "MultiArith", "SingleEq", "SVAMP", "mawps")

COMPLETIONS = [
    ("14", "14"),
    ("The answer is 14.", "14"),
    ("38 + 47 = 85, and 85 - 71 = 14\n#### 14", "14"),
    ("#### 14\nQuestion: next?\n#### 15", "14"),
    ("#### 1,400.50", "1400.5"),
    ("it is -3", "-3"),
    ("about \u22123 degrees", "-3"),
    ("$2.50 each", "2.5"),
    ("14 carrots or 15", "15"),
    (r"so \boxed{14} of 71", "14"),
    ("\u0661\u0664", "14"),
    ("fourteen", None),
    ("inf", None),
    ("", None),
]


@pytest.mark.parametrize(("completion", "expected"), COMPLETIONS)
def test_numbers(completion: str, expected: str | None):
    for name in NAMES:
        assert get_task(name).extract(completion) == expected
        assert get_task(name).score(None, "14") == 0.0


ADAPTERS = {
    "instruction": " Nancy picked 38 and her mother 47.  How many? ",
    "input": "",
    "output": "That is 38 + 47 = 85. The answer is 85.",
    "answer": [85.0],
}


@pytest.mark.parametrize("answer", [[85.0], 85, "85.0", "85", " 85 "])
def test_adapters_layout(answer):
    task = get_task("AddSub")
    (row,) = task.unpack({**ADAPTERS, "answer": answer})
    assert task.prompt(row) == "Question: Nancy picked 38 and her mother 47. How many?\nAnswer:\n"
    assert task.target(row) == "That is 38 + 47 = 85. The answer is 85.\n#### 85"
    assert task.gold(row) == "85" == task.extract(task.target(row))


def test_a_wrong_solution_is_not_taught():
    task = get_task("MultiArith")
    (row,) = task.unpack({**ADAPTERS, "output": "That makes 48. The answer is 48.", "answer": [72.0]})
    assert task.target(row) == "#### 72"


@pytest.mark.parametrize(
    ("name", "entry", "question", "gold"),
    [
        (
            "SVAMP",
            {"Body": "There are 290 bananas in 2 groups", "Question": "How big is each?", "Answer": "145.0"},
            "There are 290 bananas in 2 groups, How big is each?",
            "145",
        ),
        ("SVAMP", {"Body": "It is 2. ", "Question": "What?", "Answer": "-0.50"}, "It is 2. What?", "-0.5"),
        ("mawps", {"question": "How many?", "result": "1,000", "result_float": 1000.0}, "How many?", "1000"),
        ("mawps", {"question": "How many?", "result": "1e3"}, "How many?", "1000"),
    ],
)
def test_hub_layouts(name: str, entry: dict, question: str, gold: str):
    task = get_task(name)
    (row,) = task.unpack(entry)
    assert task.prompt(row) == f"Question: {question}\nAnswer:\n"
    assert task.gold(row) == gold == task.extract(task.target(row))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"answer": "many"}, "'answer' should be a number, is 'many'"),
        ({"answer": [1, 2]}, "'answer' should be a number"),
        ({"answer": float("inf")}, "'answer' should be a number, is inf"),
        ({"answer": None}, "'answer' should be a number"),
        ({"instruction": " "}, "question is empty"),
        ({"output": 3}, "'output' should be text"),
    ],
)
def test_malformed_rows(change: dict, words: str):
    with pytest.raises(ValueError, match=words):
        list(get_task("SingleEq").unpack({**ADAPTERS, **change}))


@pytest.mark.parametrize(
    ("output", "gold"),
    [
        ("2 x 3 = 6, so the answer is 6", "6"),
        ("That makes 1,400.50 km in all", "1400.5"),
        ("The answer is \u22123 degrees", "-3"),
        (r"so \boxed{14} of 71", "14"),
        ("#### 14\nQuestion: next?\n#### 15", "14"),
        ("\u0664\u0662", "42"),
        ("The answer is 14 or 15", "15"),
        ("fourteen", None),
        ("The answer is B", None),
        ("The answer is: (B)", None),
        ("x = 3\nprint(x)", None),
        ("no number", None),
    ],
)
def test_mathinstruct(output: str, gold: str | None):
    task = get_task("mathinstruct")
    row = {"instruction": "How many? ", "output": f"{output}\n", "source": "a"}
    task.check(row)
    assert task.prompt(row) == get_task("gsm8k").prompt({"question": "How many?"})
    assert task.target(row) == output
    assert task.gold(row) == gold == task.extract(task.target(row))
    with pytest.raises(ValueError, match="'output' is empty"):
        task.check({**row, "output": ""})
