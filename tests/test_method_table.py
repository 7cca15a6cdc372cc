"""Runs over seeds become one table: means and standard errors, files, refusals."""

from __future__ import annotations

import csv
import json
import math

import pytest
import run_folders

from lota.report.method_table import summarize_methods
from scripts import summarize

TASK = "toy_sort"


def a_run(root, name, score, *overrides, trained=10):
    """A run folder as training and evaluation leave it; returns its checkpoint."""
    log = [
        {
            "examples": k,
            "examples_per_second": 10.0 * k,
            "peak_memory_bytes": k * 2**20,
            "trained_entries": trained,
        }
        for k in (1, 2, 3)
    ]
    scores = None if score is None else {TASK: [score]}
    return run_folders.write_run(root / name, *overrides, log=log, scores=scores) / "epoch-1"


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "runs"
    for seed, (dense, lota) in enumerate([(0.5, 0.6), (0.7, 0.65), (0.9, 0.55)]):
        mask = run_folders.rated_mask(tmp_path / f"{seed}.pt", 0.1, "task_vector", seed)
        a_run(root, f"fft/seed={seed}", dense, f"seed={seed}")
        a_run(root, f"lota/seed={seed}", lota, f"seed={seed}", "lr=1e-2", mask, trained=2)
    a_run(root, "lora", 0.1, "seed=7", "adapter=lora")
    return root


def test_mean_and_standard_error_over_seeds(root):
    rows = {row.method: row for row in summarize_methods(root, TASK)}
    assert list(rows) == ["full fine-tuning", "LoTA", "LoRA r = 8"]  # best first
    dense = rows["full fine-tuning"]
    assert dense.mean == pytest.approx(0.7)
    assert dense.stderr == pytest.approx(math.sqrt((0.04 + 0 + 0.04) / 2 / 3))
    assert (dense.seeds, dense.scores) == ((0, 1, 2), (0.5, 0.7, 0.9))
    assert (dense.examples_per_second, dense.peak_memory_bytes) == (20.0, 3 * 2**20)
    assert (rows["LoTA"].sparsity, rows["LoTA"].trained, dense.sparsity) == (0.9, 2, None)
    assert rows["LoRA r = 8"].stderr is None


def test_a_run_without_a_score_is_left_out_and_named(root, caplog):
    a_run(root, "fft/seed=3", None, "seed=3")
    with caplog.at_level("WARNING"):
        rows = summarize_methods(root, TASK)
    assert "fft/seed=3" in caplog.text
    assert next(row for row in rows if row.method == "full fine-tuning").seeds == (0, 1, 2)
    with pytest.raises(ValueError, match=r"no run below .* has a score on other"):
        summarize_methods(root, "other")


def test_learning_rates_are_methods_of_their_own_and_a_seed_counts_once(root):
    a_run(root, "fft/more", 0.5, "seed=0", "lr=5e-3")
    methods = [row.method for row in summarize_methods(root, TASK)]
    assert {"full fine-tuning, lr=0.001", "full fine-tuning, lr=0.005"} <= set(methods)
    a_run(root, "fft/again", 0.5, "seed=0", "lr=5e-3")
    with pytest.raises(ValueError, match="more than one run has the same seed"):
        summarize_methods(root, TASK)


def test_the_command_writes_table_json_and_csv(root, tmp_path, capsys):
    base, out = a_run(tmp_path, "base", 0.05), tmp_path / "out"
    summarize.main([str(root), "--task", TASK, "--base", str(base), "--out", str(out)])
    text = (out / "summary.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert "| full fine-tuning | - | 10 | 0.001 | 0.700 ± 0.115 | 3 | 20.0 | 3 |" in text
    assert "| LoTA | 0.9 | 2 | 0.01 | 0.600 ± 0.029 |" in text
    assert "| base model | - | 0 | - | 0.050 |" in text
    content = json.loads((out / "summary.json").read_text())
    assert content["base"] == 0.05
    assert [m["method"] for m in content["methods"]] == ["full fine-tuning", "LoTA", "LoRA r = 8"]
    with (out / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["score"]) for row in rows if row["method"] == "LoTA"] == [0.6, 0.65, 0.55]
    with pytest.raises(SystemExit, match="no run below"):
        summarize.main([str(root), "--task", "other"])
