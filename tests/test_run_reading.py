"""Run folders read back: what they lack is left out and said, what is none is refused."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import asdict

import pytest
import run_folders
import yaml

import plot_runs
from lota.config import Config
from lota.lotto.config import LottoConfig
from lota.plots import bars
from lota.report.page import Section, write_page
from lota.report.reading import read_run, read_runs


@pytest.mark.slow
def test_what_is_not_there_is_left_out_and_said(tmp_path, capsys):
    gone = run_folders.rated_mask(tmp_path / "gone" / "0.9_mask.pt", 0.1, "task_vector")
    empty = run_folders.write_run(tmp_path / "empty", log=[])
    moved = run_folders.write_run(tmp_path / "moved", gone, log=run_folders.log_of([2.0, 1.0]))
    with (moved / "metrics.jsonl").open("a") as file:
        file.write('{"examples": 24, "nats_per')  # killed while it wrote
    (tmp_path / "gone" / "0.9_mask.pt").unlink()
    (moved / "epoch-1" / "metrics").mkdir()
    (moved / "epoch-1" / "metrics" / "summary.json").write_text('{"tasks": [{"task": "x"}]}')
    (empty / "versions.json").unlink()
    plot_runs.main([str(empty), str(moved), "--out", str(tmp_path / "f")])
    shown = capsys.readouterr().out
    assert "left out: empty: metrics.jsonl is empty: no curves" in shown
    assert "left out: empty: no evaluated checkpoint: no scores" in shown
    assert f"left out: moved: its mask {tmp_path}/gone/0.9_mask.pt is not there any more" in shown
    assert "summary.json is no summary of an evaluation" in shown
    text = (tmp_path / "f" / "index.html").read_text()
    assert "is not there any more" in text and "Overlap" not in text and "Density" not in text
    assert {row[0]: row[1] for row in run_folders.tables(text)["Runs"]}["moved"].startswith(
        "mask (file lost)"
    )


def test_an_older_checkpoint_with_scores_counts_and_is_said(tmp_path):
    folder = run_folders.write_run(tmp_path / "r", scores={"toy_sort": [1.0, 0.0, 1.0, 1.0]})
    (folder / "epoch-2").mkdir()
    (folder / "epoch-2" / "policy.pt").write_bytes(b"newer")
    (run,) = read_runs([str(folder)])
    assert run.scores[0].value == 0.75
    assert "scores are of epoch-1, epoch-2 is not evaluated" in run.notes


def with_ledger(folder, **changes):
    """The run folder of a sequence after one stage."""
    run_folders.write_run(folder)
    stage = {"name": "a", "mask": None, "kept": 1, "free_after": 9, "overlap": {}, "hash_before": {}}
    stage |= {"hash_after": {}, "scores": {"a": 1}, "losses": {"a": 0.5}, **changes}
    (folder / "ledger.json").write_text(json.dumps({"tasks": [stage]}))


def written(folder, key, value):
    """A run folder one setting of which has another value."""
    run_folders.write_run(folder)
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), key: value}))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "there is no such folder"),
        (lambda p: p.mkdir(), "there is no config.yaml"),
        (lambda p: (p.mkdir(), (p / "config.yaml").write_text("a: [")), "cannot be read"),
        (lambda p: (p.mkdir(), (p / "config.yaml").write_text("a: 1")), "holds no settings of a run"),
        (lambda p: (p.mkdir(), (p / "config.yaml").write_text("")), "holds no settings of a run"),
        (lambda p: (p.mkdir(), (p / "config.yaml").write_text("- 1")), "holds no settings of a run"),
        (lambda p: (p.mkdir(), (p / "config.yaml").write_bytes(b"\x00\xff")), "cannot be read"),
        (lambda p: (p.mkdir(), (p / "config.yaml").write_text("[" * 10_000)), "cannot be read"),
        (lambda p: (p.mkdir(), (p / "config.yaml").mkdir()), "there is no config.yaml"),
        (lambda p: p.write_text("text"), "it is a file; give the folder"),
        (lambda p: written(p, "lr", "abc"), "lr='abc' should be a number"),
        (lambda p: written(p, "seed", None), "seed=None should be a whole number"),
        (lambda p: written(p, "datasets", "gsm8k"), "datasets='gsm8k' should be a list"),
        (lambda p: written(p, "flip_mask", 1), "flip_mask=1 should be true or false"),
        (lambda p: written(p, "tasks", 3), "tasks=3 should be a list"),
        (lambda p: run_folders.write_run(p / "x"), "it holds runs: give"),
        (lambda p: with_ledger(p, kept="many"), "is no ledger: kept='many' is no int"),
        (lambda p: with_ledger(p, losses={"a": None}), "is no ledger: losses="),
        (lambda p: (run_folders.write_run(p), (p / "ledger.json").write_text("[]")), "is no ledger"),
    ],
)
def test_what_is_no_run_folder_is_refused_and_nothing_is_written(tmp_path, make, message):
    make(tmp_path / "bad")
    good = run_folders.write_run(tmp_path / "good", log=run_folders.log_of([1.0]))
    with pytest.raises(SystemExit, match=message) as stopped:
        plot_runs.main([str(good), str(tmp_path / "bad"), "--out", str(tmp_path / "f")])
    assert str(tmp_path / "bad") in str(stopped.value)
    assert not (tmp_path / "f").exists()


def test_what_every_run_writes_has_the_types_of_its_keys(tmp_path):
    for content in (Config("x"), LottoConfig("x", tasks=["a"])):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(asdict(content)))
        assert read_run(tmp_path).settings["exp_name"] == "x"


def test_what_a_sequence_writes_has_the_types_of_its_entries(tmp_path):
    with_ledger(tmp_path / "r")
    assert [stage.name for stage in read_run(tmp_path / "r").stages] == ["a"]


def test_a_log_with_lines_that_are_none(tmp_path):
    """Cut at line ends alone; what is no line of a log is counted, but not the end of a killed run's file."""
    folder = run_folders.write_run(tmp_path / "r")
    good = [{"examples": 8, "loss/train": 1.0, "note": "a\u2028b"}, {"examples": 16, "loss/train": None}]
    bad = ["7", "{}", "null", '{"examples": null}', '{"examples": "8"}', '{"examples": NaN}', "[" * 100_000]
    lines = [json.dumps(line, ensure_ascii=False) for line in good] + bad
    (folder / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b'\n\xff\n{"examples": 24, "lo')
    run = read_run(folder)
    assert run.log == good and run.series("loss/train") == ([8], [1.0])
    assert "8 lines of metrics.jsonl are no lines of a log: left out" in run.notes


@pytest.mark.parametrize("changed", [{"score": None}, {"score": "high"}, {"task": 3}, {"stderr": "x"}])
def test_scores_that_are_no_numbers_are_left_out(tmp_path, changed):
    folder = run_folders.write_run(tmp_path / "r", scores={"toy_sort": [1.0, 0.0]})
    file = folder / "epoch-1" / "metrics" / "summary.json"
    content = json.loads(file.read_text())
    content["tasks"][0] |= changed
    file.write_text(json.dumps(content))
    run = read_run(folder)
    assert not run.scores and any("is no summary of an evaluation" in note for note in run.notes)


def test_a_page_replaces_its_own_files_only(tmp_path):
    figure = bars({"a": [(1.0, None)]}, ["x"])
    sections = [Section("A", figure=figure, file="loss")]
    out = tmp_path / "f"
    for _ in range(2):
        write_page(out, "T", sections)
    pixels = re.sub(rb"Software\0LoTA", b"Software\0None", (out / "loss.png").read_bytes())
    page = (out / "index.html").read_text()
    for name, foreign in (("index.html", b"<!DOCTYPE html>\n<html>mine"), ("loss.png", pixels)):
        before = (out / name).read_bytes()
        (out / name).write_bytes(foreign)
        with pytest.raises(ValueError, match=f"{out} holds {name}, which no page of runs wrote"):
            write_page(out, "T", sections)
        assert (out / name).read_bytes() == foreign
        (out / name).write_bytes(before)
    # a picture of a version that did not say what drew it
    (out / "loss.png").write_bytes(pixels)
    old, new = (base64.b64encode(content).decode() for content in (before, pixels))
    (out / "index.html").write_text(page.replace(old, new))
    write_page(out, "T", sections)


def test_a_base_without_an_evaluation_is_refused(tmp_path):
    good = run_folders.write_run(tmp_path / "good", log=run_folders.log_of([1.0]))
    with pytest.raises(SystemExit, match="evaluate it first"):
        plot_runs.main([str(good), "--base", str(tmp_path), "--out", str(tmp_path / "f")])
    assert not (tmp_path / "f").exists()


def test_a_sequence_stands_for_the_runs_of_its_stages(tmp_path):
    folder = run_folders.write_run(tmp_path / "two_tasks")
    stage = {"name": "a", "mask": None, "kept": 1, "free_after": 1, "scores": {"a": 1.0}}
    stage |= {key: {} for key in ("overlap", "hash_before", "hash_after", "losses")}
    (folder / "ledger.json").write_text(json.dumps({"tasks": [stage]}))
    for part in ("calibrate", "adapt"):
        run_folders.write_run(folder / "1_a" / part, log=run_folders.log_of([2.0, 1.0]))
    found = read_runs([str(folder), str(folder)])
    assert [run.name for run in found] == ["two_tasks", "adapt", "calibrate"]
    assert found[1].series("nats_per_token/train") == ([8, 16], [2.0, 1.0])
    assert found[1].notes == []  # its scores are the ledger's
    assert found[0].notes == ["no forgetting.json"]


@pytest.mark.slow
def test_a_sequence_without_a_finished_stage(tmp_path, capsys):
    folder = run_folders.write_run(tmp_path / "two_tasks")
    with (folder / "config.yaml").open("a", encoding="utf-8") as file:
        file.write("tasks: [a, b]\n")
    run_folders.write_run(folder / "1_a" / "calibrate", log=run_folders.log_of([2.0, 1.0]))
    plot_runs.main([str(folder), "--out", str(tmp_path / "f")])
    assert "left out: two_tasks: ledger.json has no finished stage" in capsys.readouterr().out
    assert (tmp_path / "f" / "loss.png").is_file()
