"""The base of the studies: what it may learn, its schedule, a training that goes on, what is written."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from assets import make_study_base, study_texts
from assets.pretrain import Checkpoints, trapezoid
from assets.study_texts import SOURCES, VALIDATION, RowsOfTests, Source, Texts, question_of
from lota.data.examples import in_validation
from lota.models.hashing import content_hash
from lota.models.weights import open_weights
from tasks import get_task
from tests.evaluations import write_rows
from tests.test_study import nats_of

GSM8K = get_task("gsm8k")


def question(i: int) -> str:
    return f"Anna has {i} red apples and Ben has {i + 1} pears, how many do they have together?"


@pytest.fixture
def texts(tmp_path, monkeypatch) -> Texts:
    """gsm8k alone: 300 training rows, of which one is a test row and one nearly one."""
    rows = [{"question": question(i), "answer": f"#### {2 * i + 1}"} for i in range(300)]
    tested = [
        "What is one and one?",
        "A question of very many words that says in the end what nobody wants to know at all.",
    ]
    rows += [{"question": tested[0].upper(), "answer": "#### 2"}]
    rows += [{"question": f"Well: {tested[1].removesuffix('at all.')}", "answer": "#### 3"}]
    write_rows(tmp_path, "gsm8k", "train", rows)
    write_rows(tmp_path, "gsm8k", "test", [{"question": text, "answer": "#### 1"} for text in tested])
    monkeypatch.setattr(study_texts, "TESTED", ("gsm8k",))
    monkeypatch.setattr(study_texts, "SOURCES", {"gsm8k": Source(("gsm8k",), 0.8, "MIT", seen=0.5)})
    return Texts(tmp_path)


def test_what_is_learnt(texts):
    learnt, held_out = texts.found["gsm8k"]
    rows = {("", GSM8K.prompt(row) + GSM8K.target(row)): row for row in GSM8K.load("train", texts.data_dir)}
    assert 0.3 * 300 < len(learnt) + len(held_out) < 0.6 * 300 and 0 < len(held_out) < len(learnt)
    assert not set(learnt) & set(held_out) and set(learnt) | set(held_out) <= set(rows)
    for document in (*learnt, *held_out):
        assert not in_validation(GSM8K, rows[document], VALIDATION)
        assert rows[document]["question"].startswith(
            "Anna"
        )  # neither the test row nor what repeats most of it
    stream = list(itertools.islice(texts.stream(1), 400))
    own = [document for document in stream if document in rows]
    assert set(own) <= set(learnt) and len(set(own)) > 0.5 * len(learnt)
    size = {
        kind: sum(len("".join(d).encode()) for d in stream if (d in rows) == kind) for kind in (True, False)
    }
    assert size[True] / size[False] == pytest.approx(0.8 / study_texts.WORLD_WEIGHT, rel=0.05)
    assert (
        stream == list(itertools.islice(texts.stream(1), 400)) != list(itertools.islice(texts.stream(2), 400))
    )
    apart = texts.held_out()
    assert apart["gsm8k"] == held_out and not set(apart["world"]) & set(stream)


def test_repeated_questions():
    tested = RowsOfTests(["Who was it?", " ".join(map(str, range(14)))])
    assert tested.repeated_in("who WAS, it") and not tested.repeated_in("Who was it then?")
    assert tested.repeated_in("so " + " ".join(map(str, range(1, 14))))
    assert not tested.repeated_in(" ".join(map(str, range(12))))
    choice = (
        "Please choose the correct answer to the question: What is ice?\n\nAnswer1: a\n\nAnswer format: a/b"
    )
    assert question_of({"instruction": choice}) == "What is ice?"


def test_licences_of_the_sources():
    """Texts that may not be used commercially or changed are in no source."""
    names = {name for source in SOURCES.values() for name in source.tasks}
    assert not names & {"samsum", "alpaca_eval", "sharegpt4", "alpaca", "hh"}


def test_schedule():
    rates = [trapezoid(step, 1000, 2.0) for step in range(1000)]
    assert rates[0] == pytest.approx(2 / 50) and rates[49:700] == [2.0] * 651
    assert rates[850] == pytest.approx(1.0) and 0 < rates[-1] < 0.01
    # a longer run is the same until the shorter one falls
    assert rates[:700] == [trapezoid(step, 2000, 2.0) for step in range(700)]


@pytest.mark.slow
def test_a_training_goes_on_and_says_what_it_made(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(
        make_study_base, "SHAPE", replace(make_study_base.SHAPE, vocabulary=300, layers=1, hidden=32, mlp=64)
    )
    monkeypatch.setattr(make_study_base, "TOKENIZER_BYTES", 20_000)
    monkeypatch.setattr(study_texts, "WORLD_HELD_OUT", 5)
    threads = torch.get_num_threads()
    settings = ["--steps", "4", "--batch", "2", "--length", "64", "--save_every", "2"]

    def make(name: str, *more: str) -> None:
        make_study_base.main(
            ["--data_dir", str(texts.data_dir), "--out", str(tmp_path / name), *settings, *more]
        )

    make("whole")
    save = Checkpoints.save

    def stop(self, *given):
        save(self, *given)
        raise KeyboardInterrupt

    file = ["--checkpoint", str(tmp_path / "training.pt")]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "save", stop)
        make("parts", *file)
    make("parts", *file)
    torch.set_num_threads(threads)
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert {p.dtype for p in one.parameters()} == {torch.bfloat16}
    report = json.loads((tmp_path / "parts" / "training.json").read_text())
    assert report["weights_hash"] == content_hash(open_weights(tmp_path / "parts"))
    assert report["texts_sha256"] == texts.digest()
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path / "parts"), two.float().eval()
    assert tokenizer.pad_token is None and len(tokenizer) == 300 == report["vocabulary"]
    nats = size = 0.0
    for _, text in texts.held_out()["gsm8k"]:
        nats += nats_of(model, [tokenizer.bos_token_id], tokenizer(text, add_special_tokens=False).input_ids)
        size += len(text.encode())
    assert report["held_out"]["gsm8k"]["nats_per_byte"] == pytest.approx(nats / size, rel=1e-4)
    assert report["held_out"]["gsm8k"]["bytes"] == size and math.isfinite(
        report["held_out"]["world"]["stderr"]
    )
