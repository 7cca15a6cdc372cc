"""Every script as a user calls it, one after another, on the embedded model; every YAML in a real run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from prepared import python
from runs import MODEL, ROOT, SMALL, train, with_mini_task
from transformers import AutoModelForCausalLM, AutoTokenizer

from lota.masks import Mask, kept_count

pytestmark = pytest.mark.slow
MODELS = sorted(path.stem for path in (ROOT / "config" / "model").glob("*.yaml"))


def script(name: str, *arguments: object, cwd: Path, code: int = 0, anew: bool = False) -> str:
    """Run an entry script; returns what it printed. anew: by an interpreter that has imported nothing yet."""
    environment = {**os.environ, "PROJECT_CACHE": str(cwd / "cache")}
    interpreter = sys.executable if anew else python()
    command = [interpreter, "-u", str(ROOT / name), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The five commands: folder, and what each printed."""
    cwd = with_mini_task(tmp_path_factory.mktemp("pipeline"))
    runs, said = cwd / "cache", {}
    how = {"cwd": cwd, "anew": True}
    said["calibrate"] = script("train_single_gpu.py", "exp_name=dense", *SMALL, "n_epochs=3", **how)
    pair = ("--base", MODEL, "--tuned", runs / "dense" / "epoch-3")
    said["extract"] = script("extract_masks.py", *pair, "--sparsities", "0.5", "0.9", "--name", "mini", **how)
    adapt = ("mask_path=masks/mini/0.9_mask.pt", "trainer=FSDPTrainer", "sample_during_eval=true")
    said["adapt"] = script(
        "train_single_gpu.py", "exp_name=lota", *SMALL, *adapt, "do_first_eval=true", cwd=cwd
    )
    run = runs / "lota" / "epoch-1"
    said["convert"] = script("convert_policy_to_hf_resize.py", "--model_path", MODEL, "--policy_path",
                             run / "policy.pt", "--save_path", run, **how)  # fmt: skip
    said["evaluate"] = script("eval_model_all.py", "--model", run, "--datasets", "mini", "--sample", **how)
    prompts = ROOT / "assets" / "prompts" / "demo_prompts.json"
    draw = ("--prompt_set", prompts, "--temperatures", "0.7", "--model_name", "lota", "--n_examples", "3")
    said["sample"] = script("generate_samples.py", *draw, "--model_path", run, **how)
    return cwd, said


def test_calibration_names_the_next_command(pipeline):
    _, said = pipeline
    assert "epoch-3" in said["calibrate"]
    assert "trained entries: " in said["calibrate"]
    assert "python extract_masks.py --base" in said["calibrate"]
    assert "mask scope: " in said["calibrate"]
    assert "the scope takes 100.0 % of the matrices" in said["calibrate"]


def test_masks_fit_the_sparsity(pipeline):
    cwd, _ = pipeline
    for sparsity in ("0.5", "0.9"):
        mask = Mask.load(cwd / "masks" / "mini" / f"{sparsity}_mask.pt")
        assert mask.n_kept == kept_count(float(sparsity), mask.n_total)
    summary = json.loads((cwd / "masks" / "mini" / "summary.json").read_text())
    assert summary


def test_adaptation_changes_kept_entries_only(pipeline):
    cwd, said = pipeline
    mask = Mask.load(cwd / "masks" / "mini" / "0.9_mask.pt")
    assert f"trained entries: {mask.n_kept:,}" in said["adapt"]
    assert "python convert_policy_to_hf_resize.py" in said["adapt"]
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).state_dict()
    tuned = torch.load(cwd / "cache" / "lota" / "epoch-1" / "policy.pt", weights_only=True)["state"]
    for name, value in tuned.items():
        kept = mask.dense(name) if name in mask else torch.zeros_like(value, dtype=torch.bool)
        assert torch.equal(value[~kept], base[name][~kept])


def test_the_converted_folder_loads_with_the_trained_weights(pipeline):
    cwd, _ = pipeline
    run = cwd / "cache" / "lota" / "epoch-1"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run), AutoTokenizer.from_pretrained(run)
    policy = torch.load(run / "policy.pt", weights_only=True)["state"]
    state = model.state_dict()
    assert state.keys() == policy.keys()
    assert all(torch.equal(state[name], policy[name]) for name in policy)
    assert tokenizer("a b").input_ids == AutoTokenizer.from_pretrained(MODEL)("a b").input_ids


def test_evaluation_and_samples_are_on_disk(pipeline):
    cwd, _ = pipeline
    run = cwd / "cache" / "lota" / "epoch-1"
    result = json.loads((run / "metrics" / "mini.json").read_text())
    assert {"task", "version", "metric", "score", "stderr", "n", "seed", "settings", "model", "date"} <= set(
        result
    )
    assert result["n"] == 12
    predictions = [
        json.loads(r) for r in (run / "metrics" / "mini_predictions.jsonl").read_text().splitlines()
    ]
    assert result["score"] == sum(p["score"] for p in predictions) / 12
    assert (run / "metrics" / "mini_accuracy.txt").read_text().count("\n") == 1
    samples = json.loads((run / "demo_prompts_temp0.7.json").read_text())
    assert len(samples) == 3
    assert all(set(row) == {"instruction", "output", "generator"} for row in samples)


def test_multirun_gives_each_job_a_folder(tmp_path):
    cwd = with_mini_task(tmp_path)
    script("train_single_gpu.py", "-m", "exp_name=sweep", *SMALL, "n_examples=8", "seed=0,1", cwd=cwd)
    folders = sorted((cwd / "cache" / "sweep").iterdir())
    assert len(folders) == 2
    assert all(
        (folder / "epoch-1" / "policy.pt").is_file() or list(folder.glob("step-8")) for folder in folders
    )
    assert {("seed=0" in folder.name, "seed=1" in folder.name) for folder in folders} == {
        (True, False),
        (False, True),
    }


def test_a_bad_job_does_not_end_a_multirun(tmp_path):
    cwd = with_mini_task(tmp_path)
    arguments = ("-m", "exp_name=sweep", *SMALL, "n_examples=8", "optimizer=Adam,SGD")
    said = script("train_single_gpu.py", *arguments, cwd=cwd, code=1)
    assert "optimizer=Adam: choose one of" in said
    (folder,) = (cwd / "cache" / "sweep").iterdir()
    assert "optimizer=SGD" in folder.name
    assert list(folder.glob("*/policy.pt"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lr=fast"], "lr"),
        (["no_such_key=1"], "no_such_key"),
        (
            ["exp_name=x", "+warmup_step=1", "+model.pad_tokn=x"],
            "unknown key warmup_step=1; did you mean warmup_steps",
        ),
        (["exp_name=x", "+model.pad_tokn=x"], "did you mean model.pad_token"),
        (["trainer=NoTrainer"], "NoTrainer"),
        (["exp_name=x", "optimizer=Adam", "lr=-1"], "optimizer=Adam"),
        ([], "exp_name"),
    ],
)
def test_bad_command_lines_end_with_a_message(tmp_path, arguments, message):
    said = script("train_single_gpu.py", *arguments, cwd=tmp_path, code=1)
    assert message in said
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", MODELS)
def test_every_model_yaml_trains(tmp_path, monkeypatch, name):
    monkeypatch.chdir(with_mini_task(tmp_path))
    trainer, _ = train(f"model={name}", f"model.name_or_path={MODEL}", "n_examples=8", "debug=true")
    assert trainer.progress.finished


def test_wandb_offline_needs_no_account(tmp_path, monkeypatch):
    monkeypatch.chdir(with_mini_task(tmp_path))
    monkeypatch.delenv("WANDB_MODE")
    trainer, _ = train("wandb.enabled=true", "wandb.mode=offline", "n_examples=16")
    assert list((trainer.config.run_dir / "wandb").glob("offline-run-*"))
