"""A run that was killed anywhere and started again ends with the bits of an uninterrupted one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from prepared import python
from runs import MODEL, ROOT, metrics, policy, same, settings, stopped_after, train, write_mask

from lota.config import default_cache
from lota.train.checkpoint import newest_checkpoint
from lota.train.interrupt import Interrupted, StopBetweenSteps
from lota.train.run_folder import RunFolder
from lota.train.runlog import RunLog
from lota.train.trainer import Trainer

HERE = Path(__file__).parent
RUN = ("n_epochs=2", "save_every=16", "lr_scheduler=cosine", "momentum=0.5")


pytestmark = pytest.mark.usefixtures("mask")


@pytest.fixture
def options(workplace):
    return (*RUN, f"mask_path={workplace}/0.9_mask.pt")  # for commands that run elsewhere


def killed(moment: str, n: int, *overrides: str) -> int:
    command = [python(), str(HERE / "killed_run.py"), moment, str(n), *overrides]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    print(done.stderr[-2000:])
    return done.returncode


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "n", "survives"),
    [("policy", 1, None), ("resume", 2, 16), ("rename", 3, 32), ("backward", 6, 32)],
)
def test_killed_anywhere_then_continued(options, moment, n, survives):
    assert killed(moment, n, "exp_name=killed", *options) == -signal.SIGKILL
    newest = newest_checkpoint(Path(default_cache()) / "killed")
    assert (newest and newest[1]["progress"]["examples"]) == survives
    trainer, folder = train("exp_name=killed", *options)
    whole, reference = train("exp_name=whole", *options)
    assert same(policy(folder), policy(reference))
    ours, theirs = (torch.load(f / "resume.pt", weights_only=True) for f in (folder, reference))
    torch.testing.assert_close(ours["optimizer"], theirs["optimizer"], rtol=0, atol=0)
    assert [r["examples"] for r in metrics(trainer)] == [r["examples"] for r in metrics(whole)]
    assert not list(trainer.config.run_dir.glob(".*.tmp"))


@pytest.mark.slow
def test_full_disk_keeps_the_last_good_checkpoint(options, capsys):
    assert killed("nospace", 3, "exp_name=full", *options) == 1
    assert "OSError: " in capsys.readouterr().out
    trainer, folder = train("exp_name=full", *options)
    _, reference = train("exp_name=whole", *options)
    assert same(policy(folder), policy(reference))
    names = sorted(p.name for p in trainer.config.run_dir.glob("*-*"))
    assert names == ["step-16", "step-32", "step-48", "step-64", "step-80"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["null", "bfloat16"])
def test_every_kind_of_weights_resumes(workplace, precision):
    """Stopped between steps in the middle of an epoch, dense and masked bf16."""
    mask = f"mask_path={workplace}/0.9_mask.pt" if precision == "bfloat16" else "mask_path=null"
    options = (*RUN, mask, f"model.fsdp_policy_mp={precision}", "save_every=epoch_1", "optimizer=AdamW")
    with stopped_after(7):
        train("exp_name=stopped", *options)
    trainer, folder = train("exp_name=stopped", *options)
    assert (trainer.config.run_dir / "step-56" / "resume.pt").is_file()
    _, reference = train("exp_name=whole", *options)
    assert same(policy(folder), policy(reference))


@pytest.mark.slow
def test_ctrl_c_saves_says_how_to_resume_and_fails(options, workplace):
    overrides = ["exp_name=stopped", f"model.name_or_path={MODEL}", "datasets=[mini]", "do_first_eval=false",
                 "minimum_log_interval_secs=0", *options, "n_epochs=500", "save_every=epoch_500"]  # fmt: skip
    command = [sys.executable, str(ROOT / "train_single_gpu.py"), *overrides]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    log = Path(os.environ["PROJECT_CACHE"]) / "stopped" / "metrics.jsonl"
    deadline = time.monotonic() + 300  # on a busy machine
    while not (log.is_file() and log.read_text().count("\n") > 2):
        assert time.monotonic() < deadline and process.poll() is None, "training did not start"
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "The same command resumes" in stderr
    assert newest_checkpoint(log.parent)[1]["progress"]["finished"] is False


@pytest.mark.slow
def test_a_finished_run_says_so_and_overwrite_starts_anew(options, caplog):
    first, folder = train(*options)
    weights, before = policy(folder), (folder / "policy.pt").stat().st_mtime_ns
    caplog.set_level("INFO")
    _, again = train(*options)
    assert again == folder
    assert "already finished" in caplog.text
    assert (folder / "policy.pt").stat().st_mtime_ns == before
    note = first.config.run_dir / "notes.txt"
    note.write_text("mine")
    _, anew = train(*options, "overwrite=true", "seed=1", "save_every=epoch_1")
    assert anew.name == "epoch-2"
    assert not same(policy(anew), weights)
    assert not list(first.config.run_dir.glob("step-*"))
    assert note.read_text() == "mine"


@pytest.mark.slow
def test_what_may_not_be_continued(options, workplace):
    train(*options)
    for change, message in (
        ("lr=1e-2", r"lr: 0.001 -> 0.01.*overwrite=true"),
        ("model.policy_dtype=bfloat16", "model.policy_dtype: float32 -> bfloat16"),
        ("resume=never", "resume=never"),
    ):
        with pytest.raises(ValueError, match=message):
            train(*options, change)
    refused = pytest.raises(ValueError, match=f"another process .pid {os.getpid()}. is at work in")
    with RunFolder(settings(*options, "exp_name=held")), refused:
        train(*options, "exp_name=held")
    train(*options, "eval_every=5", "n_eval_examples=3", "wandb.project=other", "minimum_log_interval_secs=9")
    write_mask(workplace / "0.9_mask.pt", seed=7)
    with pytest.raises(ValueError, match="another mask under"):
        train(*options)
    write_mask(workplace / "0.9_mask.pt")
    task = workplace / "tasks" / "mini.py"
    task.write_text(task.read_text().replace("7 * i + 3 * k", "5 * i + 3 * k"))
    with pytest.raises(ValueError, match="another data"):
        train(*options)


def folder_state(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}


@pytest.mark.slow
def test_debug_leaves_an_existing_run_alone(options):
    trainer, _ = train(*options)
    before = folder_state(trainer.config.run_dir)
    _, none = train(*options, "debug=true", "lr=1e-2", "wandb.enabled=true")
    after = folder_state(trainer.config.run_dir)
    assert none is None and not list((trainer.config.run_dir / "debug").glob("*/policy.pt"))
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[0] for name in set(after) - set(before)} == {"debug"}


@pytest.mark.parametrize("lost", ["step-*/resume.pt", "config.yaml"])
def test_checkpoints_that_cannot_be_continued_are_not_deleted(options, lost):
    trainer, folder = train(*options)
    for path in trainer.config.run_dir.glob(lost):
        path.unlink()
    with pytest.raises(ValueError, match=r"cannot be continued.*overwrite=true"):
        train(*options)
    assert (folder / "policy.pt").is_file()


@pytest.mark.slow
def test_a_truncated_resume_file_is_passed_over(options, caplog):
    train(*options, "exp_name=whole")
    trainer, folder = train(*options)
    with open(folder / "resume.pt", "r+b") as file:
        file.truncate(1000)
    again, last = train(*options)
    assert again.data.resumable.folder.name == "step-64"
    assert "passed over" in caplog.text
    assert same(policy(last), policy(trainer.config.run_dir.parent / "whole" / "step-80"))


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["error", "kill"])
def test_what_overwrite_replaces_is_kept_until_the_new_run_has_a_checkpoint(options, monkeypatch, moment):
    trainer, _ = train(*options)
    run = trainer.config.run_dir
    before = folder_state(run)
    if moment == "kill":
        assert killed("backward", 1, "exp_name=run", *options, "overwrite=true") == -signal.SIGKILL
        assert not (run / "step-80").exists()
    else:
        monkeypatch.setattr(Trainer, "set_learning_rate", None)
        with pytest.raises(TypeError):
            train(*options, "overwrite=true")
    _, again = train(*options)
    assert again.name == "step-80"
    after = folder_state(run)
    assert all(after[name] == content for name, content in before.items() if name.endswith(".pt"))


def test_paths_are_stored_as_places(options, workplace):
    """So that a run can be continued from another folder."""
    config = settings(*options, "mask_path=0.9_mask.pt")
    config.resolve_paths()
    assert config.mask_path == str(workplace / "0.9_mask.pt")
    assert config.model.name_or_path == str(MODEL)
    config.mask_path, config.model.name_or_path = "masks/absent.pt", "org/model"
    config.resolve_paths()
    assert (config.mask_path, config.model.name_or_path) == ("masks/absent.pt", "org/model")


def test_a_log_is_continued_after_its_last_whole_line(tmp_path):
    """Lines of later steps go, and one cut inside a character; a line separator in a text ends no line."""
    row = json.dumps({"examples": 8, "completion": "a\u2028b"}, ensure_ascii=False).encode() + b"\n"
    (tmp_path / "samples.jsonl").write_bytes(row + b'{"examples": 16}\n{"examples": 8, "completion": "\xc3')
    RunLog(settings(), tmp_path, total_examples=40, examples=8).close()
    assert (tmp_path / "samples.jsonl").read_bytes() == row


def test_repeated_signals_do_not_lose_the_save():
    with StopBetweenSteps() as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        with pytest.raises(Interrupted) as stopped:
            stop.check()
        assert stopped.value.exit_code == 143
        stop.received_at -= 2
        stop.saving = True
        os.kill(os.getpid(), signal.SIGINT)
        stop.saving = False
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
