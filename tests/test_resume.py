"""A run that was killed anywhere and started again ends with the bits of an uninterrupted one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from prepared import python
from run_folders import finished_run, folder_state
from runs import MODEL, ROOT, metrics, policy, same, settings, stopped_after, train, write_mask
from safetensors.torch import load_file, save_file

from lota import delta
from lota.config import default_cache
from lota.distributed.processes import ALONE
from lota.models.policy import read_policy
from lota.share.convert import convert_policy
from lota.train import checkpoint
from lota.train.checkpoint import newest_checkpoint, verify
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
@pytest.mark.parametrize("state", ["float32", "bfloat16", "factored"])
@pytest.mark.parametrize("precision", ["null", "bfloat16"])
def test_every_kind_of_weights_resumes(workplace, precision, state):
    """Stopped between steps in the middle of an epoch: dense and masked bf16, and without masters."""
    mask = f"mask_path={workplace}/0.9_mask.pt" if precision == "bfloat16" else "mask_path=null"
    options = (*RUN, mask, f"model.fsdp_policy_mp={precision}", "save_every=epoch_1", "optimizer=AdamW")
    if state == "factored":
        mask = "freeze_odd_layers=true" if precision == "bfloat16" else "freeze_odd_layers=false"
        options = (*options, "mask_path=null", mask)
    if state != "float32":
        options = (
            *options,
            f"optimizer_state={state}",
            "stochastic_rounding=true",
            "model.policy_dtype=bfloat16",
        )
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
    command = [python(), str(ROOT / "train_single_gpu.py"), *overrides]
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
        ("optimizer_state=bfloat16", "optimizer_state: float32 -> bfloat16"),
        ("stochastic_rounding=true model.policy_dtype=bfloat16", "stochastic_rounding: False -> True"),
        ("resume=never", "resume=never"),
    ):
        with pytest.raises(ValueError, match=message):
            train(*options, *change.split())
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
    with StopBetweenSteps(ALONE) as stop:
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


# What has changed, is damaged, or is in use


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed", ["base", "config", "tokenizer", "chat template", "mask", "base by a mask's run"]
)
def test_a_run_is_not_continued_on_something_else(options, workplace, changed):
    shutil.copytree(MODEL, "model")
    given = (*options, "model.name_or_path=model", "model.fsdp_policy_mp=bfloat16")
    given = tuple("mask_path=0.9_mask.pt" if o.startswith("mask_path") else o for o in given)
    with stopped_after(3):
        train(*given)
    if changed.startswith("base"):
        tensors = load_file("model/model.safetensors")
        name = "model.norm.weight" if changed == "base" else "model.layers.0.mlp.up_proj.weight"
        tensors[name].view(-1)[0] += 1
        save_file(tensors, "model/model.safetensors", {"format": "pt"})
        changed = "base"
    elif changed == "config":
        content = json.loads(Path("model/config.json").read_text())
        Path("model/config.json").write_text(json.dumps({**content, "rms_norm_eps": 0.1}))
    elif changed == "mask":
        write_mask(workplace / "0.9_mask.pt", seed=1)
    else:
        file = Path("model/tokenizer.json" if changed == "tokenizer" else "model/chat_template.jinja")
        content = {"chat_template.jinja": "{{ 1 }}"}.get(file.name) or file.read_text()
        file.write_text(content.replace('"normalizer": null', '"normalizer": {"type": "NFC"}'))
    with pytest.raises(ValueError, match=f"was trained with another {changed} under the same name"):
        train(*given)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["policy.pt", "resume.pt"])
@pytest.mark.parametrize("harm", ["flip", "lose"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(options, caplog, file, harm):
    train(*options, "exp_name=whole")
    _, folder = train(*options)
    if harm == "lose":
        (folder / file).unlink()
    else:
        data = bytearray((folder / file).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / file).write_bytes(data)
        with pytest.raises(ValueError, match=rf"{file} is damaged"):
            verify(folder)
    again, last = train(*options)
    assert again.data.resumable.folder.name == "step-64"
    assert "step-80 is passed over" in caplog.text and file in caplog.text
    assert same(policy(last), policy(folder.parent.parent / "whole" / "step-80"))


@pytest.mark.slow
def test_a_damaged_policy_is_read_by_nobody(options, tmp_path):
    _, folder = train(*options)
    with open(folder / "policy.pt", "r+b") as file:
        file.seek(-5000, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-5000, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    for use in (
        lambda: convert_policy(MODEL, folder, tmp_path / "converted"),
        lambda: delta.extract(MODEL, folder / "policy.pt", tmp_path / "d.safetensors"),
        lambda: read_policy(folder),
    ):
        with pytest.raises(ValueError, match=r"policy\.pt is damaged"):
            use()


@pytest.mark.parametrize("content", [b"", b"- 1\n", b"a: [", b"\xff\xfe\x00"])
def test_a_config_that_is_none_is_named(options, content):
    run = finished_run(settings(*options))
    (run / "config.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{run}/config\.yaml .*overwrite=true"):
        train(*options)
    assert (run / "step-80" / "policy.pt").exists()


def test_a_model_that_cannot_be_loaded_leaves_no_folder(options, monkeypatch):
    def load(*_, **__):
        raise ValueError("no memory")

    monkeypatch.setattr("lota.train.run_model.load_model", load)
    with pytest.raises(ValueError, match="no memory"):
        train(*options)
    assert not settings(*options).run_dir.exists()


@pytest.mark.slow
def test_an_evaluation_that_a_stop_has_cut_short_is_made_by_the_run_that_continues(options, monkeypatch):
    options = (*options, "do_first_eval=true", "eval_every=16", "eval_batch_size=2", "save_every=64")
    whole, expected = train(*options, "exp_name=whole")
    real, parts = Trainer.loss, []

    def loss(self, part, meter):
        if not torch.is_grad_enabled() and self.progress.step == 4 and not self.progress.finished:
            parts.append(part)
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, part, meter)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Trainer, "loss", loss)
        train(*options)
    again, last = train(*options)
    assert len(parts) == 1
    assert same(policy(last), policy(expected))
    held_out = [
        [(line["step"], line["loss/eval"]) for line in metrics(run) if "loss/eval" in line]
        for run in (whole, again)
    ]
    assert held_out[0] == held_out[1]


@pytest.mark.slow
def test_a_stop_right_after_a_checkpoint_does_not_write_it_again(options, monkeypatch):
    real, saved = checkpoint.save, []
    monkeypatch.setattr(
        checkpoint, "save", lambda folder, **more: (saved.append(folder.name), real(folder, **more))
    )
    with stopped_after(2, signal.SIGTERM):
        train(*options)
    assert saved == ["step-16"]


def test_lines_that_are_none_of_a_log_stay(tmp_path):
    text = b'7\n{}\n[]\n"x"\n{"examples": "8"}\n{"examples": 8}\n{"examples": 16}\n7\n{"examples": 24}\n'
    (tmp_path / "metrics.jsonl").write_bytes(text)
    inode = (tmp_path / "metrics.jsonl").stat().st_ino
    RunLog(settings(), tmp_path, total_examples=40, examples=8).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == text[: text.index(b'{"examples": 16}')]
    assert (tmp_path / "metrics.jsonl").stat().st_ino == inode  # cut, not written anew


def test_a_run_that_starts_anew_has_no_old_lines(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"examples": 0, "loss/eval": 1}\n')
    RunLog(settings(), tmp_path, total_examples=40, examples=0).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_checkpoint_that_cannot_be_read_now_is_not_taken_for_damaged(options, monkeypatch):
    run = finished_run(settings(*options))
    (run / "step-80" / "resume.pt").touch()

    def load(*_, **__):
        raise PermissionError(13, "Permission denied", "resume.pt")

    monkeypatch.setattr("lota.train.checkpoint.torch.load", load)
    with pytest.raises(PermissionError):
        newest_checkpoint(run)
