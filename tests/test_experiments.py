"""Every experiment file composes, says its command, and trains; the sweep runs to its end and goes on."""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from prepared import python
from runs import MODEL, ROOT, composed, metrics, with_mini_task, write_mask

from scripts.settings import lines_of
from trainers import TRAINERS

EXPERIMENTS = sorted((ROOT / "config" / "experiment").glob("*.yaml"))
NAMES = [path.stem for path in EXPERIMENTS]
SMALL = (
    f"model.name_or_path={MODEL}", "datasets=[mini]", "warmup_steps=1", "eval_batch_size=8",
    "minimum_log_interval_secs=0", "max_length=512", "max_prompt_length=256", "save_delta=false",
)  # fmt: skip


def test_the_methods_of_the_comparison_are_there():
    wanted = {"fft", "lora_r8", "lora_r64", "random_0.9", *(f"lota_{s}" for s in (0.5, 0.9, 0.95, 0.99))}
    assert wanted <= set(NAMES)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=NAMES)
def test_every_experiment_says_its_command_and_comments_its_keys(path):
    lines = path.read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1].startswith(f"# python train_single_gpu.py +experiment={path.stem}")
    assert all(line.comment for line in lines_of(path))


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_trains(tmp_path, monkeypatch, name):
    monkeypatch.chdir(with_mini_task(tmp_path))
    config = composed(f"+experiment={name}", *SMALL, "seed=4", "n_examples=16")
    if config.mask_path is not None:
        (tmp_path / config.mask_path).parent.mkdir(parents=True)
        write_mask(tmp_path / config.mask_path)
    trainer = TRAINERS[config.trainer.name](config)
    trainer.train()
    assert trainer.progress.finished
    n_trained = metrics(trainer)[-1]["trained_entries"]
    assert n_trained == trainer.optimizer.n_trained
    assert (n_trained == 795_776) == (name in ("fft", "calibrate_low_memory", "metamathqa_calibrate"))
    if "seed" in config.exp_name:
        assert config.exp_name == f"{name}/seed-4"


def test_rates_differ_by_method_and_the_rest_is_the_same():
    """A fair comparison: nothing but the method and its learning rate differs."""
    method = {"exp_name", "lr", "mask_path", "adapter", "lora_rank", "lora_alpha", "freeze_odd_layers"}
    base = asdict(composed("+experiment=fft"))
    precision = {"stochastic_rounding", "optimizer_state", "model"}
    low = asdict(composed("+experiment=calibrate_low_memory"))
    assert {key for key in low if low[key] != base[key]} == {"exp_name"} | precision
    assert {key for key in low["model"] if low["model"][key] != base["model"][key]} == {
        "policy_dtype", "fsdp_policy_mp"
    }  # fmt: skip
    of_others = {"calibrate_low_memory", *(name for name in NAMES if name.startswith("metamathqa"))}
    for name in set(NAMES) - of_others:
        other = asdict(composed(f"+experiment={name}"))
        assert {key for key in other if other[key] != base[key]} <= method, name


@pytest.mark.slow
def test_a_multirun_over_experiments_and_adapters_has_a_folder_per_job(tmp_path):
    cwd = with_mini_task(tmp_path)
    sweep = ("+experiment=fft,alternate_layers", "adapter=none,lora", "freeze_odd_layers=false")
    train_command("-m", *sweep, *SMALL, "n_examples=8", cwd=cwd)
    runs = sorted(path.parent.parent for path in (cwd / "cache").rglob("policy.pt"))
    assert [run.relative_to(cwd / "cache").parts[0] for run in runs] == ["alternate_layers"] * 2 + ["fft"] * 2
    names = [yaml.safe_load((run / "config.yaml").read_text())["adapter"]["name"] for run in runs]
    assert names == ["lora", "none"] * 2


@pytest.mark.slow
def test_a_sweep_in_a_file(tmp_path):
    cwd = with_mini_task(tmp_path)
    write_mask(tmp_path / "masks" / "mini" / "0.9_mask.pt")
    train_command("+experiment=lota_rates", "seed=0", *SMALL, "n_examples=8", cwd=cwd)
    folders = [path.parent.parent for path in (cwd / "cache" / "lota_rates").rglob("policy.pt")]
    rates = sorted(yaml.safe_load((folder / "config.yaml").read_text())["lr"] for folder in folders)
    assert rates == [3e-5, 1e-4, 3e-4]


def train_command(*arguments: str, cwd: Path) -> None:
    environment = {**os.environ, "PROJECT_CACHE": str(cwd / "cache")}
    command = [python(), str(ROOT / "train_single_gpu.py"), *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def sweep(out: Path, *arguments: str) -> str:
    environment = {**os.environ, "OUT": str(out), "PYTHON": python()}
    environment |= {"SEEDS": "0", "METHODS": "lota_0.9", "SPARSITIES": "0.9"}
    environment["EVAL"] = "--n_examples 4 --max_new_tokens 2"
    command = [str(ROOT / "scripts" / "sweep_sparsity.sh"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_sweep_runs_and_skips_what_is_finished(tmp_path):
    small = ("n_examples=32", "lr=1e-3")
    said = sweep(tmp_path, *small)
    scored = re.findall(rf"^=== {tmp_path}/runs/(.*)$", said, re.MULTILINE)
    assert scored == [f"{name}/seed=0" for name in ("fft", "lota_0.9")]
    rows = json.loads((tmp_path / "summary.json").read_text())["methods"]
    assert {row["method"]: row["sparsity"] for row in rows} == {"full fine-tuning": None, "LoTA": 0.9}
    assert (tmp_path / "figures" / "exact_match_toy_sort.png").is_file()
    # as after an interruption: only what is missing is done again
    run = tmp_path / "runs" / "lota_0.9" / "seed=0"
    written = (run / "metrics.jsonl").read_text()
    (run / "step-32" / "metrics" / "toy_sort.json").unlink()
    said = sweep(tmp_path, *small)
    assert re.findall(rf"^=== {tmp_path}/runs/(.*)$", said, re.MULTILINE) == ["lota_0.9/seed=0"]
    assert (run / "metrics.jsonl").read_text() == written
