"""A server as the engine: equal results, faults of the server, and what is refused before work."""

from __future__ import annotations

import json

import pytest

import eval_model_all
import generate_samples
from lota.distributed.processes import Processes
from lota.evaluate import engine_openai
from lota.evaluate.decoding import Decoding
from lota.evaluate.engine_choice import check_engine
from lota.evaluate.engine_openai import OpenAIEngine, server_address
from lota.evaluate.engine_outside import OutsideModel
from tasks import get_task
from tests.chars import ALPHABET, char_model, char_tokenizer, save_pair
from tests.evaluations import json_lines, write_rows
from tests.openai_server import Server
from tests.test_eval_model_all import choice_row


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    questions = [{"question": f"{ALPHABET[i : 3 * i]}?", "answer": f"#### {i}"} for i in range(1, 12)]
    write_rows(data, "gsm8k", "test", questions)
    write_rows(data, "ARC-Easy", "test", [choice_row(i) for i in range(4)])
    (data / "tasks/wikitext").mkdir()
    (data / "tasks/wikitext/validation.txt").write_text(" \n = One = \n \n a b c \n \n = Two = \n \n d e \n")
    return data


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def server(folder):
    return Server(char_model(), char_tokenizer(), name=str(folder))


@pytest.fixture
def run(folder, data, tmp_path, server):
    """Run the command; with the server unless an engine is named."""

    def run(datasets, *more, out="served", code=0, model=folder):
        line = ["--model", str(model), "--datasets", datasets, "--data_dir", str(data)]
        line += ["--max_new_tokens", "12", "--out", str(tmp_path / out), *map(str, more)]
        with server.running() as url:
            if "--engine" not in more:
                line += ["--engine", "openai", "--base_url", url]
            assert eval_model_all.main(line) == code
        return tmp_path / out / "metrics"

    return run


LOCAL = ("--engine", "transformers")


def test_results_equal_those_of_transformers(run, server):
    """Completions, greedy and drawn, in the same bytes; log-probabilities within fp32's rounding."""
    for scoring in ("generate", "loglik"):
        names = "gsm8k,ARC-Easy,wikitext" if scoring == "generate" else "ARC-Easy"
        local = run(names, *LOCAL, "--scoring", scoring, out="local")
        served = run(names, "--scoring", scoring, "--concurrency", 3)
        for name in ("gsm8k", "ARC-Easy") if scoring == "generate" else ():
            file = f"{name}_predictions.jsonl"
            assert (served / file).read_bytes() == (local / file).read_bytes()
    for name, value in (("ARC-Easy_loglik", "logliks"), ("wikitext", "nats")):
        ours, theirs = (json_lines(at / f"{name}_predictions.jsonl") for at in (served, local))
        for one, other in zip(ours, theirs, strict=True):
            assert one.pop(value) == pytest.approx(other.pop(value), abs=1e-3)
            one.pop("score"), other.pop("score")
            assert one == other
    drawn = [
        (
            run("gsm8k", *engine, "--sample", "--num_runs", 2, out=out) / "gsm8k_predictions_run1.jsonl"
        ).read_bytes()
        for engine, out in (((), "drawn"), (LOCAL, "drawn_here"))
    ]
    assert drawn[0] == drawn[1]
    assert 1 < server.most_at_once <= 64
    first = next(body for body in server.asked if body["max_tokens"] == 12)
    assert (first["stop"], first["stop_token_ids"]) == (list(get_task("gsm8k").stop), [2])
    stored = json.loads((served / "gsm8k.json").read_text())["settings"]
    assert (stored["engine"], stored["served"]) == ("openai", server.name)
    assert len(stored["weights"]) == 64  # of the folder, which is here


def test_engines_do_not_share_results_and_a_comparison_names_them(run, tmp_path, caplog):
    local = run("gsm8k", *LOCAL, out="both")
    run("gsm8k", "--compare", tmp_path / "both", out="other")
    content = json.loads((tmp_path / "other/metrics/summary.json").read_text())
    assert content["tasks"][0]["differing_settings"] == ["dtype", "engine"]
    assert content["tasks"][0]["difference"]["exact_match"]["score"] == 0
    run("gsm8k", out="both")
    assert "made with another" in caplog.text and "engine" in caplog.text
    assert (local / "gsm8k_predictions.1.journal").is_file()


@pytest.mark.parametrize(("attribute", "value"), [("max_model_len", 60), ("knows_vllm", False)])
def test_a_server_that_was_started_otherwise_gives_other_results(run, server, caplog, attribute, value):
    """Its context cuts prompts; without vLLM's fields it may penalise repetitions."""
    run("gsm8k")
    n_asked = len(server.asked)
    setattr(server, attribute, value)
    served = run("gsm8k")
    assert len(server.asked) >= n_asked + 11 and "made with another" in caplog.text
    assert (served / "gsm8k_predictions.1.journal").is_file()


def test_faults_are_tried_again(run, server):
    local = run("gsm8k", *LOCAL, out="local")
    server.faults = [(500, {}), (429, {"Retry-After": "0.05"}), (503, {}), (500, {}), (408, {})]
    server.delay = 1.0
    served = run("gsm8k", "--timeout", 0.5)
    assert not server.faults
    assert (served / "gsm8k_predictions.jsonl").read_bytes() == (
        local / "gsm8k_predictions.jsonl"
    ).read_bytes()
    assert len(server.asked) >= 1 + 11 + 5


def test_a_server_that_dies_is_continued_by_the_same_command(run, server, monkeypatch, capsys):
    monkeypatch.setattr(engine_openai, "RETRIES", 1)
    local = run("gsm8k", *LOCAL, out="local")
    server.dies_after = 1 + 6  # the first one finds out what the server can do
    served = run("gsm8k", "--concurrency", 2, code=1)
    said = capsys.readouterr().err
    assert "what is done is kept: start the server and give the same command again" in said
    assert "Traceback" not in said
    assert server.unanswered <= 2 * 2  # those in flight, each tried again once; no more are sent
    kept = json_lines(served / "gsm8k_predictions.journal")[1:]
    assert len(kept) == 6
    server.dies_after = None
    server.asked.clear()
    served = run("gsm8k", "--concurrency", 2)
    assert len(server.asked) == 1 + 11 - 6
    assert server.most_at_once == 2
    assert (served / "gsm8k_predictions.jsonl").read_bytes() == (
        local / "gsm8k_predictions.jsonl"
    ).read_bytes()


def test_a_server_that_loads_another_model_is_noticed(folder, server):
    model = OutsideModel(str(folder), char_tokenizer())
    with server.running() as url, OpenAIEngine(model, url, concurrency=2, timeout=600) as engine:
        server.name = "other"
        with pytest.raises(ValueError, match=f"now answers as other, and not as {folder}"):
            engine.complete([[3], [4]], Decoding(2), indices=range(2), on_done=lambda i, text: None)


def test_what_is_in_flight_is_given_up_when_the_user_stops(folder, server):
    def stop(i, text):
        raise KeyboardInterrupt

    with server.running() as url, pytest.raises(KeyboardInterrupt):
        model = OutsideModel(str(folder), char_tokenizer())
        with OpenAIEngine(model, url, concurrency=2, timeout=600) as engine:
            server.delay = 20.0
            engine.complete([[3], [], [5]], Decoding(2), indices=range(3), on_done=stop)
    assert server.at_once == 1  # still at work on the other one


@pytest.mark.parametrize(
    ("changes", "more", "said"),
    [
        ({"name": "other"}, [], "serves other, not"),
        ({"name": "other"}, ["--served_model", "mine"], "serves other, not mine"),
        ({"name": "mine", "root": "/"}, ["--served_model", "mine"], "has mine from /, not from"),
        ({"faults": [(404, {})]}, [], "a fault"),
        ({"dies_after": 0}, [], "Connection error"),
        ({"key": "secret"}, [], "give its key in OPENAI_API_KEY"),
        ({"page": True}, [], "does not speak OpenAI's protocol"),
        ({}, ["--max_new_tokens", "256"], "the model has 256 positions"),
        ({"knows_vllm": False}, ["--sample"], "--top_k 50: the server"),
        (
            {"echoes": False, "prompt_logprobs": False},
            ["--scoring", "loglik"],
            "does not return the log-prob",
        ),
        ({"takes_ids": False}, ["--scoring", "loglik"], "does not return the log-probabilities"),
    ],
)
def test_refused_before_work(run, server, monkeypatch, capsys, changes, more, said):
    monkeypatch.setattr(engine_openai, "RETRIES", 1)
    for name, value in changes.items():
        setattr(server, name, value)
    out = run("ARC-Easy" if "--scoring" in more else "gsm8k", *more, code=1)
    assert said in capsys.readouterr().err
    assert not list(out.glob("*.journal"))
    assert len(server.asked) <= 4  # what finds out what the server can do


def test_a_server_that_cannot_be_reached(folder, data, tmp_path, capsys):
    line = f"--model {folder} --datasets gsm8k --data_dir {data} --out {tmp_path}/out --engine openai"
    assert eval_model_all.main([*line.split(), "--base_url", "http://127.0.0.1:9"]) == 1
    assert "http://127.0.0.1:9/v1: Connection error; start it" in capsys.readouterr().err


def test_another_servers_dialect(run, server, monkeypatch):
    """Text prompts, none of vLLM's fields, texts as answers, another name, a key; then log-probabilities
    without echo.
    """
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    local = run("gsm8k", *LOCAL, out="local")
    server.takes_ids = server.knows_vllm = False
    server.name, server.max_model_len, server.key = "mine", None, "secret"
    served = run("gsm8k", "--served_model", "mine")
    assert (served / "gsm8k_predictions.jsonl").read_bytes() == (
        local / "gsm8k_predictions.jsonl"
    ).read_bytes()
    assert all(isinstance(body["prompt"], str) for body in server.asked[3:])
    server.takes_ids = server.knows_vllm = True
    server.echoes = False
    local = run("ARC-Easy", *LOCAL, "--scoring", "loglik", out="local")
    served = run("ARC-Easy", "--served_model", "mine", "--scoring", "loglik")
    ours, theirs = (json_lines(at / "ARC-Easy_loglik_predictions.jsonl") for at in (served, local))
    assert [one["logliks"] for one in ours] == [pytest.approx(one["logliks"], abs=1e-3) for one in theirs]


def test_samples(folder, tmp_path, server):
    (tmp_path / "prompts.json").write_text(json.dumps(["Hi", "Name a colour, please.", "Why?", "Count."]))
    line = f"--prompt_set {tmp_path}/prompts.json --model_name N --model_path {folder} --temperatures 0.7,0.0"
    line += " --max_length 90 --max_prompt_length 60"
    assert generate_samples.main([*line.split(), "--out", str(tmp_path / "local")]) == 0
    with server.running() as url:
        served = ["--out", str(tmp_path / "served"), "--engine", "openai", "--base_url", url]
        assert generate_samples.main([*line.split(), *served]) == 0
    for name in ("prompts_temp0.7.json", "prompts_temp0.0.json"):
        assert (tmp_path / "served" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--base_url", "http://x"],
            "--base_url: --engine transformers talks to no server; add --engine openai",
        ),
        (["--engine", "openai"], "give --base_url"),
        (["--engine", "openai", "--base_url", "localhost:8000"], "give an address such as"),
        (
            ["--engine", "openai", "--base_url", "http://x", "--dtype", "float16"],
            "--dtype: --engine openai the",
        ),
        (
            ["--engine", "openai", "--base_url", "http://x", "--delta", "d"],
            "--delta: --engine openai the server",
        ),
        (
            ["--engine", "openai", "--base_url", "http://x", "--timeout", "-1"],
            "--timeout -1.0: must be above 0",
        ),
        (["--engine", "vllm"], "`vllm serve MODEL` in that environment and use --engine openai --base_url"),
        (["--concurrency", "4"], "--concurrency: --engine transformers works on batches; give --bs"),
    ],
)
def test_flags_that_an_engine_cannot_honour(folder, data, tmp_path, capsys, nothing_loads, flags, said):
    line = ["--model", str(folder), "--datasets", "gsm9k", "--data_dir", str(data), "--out", str(tmp_path)]
    assert eval_model_all.main([*line, *flags]) == 1
    error = capsys.readouterr().err
    assert said in error and "gsm9k" in error  # all problems at once


def test_several_processes_have_the_engine_in_each(monkeypatch):
    monkeypatch.setattr("lota.evaluate.engine_choice.processes", lambda: Processes(0, 2))
    base = ["--model", "m", "--datasets", "gsm8k"]
    for flags, said in [
        (["--engine", "openai", "--base_url", "http://x"], "start it without torchrun"),
        (["--device", "cuda:1"], "--device cuda:1: each process has a GPU of its own"),
    ]:
        with pytest.raises(ValueError, match=said):
            check_engine(eval_model_all.parse([*base, *flags]))
    check_engine(eval_model_all.parse([*base, "--device", "cpu"]))


def test_addresses():
    assert server_address("http://h:1/") == server_address("http://h:1/v1/") == "http://h:1/v1"
    assert server_address("https://h/proxy/v1") == "https://h/proxy/v1"
