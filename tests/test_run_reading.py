"""Run folders read back: what they lack is left out and said, what is none is refused."""

from __future__ import annotations

import json

import pytest
import run_folders

import plot_runs
from lota.report.reading import read_runs


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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "there is no such folder"),
        (lambda p: p.mkdir(), "there is no config.yaml"),
        (lambda p: (p.mkdir(), (p / "config.yaml").write_text("a: [")), "cannot be read"),
        (lambda p: (p.mkdir(), (p / "config.yaml").write_text("a: 1")), "holds no settings of a run"),
        (lambda p: run_folders.write_run(p / "x"), "it holds runs: give"),
        (lambda p: (run_folders.write_run(p), (p / "ledger.json").write_text("[]")), "is no ledger"),
    ],
    ids=["absent", "empty", "broken", "other", "parent", "ledger"],
)
def test_what_is_no_run_folder_is_refused_and_nothing_is_written(tmp_path, make, message):
    make(tmp_path / "bad")
    good = run_folders.write_run(tmp_path / "good", log=run_folders.log_of([1.0]))
    with pytest.raises(SystemExit, match=message) as stopped:
        plot_runs.main([str(good), str(tmp_path / "bad"), "--out", str(tmp_path / "f")])
    assert str(tmp_path / "bad") in str(stopped.value)
    assert not (tmp_path / "f").exists()


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
