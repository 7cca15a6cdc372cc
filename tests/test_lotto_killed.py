"""A sequence of tasks killed anywhere: the same command continues to the bits of an uninterrupted one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lotto_runs import run, with_tasks
from runs import ROOT, policy, same

HERE = Path(__file__).parent
# moment, its number, what was finished before it
KILLS = [
    ("policy", 2, ["1_one/calibrate"]),
    ("backward", 8, ["1_one/calibrate", "1_one/adapt"]),
    ("ledger", 2, ["1_one/calibrate", "1_one/adapt", "2_two/calibrate"]),
]


@pytest.mark.parametrize(("moment", "n", "done"), KILLS)
def test_killed_anywhere_the_same_command_continues(tmp_path, monkeypatch, moment, n, done):
    monkeypatch.chdir(with_tasks(tmp_path))
    torch.set_num_threads(1)
    command = [sys.executable, str(HERE / "killed_lotto.py"), moment, str(n)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}"}
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    lotto, trainings = run()
    reference, _ = run("exp_name=whole")
    weights = [policy(one.weights(one.stages[1]).parent) for one in (lotto, reference)]
    assert same(*weights)
    for name in ("ledger.json", "ledger.txt", "forgetting.json"):
        assert (lotto.folder / name).read_bytes() == (reference.folder / name).read_bytes()
    assert not set(trainings.names) & set(done)
    assert not list(lotto.folder.rglob("*.tmp"))
