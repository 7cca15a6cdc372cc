"""Sweeps launched by submitit, and batch scripts: several processes, kill and requeue."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from runs import MODEL, ROOT, assert_frozen, base, policy, train, write_mask

from lota.config import Config
from lota.config_checks import problems_of
from lota.distributed.submitted import export_variables
from lota.train.interrupt import Interrupted
from lota.train.overrides import override_problems

submitit = pytest.importorskip("submitit", reason="submitit is in requirements-dev.txt")
pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
STAND_IN = ROOT / "tests" / "slurm_stand_in"
SETTINGS = (
    f"model.name_or_path={MODEL}", "model=blank_model", "datasets=[toy_sort]", "n_examples=240",
    "batch_size=8", "warmup_steps=2", "do_first_eval=false", "eval_every=100000",
    "minimum_log_interval_secs=0", "save_every=80",
)  # fmt: skip
PATIENCE = 300  # seconds that anything may take on a busy machine


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SUBMITIT_"))}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def until(found: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Wait until something is so. Fails if the process ends before, or if it takes too long."""
    deadline = time.monotonic() + PATIENCE
    while not found():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def lines(run: Path) -> int:
    log = run / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.is_file() else 0


@contextlib.contextmanager
def started(command: list[str], folder: Path, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """A command in a session of its own, all of which is killed at the end."""
    process = subprocess.Popen(
        command, cwd=folder, env=environment(**variables), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


# A sweep of submitit's local executor, which needs no cluster


def sweep(*overrides: str) -> list[str]:
    script = str(ROOT / "train_single_gpu.py")
    return [sys.executable, script, "-m", "hydra/launcher=submitit_local", *SETTINGS, *overrides]


def tasks_of(folder: Path, text: str) -> list[int]:
    """Processes of the job whose log has the text, in the order of their ranks."""
    logs = folder.glob("multirun/*/*/.submitit/*/*_log.out")
    job = next(log.parent.name for log in logs if text in log.read_text())
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"PPid:\t{job}\n" in (process / "status").read_text():
                variables = (process / "environ").read_bytes().split(b"\0")
                rank = next(v for v in variables if v.startswith(b"SUBMITIT_LOCAL_GLOBALID="))
                found.append((int(rank.partition(b"=")[2]), int(process.name)))
    return [number for _, number in sorted(found)]


def job_logs(folder: Path) -> str:
    return "".join(log.read_text() for log in folder.glob("multirun/*/*/.submitit/*/*_log.out"))


@pytest.mark.slow
def test_a_preempted_job_is_requeued_and_a_killed_one_continues_with_the_same_command(
    tmp_path, private_cache
):
    command = sweep("exp_name=swept", "lr=1e-3,2e-3")

    def run(rate: str) -> Path:
        found = list((private_cache / "swept").glob(f"*lr={rate}*"))
        return found[0] if found else tmp_path

    with started(command, tmp_path) as process:
        until(lambda: lines(run("0.001")) > 1, process)
        os.kill(*tasks_of(tmp_path, "lr=0.001"), signal.SIGUSR2)
        until(lambda: (run("0.002") / "step-80").is_dir(), process)
        os.kill(*tasks_of(tmp_path, "lr=0.002"), signal.SIGKILL)
        said, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 1
    assert "a job ended without a result" in said and "Traceback" not in said
    logs = job_logs(tmp_path)
    stopped = re.search(r"stopped; saved .*/(step-\d+)\. ", logs)
    assert (
        stopped and f"{stopped[1]} after {stopped[1].removeprefix('step-')} examples" in logs
    )  # it continued
    assert "Requeued job" in logs
    assert (run("0.001") / "step-240").is_dir() and not (run("0.002") / "step-240").exists()

    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    logs = job_logs(tmp_path)
    assert "is already finished" in logs and re.search(r"continuing .*lr=0.002.* after \d+ examples", logs)
    for rate in ("1e-3", "2e-3"):
        whole = train(*SETTINGS[2:], f"lr={rate}", f"exp_name=whole_{rate}")[1]
        found = policy(run(str(float(rate))) / "step-240")
        assert all(torch.equal(value, found[name]) for name, value in policy(whole).items())


@pytest.mark.slow
def test_a_job_of_several_processes_stops_and_is_requeued_as_one(tmp_path, private_cache):
    mask = write_mask(tmp_path / "0.9_mask.pt")
    settings = (f"mask_path={tmp_path / '0.9_mask.pt'}", "lr=1e-3")
    command = sweep("exp_name=two", "hydra.launcher.tasks_per_node=2", *settings)

    def run() -> Path:
        return next((private_cache / "two").glob("*"), tmp_path)

    with started(command, tmp_path) as process:
        until(lambda: lines(run()) > 1, process)
        _, second = tasks_of(tmp_path, "two/")
        os.kill(second, signal.SIGUSR2)  # the other one learns of it, and requeues the job
        said, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, said + job_logs(tmp_path)
    logs = job_logs(tmp_path)
    assert logs.count("Requeued job") == logs.count("stopped; saved") == 1
    assert re.search(r"continuing .* after \d+ examples", logs)
    found, start = policy(run() / "step-240"), base().state_dict()
    assert_frozen(mask, found, start)
    alone = policy(train(*SETTINGS[2:], *settings, "exp_name=alone")[1])
    moved = max((alone[name] - start[name]).abs().max() for name in mask.names)
    assert all(torch.allclose(found[n], value, rtol=0, atol=1e-2 * moved) for n, value in alone.items())


# The batch scripts, run by bash with a srun and a scontrol of ours


def batch(script: str, nodes: int, processes: int, *overrides: str) -> tuple[list[str], dict[str, str]]:
    """A command and its variables, which SLURM would set."""
    activate = Path(sys.prefix) / "bin" / "activate"
    if not activate.is_file():
        pytest.skip("the scripts want a virtual environment")
    port = 0
    while not 20000 < port < 60000:  # the scripts make it of the job's number
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
    variables = {
        "PATH": f"{STAND_IN}:{os.environ['PATH']}",
        "VENV": sys.prefix,
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": str(port - 20000),
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_JOB_NODELIST": "machines",
        "SLURM_CPUS_PER_TASK": "1",
        "PROCESSES_PER_NODE": str(processes),
    }
    return ["bash", str(ROOT / "scripts" / "slurm" / script), *SETTINGS, *overrides], variables


def stopped(command: list[str], variables: dict[str, str], folder: Path, run: Path) -> str:
    """Start a batch job, send the signal of its time limit; returns the checkpoint that it leaves."""
    with started(command, folder, **variables) as process:
        until(lambda: lines(run) > 1, process)
        os.kill(process.pid, signal.SIGUSR1)  # to the batch shell alone
        said, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode != 0
    step = re.search(r"stopped; saved .*/(step-\d+)\. ", said)
    assert step and Path(variables["REQUEUED"]).read_text().split() == [variables["SLURM_JOB_ID"]]
    return step[1]


@pytest.mark.slow
def test_a_batch_job_on_one_machine_saves_before_its_time_limit(tmp_path, private_cache):
    command, variables = batch("one_node.sbatch", 1, 1, "exp_name=batch", "lr=1e-3")
    variables["REQUEUED"] = str(tmp_path / "requeued")
    step = stopped(command, variables, tmp_path, private_cache / "batch")
    assert (private_cache / "batch" / step / "resume.pt").is_file()


@pytest.mark.slow
def test_a_batch_job_on_two_machines_saves_before_its_time_limit_and_continues(tmp_path, private_cache):
    write_mask(tmp_path / "0.9_mask.pt")
    settings = (f"mask_path={tmp_path / '0.9_mask.pt'}", "exp_name=batch", "lr=1e-3")
    command, variables = batch("many_nodes.sbatch", 2, 1, *settings)
    variables["REQUEUED"] = str(tmp_path / "requeued")
    run = private_cache / "batch"
    step = stopped(command, variables, tmp_path, run)
    with started(command, tmp_path, **variables, SLURM_RESTART_COUNT="1") as process:
        said, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, said
    assert f"continuing {run / step}" in said and (run / "step-240").is_dir()
    assert (tmp_path / "requeued").read_text().split() == [variables["SLURM_JOB_ID"]]  # not again


@pytest.mark.slow
def test_a_batch_job_that_fails_is_not_requeued(tmp_path):
    command, variables = batch("one_node.sbatch", 1, 1, "exp_name=bad", "lr=-1")
    variables["REQUEUED"] = str(tmp_path / "requeued")
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(**variables), capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode != 0 and "lr=-1" in done.stderr
    assert not (tmp_path / "requeued").exists()


# What SLURM is asked for


def test_the_script_that_submitit_would_submit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{STAND_IN}:{os.environ['PATH']}")  # submitit looks for srun
    overrides = ["exp_name=x", "hydra/launcher=submitit_slurm", f"hydra.sweep.dir={tmp_path}"]
    overrides += ["hydra.launcher.gpus_per_node=8", "hydra.launcher.nodes=2", "hydra.launcher.partition=gpu"]
    with initialize_config_dir(str(ROOT / "config"), version_base=None):
        cfg = compose("config", overrides=overrides, return_hydra_config=True)
        launcher = instantiate(cfg.hydra.launcher)
    executors = []
    monkeypatch.setattr(submitit.AutoExecutor, "map_array", lambda self, *rest: executors.append(self) or [])
    launcher.config = cfg
    launcher.launch([["lr=1e-3"]], 0)
    text = executors[0]._executor._make_submission_file_text("run this", "id")
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.MULTILINE))
    wanted = {"nodes": "2", "gpus-per-node": "8", "ntasks-per-node": "8", "partition": "gpu", "requeue": ""}
    wanted |= {"signal": "USR2@300", "time": "1440", "cpus-per-task": "8", "open-mode": "append"}
    assert wanted.items() <= asked.items()
    assert executors[0]._executor.max_num_timeout == 1000


def problems(*arguments: str) -> list[str]:
    return list(override_problems([*arguments, "exp_name=x"], Config, ROOT / "config" / "config.yaml"))


def test_a_launcher_is_for_sweeps_and_must_be_installed(monkeypatch):
    assert problems("-m", "hydra/launcher=submitit_slurm", "hydra.launcher.gpus_per_node=8") == []
    assert problems("-m", "hydra/launcher=submitit_local") == []
    assert problems("hydra/launcher=submitit_slurm") == [
        "hydra/launcher=submitit_slurm: it launches the jobs of a sweep; put -m in front of all settings"
    ]
    monkeypatch.setattr("lota.train.overrides.find_spec", lambda name: None)
    (line,) = problems("-m", "hydra/launcher=submitit_slurm")
    assert "pip install hydra-submitit-launcher submitit" in line
    assert problems("-m", "hydra/launcher=basic") == []


@pytest.mark.parametrize("variable", [("SLURM_RESTART_COUNT", "2"), ("SUBMITIT_EXECUTOR", "local")])
def test_a_job_that_may_be_requeued_must_be_able_to_continue(variable, monkeypatch):
    from runs import settings

    for setting in ("overwrite=true", "resume=never"):
        settings(setting)
        with monkeypatch.context() as inside:
            inside.setenv(*variable)
            with pytest.raises(ValueError, match=f"{setting} in a job that may be requeued"):
                settings(setting)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    assert list(problems_of(settings("overwrite=true"))) == []


def test_processes_of_submitit_get_the_variables_of_torchrun(monkeypatch, tmp_path):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in (*names, "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    assert not export_variables()
    for name, value in {
        "SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": "77", "SUBMITIT_LOCAL_NTASKS": "1",
        "SUBMITIT_LOCAL_JOB_NUM_NODES": "1", "SUBMITIT_LOCAL_GLOBALID": "1", "SUBMITIT_LOCAL_LOCALID": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    assert not export_variables() and "RANK" not in os.environ
    monkeypatch.setenv("SUBMITIT_LOCAL_NTASKS", "4")
    assert export_variables()
    given = {name: os.environ[name] for name in names}
    port = int(given.pop("MASTER_PORT"))
    assert given == {
        "RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "127.0.0.1",
    }  # fmt: skip
    assert 1024 < port < 65536 and "CUDA_VISIBLE_DEVICES" not in os.environ


def test_a_signal_of_preemption_goes_on_to_who_handled_it_before():
    got = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: got.append(number))
    try:
        assert Interrupted(signal.SIGUSR2).passed_on() and got == [signal.SIGUSR2]
        assert not Interrupted(signal.SIGTERM).passed_on()
        signal.signal(signal.SIGUSR2, signal.SIG_DFL)
        assert not Interrupted(signal.SIGUSR2).passed_on()  # it would end the process
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert Interrupted(signal.SIGUSR2).exit_code == 128 + signal.SIGUSR2
