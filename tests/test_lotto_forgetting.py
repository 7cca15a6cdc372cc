"""Forgetting and its relatives against numbers worked out by hand."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
from types import SimpleNamespace

import pytest

from lota.evaluate.estimates import mean, ratio
from lota.lotto.forgetting import Matrix, write_results
from lota.lotto.held_out import Measured, measure_all

# scores of two examples per task; a[i][j] on task j after stage i
SCORES = {
    "a": [(1.0, 0.8), (0.5, 0.9), (0.4, 0.2)],
    "b": [(0.0, 0.2), (0.6, 1.0), (0.7, 0.3)],
    "c": [(0.1, 0.1), (0.0, 0.2), (0.9, 0.7)],
}
TASKS = list(SCORES)


def matrix(sign: float = 1.0, **more) -> Matrix:
    rows = [{t: mean(dict(enumerate(sign * x for x in SCORES[t][at]))) for t in TASKS} for at in range(3)]
    return Matrix(TASKS, rows, **more)


def stderr_of(*pairs: tuple[tuple[float, float], tuple[float, float]]) -> float:
    """Of a mean of paired differences over tasks that are independent."""
    errors = [statistics.stdev([x - y for x, y in zip(a, b, strict=True)]) / math.sqrt(2) for a, b in pairs]
    return math.sqrt(sum(e**2 for e in errors)) / len(errors)


def test_summaries():
    # a: 0.9, 0.7, 0.3; b: 0.1, 0.8, 0.5; c: 0.1, 0.1, 0.8
    found = matrix()
    assert found.average()[0] == pytest.approx((0.3 + 0.5 + 0.8) / 3)
    value, error = found.backward_transfer()
    assert value == pytest.approx(((0.3 - 0.9) + (0.5 - 0.8)) / 2)
    differences = [(SCORES["a"][2], SCORES["a"][0]), (SCORES["b"][2], SCORES["b"][1])]
    assert error == pytest.approx(stderr_of(*differences))
    value, error = found.forgetting()
    assert value == pytest.approx(((0.9 - 0.3) + (0.8 - 0.5)) / 2)
    assert error == pytest.approx(stderr_of(*differences))


def test_the_best_of_all_earlier_stages_counts():
    """Also one before the task's own stage, as in the definition."""
    rows = [{"a": mean({0: 0.2}), "b": mean({0: 0.9})}, {"a": mean({0: 0.6}), "b": mean({0: 0.7})},
            {"a": mean({0: 0.1}), "b": mean({0: 0.3}), }]  # fmt: skip
    for row in rows:
        row["c"] = mean({0: 0.5})
    found = Matrix(["a", "b", "c"], rows)
    assert found.forgetting()[0] == pytest.approx(((0.6 - 0.1) + (0.9 - 0.3)) / 2)
    assert found.backward_transfer()[0] == pytest.approx(((0.1 - 0.2) + (0.3 - 0.7)) / 2)


def test_losses_count_the_other_way():
    scores, losses = matrix(), matrix(-1.0, smaller_is_better=True)
    assert losses.average()[0] == pytest.approx(-scores.average()[0])
    for summary in ("backward_transfer", "forgetting"):
        assert getattr(losses, summary)() == pytest.approx(getattr(scores, summary)())


def test_a_single_task_has_nothing_to_forget():
    found = Matrix(["a"], [{"a": mean({0: 1.0, 1: 0.0})}])
    assert found.average()[0] == 0.5
    assert found.backward_transfer() is None and found.forgetting() is None


def measured(at: int, task: str, metric: str | None = "exact_match") -> Measured:
    score = None if metric is None else mean(dict(enumerate(SCORES[task][at])))
    return Measured(metric, score, ratio({0: 2.0 + at, 1: 4.0}, {0: 1, 1: 3}))


@pytest.mark.parametrize("metric", ["exact_match", None, "word_perplexity"])
def test_the_results_of_a_sequence(tmp_path, metric):
    """Scores are left out where a task has none, or one of which less is better."""
    kinds = {"a": "exact_match", "b": metric, "c": "exact_match"}
    stages = [{t: measured(at, t, kinds[t]) for t in TASKS} for at in range(3)]
    content = write_results(tmp_path, TASKS, stages, stages[0])
    assert json.loads((tmp_path / "forgetting.json").read_text()) == content
    assert content["loss"]["matrix"] == [[1.5] * 3, [1.75] * 3, [2.0] * 3]
    assert content["loss"]["forgetting"]["value"] == pytest.approx((0.5 + 0.5) / 2)
    assert (tmp_path / "forgetting_loss.png").is_file()
    assert ("score" in content) == (tmp_path / "forgetting.png").is_file() == (metric == "exact_match")
    text = (tmp_path / "forgetting.txt").read_text()
    assert (
        "after c" in text and "2.000" in text and ("forgetting: 0.450" in text) == (metric == "exact_match")
    )


@pytest.mark.parametrize("found", [measured(0, "a"), measured(1, "b", None)])
def test_results_are_read_back_as_they_were(found):
    assert Measured.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_the_error_of_a_ratio():
    """Nats per token over texts: the delta method, worked out for two of them."""
    found = ratio({0: 3.0, 1: 5.0}, {0: 2, 1: 2})
    assert found.value == 2.0
    assert found.stderr == pytest.approx(statistics.stdev([3.0 / 2, 5.0 / 2]) / math.sqrt(2))


class Rows:
    """Held-out rows of a task whose results are those of the model that was loaded."""

    def __init__(self, name: str):
        self.task, self.key, self.measured = SimpleNamespace(name=name), f"rows of {name}", []

    def measure(self, model, tokenizer, folder):
        self.measured.append(model)
        return Measured("accuracy", mean({0: model}), mean({0: model / 2}))


def test_results_are_those_of_the_weights(tmp_path, caplog):
    """What was measured is used again for the same weights alone, and a damaged file is set aside."""
    rows = [Rows("a"), Rows("b")]

    def found(model: float, weights: str) -> list[float]:
        results = measure_all(rows, lambda: contextlib.nullcontext((model, None)), tmp_path, weights)
        return [results[name].score.value for name in ("a", "b")]

    assert found(1.0, "first") == found(9.0, "first") == [1.0, 1.0]
    assert found(2.0, "second") == [2.0, 2.0]
    assert [one.measured for one in rows] == [[1.0, 2.0]] * 2
    (tmp_path / "held_out.json").write_text('{"a": 3}')
    assert found(4.0, "second") == [4.0, 4.0]
    assert (tmp_path / "held_out.1.json").read_text() == '{"a": 3}' and "cannot be read" in caplog.text
