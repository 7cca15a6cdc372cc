"""The evaluator: scores and files, what is reused and what is set aside."""

from __future__ import annotations

import json
import math
import statistics

import pytest

import lota.evaluate.engine as engine
from lota.data.examples import held_out_rows
from lota.data.prompts import Prompter
from lota.evaluate.decoding import Decoding
from lota.evaluate.estimates import mean_and_stderr
from lota.evaluate.evaluator import Evaluator
from lota.evaluate.scorers import TaskRequest
from tasks import get_task
from tasks.base import Task
from tests import evaluations
from tests.chars import char_model, char_tokenizer
from tests.evaluations import json_lines

ROWS = [{"question": f"What is {i}?", "answer": f"It is.\n#### {i}"} for i in range(7)]


@pytest.fixture(scope="module")
def pair():
    return char_model(), char_tokenizer()


@pytest.fixture
def scripted(monkeypatch):
    """Completions chosen by the test instead of a model's; the prompt numbers asked for, in order."""
    asked: list[int] = []
    answers: dict[int, str] = {}

    def fake(model, tokenizer, prompts, decoding, *, indices, on_done, **more):
        for at in reversed(range(len(prompts))):  # any order of completion is allowed
            asked.append(indices[at])
            on_done(at, answers.get(indices[at], "nothing"))
        return []

    monkeypatch.setattr(engine, "generate", fake)
    fake.asked, fake.answers = asked, answers
    return fake


def score(pair, folder, rows=ROWS, task=None, **more):
    return evaluations.score(pair, folder, task or get_task("gsm8k"), rows, **more)


def test_mean_and_stderr():
    scores = [1.0, 0.0, 0.0, 1.0, 1.0]
    by_hand = math.sqrt(sum((x - 0.6) ** 2 for x in scores) / 4) / math.sqrt(5)
    assert mean_and_stderr(scores) == (0.6, pytest.approx(by_hand, rel=1e-12))
    assert mean_and_stderr([1.0]) == (1.0, None)


def test_files_and_their_numbers(pair, tmp_path, scripted):
    # 1, 3 and 5 are right; 0 holds the answer in its prompt only; 2 is wrong; 4 and 6 are no numbers
    scripted.answers.update({1: "#### 1.0", 2: "#### 3", 3: "so 3", 4: "inf", 5: "#### +5", 6: "Q"})
    result = score(pair, tmp_path)
    predictions = json_lines(tmp_path / "metrics/gsm8k_predictions.jsonl")
    assert [p["score"] for p in predictions] == [0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    assert [p["extracted"] for p in predictions] == [None, "1", "3", "3", None, "5", None]
    assert [p["gold"] for p in predictions] == list("0123456")
    assert all(list(p) == ["prompt", "completion", "extracted", "gold", "score"] for p in predictions)
    assert [p["prompt"] for p in predictions] == [get_task("gsm8k").prompt(row) for row in ROWS]
    stored = json.loads((tmp_path / "metrics/gsm8k.json").read_text())
    names = ["task", "version", "metric", "score", "stderr", "n", "seed", "settings", "model", "date"]
    assert list(stored) == names
    assert stored["score"] == result.score == 3 / 7
    assert stored["stderr"] == pytest.approx(statistics.stdev([0, 1, 0, 1, 0, 1, 0]) / math.sqrt(7))
    assert (stored["n"], stored["seed"], stored["model"]) == (7, 0, "m")
    assert stored["settings"]["max_new_tokens"] == 12
    assert (tmp_path / "metrics/gsm8k_accuracy.txt").read_text().count(str(3 / 7)) == 1


def test_every_example_is_scored_with_a_real_model(pair, tmp_path):
    """Batches of 3 over 7 rows: the last, partial batch counts."""
    result = score(pair, tmp_path)
    assert result.n == len(json_lines(tmp_path / "metrics/gsm8k_predictions.jsonl")) == 7


def test_no_answer_scores_nothing_whatever_the_task_says(pair, tmp_path, scripted):
    class Generous(type(get_task("gsm8k"))):
        def score(self, extracted, gold):
            return 1.0

    assert score(pair, tmp_path, task=Generous()).score == 0.0


def test_equal_key_is_reused_and_any_other_is_set_aside(pair, tmp_path, scripted, caplog):
    caplog.set_level("INFO")
    score(pair, tmp_path)
    first = (tmp_path / "metrics/gsm8k_predictions.jsonl").read_text()
    score(pair, tmp_path)
    assert len(scripted.asked) == 7
    assert "reusing 7 results" in caplog.text
    assert len((tmp_path / "metrics/gsm8k_accuracy.txt").read_text().splitlines()) == 1  # nothing new

    class NewVersion(type(get_task("gsm8k"))):
        version = 99

    other_rows = [*ROWS[:-1], {"question": "Other?", "answer": "#### 6"}]
    changes = {
        "settings": {"decoding": Decoding(max_new_tokens=13)},
        "version": {"task": NewVersion()},
        "data": {"rows": other_rows},
        "seed": {"decoding": Decoding(max_new_tokens=12, temperature=1.0, seed=5)},
    }
    for count, (word, change) in enumerate(changes.items(), start=1):
        caplog.clear()
        scripted.asked.clear()
        score(pair, tmp_path, **change)
        assert len(scripted.asked) == 7, word
        assert word in caplog.text
        assert "starting anew" in caplog.text
        assert len(list((tmp_path / "metrics").glob("gsm8k_predictions.?.jsonl"))) == count
    assert (tmp_path / "metrics/gsm8k_predictions.1.jsonl").read_text() == first


def test_other_weights_are_never_reused(tmp_path, scripted, caplog):
    model, tokenizer = char_model(), char_tokenizer()
    score((model, tokenizer), tmp_path)
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] += 1e-6
    caplog.set_level("INFO")
    score((model, tokenizer), tmp_path)
    assert len(scripted.asked) == 14
    assert "made with another weights" in caplog.text


def test_greedy_predictions_serve_every_seed_and_draws_do_not(pair, tmp_path, scripted):
    assert len(score(pair, tmp_path, num_runs=3).runs) == 3
    assert len(scripted.asked) == 21  # one file per run; the first one serves another seed
    scripted.asked.clear()
    score(pair, tmp_path, decoding=Decoding(max_new_tokens=12, seed=9))
    assert scripted.asked == []
    result = score(pair, tmp_path, decoding=Decoding(max_new_tokens=12, temperature=1.0, seed=9), num_runs=2)
    assert len(scripted.asked) == 14
    assert result.n == 7


def test_several_runs_share_examples(pair, tmp_path, monkeypatch):
    """The error is over examples: two runs of equal scores tell no more than one."""

    def fake(model, tokenizer, prompts, decoding, *, indices, on_done, **more):
        for at, i in enumerate(indices):
            on_done(at, f"#### {i if i < 3 + decoding.seed else 99}")

    monkeypatch.setattr(engine, "generate", fake)
    decoding = Decoding(max_new_tokens=12, temperature=1.0)
    result = score(pair, tmp_path, decoding=decoding, num_runs=2)
    assert result.runs == (3 / 7, 4 / 7)
    assert result.score == pytest.approx(3.5 / 7)
    assert result.stderr == pytest.approx(statistics.stdev([1, 1, 1, 0.5, 0, 0, 0]) / math.sqrt(7))
    stored = json.loads((tmp_path / "metrics/gsm8k.json").read_text())
    assert stored["runs"] == [3 / 7, 4 / 7]
    assert stored["runs_stderr"] == pytest.approx(0.5 / 7)  # half the distance of two runs
    assert len((tmp_path / "metrics/gsm8k_accuracy.txt").read_text().splitlines()) == 2


def test_an_interrupted_run_goes_on_where_it_was(pair, tmp_path, scripted):
    def interrupt(prediction):
        if len(scripted.asked) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(pair, tmp_path, on_done=interrupt)
    assert not (tmp_path / "metrics/gsm8k.json").exists()
    journal = tmp_path / "metrics/gsm8k_predictions.journal"
    journal.write_bytes(journal.read_bytes()[:-9])  # as after a power cut in the middle of the last line
    kept = scripted.asked[:3]
    scripted.asked.clear()
    score(pair, tmp_path)
    assert sorted(scripted.asked) == sorted(set(range(7)) - set(kept))
    assert [p["gold"] for p in json_lines(tmp_path / "metrics/gsm8k_predictions.jsonl")] == list("0123456")


def test_a_larger_sample_goes_on_from_a_smaller_one(pair, tmp_path, scripted):
    score(pair, tmp_path, chosen=[1, 4])
    result = score(pair, tmp_path, chosen=[1, 2, 4, 6])
    assert sorted(scripted.asked) == [1, 2, 4, 6]
    assert result.n == 4
    assert [p["gold"] for p in json_lines(tmp_path / "metrics/gsm8k_predictions.jsonl")] == list("1246")


def test_tasks_without_score_or_rows(pair, tmp_path):
    class TrainOnly(Task):
        name, held_out = "train_only", None

    with pytest.raises(ValueError, match="alpaca_eval has no score"):
        score(pair, tmp_path, task=get_task("alpaca_eval"))
    with pytest.raises(ValueError, match="nothing to score"):
        score(pair, tmp_path, rows=[])
    with pytest.raises(ValueError, match="no held-out split"):
        held_out_rows(TrainOnly(), tmp_path)


def test_evaluator_serves_several_tasks(pair, tmp_path, scripted):
    evaluator = Evaluator(
        engine.TransformersEngine(*pair), Prompter(pair[1]), model_name="m", out_dir=tmp_path
    )
    for name in ("one", "two"):
        task = type(name, (type(get_task("gsm8k")),), {"name": name})()
        evaluator.evaluate(TaskRequest(task, ROWS, Decoding(12)))
    assert {path.name for path in (tmp_path / "metrics").glob("*.json")} == {"one.json", "two.json"}
