"""Multiple choice: which choice a completion names, real rows, and rows of the hub sets."""

from __future__ import annotations

import pytest

from tasks import EVALUATED_ON, get_task
from tasks.choices import find_letter

EIGHT = EVALUATED_ON["commonsense"]

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
