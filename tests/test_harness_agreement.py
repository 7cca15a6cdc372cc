"""Agreement with lm-evaluation-harness: its flexible filter for gsm8k, and its log-likelihoods.

The harness is a development requirement; without it these tests are skipped.
"""

from __future__ import annotations

import itertools
import math
import random
import warnings
from decimal import Decimal, InvalidOperation

import pytest
import torch
import transformers

from lota.data.batches import Prompt
from lota.evaluate.batching import context_length
from lota.evaluate.estimates import corpus_perplexity
from lota.evaluate.loglik import choice_requests, logliks, text_requests
from tasks import get_task
from tests.tolerance import assert_same, chain, rounding

extraction = pytest.importorskip("lm_eval.filters.extraction")

FLEXIBLE = extraction.RegexFilter(  # lm_eval/tasks/gsm8k/gsm8k.yaml, filter flexible-extract
    regex_pattern=r"(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1
)
GSM8K = get_task("gsm8k")

# gsm8k


def harness_answer(completion: str) -> Decimal | str | None:
    """The filter's answer as a number; its text where that is none; None for no answer."""
    (found,) = FLEXIBLE.apply([[completion]], [{}])[0]
    if found == "[invalid]":
        return None
    try:
        # what the harness's exact_match leaves out for gsm8k: commas, dollar signs, a point at the end
        return Decimal(found.replace(",", "").replace("$", "").removesuffix("."))
    except InvalidOperation:
        return found


def our_answer(completion: str) -> Decimal | None:
    found = GSM8K.extract(completion)
    return None if found is None else Decimal(found)


# Completions on which the two are meant to differ: the completion, ours, the harness's, and why ours.
EXPLAINED = [
    (
        "So she has 12 left.\n#### 12\n\nQuestion: Tom has 5 cats",
        "12",
        "5",
        "what follows #### N is a new problem",
    ),
    ("#### 7 (that is 3 + 4)", "7", "4", "a remark after the marked answer"),
    ("It is \\boxed{42}, as 40 + 2 shows.", "42", "2", "a box marks the answer"),
    ("10-5", "5", "-5", "a minus after a digit is a subtraction"),
    ("The total is 8 ...", "8", "...", "an ellipsis is no number"),
    ("It will be 15, etc.,.", "15", ".,.", "nor is other punctuation"),
    ("That makes \u0664\u0662 in all.", "42", None, "digits of other scripts are digits"),
    ("She ends at \u22123.", "-3", "3.", "a typographic minus"),
]


@pytest.mark.parametrize(("completion", "ours", "theirs", "why"), EXPLAINED)
def test_explained_disagreements(completion, ours, theirs, why):
    """Each in both directions: ours is right, and the harness's is what the table says."""
    assert our_answer(completion) == Decimal(ours), why
    (found,) = FLEXIBLE.apply([[completion]], [{}])[0]
    assert (None if found == "[invalid]" else found) == theirs


NAMES = ("Weng", "Julie", "Albert", "Mr. Sam", "Alexis")
THINGS = ("eggs", "dollars", "pages", "miles", "hours", "km", "% of the class")
STEPS = (
    "{name} starts with {a} {thing} and gets {b} more.",
    "That is {a} + {b} = {c} {thing}.",
    "First, {a} x {b} = {d}.",
    "1) Multiply: {a} * {b} = {d}.",
    "We know that {name} paid ${a}.50 for {b} of them.",
    "In week {b}, {name} had {d:,} {thing}.",
    "Let x be the number of {thing}.",
)
ENDINGS = (
    "\n#### {n}",
    "\n#### {n}\n",
    "\n#### ${n}",
    "\nThe answer is {n}.",
    "\nTherefore, {name} has {n} {thing}.",
    "\nSo the answer is **{n}**",
    "\nFinal answer: {n} {thing}",
    "\nThe result is \\boxed{{{n}}}",
    "\nIt costs ${n}.",
    " = {n}",
    "\nThus {name} needs {n}, and no more!",
    "\nAnswer:\n{n}",
    "\nI'd say ({n})",
)
NUMBERS = (
    lambda rng: str(rng.randint(0, 99)),
    lambda rng: str(rng.randint(100, 99999)),
    lambda rng: f"{rng.randint(1000, 9_999_999):,}",
    lambda rng: f"{rng.uniform(0, 500):.2f}",
    lambda rng: f"{rng.randint(1, 90)}.0",
    lambda rng: f"-{rng.randint(1, 400)}",
    lambda rng: f"{rng.randint(1, 9)}.{rng.randint(1, 9)}",
    lambda rng: f"{rng.randint(1000, 99999):,}.{rng.randint(10, 99)}",
)


def varied_completions(n: int, seed: int) -> list[str]:
    """Solutions with 0 to 4 steps, every ending with every kind of number; one in 40 without an answer."""
    rng = random.Random(seed)
    forms = itertools.cycle(itertools.product(ENDINGS, NUMBERS))
    completions = []
    while len(completions) < n:
        words = {"name": rng.choice(NAMES), "thing": rng.choice(THINGS)}
        a, b = rng.randint(2, 60), rng.randint(2, 60)
        steps = rng.sample(STEPS, rng.randint(0, 4))
        text = " ".join(step.format(a=a, b=b, c=a + b, d=a * b, **words) for step in steps)
        ending, number = next(forms)
        if len(completions) % 40 == 39:
            completions.append("I do not know how to solve this, sorry.")
        else:
            completions.append(text + ending.format(n=number(rng), **words))
    return completions


def test_a_thousand_varied_completions():
    completions = varied_completions(1000 - len(EXPLAINED), seed=0) + [entry[0] for entry in EXPLAINED]
    assert len(set(completions)) > 900
    differing = [text for text in completions if our_answer(text) != harness_answer(text)]
    assert sum(harness_answer(text) is None for text in completions) > 20
    assert len(differing) <= 10  # 1 % of them
    assert set(differing) <= {entry[0] for entry in EXPLAINED}


def test_the_published_solutions(shared):
    """Ours finds the published answer of every test row; the filter misses it nowhere either."""
    rows = GSM8K.load("test", shared / "data")
    assert len(rows) > 1000
    for row in rows:
        assert our_answer(GSM8K.target(row)) == harness_answer(GSM8K.target(row)) == Decimal(GSM8K.gold(row))


# log-likelihoods


@pytest.fixture(scope="module")
def harness():
    """stories260K in the harness and in ours, the same weights."""
    from tests.conftest import SHARED

    path = SHARED / "models" / "stories260K"
    if not path.is_dir():
        pytest.skip(f"{path} is absent")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the harness and what it imports warn
        from lm_eval.models.huggingface import HFLM

        model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, device="cpu"), model, tokenizer


def instances(kind: str, arguments: list[tuple]) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


@pytest.mark.parametrize("name", ["arc", "boolq", "piqa"])
def test_logliks_of_choices(harness, shared, name):
    lm, model, tokenizer = harness
    task = get_task(name)
    rows = random.Random(0).sample(task.load("test", shared / "data"), 12)
    requests, texts = [], []
    for row in rows:
        prompt = Prompt(task.prompt(row), task.closing)
        found, cut = choice_requests(tokenizer, prompt, task.choices(row), context_length(model.config))
        if not cut:
            requests += found
            texts += [(prompt.text, choice) for choice in task.choices(row)]
    assert len(texts) >= 20
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = [
            value for value, _ in lm.loglikelihood(instances("loglikelihood", texts), disable_tqdm=True)
        ]
    ours = logliks(model, requests, batch_size=7)
    assert_same(torch.tensor(ours), torch.tensor(theirs), terms=chain(model))


@pytest.mark.slow
def test_logliks_of_long_texts(harness, shared):
    """Windows over texts of several contexts; the harness's own beginning-of-text token is left out."""
    lm, model, tokenizer = harness
    task = get_task("wikitext")
    rows = task.load("validation", shared / "data")
    texts = [task.target(row) for row in rows if 2000 < len(task.target(row)) < 8000][:3]
    requests = [text_requests(tokenizer, text, context_length(model.config)) for text in texts]
    assert max(map(len, requests)) >= 3
    lm.add_bos_token = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = lm.loglikelihood_rolling(
                instances("loglikelihood_rolling", [(text,) for text in texts]), disable_tqdm=True
            )
    finally:
        lm.add_bos_token = None
    ours = [sum(logliks(model, windows, batch_size=2)) for windows in requests]
    assert_same(torch.tensor(ours), torch.tensor(theirs), terms=chain(model))
    nats = {i: -value for i, value in enumerate(ours)}
    found = corpus_perplexity(nats, {i: task.n_words({"text": text}) for i, text in enumerate(texts)})
    weighted = [
        (value, len(text.split()) + text.count("\n")) for value, text in zip(theirs, texts, strict=True)
    ]
    from lm_eval.api.metrics import weighted_perplexity

    expected = weighted_perplexity(weighted)
    allowed = rounding(torch.float32, chain(model)) * math.log(expected)  # its logarithm's, times that
    assert found.value == pytest.approx(expected, rel=allowed)
