"""eval_model_all.py: samples, scoring, examples, templates, the summary, comparison, and what it refuses."""

from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path

import pytest
import yaml

import eval_model_all
from lota import places
from lota.evaluate.cli import choose_results_folder, model_parser, recorded_prompting
from lota.places import holding
from lota.share.convert import convert_policy
from tasks import evaluation_names
from tests.chars import char_model, char_tokenizer, save_pair
from tests.evaluations import json_lines, write_rows
from tests.hf_models import save_policy

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[assistant]"


def choice_row(i: int) -> dict:
    listed = "Answer1: red Answer2: blue"
    right = f"answer{i % 2 + 1}"
    return {
        "instruction": f"Choose number {i}.\n\n{listed}\n\nAnswer format: answer1/answer2",
        "input": "",
        "output": f"the correct answer is {right}",
        "answer": right,
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Small files for gsm8k, ARC-Easy, ARC-Challenge, wikitext and, without training rows, hexphi."""
    folder = tmp_path_factory.mktemp("data")
    for split, n in (("train", 6), ("test", 8)):
        rows = [{"question": f"{split} {i}?", "answer": f"#### {i}"} for i in range(n)]
        write_rows(folder, "gsm8k", split, rows)
    write_rows(folder, "hexphi", "test", [{"instruction": "Say no."}])
    for name in ("ARC-Easy", "ARC-Challenge"):
        write_rows(folder, name, "test", [choice_row(i) for i in range(6)])
    (folder / "tasks/wikitext").mkdir()
    (folder / "tasks/wikitext/validation.txt").write_text(
        " \n = One = \n \n a b c \n \n = Two = \n \n d e \n"
    )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("other"), seed=5)


@pytest.fixture
def run(folder, data, tmp_path):
    def run(datasets, *more, model=folder, out="out", code=0):
        arguments = ["--model", str(model), "--datasets", datasets, "--data_dir", str(data)]
        arguments += ["--max_new_tokens", "6", "--out", str(tmp_path / out), *map(str, more)]
        assert eval_model_all.main(arguments) == code
        file = tmp_path / out / "metrics/summary.json"
        return json.loads(file.read_text()) if code == 0 else None

    return run


def predictions(folder, stem):
    return json_lines(folder / "metrics" / f"{stem}_predictions.jsonl")


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        (["HERE"], "HERE"),
        (["HERE", "--out", "HERE/x"], "HERE/x"),
        (["org/name"], "HERE/cache/results/org/name"),
        (["HERE", "--delta", "HERE/a.safetensors"], "HERE/a_results"),
    ],
)
def test_where_results_go(tmp_path, arguments, folder):
    here = [argument.replace("HERE", str(tmp_path)) for argument in (*arguments, folder)]
    args = model_parser(None, "--model").parse_args(["--model", *here[:-1]])
    assert choose_results_folder(args) == Path(here[-1])


def test_a_sample_of_the_rows_is_scored_greedily_or_drawn(run, folder, tmp_path, capsys):
    run("gsm8k", "--n_examples", 4, "--bs", 3)
    greedy = json.loads((tmp_path / "out/metrics/gsm8k.json").read_text())
    assert greedy["n"] == 4
    assert greedy["settings"]["temperature"] == 0
    more = ["--sample", "--top_p", 0.5, "--num_runs", 2, "--verbose"]
    run("gsm8k", "--n_examples", 4, *more, out="drawn")
    drawn = json.loads((tmp_path / "drawn/metrics/gsm8k.json").read_text())
    wanted = {"temperature": 0.6, "top_p": 0.5, "top_k": 50, "max_new_tokens": 6}
    assert wanted.items() <= drawn["settings"].items()
    assert "[completion]" in capsys.readouterr().out
    asked = [p["prompt"] for p in predictions(tmp_path / "drawn", "gsm8k")]
    assert asked == [p["prompt"] for p in predictions(tmp_path / "out", "gsm8k")]
    assert asked != [f"Question: test {i}?\nAnswer:\n" for i in range(4)]  # not the first rows


def test_summary_over_tasks(run, tmp_path, capsys):
    assert len(evaluation_names("commonsense")) == 8
    assert evaluation_names("mathinstruct, gsm8k,purebad") == ["gsm8k", "hexphi"]
    content = run("mathinstruct, ARC-Easy,wikitext", "--n_examples", 4)
    assert [entry["task"] for entry in content["tasks"]] == ["gsm8k", "ARC-Easy", "wikitext"]
    assert [entry["scoring"] for entry in content["tasks"]] == ["generation", "generation", "perplexity"]
    for entry in content["tasks"]:
        stored = json.loads((tmp_path / f"out/metrics/{entry['task']}.json").read_text())
        same = ("task", "version", "metric", "score", "stderr", "n", "seed")
        assert {key: entry[key] for key in same} == {key: stored[key] for key in same}
        assert entry["n_cut"] == 0
    output = capsys.readouterr().out
    gsm8k = content["tasks"][0]
    numbers = f"{gsm8k['score']:.4f} +{gsm8k['stderr']:.4f} +4 +0"
    assert re.search(rf"^gsm8k +exact_match +{numbers}$", output, re.MULTILINE)
    assert re.search(r"^ +token_perplexity +[0-9.]+ +[0-9.]+ +2$", output, re.MULTILINE)


def test_several_runs_show_their_spread(run, capsys):
    drawn = ["--sample", "--num_runs", 3, "--temperature", 0.9, "--top_p", 0.8, "--top_k", 7]
    (entry,) = run("gsm8k", *drawn)["tasks"]
    assert len(entry["runs"]) == 3
    assert entry["runs_stderr"] == pytest.approx(statistics.stdev(entry["runs"]) / math.sqrt(3))
    assert f"gsm8k: 3 runs, {entry['runs'][0]:.4f}, " in capsys.readouterr().out


def test_loglik_and_the_mean_over_a_group(run, monkeypatch, capsys):
    eight = ("ARC-Easy", "ARC-Challenge")
    monkeypatch.setitem(eval_model_all.EVALUATED_ON, "commonsense", eight)
    content = run("commonsense,wikitext", "--scoring", "loglik")
    first, second, text = content["tasks"]
    assert (first["scoring"], text["scoring"]) == ("loglik", "perplexity")
    assert list(first["metrics"]) == ["accuracy_loglik", "accuracy_loglik_norm"]
    (mean, _) = content["means"]
    assert mean["score"] == pytest.approx((first["score"] + second["score"]) / 2)
    assert mean["stderr"] == pytest.approx(math.hypot(first["stderr"], second["stderr"]) / 2)
    assert "commonsense (mean of 2)" in capsys.readouterr().out


def test_examples_come_from_training_rows(run, tmp_path):
    run("gsm8k", "--num_fewshot", 2, "--n_examples", 3)
    for prediction in predictions(tmp_path / "out", "gsm8k"):
        questions = re.findall(r"Question: (\w+)", prediction["prompt"])
        assert questions == ["train", "train", "test"]


def test_comparison_is_paired(run, folder, other, tmp_path, capsys):
    """Against a stored evaluation of more examples; by hand from the two files of predictions."""
    run("gsm8k,ARC-Easy,wikitext", "--scoring", "generate", model=other, out="other")
    write_scores(tmp_path / "other/metrics/gsm8k_predictions.journal")
    capsys.readouterr()
    content = run("gsm8k,wikitext", "--compare", tmp_path / "other", "--n_examples", 5)
    gsm8k, wikitext = content["tasks"]
    ours = predictions(tmp_path / "out", "gsm8k")
    numbers = [int(prediction["gold"]) for prediction in ours]
    assert len(numbers) == 5 and numbers != [0, 1, 2, 3, 4]
    differences = [p["score"] - float(i % 2) for p, i in zip(ours, numbers, strict=True)]
    found = gsm8k["difference"]["exact_match"]
    assert found["n"] == 5
    assert found["score"] == pytest.approx(statistics.fmean(differences))
    assert found["stderr"] == pytest.approx(statistics.stdev(differences) / math.sqrt(5))
    theirs = json.loads((tmp_path / "other/metrics/wikitext.json").read_text())
    assert wikitext["difference"]["word_perplexity"]["score"] == pytest.approx(
        wikitext["score"] - theirs["score"]
    )
    assert content["compared_with"] == str(tmp_path / "other")
    output = capsys.readouterr().out
    assert "difference" in output.splitlines()[0]
    assert f"{found['score']:+.4f}" in output
    assert gsm8k["differing_settings"] == wikitext["differing_settings"] == []
    content = run("gsm8k", "--compare", tmp_path / "other", "--num_fewshot", 1, "--sample")
    names = ["temperature", "top_p", "top_k", "num_fewshot", "few_shot"]
    assert content["tasks"][0]["differing_settings"] == names
    assert f"gsm8k: not the same {', '.join(names)} there" in capsys.readouterr().out


def write_scores(journal):
    """Let example i have the score i % 2."""
    header, *records = json_lines(journal)
    for line in records:
        line["record"]["score"] = float(line["index"] % 2)
    journal.write_text("".join(json.dumps(line) + "\n" for line in [header, *records]))


def test_comparison_with_oneself_is_zero(run, folder, tmp_path):
    run("ARC-Easy", "--scoring", "loglik")
    content = run("ARC-Easy", "--scoring", "loglik", "--compare", tmp_path / "out")
    zero = {"score": 0.0, "stderr": 0.0, "n": 6}
    assert content["tasks"][0]["difference"] == {"accuracy_loglik": zero, "accuracy_loglik_norm": zero}


@pytest.fixture
def convert(tmp_path):
    """Base with a template -> run with these settings -> converted folder."""
    base, epoch = tmp_path / "base", tmp_path / "run/epoch-1"
    char_model().save_pretrained(base)
    tokenizer = char_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(base)
    epoch.mkdir(parents=True)
    save_policy(epoch / "policy.pt", char_model(seed=2).state_dict())

    def convert(**settings):
        config = {"model": {"pad_token": None, "tokenizer_name_or_path": None}, "datasets": ["gsm8k"]}
        (epoch.parent / "config.yaml").write_text(yaml.safe_dump({**config, **settings}))
        convert_policy(base, epoch / "policy.pt", tmp_path / "elsewhere")

    return convert


def test_the_runs_template_is_picked_up(run, convert, tmp_path):
    for choice, start in ((None, "Question: "), ("never", "Question: "), ("auto", "[user]Question: ")):
        convert(**({} if choice is None else {"chat_template": choice}))
        assert recorded_prompting(str(tmp_path / "elsewhere"))[0] == (choice or "never")
        run("gsm8k", model=tmp_path / "elsewhere")
        assert predictions(tmp_path / "out", "gsm8k")[0]["prompt"].startswith(start)
    run("gsm8k", "--chat_template", "never", model=tmp_path / "elsewhere")
    assert predictions(tmp_path / "out", "gsm8k")[0]["prompt"].startswith("Question: ")
    assert recorded_prompting("org/name") == recorded_prompting(str(tmp_path / "base")) == ("never", None)


@pytest.mark.parametrize("scoring", ["generate", "loglik"])
def test_prompts_are_cut_as_the_run_cut_them(run, convert, tmp_path, scoring):
    """Counted in the summary; a comparison with whole prompts names the difference."""
    convert(max_length=50, max_prompt_length=40)
    task, model = ("gsm8k" if scoring == "generate" else "ARC-Easy"), tmp_path / "elsewhere"
    stem = task if scoring == "generate" else f"{task}_loglik"
    write_rows(
        tmp_path, "gsm8k", "test", [{"question": "x" * n, "answer": "#### 1"} for n in (9, 30, 31, 99)]
    )
    more = ["--scoring", scoring, *(["--data_dir", tmp_path] if scoring == "generate" else [])]
    (entry,) = run(task, *more, model=model)["tasks"]
    n_long = sum(len(prediction["prompt"]) >= 50 for prediction in predictions(tmp_path / "out", stem))
    assert entry["n_cut"] == n_long == (2 if scoring == "generate" else 6)
    (whole,) = run(task, *more, "--whole_prompts", "--compare", tmp_path / "out", model=model, out="whole")[
        "tasks"
    ]
    assert whole["n_cut"] == 0
    assert whole["differing_settings"] == ["prompt_limits"]
    cut, kept = (
        json.loads((tmp_path / out / f"metrics/{stem}.json").read_text())["settings"]
        for out in ("out", "whole")
    )
    assert cut["prompt_limits"] == {"max_length": 50, "max_prompt_length": 40}
    assert "prompt_limits" not in kept
    if scoring == "loglik":  # what the model read differs
        logliks = [
            [prediction["logliks"] for prediction in predictions(tmp_path / out, stem)]
            for out in ("out", "whole")
        ]
        assert logliks[0] != logliks[1]


def test_another_draw_of_examples_is_named(run, tmp_path):
    run("gsm8k", "--num_fewshot", 2)
    for seed, names in ((0, []), (1, ["few_shot"])):
        content = run("gsm8k", "--num_fewshot", 2, "--seed", seed, "--compare", tmp_path / "out", out="other")
        assert content["tasks"][0]["differing_settings"] == names


@pytest.mark.parametrize(
    ("datasets", "more", "words"),
    [
        ("gsm8k", ["--scoring", "loglik"], "task gsm8k cannot be scored by loglik"),
        ("wikitext", ["--num_fewshot", "2"], "task wikitext scores texts, without prompts"),
        ("purebad", ["--num_fewshot", "1"], "task hexphi has no train split to take examples from"),
        ("gsm8k", ["--num_fewshot", "6"], "there are 6 training rows to draw from"),
        ("gsm8k", ["--compare", "/nowhere"], "has no predictions of gsm8k scored by generation"),
        ("gsm8k", ["--chat_template", "always"], "the tokenizer has none"),
        (" , ", [], "names no task"),
        ("sharegpt", [], "task sharegpt has no score"),
        ("alpaca_eval", [], "has no score"),
        ("gsm9k", [], "nearest: gsm8k"),
        ("gsm8k", ["--data_dir", "/nowhere"], "no data for split 'test'"),
        ("gsm8k", ["--dtype", "int3"], "unknown dtype"),
        ("gsm8k", ["--device", "warp"], "--device warp cannot be used"),
        ("gsm8k", ["--sample", "--temperature", "-1"], "temperature=-1.0"),
        ("gsm8k", ["--max_new_tokens", "0"], "max_new_tokens=0"),
        ("gsm8k", ["--max_new_tokens", "100000"], "positions for prompt and completion together; give at"),
        ("gsm8k", ["--tokenizer_path", "/nowhere"], "tokenizer"),
    ],
)
def test_refused_before_the_model_loads(run, nothing_loads, capsys, datasets, more, words):
    run(datasets, *more, code=1)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("change", [["--top_k", "5"], ["--n_examples", "-1"], ["--bs", "0"]])
def test_contradictions_are_refused(run, change, capsys):
    with pytest.raises(SystemExit) as stop:
        run("gsm8k", *change)
    assert stop.value.code == 2
    assert change[0] in capsys.readouterr().err


def test_all_problems_at_once(run, nothing_loads, capsys):
    run("gsm9k,gsm8k,alpaca_eval", "--scoring", "loglik", code=1)
    error = capsys.readouterr().err
    assert all(word in error for word in ("'gsm9k'", "alpaca_eval has no score", "gsm8k cannot be scored"))


def test_a_malformed_row_is_named(run, tmp_path, nothing_loads, capsys):
    write_rows(
        tmp_path, "gsm8k", "test", [{"question": "fine?", "answer": "#### 1"}, {"question": "no answer?"}]
    )
    run("gsm8k", "--data_dir", tmp_path, code=1)
    error = capsys.readouterr().err
    assert all(word in error for word in ("test.jsonl", "2", "'answer'"))


def test_a_task_that_another_process_scores_is_refused_before_loading(run, tmp_path, nothing_loads, capsys):
    """Two evaluations of other tasks in one place are none of each other's business."""
    with holding(tmp_path / "out" / "metrics" / "gsm8k.json"):
        places._held.clear()  # as another process sees it
        run("gsm8k", code=1)
        assert "is at work in" in capsys.readouterr().err
        with pytest.raises(AssertionError, match="the model was loaded"):
            run("hexphi")


def test_a_model_folder_without_tokenizer(run, tmp_path, nothing_loads, capsys):
    char_model().save_pretrained(tmp_path / "bare")
    run("gsm8k", model=tmp_path / "bare", code=1)
    error = capsys.readouterr().err
    assert f"no tokenizer at {tmp_path / 'bare'}" in error
    assert "--tokenizer_path" in error


def test_other_rows_cannot_be_compared(run, tmp_path, request, capsys):
    run("gsm8k", "--n_examples", 2, out="other")
    request.getfixturevalue("nothing_loads")
    write_rows(tmp_path, "gsm8k", "test", [{"question": "another?", "answer": "#### 1"}])
    run("gsm8k", "--data_dir", tmp_path, "--compare", tmp_path / "other", code=1)
    assert "of other rows or another version of task gsm8k" in capsys.readouterr().err
    (tmp_path / "other/metrics/gsm8k_predictions.journal").write_text("junk\n")
    run("gsm8k", "--compare", tmp_path / "other", code=1)
    assert "cannot be read" in capsys.readouterr().err


def test_numbers_out_of_range_are_told_together_and_alone(capsys):
    line = "--model model --datasets toy_sort"
    for flags, said in [
        ("--seed -1 --bs 0", "--seed -1: must be at least 0; --bs 0: must be at least 1"),
        ("--bs 0", "--bs 0: must be at least 1"),
    ]:
        with pytest.raises(SystemExit):
            eval_model_all.main([*line.split(), *flags.split()])
        assert capsys.readouterr().err.rstrip().endswith(f"error: {said}")


def test_out_that_is_a_file_is_refused_before_loading(tmp_path, capsys, nothing_loads):
    (tmp_path / "file").write_text("")
    for out in ("file", "file/below"):
        line = ["--model", "model", "--datasets", "toy_sort", "--out", str(tmp_path / out)]
        assert eval_model_all.main(line) == 1
        said = capsys.readouterr().err
        assert f"--out {tmp_path / out}: {tmp_path / 'file'} is a file; name a folder" in said


def test_a_folder_that_cannot_be_written_is_refused_before_loading(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path / "model")
    args = model_parser(None, "--model").parse_args(["--model", str(tmp_path / "model")])
    with pytest.raises(ValueError, match=r"you may not write in .*model; name another folder"):
        choose_results_folder(args)


def test_no_model_and_no_data_are_told_together(tmp_path, capsys):
    line = f"--model no_such_folder --datasets gsm8k --data_dir {tmp_path} --out {tmp_path / 'out'}"
    assert eval_model_all.main(line.split()) == 1
    said = capsys.readouterr().err
    assert "no_such_folder does not exist" in said and "task gsm8k: no data for split 'test'" in said
