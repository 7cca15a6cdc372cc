"""Rows of each task: layouts of the published sets, malformed entries, and the data beside the project."""

from __future__ import annotations

import pytest

from tasks import EVALUATED_ON, get_task
from tasks.rows import read_rows

ARC = {
    "question": " Which palms?",
    "choices": {"text": ["dry", "wet palms"], "label": ["1", "2"]},
    "answerKey": "2",
}
AQUA = {
    "question": "What is 60% of 1400?",
    "options": ["A)450 gms", "B)100 gms", "C)840 gms", "D)240 gms", "E)None of these"],
    "rationale": "0.6 * 1400 = 840\nC",
    "correct": "C",
}
MATH_QA = {
    "Problem": "what is it ?",
    "Rationale": '"explanation : t = 3 years . answer : option a"',
    "options": "a ) rs . 1,400 , b ) rs . 300 , c ) ( 5 ) , d ) rs . 350 , e ) none of these",
    "correct": "a",
}
GSM8K = {"question": "How many?", "answer": "Two and <<2+3=5>>three is 5.\n#### 5"}
SVAMP = {"Body": "There are 290 bananas in 2 groups", "Question": "How big is each?", "Answer": "145.0"}
MAWPS = {"question": "How many?", "result": "1,000", "result_float": 1000.0}
ADAPTERS_CHOICE = {
    "instruction": "What is it? Answer Choices: (A) f(x) (B) 100 gms (C) 252 gms (D) 240 (E) None of these",
    "input": "",
    "output": "It is 252.The answer is (B).",
    "answer": ["C"],
}
ADAPTERS_NUMBER = {
    "instruction": " Nancy picked 38 and her mother 47.  How many? ",
    "input": "",
    "output": "That is 38 + 47 = 85. The answer is 85.",
    "answer": [85.0],
}
NANCY = "Question: Nancy picked 38 and her mother 47. How many?"
WRONG_SOLUTION = {**ADAPTERS_NUMBER, "output": "That makes 48. The answer is 48.", "answer": [72.0]}
SAMSUM = {"id": "1", "dialogue": "Ann: hi\r\nBo: bye\r\n", "summary": "Bo  leaves. "}
SHP = {"history": "why?", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_A": 8, "score_B": 4}
HH = {
    "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c: Human: d\n\nAssistant: good ",
    "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c: Human: d\n\nAssistant:",
}

# (task, entry of the published set, prompt without its closing words, target, gold)
LAYOUTS = [
    ("gsm8k", GSM8K, "Question: How many?", "Two and three is 5.\n#### 5", "5"),
    ("gsm8k", {**GSM8K, "answer": "#### 1,080"}, "Question: How many?", "#### 1,080", "1080"),
    # numbered choices are shown with letters
    ("arc", ARC, "Question: Which palms?\nA. dry\nB. wet palms", "B. wet palms", "B"),
    (
        "AQuA",
        AQUA,
        "Question: What is 60% of 1400?\nA. 450 gms\nB. 100 gms\nC. 840 gms\nD. 240 gms\nE. None of these",
        "0.6 * 1400 = 840\nC\nThe answer is C.",
        "C",
    ),
    (
        "mathqa",
        MATH_QA,
        "Question: what is it ?\nA. rs . 1,400\nB. rs . 300\nC. ( 5 )\nD. rs . 350\nE. none of these",
        "explanation : t = 3 years . answer : option a\nThe answer is A.",
        "A",
    ),
    (
        "AQuA",
        ADAPTERS_CHOICE,
        "Question: What is it?\nA. f(x)\nB. 100 gms\nC. 252 gms\nD. 240\nE. None of these",
        "The answer is C.",  # its solution says B
        "C",
    ),
    *(
        (
            "AddSub",
            {**ADAPTERS_NUMBER, "answer": answer},
            NANCY,
            f"{ADAPTERS_NUMBER['output']}\n#### 85",
            "85",
        )
        for answer in ([85.0], 85, "85.0", "85", " 85 ")
    ),
    ("MultiArith", WRONG_SOLUTION, NANCY, "#### 72", "72"),  # which is not taught
    ("SVAMP", SVAMP, "Question: There are 290 bananas in 2 groups, How big is each?", "#### 145", "145"),
    (
        "SVAMP",
        {"Body": "It is 2. ", "Question": "What?", "Answer": "-0.50"},
        "Question: It is 2. What?",
        "#### -0.5",
        "-0.5",
    ),
    ("mawps", MAWPS, "Question: How many?", "#### 1000", "1000"),
    ("mawps", {"question": "How many?", "result": "1e3"}, "Question: How many?", "#### 1000", "1000"),
    ("samsum", SAMSUM, "Dialogue:\nAnn: hi\nBo: bye", "Bo leaves.", "Bo leaves."),
]
LAYOUT = {
    "instruction": "Is it?\n\nAnswer format: true/false",
    "input": "",
    "output": "the correct answer is true",
    "answer": "true",
}
# (one of the eight, entry, instruction, answer)
EIGHT = [
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
    (
        "boolq",
        {**LAYOUT, "input": "A passage."},
        "Is it?\n\nAnswer format: true/false\n\nA passage.",
        "true",
    ),
]
LAYOUTS += [
    (name, entry, text, f"the correct answer is {answer}", answer) for name, entry, text, answer in EIGHT
]
CLOSINGS = {"samsum": "\n\nSummary:\n", **dict.fromkeys(EVALUATED_ON["commonsense"], "\n\nAnswer:\n")}


@pytest.mark.parametrize(("name", "entry", "prompt", "target", "gold"), LAYOUTS)
def test_an_entry_becomes_prompt_target_and_gold(name: str, entry: dict, prompt: str, target: str, gold: str):
    task = get_task(name)
    (row,) = task.unpack(entry)
    task.check(row)
    assert task.prompt(row) == prompt + CLOSINGS.get(name, "\nAnswer:\n")
    assert task.prompt(row).endswith(task.closing)
    assert task.messages(row) == [{"role": "user", "content": prompt}]
    assert task.target(row) == target
    assert task.gold(row) == gold == task.extract(task.target(row))


def test_choices_of_a_lettered_row():
    task = get_task("arc")
    (row,) = task.unpack(ARC)
    assert (task.choices(row), task.choice(row)) == (["A. dry", "B. wet palms"], 1)


def test_samsum_metrics():
    task = get_task("samsum")
    (row,) = task.unpack(SAMSUM)
    assert task.metrics(row, "Bo left") == {"rouge1": pytest.approx(0.5)}  # "leaves" and "left" differ
    assert task.metrics(row, "") == {"rouge1": 0.0}


PLAIN_HH = "'rejected' should run from 'Human:' to a last 'Assistant:'"
MALFORMED = [
    ("arc", ARC, {"answerKey": "C"}, "'answerKey' is 'C', none of the labels 1, 2"),
    ("arc", ARC, {"answerKey": 2}, "'answerKey' should be text"),
    ("arc", ARC, {"choices": ["dry", "wet"]}, "'choices' should hold text and label"),
    ("arc", ARC, {"choices": {"text": ["dry"], "label": ["1", "2"]}}, "1 texts and 2 labels"),
    ("arc", ARC, {"question": " "}, "'question' is empty"),
    ("AQuA", AQUA, {"correct": "F"}, "'correct' should be one of A, B, C, D, E, is 'F'"),
    ("AQuA", AQUA, {"options": ["A)1", "C)2"]}, r"should list A\) to E\)"),
    ("AQuA", AQUA, {"options": None}, "'options' should list"),
    ("AQuA", AQUA, {"question": ""}, "'question' is empty"),
    ("AQuA", AQUA, {"rationale": None}, "'rationale' should be text"),
    ("SingleEq", ADAPTERS_NUMBER, {"answer": "many"}, "'answer' should be a number, is 'many'"),
    ("SingleEq", ADAPTERS_NUMBER, {"answer": [1, 2]}, "'answer' should be a number"),
    ("SingleEq", ADAPTERS_NUMBER, {"answer": float("inf")}, "'answer' should be a number, is inf"),
    ("SingleEq", ADAPTERS_NUMBER, {"answer": None}, "'answer' should be a number"),
    ("SingleEq", ADAPTERS_NUMBER, {"instruction": " "}, "question is empty"),
    ("SingleEq", ADAPTERS_NUMBER, {"output": 3}, "'output' should be text"),
    ("boolq", {"question": "a", "answer": "yes"}, {}, "'answer' should be true or false"),
    ("boolq", LAYOUT, {"answer": "maybe"}, "'answer' is 'maybe', none of true/false"),
    ("boolq", LAYOUT, {"output": "the correct answer is false"}, "but 'answer' 'true'"),
    ("boolq", LAYOUT, {"instruction": "Is it?"}, "should end with 'Answer format: '"),
    ("boolq", LAYOUT, {"answer": True}, "'answer' should be text"),
    ("piqa", {"goal": "a", "sol1": "b", "sol2": "c", "label": -1}, {}, "'label' should be the number"),
    ("piqa", {"goal": "a", "sol1": "b", "sol2": "c", "label": 2}, {}, "right choice is 3 of 2"),
    ("hellaswag", {"activity_label": "a", "ctx": "b", "label": "0"}, {}, "'endings' should be a list"),
    ("winogrande", {"sentence": "a", "option1": "b", "option2": "c", "answer": ""}, {}, "'answer' should be"),
    ("social_i_qa", {"context": "a", "question": "b"}, {}, "'answerA' is missing"),
    ("samsum", SAMSUM, {"summary": " "}, "'summary' is empty"),
    ("dolly", {"instruction": "Who?", "context": ""}, {}, "'response' is missing"),
    ("shp", SHP, {"labels": 2}, "'labels' should be 1"),
    ("shp", SHP, {"score_B": "x"}, "'score_B' should be a number"),
    ("hh", HH, {"rejected": ""}, PLAIN_HH),
    ("hh", HH, {"rejected": "a"}, PLAIN_HH),
    ("hh", HH, {"rejected": "\n\nHuman: a"}, PLAIN_HH),
    ("hh", HH, {"rejected": "\n\nAssistant: a"}, PLAIN_HH),
    ("hh", HH, {"rejected": "x\n\nHuman: a\n\nAssistant: b"}, PLAIN_HH),
]


@pytest.mark.parametrize(("name", "entry", "change", "words"), MALFORMED)
def test_a_malformed_entry_names_its_field(name: str, entry: dict, change: dict, words: str):
    task = get_task(name)
    with pytest.raises(ValueError, match=words):
        for row in task.unpack({**entry, **change}):
            task.check(row)


COUNTS = {
    "gsm8k": {"train": 7473, "test": 1319},
    "arc": {"train": 1119, "test": 1172},
    "ARC-Challenge": {"train": 1119, "test": 1172},
    "ARC-Easy": {"train": 2251, "test": 2376},
    "boolq": {"train": 9427, "test": 3270},
    "openbookqa": {"train": 4957, "test": 500},
    "piqa": {"test": 1838},
    "hellaswag": {"test": 1000},
    "commonsense": {"train": 8000},
    "samsum": {"train": 2048, "test": 100},
    "sql": {"train": 7000, "test": 500},
}


@pytest.mark.parametrize(
    ("name", "split"), [(name, split) for name, found in COUNTS.items() for split in found]
)
def test_targets_of_real_rows_are_read_as_their_gold_answers(name: str, split: str, shared):
    task = get_task(name)
    rows = task.load(split, shared / "data")
    assert len(rows) == COUNTS[name][split]
    for row in rows:
        assert task.extract(task.target(row)) == task.gold(row)
        if "loglik" in task.scoring:
            assert task.target(row) == task.choices(row)[task.choice(row)]
        if name in EVALUATED_ON["commonsense"]:
            assert task.prompt(row) == row["instruction"].strip() + "\n\nAnswer:\n"
        if name == "gsm8k":
            assert float(task.gold(row)) == float(
                row["answer"].split("####")[1].replace(",", "")
            )  # published
            assert "<<" not in task.target(row)
        if name == "samsum":
            assert "\r" not in row["dialogue"]


def test_sql_real_rows(shared):
    task = get_task("sql")
    ran = [task.metrics(row, task.target(row)) for row in task.load("test", shared / "data")]
    assert sum("column_match" in metrics for metrics in ran) == 485  # of 500; the others are no SQLite
    # the others find nothing on any filling: columns whose names are numbers, scores as sums
    assert sum("execution_match" in metrics for metrics in ran) == 472
    assert all(set(metrics.values()) == {1.0} for metrics in ran)


@pytest.mark.parametrize(("split", "n_numbered"), [("train", 23), ("test", 22)])
def test_arc_real_rows(split: str, n_numbered: int, shared):
    """Some rows have numbers for letters."""
    task = get_task("arc")
    assert {task.gold(row) for row in task.load(split, shared / "data")} == set("ABCD")
    lines = (shared / f"data/tasks/arc/{split}.jsonl").read_text().splitlines()
    assert sum('"label":["1"' in line for line in lines) == n_numbered


def test_alpaca_eval_real_rows(shared):
    task = get_task("alpaca_eval")
    rows = task.load("eval", shared / "data")
    assert len(rows) == 805
    for row in rows:
        assert task.prompt(row).endswith(task.closing) and row["instruction"] in task.prompt(row)


def test_the_mix_asks_as_its_tasks_do(shared):
    """Rows of the training mix and of a set it is made of give the same prompt."""
    mix, boolq = get_task("commonsense"), get_task("boolq")
    prompts = {mix.prompt(row) for row in mix.load("train", shared / "data")}
    assert prompts & {boolq.prompt(row) for row in boolq.load("train", shared / "data")}


def test_hub_rows_read_as_local_ones(shared):
    """arc holds ARC-Challenge as the hub does: brought into the layout it equals the published layout."""
    task = get_task("ARC-Challenge")
    raw = read_rows(shared / "data/tasks/arc/test.jsonl", lambda row: None)
    made = [row for entry in raw for row in task.unpack(entry)]
    published = task.load("test", shared / "data")
    pairs = zip(made, published, strict=True)
    same = sum(task.prompt(ours).split() == task.prompt(theirs).split() for ours, theirs in pairs)
    assert same > 0.99 * len(published)
    assert [row["answer"] for row in made] == [row["answer"] for row in published]


def test_all_eight_are_tasks_of_one_table():
    eight = [get_task(name) for name in EVALUATED_ON["commonsense"]]
    assert {task.metric for task in eight} == {"exact_match"}
    assert len({task.hub.path for task in eight}) == 7  # both ARC sets share a repository


def test_wikitext_real_rows(shared):
    task = get_task("wikitext")
    rows = task.load("validation", shared / "data")
    whole = (shared / "data/tasks/wikitext/validation.txt").read_text(encoding="utf-8")
    assert "".join(row["text"] for row in rows).rstrip("\n") == whole.rstrip("\n")
    assert len(rows) == 60  # articles
    assert all(row["text"].lstrip().startswith("= ") for row in rows)
    # the published size of this split in words, an end of line being one
    assert sum(task.n_words(row) for row in rows) == 217646
    assert (task.prompt(rows[0]), task.target(rows[0])) == ("", rows[0]["text"])
    assert (task.scoring, task.metric) == (("perplexity",), "word_perplexity")


def test_wikitext_hub_lines(tmp_path, monkeypatch):
    import datasets

    first = ["", " = One = \n", "", " Text . \n", " = = Part = = \n", ""]
    second = [" = Two = \n", "", " = 1 = in a text \n"]
    rows = [{"text": line} for line in [*first, *second]]
    monkeypatch.setattr(datasets, "load_dataset", lambda **arguments: rows)
    assert [row["text"] for row in get_task("wikitext").load("test", tmp_path)] == [
        "\n = One = \n\n Text . \n = = Part = = \n\n",
        " = Two = \n\n = 1 = in a text \n",
    ]
