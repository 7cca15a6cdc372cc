"""Log-likelihoods, perplexity and several metrics, compared with sums over a model's own probabilities."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics

import pytest
import torch

import lota.evaluate.engine as engine
import lota.evaluate.scorers as scorers
from lota.data.batches import Prompt
from lota.data.prompts import FewShot, Limits, Prompter
from lota.evaluate.decoding import Decoding
from lota.evaluate.estimates import corpus_perplexity, mean, mean_of
from lota.evaluate.loglik import choice_requests, logliks, windows
from lota.models.head import Head
from tasks import get_task
from tasks.base import Task
from tests.chars import char_model, char_tokenizer
from tests.evaluations import json_lines, score
from tests.tiny import VOCAB, make


class Colours(Task):
    """Three choices of unlike length; the prompt ends with a line break."""

    name = "colours"
    scoring = ("generation", "loglik")
    closing = "\nAnswer:\n"
    fields = ("question",)
    labels = ("red", "light blue", "g")

    def prompt(self, row):
        return f"Q: {row['question']}{self.closing}"

    def target(self, row):
        return self.labels[row["answer"]]

    def gold(self, row):
        return self.labels[row["answer"]]

    def extract(self, completion):
        return completion.strip() or None

    def choices(self, row):
        return list(self.labels)

    def choice(self, row):
        return row["answer"]


ROWS = [{"question": "abcdefg"[: i + 1], "answer": i % 3} for i in range(7)]


@pytest.fixture(scope="module")
def pair():
    return char_model(), char_tokenizer()


def by_hand(pair, context: str, continuation: str) -> float:
    """log p of the last characters, one forward pass, one token at a time."""
    model, tokenizer = pair
    ids = [*tokenizer(context).input_ids, *tokenizer(continuation, add_special_tokens=False).input_ids]
    n = len(tokenizer(continuation, add_special_tokens=False).input_ids)
    with torch.no_grad():
        probabilities = model(torch.tensor([ids])).logits[0].softmax(-1)
    return sum(math.log(probabilities[at - 1, ids[at]]) for at in range(len(ids) - n, len(ids)))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_logliks(pair, batch_size):
    texts = [("Hello", " world"), ("a", "b"), ("Some longer context, ", "x"), ("?", "many more characters")]
    requests = [tuple(pair[1](t, add_special_tokens=False).input_ids for t in text) for text in texts]
    seen = {}
    found = logliks(pair[0], requests, batch_size=batch_size, on_done=seen.__setitem__)
    expected = [by_hand(pair, *text) for text in texts]
    assert found == pytest.approx(expected, abs=1e-4)
    assert [seen[i] for i in range(4)] == found


def test_broken_weights_are_an_error(pair):
    model = char_model()
    model.model.norm.weight.data[:] = math.nan
    with pytest.raises(ValueError, match=r"not numbers \(NaN\)"):
        logliks(model, [([5], [6])], batch_size=1)


def test_choices_normal_and_length_normalised(pair, tmp_path):
    task = Colours()
    result = score(pair, tmp_path, task, ROWS, scoring="loglik")
    right = {"accuracy_loglik": [], "accuracy_loglik_norm": []}
    for row, stored in zip(
        ROWS, json_lines(tmp_path / "metrics/colours_loglik_predictions.jsonl"), strict=True
    ):
        values = [by_hand(pair, task.prompt(row), choice) for choice in task.labels]
        # the line break that ends the prompt counts with every choice
        values = [v + by_hand(pair, task.prompt(row).rstrip(), "\n") for v in values]
        assert stored["logliks"] == pytest.approx(values, abs=1e-3)
        per_character = [v / len(choice) for v, choice in zip(values, task.labels, strict=True)]
        right["accuracy_loglik"].append(float(values.index(max(values)) == row["answer"]))
        right["accuracy_loglik_norm"].append(float(per_character.index(max(per_character)) == row["answer"]))
        assert stored["gold"] == task.labels[row["answer"]]
        best = task.labels[values.index(max(values))]
        assert stored["completion"] == stored["extracted"] == best
    assert {name: found.value for name, found in result.estimates.items()} == {
        name: statistics.fmean(values) for name, values in right.items()
    }
    assert result.metric == "accuracy_loglik"
    content = json.loads((tmp_path / "metrics/colours_loglik.json").read_text())
    assert (
        content["metrics"]["accuracy_loglik_norm"]["score"] == result.estimates["accuracy_loglik_norm"].value
    )
    assert content["settings"]["scoring"] == "loglik"
    assert not (tmp_path / "metrics/colours.json").exists()  # generation's results have a place of their own


def test_logliks_are_reused_and_continued(pair, tmp_path, monkeypatch):
    score(pair, tmp_path, Colours(), ROWS, scoring="loglik", chosen=[0, 3])
    asked = []
    real = engine.logliks
    monkeypatch.setattr(
        engine, "logliks", lambda m, requests, **k: asked.append(len(requests)) or real(m, requests, **k)
    )
    result = score(pair, tmp_path, Colours(), ROWS, scoring="loglik", num_runs=3)
    assert asked == [5 * 3]  # five rows of three choices; more runs of what draws nothing would be the same
    assert result.n == 7
    assert len(result.runs) == 1


def test_a_scoring_that_the_task_does_not_offer(pair, tmp_path):
    with pytest.raises(ValueError, match="task gsm8k cannot be scored by loglik, only by generation"):
        score(pair, tmp_path, get_task("gsm8k"), [{}], scoring="loglik")


def test_long_prompts_of_choices_are_cut_and_counted(pair, tmp_path):
    tokenizer = pair[1]
    text = "Q: " + "x" * 300 + "\nAnswer:\n"
    requests, cut = choice_requests(tokenizer, Prompt(text, "\nAnswer:\n"), ["red", "light blue"], 256)
    assert cut
    assert {len(context) + len("\nlight blue") - 1 for context, _ in requests} == {256}
    assert tokenizer.decode(requests[0][0]).startswith("Q: xxx")
    assert tokenizer.decode(requests[0][0]).endswith("\nAnswer:")
    with pytest.raises(ValueError, match="does not fit the model's context, 256"):
        choice_requests(tokenizer, Prompt(text), ["y" * 300], 256)
    rows = [*ROWS[:2], {"question": "x" * 300, "answer": 1}]
    assert score(pair, tmp_path, Colours(), rows, scoring="loglik").n_cut == 1
    assert score(pair, tmp_path, Colours(), rows).n_cut == 1
    assert json.loads((tmp_path / "metrics/colours.json").read_text())["n_cut"] == 1


@pytest.mark.parametrize("n", [1, 4, 5, 8, 11, 13])
def test_windows_predict_every_token_once(n):
    tokens = list(range(10, 10 + n))
    found = windows(tokens, 1, 4)
    assert [token for _, after in found for token in after] == tokens
    assert all(before and len(before) + len(after) - 1 <= 4 for before, after in found)
    whole = [1, *tokens]
    for before, after in found:  # each context is what stands right before in the text
        end = whole.index(after[0])
        assert whole[end - len(before) : end] == before
    if n > 4:
        assert len(found[-1][0]) + len(found[-1][1]) == 5  # the last window sees as much as fits


def test_perplexity(pair, tmp_path):
    task = get_task("wikitext")
    texts = ["one two\nthree\n", "a b c d", "x" * 40]
    result = score(pair, tmp_path, task, [{"text": text} for text in texts])
    nats = [-by_hand(pair, "<s>", text) for text in texts]
    words, tokens = [5, 4, 1], [len(text) for text in texts]
    assert result.score == pytest.approx(math.exp(sum(nats) / sum(words)), rel=1e-4)
    assert result.metric == "word_perplexity"
    per_token = result.estimates["token_perplexity"]
    assert per_token.value == pytest.approx(math.exp(sum(nats) / sum(tokens)), rel=1e-4)
    stored = json.loads((tmp_path / "metrics/wikitext.json").read_text())
    assert stored["metrics"]["token_perplexity"]["stderr"] == per_token.stderr
    prediction = json_lines(tmp_path / "metrics/wikitext_predictions.jsonl")[1]
    assert prediction["score"] == pytest.approx(math.exp(nats[1] / 4), rel=1e-4)
    assert list(prediction)[:5] == ["prompt", "completion", "extracted", "gold", "score"]


def test_the_error_of_a_perplexity_is_that_of_many_draws():
    """The deviation over simulated corpora, against the delta method's error from one of them."""
    generator = torch.Generator().manual_seed(0)

    def corpus(n):
        counts = torch.randint(20, 200, (n,), generator=generator).double()
        nats = counts * (2 + 0.3 * torch.randn(n, generator=generator, dtype=torch.float64))
        return corpus_perplexity(dict(enumerate(nats.tolist())), dict(enumerate(counts.tolist())))

    values = [corpus(100).value for _ in range(300)]
    assert corpus(100).stderr == pytest.approx(statistics.stdev(values), rel=0.3)


def test_estimates():
    a, b = mean({0: 1.0, 1: 0.0, 2: 1.0}), mean({0: 0.5, 1: 0.5, 2: 0.0})
    difference = a.minus(b)
    assert difference.value == pytest.approx(2 / 3 - 1 / 3)
    assert difference.stderr == pytest.approx(statistics.stdev([0.5, -0.5, 1.0]) / math.sqrt(3))
    assert mean({4: 1.0}).stderr is None
    value, error = mean_of([a, b])
    assert (value, error) == (pytest.approx(0.5), pytest.approx(math.hypot(a.stderr, b.stderr) / 2))


def test_several_metrics_of_a_completion(pair, tmp_path, monkeypatch):
    task = get_task("sql")
    context = "CREATE TABLE staff (name VARCHAR, age INTEGER)"
    answers = ["SELECT name FROM staff", "SELECT age FROM staff", "SELECT nope FROM staff"]
    rows = [{"question": "Who?", "context": context, "answer": answer} for answer in answers]

    def fake(model, tokenizer, prompts, decoding, *, indices, on_done, **more):
        for at, text in enumerate(["select NAME from staff;", "SELECT name FROM staff", ""]):
            on_done(at, text)

    monkeypatch.setattr(engine, "generate", fake)
    result = score(pair, tmp_path, task, rows)
    stored = json.loads((tmp_path / "metrics/sql.json").read_text())
    assert stored["metric"] == "rouge1"
    assert stored["score"] == result.score == pytest.approx((1 + 3 / 4 + 0) / 3)
    assert stored["metrics"]["exact_match"]["score"] == pytest.approx(1 / 3)
    # sqlite3 does not take the last row's own answer, so that row has no execution_match
    assert {k: stored["metrics"]["execution_match"][k] for k in ("score", "n")} == {"score": 0.5, "n": 2}
    predictions = json_lines(tmp_path / "metrics/sql_predictions.jsonl")
    assert predictions[2]["metrics"].keys() == {"rouge1", "exact_match"}


@pytest.mark.parametrize("more", [(), ("other",)], ids=["one metric", "two"])
def test_no_answer_scores_0_whatever_the_task_makes_of_it(pair, tmp_path, monkeypatch, more):
    class Generous(Colours):
        more_metrics = more

        def score(self, extracted, gold):
            return 1.0

        def metrics(self, row, completion):
            assert super().metrics(row, completion)["exact_match"] == float(bool(completion.strip()))
            return {"exact_match": 1.0, "other": 1.0}

    def fake(model, tokenizer, prompts, decoding, *, indices, on_done, **more):
        for at, text in enumerate(["red", "   ", "no colour"]):
            on_done(at, text)

    monkeypatch.setattr(engine, "generate", fake)
    result = score(pair, tmp_path, Generous(), ROWS[:3])
    stored = json_lines(tmp_path / "metrics/colours_predictions.jsonl")
    assert [(p["extracted"], p["score"]) for p in stored] == [("red", 1.0), (None, 0.0), ("no colour", 1.0)]
    assert result.score == pytest.approx(2 / 3)


def test_examples_decide_what_is_reused(pair, tmp_path, monkeypatch):
    prompts = []
    real = engine.generate

    def spy(model, tokenizer, ids, decoding, **settings):
        prompts.append([tokenizer.decode(row) for row in ids])
        return real(model, tokenizer, ids, decoding, **settings)

    monkeypatch.setattr(engine, "generate", spy)
    training = [{"question": f"t{i}", "answer": i % 3} for i in range(20)]
    for few_shot in (None, FewShot(2, 0, training), FewShot(2, 0, training), FewShot(2, 1, training)):
        result = score(pair, tmp_path, Colours(), ROWS[:3], few_shot=few_shot)
    assert [len(call) for call in prompts] == [3, 3, 3]  # the second one with seed 0 is reused
    assert prompts[0][0] == "Q: a\nAnswer:\n"
    for i, text in enumerate(prompts[1]):
        assert text.count("Answer:") == 3
        assert text.endswith(f"Q: {ROWS[i]['question']}\nAnswer:\n")
        assert text.startswith("Q: t")
    assert prompts[1] != prompts[2]
    assert result.settings["num_fewshot"] == 2


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "qwen2"])
def test_logliks_do_not_depend_on_the_batch(kind, monkeypatch):
    """Padding leaves no trace, whatever a model's positions; scores are made for continuations only."""
    model = make(kind).eval()
    generator = torch.Generator().manual_seed(0)
    sizes = [(9, 4), (3, 1), (20, 2), (1, 4), (6, 3)]
    requests = [
        tuple(torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in size) for size in sizes
    ]
    scored, logps = [], Head.logps
    watched = lambda head, hidden, ids: scored.append(len(ids)) or logps(head, hidden, ids)  # noqa: E731
    monkeypatch.setattr(Head, "logps", watched)
    together = logliks(model, requests, batch_size=5)
    assert scored == [4 + 1 + 2 + 4 + 3]
    for request, value in zip(requests, together, strict=True):
        ids = torch.tensor([request[0] + request[1]])
        with torch.no_grad():
            logps = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
        assert value == pytest.approx(logps[len(request[0]) - 1 :].sum().item(), abs=1e-4)


def test_an_example_that_is_left_out_counts_as_cut(pair, tmp_path):
    """One of one: the prompt itself is whole."""
    training = [{"question": "x" * 300, "answer": 0}] * 2
    rows = [{"question": "a", "answer": 1}]
    for scoring in ("generation", "loglik"):
        result = score(pair, tmp_path, Colours(), rows, scoring=scoring, few_shot=FewShot(1, 0, training))
        assert result.n_cut == 1


def test_what_predictions_depend_on(pair):
    """Limits of training count where a prompt is read as in training: not behind examples, not in texts."""
    limits = Limits(256, 128)
    prompter = Prompter(pair[1], limits=limits)

    def settings(task, rows=ROWS, **more):
        request = scorers.TaskRequest(task, rows, Decoding(12), **more)
        return request.scorer(engine.TransformersEngine(*pair), prompter, request).settings

    alone = settings(Colours(), scoring="loglik")
    assert alone == {"scoring": "loglik", "num_fewshot": 0, "prompt_limits": dataclasses.asdict(limits)}
    assert settings(Colours())["prompt_limits"] == dataclasses.asdict(limits)
    behind = settings(Colours(), few_shot=FewShot(2, 0, ROWS), scoring="loglik")
    assert behind == {"scoring": "loglik", "num_fewshot": 2}
    assert settings(get_task("wikitext"), [{"text": "a"}]) == {"scoring": "perplexity", "num_fewshot": 0}


@pytest.mark.parametrize(("n_tokens", "fits"), [(245, True), (246, True), (247, False), (254, False)])
def test_examples_leave_room_for_the_longest_choice(pair, tmp_path, n_tokens, fits):
    """256 tokens of context and choices of 3, 10 and 1 tokens."""
    tokenizer, task, row = pair[1], Colours(), {"question": "a", "answer": 1}
    alone = len(tokenizer(task.demonstration({"question": "", "answer": 0}) + task.prompt(row)).input_ids)
    training = [{"question": "x" * (n_tokens - alone), "answer": 0}] * 2
    result = score(pair, tmp_path, task, [row], scoring="loglik", few_shot=FewShot(1, 0, training))
    (stored,) = json_lines(tmp_path / "metrics/colours_loglik_predictions.jsonl")
    assert (stored["prompt"].count("Answer:"), result.n_cut) == ((2, 0) if fits else (1, 1))
