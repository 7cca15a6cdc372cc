"""Evaluation and samples in several processes: the results of one process, and what happens if one fails."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import eval_model_all
import generate_samples
from lota.distributed.processes import Processes
from lota.evaluate.decoding import Decoding
from lota.evaluate.engine import TransformersEngine
from lota.evaluate.engine_shared import SharedEngine
from tests.chars import ALPHABET, char_model, char_tokenizer, save_pair
from tests.evaluations import json_lines, write_rows
from tests.test_eval_model_all import choice_row
from tests.torchrun import torchrun

PROGRAM = Path(__file__).parent / "evaluating.py"
SCRIPTS = {"eval_model_all": eval_model_all, "generate_samples": generate_samples}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, 29 questions, nine choices, five prompts."""
    place = tmp_path_factory.mktemp("place")
    save_pair(place / "model")
    texts = [ALPHABET[i % 40 : i % 40 + 3 * (i % 17)] for i in range(1, 30)]
    write_rows(place, "gsm8k", "test", [{"question": f"{t}?", "answer": f"#### {len(t)}"} for t in texts])
    write_rows(place, "ARC-Easy", "test", [choice_row(i) for i in range(9)])
    (place / "prompts.json").write_text(json.dumps(["Hi", "Name a colour, please.", "Why?", "Count.", "So?"]))
    return place


def evaluation(place: Path, out: Path, datasets: str, *more: str) -> list:
    line = ["--model", place / "model", "--data_dir", place, "--datasets", datasets, "--out", out]
    return ["eval_model_all", [*map(str, line), "--max_new_tokens", "12", "--bs", "4", *more], 0]


def commands(place: Path, out: Path) -> list:
    """Even and uneven shares, empty ones, a continuation, draws, log-likelihoods, samples, a refusal."""
    samples = ["--model_path", place / "model", "--prompt_set", place / "prompts.json", "--model_name", "N"]
    samples += ["--out", out / "samples", "--temperatures", "0.7", "--chunk_size", "2"]
    samples += ["--max_length", "90", "--max_prompt_length", "60"]
    return [
        evaluation(place, out / "few", "gsm8k", "--n_examples", "3"),
        evaluation(place, out / "all", "gsm8k", "--n_examples", "11"),
        evaluation(place, out / "all", "gsm8k"),
        evaluation(place, out / "drawn", "gsm8k", "--sample", "--num_runs", "2"),
        evaluation(place, out / "loglik", "ARC-Easy", "--scoring", "loglik"),
        ["generate_samples", list(map(str, samples)), 0],
    ]


def files(out: Path) -> dict[str, bytes | list]:
    """What was written, by name: bytes, but records of log-likelihoods as they are read, and no dates."""
    found: dict[str, bytes | list] = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file() and path.suffix != ".journal"):
        name = str(path.relative_to(out))
        if "loglik_predictions" in name:
            found[name] = json_lines(path)
        elif not name.startswith("loglik"):
            found[name] = re.sub(rb"\d{4}-\d\d-\d\dT[\d:]+\+00:00", b"", path.read_bytes())
    return found


@pytest.fixture(scope="module")
def alone(place):
    for script, arguments, code in commands(place, place / "alone"):
        assert SCRIPTS[script].main(arguments) == code
    return files(place / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])
def test_results_are_those_of_one_process(place, alone, n):
    """Bytes of completions, log-likelihoods within rounding; every row once, in order; one table."""
    out = place / str(n)
    (place / f"{n}.json").write_text(json.dumps(commands(place, out)))
    done = torchrun(n, PROGRAM, place / f"{n}.json")
    assert done.returncode == 0, done.stderr
    found = files(out)
    name = "loglik/metrics/ARC-Easy_loglik_predictions.jsonl"
    for ours, theirs in zip(found.pop(name), alone[name], strict=True):
        assert ours.pop("logliks") == pytest.approx(theirs["logliks"], abs=1e-3)
        assert ours == {key: value for key, value in theirs.items() if key != "logliks"}
    assert found == {key: value for key, value in alone.items() if key != name}
    assert done.stdout.count("results in") == 5
    assert done.stdout.count("samples in") == 1
    assert done.stderr.count("reusing 11 results") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "faulty"), [("error", 1), ("kill", 0)])
def test_an_error_on_one_process_ends_all(place, alone, tmp_path, fault, faulty):
    """It is told once; what was done is kept, and the same command goes on, in one process too."""
    command = evaluation(place, tmp_path / "out", "gsm8k")
    (tmp_path / "line.json").write_text(json.dumps([command]))
    done = torchrun(2, PROGRAM, tmp_path / "line.json", timeout=60, FAULT=fault, FAULTY=str(faulty))
    assert done.returncode != 0
    told = {"error": "error: what went wrong", "kill": "error: another process has ended"}
    # the launcher tells of a kill itself, and may end the other process before it does
    assert done.stderr.count("error: ") == done.stderr.count(told[fault]), done.stderr
    assert done.stderr.count("error: ") in ([1] if fault == "error" else [0, 1])
    assert "Traceback" not in done.stderr.partition("torch/distributed/elastic")[0]
    journal = tmp_path / "out/metrics/gsm8k_predictions.journal"
    assert len(json_lines(journal)) == 1 + 8  # the first batch of both
    assert eval_model_all.main(command[1]) == 0
    ours = (tmp_path / "out/metrics/gsm8k_predictions.jsonl").read_bytes()
    assert ours == alone["all/metrics/gsm8k_predictions.jsonl"]


class Recorded(Processes):
    """The first of three processes; the others' batches are done here too."""

    def broadcast(self, item):
        self.__dict__.setdefault("dealt", []).append(item)
        return item

    def gather(self, item):
        return [item]


@pytest.mark.parametrize(("n", "sizes"), [(13, [4, 4, 4, 1, 0, 0]), (5, [2, 2, 1]), (2, [1, 1, 0])])
def test_batches_are_those_of_one_process_unless_some_had_none(n, sizes):
    processes, done = Recorded(0, 3), []
    with SharedEngine(TransformersEngine(char_model(), char_tokenizer(), 4), processes) as engine:
        prompts = [[3 + i] * (1 + i % 5) for i in range(n)]
        engine.complete(prompts, Decoding(2), indices=range(n), on_done=lambda i, text: done.append(i))
    *rounds, end = processes.dealt
    assert end is None
    batches = [batch for dealt in rounds for batch in dealt]
    assert [len(batch.rows) for batch in batches] == sizes
    rows = [row for batch in batches for row in batch.rows]
    assert sorted(rows) == list(range(n))
    lengths = [len(prompts[row]) for row in rows]
    assert lengths == sorted(lengths, reverse=True)
    assert done == [row for dealt in rounds for row in dealt[0].rows]
