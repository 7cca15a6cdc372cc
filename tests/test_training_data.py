"""Examples of several tasks at once: of each its share, chosen by the seed."""

from __future__ import annotations

import itertools

import pytest

from lota.data.examples import load_examples, load_held_out, rows_of
from lota.data.prompts import Prompter
from lota.data.task import Preference
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


def answers(monkeypatch, pairs):
    """Let the task of preferences have these answers, in turn."""
    task = get_task("pairs")
    given = itertools.cycle(pairs)
    monkeypatch.setattr(type(task), "preference", lambda self, row: Preference("p", *next(given)))
    return task


def test_preferences_of_which_nothing_is_learnt_are_left_out_and_counted(monkeypatch, caplog):
    task = answers(monkeypatch, [("a", "b"), ("same", "same"), (" ", "b"), ("a", "")])
    config, prompter = settings("datasets=[pairs]", "loss=dpo"), Prompter(char_tokenizer())
    found = load_examples([task], "train", config, prompter)
    assert [(e.response, e.rejected) for e in found] == [("a", "b"), ("a", "")] * 10
    text = "20 of 40 preferences left out: both answers are equal in 10, the preferred one is empty in 10"
    assert f"pairs, train: {text}" in caplog.messages
    assert len(load_held_out([task], config, prompter)) == 6
    task = answers(monkeypatch, [("same", "same")])
    with pytest.raises(ValueError, match=r"pairs, train: 40 of 40 preferences .* no preference is left"):
        load_examples([task], "train", config, prompter)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("max_length=8 max_prompt_length=4", "40 prompts and 30 responses of 40 examples are cut"),
        ("warmup_steps=6", "warmup_steps=6, but the run has 5 steps: lr=0.001 is never reached"),
        ("lr=0", "lr=0: no weight will change"),
        ("warmup_steps=5", None),  # the last step has the whole rate
    ],
)
def test_what_a_run_will_not_do_is_said_before_a_model_loads(caplog, override, said):
    from lota.train.preflight import prepare

    prepare(settings(*override.split()), get_task)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == (said is not None) and (not said or warnings[0].startswith(said))


def prepared(*overrides: str):
    from lota.train.preflight import prepare

    return prepare(settings(*overrides), get_task)


def test_replayed_rows_join_the_training_rows_and_are_not_held_out():
    """A sample of the replayed task, after all rows of the run's own; another share is other data."""
    plain = prepared("do_first_eval=true")
    replayed = prepared("do_first_eval=true", "replay=[toy_shift]", "replay_fraction=0.02")
    texts = [example.prompt.text for example in replayed.train]
    own, more = texts[: len(plain.train)], texts[len(plain.train) :]
    assert own == [example.prompt.text for example in plain.train]
    every = prompts("toy_shift", "train")
    assert len(more) == round(0.02 * len(every)) and set(more) <= set(every)
    places = [every.index(prompt) for prompt in more]
    assert places == sorted(places) and places != list(range(len(more)))
    assert [e.prompt.text for e in replayed.held_out] == [e.prompt.text for e in plain.held_out]
    assert len({data.seen["data"] for data in (plain, replayed, prepared("replay=[toy_shift]"))}) == 3
    fraction = "validation_fraction=0.3"
    kept = prepared("replay=[toy_shift]", "replay_fraction=1", "do_first_eval=true", fraction)
    task = get_task("toy_shift")
    trained = {row for row in map(task.prompt, rows_of(task, "train", "", 0.3))}
    assert {e.prompt.text for e in kept.train if e.prompt.text in every} == trained != set(every)


def test_a_replayed_task_is_checked_like_the_others():
    with pytest.raises(ValueError, match="unknown task 'toy_shif'"):
        prepared("replay=[toy_shif]")
    with pytest.raises(ValueError, match=r"learns from preference pairs, and task mini has none"):
        prepared("datasets=[pairs]", "loss=dpo", "replay=[mini]")


@pytest.mark.slow
def test_a_run_on_two_tasks():
    trainer, folder = train("datasets=[mini,toy_shift]", "data_fraction=0.005", "eval_every=16")
    assert [e.prompt.text for e in trainer.data.train] == loaded("data_fraction=0.005")
    assert trainer.progress.examples == len(trainer.data.train) == 1 + 32
    assert (folder / "policy.pt").is_file() and any("loss/eval" in line for line in metrics(trainer))
