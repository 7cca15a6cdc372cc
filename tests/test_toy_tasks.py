"""Toy tasks: splits that share nothing, answers checked independently, what counts as an answer."""

from __future__ import annotations

import contextlib
import itertools
import random
import string

import pytest
import torch

from lota.data.batches import Example, Prompt, collate, encode
from lota.models.loading import load_model, load_tokenizer
from lota.train.losses import response_logps, sft_loss
from tasks import get_task
from tests.test_assets import MODEL, greedy

NAMES = ["toy_sort", "toy_shift", "toy_reverse"]


@pytest.mark.parametrize("name", NAMES)
def test_splits_share_nothing_and_never_change(name):
    task = get_task(name)
    train, test = task.load("train", "/nowhere"), task.load("test", "/elsewhere")
    assert (len(train), len(test)) == (6400, 400)
    for field in ("question", "answer"):
        assert not {row[field] for row in train} & {row[field] for row in test}
    assert len({row["question"] for row in train + test}) == 6800
    assert task.load("test", None) == test


def test_the_first_rows_are_what_they_were():
    """Scores of two commits are comparable only on the same rows; a change must raise the version."""
    first = [get_task(name).load("test")[0] for name in NAMES]
    assert [(row["question"], row["answer"]) for row in first] == [
        ("c i q d b w", "b c d i q w"),
        ("7 0 3 7 2", "8 1 4 8 3"),
        ("white gold red gray green", "green gray red gold white"),
    ]
    assert [get_task(name).version for name in NAMES] == [1, 1, 1]


def test_answers():
    for row in get_task("toy_sort").load("test"):
        question, answer = row["question"].split(), row["answer"].split()
        assert sum(answer.count(letter) for letter in question) == len(question) == len(answer) == 6
        places = [string.ascii_lowercase.index(letter) for letter in answer]
        assert all(a < b for a, b in itertools.pairwise(places))
    following = dict(zip("0123456789", "1234567890", strict=True))
    for row in get_task("toy_shift").load("test"):
        assert row["answer"] == " ".join(following[digit] for digit in row["question"].split())
    for row in get_task("toy_reverse").load("test"):
        question, answer = row["question"].split(), row["answer"].split()
        assert len(set(question)) == len(answer) == 5
        assert [answer.index(word) for word in question] == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("name", NAMES)
def test_target_is_extracted_as_gold(name):
    task = get_task(name)
    for row in task.load("test")[:50]:
        assert task.prompt(row).endswith(task.closing)
        assert row["question"] in task.prompt(row)
        assert row["answer"] not in task.prompt(row)
        assert task.score(task.extract(task.target(row)), task.gold(row)) == 1.0


def test_unknown_split():
    with pytest.raises(ValueError, match="no split 'validation'"):
        get_task("toy_sort").load("validation")


def accuracy(model, tokenizer, task, n=100):
    rows = task.load("test")[:n]
    completions = greedy(model, tokenizer, [task.prompt(row) for row in rows], task)
    return sum(task.score(task.extract(c), task.gold(r)) for c, r in zip(completions, rows, strict=True)) / n


@pytest.mark.parametrize("name", NAMES)
def test_the_base_cannot_do_it(name):
    model, tokenizer = load_model(str(MODEL)), load_tokenizer(str(MODEL))
    assert accuracy(model, tokenizer, get_task(name)) <= 0.02


@pytest.mark.slow
@pytest.mark.parametrize(("name", "examples"), [("toy_shift", 1600), ("toy_reverse", 2400)])
def test_a_few_steps_teach_it(name, examples):
    task, tokenizer, model = get_task(name), load_tokenizer(str(MODEL)), load_model(str(MODEL))
    rows = random.Random(0).sample(task.load("train"), examples)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3, alpha=0.99)
    for start in range(0, len(rows), 16):
        examples = [Example(Prompt(task.prompt(row)), task.target(row)) for row in rows[start : start + 16]]
        batch = collate([encode(tokenizer, e, max_length=64, max_prompt_length=48) for e in examples], 0)
        sft_loss(*response_logps(model, batch, contextlib.nullcontext())).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert accuracy(model, tokenizer, task) >= 0.8
