"""The commonsense mix and its eight sets: choices in completions, real rows, rows of the hub sets."""

from __future__ import annotations

import pytest

from tasks import EVALUATED_ON, get_task

EIGHT = EVALUATED_ON["commonsense"]

WORDS = [
    ("the correct answer is answer3", "answer3"),
    ("The correct answer is Answer 3.", "answer3"),
    ("answer3", "answer3"),
    ("Answer: answer3", "answer3"),
    ("**answer3**", "answer3"),
    (r"\boxed{\text{answer3}}", "answer3"),
    ("answer\uff13", "answer3"),  # fullwidth digit
    ("answer\u0663", "answer3"),  # Arabic-Indic digit
    ("the correct answer is answer3\n\nthe correct answer is answer1", "answer3"),
    ("answer1 is wrong. The correct answer is answer2", "answer2"),
    ("The answer is not answer1 but answer2", "answer2"),
    ("answer2, yes, answer2", "answer2"),
    ("answer1 or answer2", None),
    ("the correct answer is answer1 or answer2", None),
    ("answer1/answer2/answer3", None),
    ("not answer1", None),
    ("answer12", None),
    ("answer0", None),
    ("answer", None),
    ("3", None),
    ("the third", None),
    ("solution1", None),
    ("answer\u00b2", None),  # a superscript is no digit
    ("", None),
]


@pytest.mark.parametrize(("completion", "expected"), WORDS)
def test_words(completion: str, expected: str | None):
    for name in ("social_i_qa", "ARC-Challenge", "ARC-Easy", "openbookqa"):
        assert get_task(name).extract(completion) == expected


@pytest.mark.parametrize(
    ("name", "completion", "expected"),
    [
        ("boolq", "the correct answer is true", "true"),
        ("boolq", "False.", "false"),
        ("boolq", "That is not true", None),
        ("boolq", "true or false", None),
        ("boolq", "untrue", None),
        ("boolq", "yes", None),
        ("boolq", "answer1", None),
        ("piqa", "the correct answer is solution2", "solution2"),
        ("piqa", "Solution 1", "solution1"),
        ("piqa", "solution1 and solution2", None),
        ("piqa", "answer1", None),
        ("hellaswag", "the correct answer is ending4", "ending4"),
        ("hellaswag", "the ending", None),
        ("winogrande", "Option2: Maria", "option2"),
        ("winogrande", "option1, option2", None),
        ("commonsense", "the correct answer is true", "true"),
        ("commonsense", "the correct answer is ending2", "ending2"),
        ("commonsense", "option1 or true", None),
    ],
)
def test_words_of_each_set(name: str, completion: str, expected: str | None):
    assert get_task(name).extract(completion) == expected


LOCAL = {
    ("ARC-Challenge", "train"): 1119,
    ("ARC-Challenge", "test"): 1172,
    ("ARC-Easy", "train"): 2251,
    ("ARC-Easy", "test"): 2376,
    ("boolq", "train"): 9427,
    ("boolq", "test"): 3270,
    ("openbookqa", "train"): 4957,
    ("openbookqa", "test"): 500,
    ("piqa", "test"): 1838,
    ("hellaswag", "test"): 1000,
    ("commonsense", "train"): 8000,
}


@pytest.mark.parametrize(("name", "split"), LOCAL)
def test_commonsense_real_rows(name: str, split: str, shared):
    task = get_task(name)
    rows = task.load(split, shared / "data")
    assert len(rows) == LOCAL[name, split]
    for row in rows:
        assert task.extract(task.target(row)) == task.gold(row)
        assert task.target(row) == task.choices(row)[task.choice(row)]
        assert task.prompt(row) == row["instruction"].strip() + "\n\nAnswer:\n"


def test_the_mix_asks_as_its_tasks_do(shared):
    """Rows of the training mix and of a set it is made of give the same prompt."""
    mix, boolq = get_task("commonsense"), get_task("boolq")
    prompts = {mix.prompt(row) for row in mix.load("train", shared / "data")}
    assert prompts & {boolq.prompt(row) for row in boolq.load("train", shared / "data")}


def test_hub_rows_read_as_local_ones(shared):
    """arc holds ARC-Challenge as the hub does: brought into the layout it equals the published layout."""
    raw = [
        {"question": row["question"], "choices": row["choices"], "answerKey": row["answerKey"]}
        for row in _raw_arc(shared)
    ]
    task = get_task("ARC-Challenge")
    made = [next(iter(task.unpack(row))) for row in raw]
    published = task.load("test", shared / "data")
    same = sum(
        " ".join(task.prompt(a).split()) == " ".join(task.prompt(b).split())
        for a, b in zip(made, published, strict=True)
    )
    assert same > 0.99 * len(published)
    assert [row["answer"] for row in made] == [row["answer"] for row in published]


def _raw_arc(shared):
    from tasks.rows import read_rows

    return read_rows(shared / "data/tasks/arc/test.jsonl", lambda row: None)


HUB_ROWS = [
    (
        "boolq",
        {"question": "is it hot", "answer": False, "passage": "..."},
        "Please answer the following question with true or false, question: is it hot?\n\n"
        "Answer format: true/false",
        "false",
    ),
    (
        "piqa",
        {"goal": "dresser", "sol1": "a pin", "sol2": "wood", "label": 1},
        "Please choose the correct solution to the question: dresser\n\nSolution1: a pin\n\n"
        "Solution2: wood\n\nAnswer format: solution1/solution2",
        "solution2",
    ),
    (
        "social_i_qa",
        {
            "context": "It rained.",
            "question": "Why?",
            "answerA": "x",
            "answerB": "y",
            "answerC": "z",
            "label": "3",
        },
        "Please choose the correct answer to the question: It rained. Why?\n\nAnswer1: x Answer2: y "
        "Answer3: z\n\nAnswer format: answer1/answer2/answer3",
        "answer3",
    ),
    (
        "openbookqa",
        {
            "question_stem": "The sun is",
            "choices": {"text": ["hot", "cold"], "label": ["A", "B"]},
            "answerKey": "A",
        },
        "Please choose the correct answer to the question: The sun is\n\nAnswer1: hot Answer2: cold\n\n"
        "Answer format: answer1/answer2",
        "answer1",
    ),
    (
        "hellaswag",
        {
            "activity_label": "Baking",
            "ctx": "[header] How to bake [title] Start. He",
            "endings": ["a.", "b."],
            "label": "0",
        },
        "Please choose the correct ending to complete the given sentence: Baking: How to bake Start. He\n\n"
        "Ending1: a. Ending2: b.\n\nAnswer format: ending1/ending2",
        "ending1",
    ),
    (
        "winogrande",
        {"sentence": "_ won.", "option1": "Ann", "option2": "Bo", "answer": "2"},
        "Please choose the correct answer to fill in the blank to complete the given sentence: _ won.\n\n"
        "Option1: Ann Option2: Bo\n\nAnswer format: option1/option2",
        "option2",
    ),
]


@pytest.mark.parametrize(("name", "entry", "instruction", "answer"), HUB_ROWS)
def test_hub_rows_in_the_layout(name: str, entry: dict, instruction: str, answer: str):
    task = get_task(name)
    (row,) = task.unpack(entry)
    task.check(row)
    assert row["instruction"] == instruction
    assert task.gold(row) == answer == task.extract(task.target(row))


@pytest.mark.parametrize(
    ("name", "entry", "words"),
    [
        ("boolq", {"question": "a", "answer": "yes"}, "'answer' should be true or false"),
        ("piqa", {"goal": "a", "sol1": "b", "sol2": "c", "label": -1}, "'label' should be the number"),
        ("piqa", {"goal": "a", "sol1": "b", "sol2": "c", "label": 2}, "right choice is 3 of 2"),
        ("hellaswag", {"activity_label": "a", "ctx": "b", "label": "0"}, "'endings' should be a list"),
        ("winogrande", {"sentence": "a", "option1": "b", "option2": "c", "answer": ""}, "'answer' should be"),
        ("social_i_qa", {"context": "a", "question": "b"}, "'answerA' is missing"),
    ],
)
def test_malformed_hub_rows(name: str, entry: dict, words: str):
    with pytest.raises(ValueError, match=words):
        list(get_task(name).unpack(entry))


LAYOUT = {
    "instruction": "Is it?\n\nAnswer format: true/false",
    "input": "",
    "output": "the correct answer is true",
    "answer": "true",
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"answer": "maybe"}, "'answer' is 'maybe', none of true/false"),
        ({"output": "the correct answer is false"}, "but 'answer' 'true'"),
        ({"instruction": "Is it?"}, "should end with 'Answer format: '"),
        ({"answer": True}, "'answer' should be text"),
    ],
)
def test_malformed_layout(change: dict, words: str):
    get_task("boolq").check(LAYOUT)
    with pytest.raises(ValueError, match=words):
        get_task("boolq").check({**LAYOUT, **change})


def test_the_input_follows_the_instruction():
    assert get_task("boolq").prompt({**LAYOUT, "input": "A passage."}) == (
        "Is it?\n\nAnswer format: true/false\n\nA passage.\n\nAnswer:\n"
    )


def test_all_eight_are_tasks_of_one_table():
    assert {get_task(name).metric for name in EIGHT} == {"exact_match"}
    assert len({get_task(name).hub.path for name in EIGHT}) == 7  # both ARC sets share a repository
