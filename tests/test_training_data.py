"""Examples of several tasks at once: of each its share, chosen by the seed."""

from __future__ import annotations

import pytest

from lota.data.examples import load_examples, load_held_out
from lota.data.prompts import Prompter
from tasks import get_task
from tests.chars import char_tokenizer
from tests.runs import metrics, settings, train

pytestmark = pytest.mark.usefixtures("workplace")
NAMES = ("mini", "toy_shift")


def prompts(name: str, split: str) -> list[str]:
    task = get_task(name)
    return [task.prompt(row) for row in task.load(split, None)]


def loaded(*overrides: str) -> list[str]:
    config = settings("datasets=[mini,toy_shift]", *overrides)
    tasks = [get_task(name) for name in config.datasets]
    return [e.prompt.text for e in load_examples(tasks, "train", config, Prompter(char_tokenizer()))]


@pytest.mark.slow
def test_every_task_gives_its_share():
    """In the order of the tasks and of their rows; a seeded sample, not the first rows."""
    every = [prompts(name, "train") for name in NAMES]
    counts = [round(0.1 * len(rows)) for rows in every]
    found = loaded("data_fraction=0.1")
    assert len(found) == sum(counts)
    for rows, part in zip(every, (found[: counts[0]], found[counts[0] :]), strict=True):
        places = [rows.index(prompt) for prompt in part]
        assert places == sorted(places) and places != list(range(len(part)))
    assert loaded("data_fraction=0.1") == found != loaded("data_fraction=0.1", "seed=1")
    assert loaded() == [prompt for rows in every for prompt in rows]


def test_held_out_examples_are_a_sample_over_all_tasks():
    config = settings("datasets=[mini,toy_shift]", "n_eval_examples=200")
    tasks = [get_task(name) for name in config.datasets]
    found = [e.prompt.text for e in load_held_out(tasks, config, Prompter(char_tokenizer()))]
    mini, shift = (set(prompts(name, "test")) for name in NAMES)
    assert len(found) == 200
    assert mini & set(found) and shift & set(found) and set(found) <= mini | shift


@pytest.mark.slow
def test_a_run_on_two_tasks():
    trainer, folder = train("datasets=[mini,toy_shift]", "data_fraction=0.005", "eval_every=16")
    assert [e.prompt.text for e in trainer.data.train] == loaded("data_fraction=0.005")
    assert trainer.progress.examples == len(trainer.data.train) == 1 + 32
    assert (folder / "policy.pt").is_file() and any("loss/eval" in line for line in metrics(trainer))
