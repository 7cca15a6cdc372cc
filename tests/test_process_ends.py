"""Several processes end together, after a stop, an error or a kill of one; what keeps them from starting."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest
from launched import ROOT, Launched, launch
from prepared import python
from runs import SMALL, with_mini_task, write_mask

from lota.train.checkpoint import newest_checkpoint

pytestmark = pytest.mark.slow
# a run that is far from its end when something happens to it
LONG = [*SMALL, "mask_path=0.9_mask.pt", "exp_name=run", "n_epochs=null", "n_examples=100000",
        "save_every=16", "eval_every=1000000"]  # fmt: skip
TRAIN = str(ROOT / "train_single_gpu.py")
FULL_DISK = """
import errno, runpy, sys
from lota.train import checkpoint
save, calls = checkpoint.save, []
def full(*args, **named):
    calls.append(1)
    if len(calls) == 2:
        raise OSError(errno.ENOSPC, "No space left on device")
    save(*args, **named)
checkpoint.save = full
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
MEET = (
    "import sys; from datetime import timedelta; from lota.distributed.processes import join, ProcessLost\n"
    "try: join(start=timedelta(seconds=int(sys.argv[1])))\n"
    "except (ValueError, ProcessLost) as error: sys.exit(0 if getattr(error, 'told', False) else str(error))"
)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_mask(with_mini_task(tmp_path) / "0.9_mask.pt")
    return tmp_path


def ended_by(place: Path, number: signal.Signals, rank: int, *more: str, anew: bool = False):
    with Launched([TRAIN, *LONG, *more], 2, place, anew=anew) as launched:
        launched.until(place / "run" / "step-16" / "policy.pt")
        launched.signal(rank, number)
        return launched.ended()


def test_a_kill_of_one_ends_the_others_with_one_message_and_a_whole_checkpoint(place):
    for killed, survivor in ((1, 0), (0, 1)):
        ended = ended_by(place, signal.SIGKILL, killed, anew=killed == 1)  # torch's log level is read once
        assert ended.codes[killed] == -signal.SIGKILL and ended.codes[survivor] == 1
        assert ended.output.count("error:") == 1
        assert "another process has ended; checkpoints written before are whole" in ended.outputs[survivor]
        assert "Traceback" not in ended.output and "Exception raised" not in ended.output
        found = newest_checkpoint(place / "run")
        assert found is not None  # verified by its checksums
        place = place / "again"
        place.mkdir()
        write_mask(with_mini_task(place) / "0.9_mask.pt")


def test_a_sharded_run_that_was_killed_continues_in_more_processes(place):
    ended = ended_by(place, signal.SIGKILL, 1, "trainer=FSDPTrainer")
    assert ended.codes == [1, -signal.SIGKILL] and ended.output.count("error:") == 1
    found = newest_checkpoint(place / "run")
    assert found is not None
    with Launched([TRAIN, *LONG, "trainer=FSDPTrainer"], 3, place) as launched:
        launched.until(place / "run" / f"step-{found[1]['progress']['examples'] + 16}" / "policy.pt")
        launched.signal(0, signal.SIGTERM)
        ended = launched.ended()
    assert ended.codes == [128 + signal.SIGTERM] * 3
    assert f"continuing {found[0]}" in ended.outputs[0] and "error" not in ended.output


def test_a_stop_of_any_process_saves_and_stops_all_at_one_step(place):
    ended = ended_by(place, signal.SIGUSR1, 1)
    assert ended.codes == [128 + signal.SIGUSR1] * 2
    assert ended.output.count("stopped; saved") == 1 and "error" not in ended.output
    found = newest_checkpoint(place / "run")
    assert found is not None and str(found[0].name) in ended.outputs[0]
    # the next command, in one process more, continues from there and is stopped by the first
    with Launched([TRAIN, *LONG], 3, place) as launched:
        after = found[1]["progress"]["examples"]
        launched.until(place / "run" / f"step-{after - after % 16 + 32}")
        launched.signal(0, signal.SIGTERM)
        ended = launched.ended()
    assert ended.codes == [128 + signal.SIGTERM] * 3
    assert f"continuing {found[0]}" in ended.outputs[0]


def test_an_error_of_one_process_is_told_once(place):
    """The disk of the first one is full when it writes its second checkpoint."""
    ended = launch(["-c", FULL_DISK, TRAIN, *LONG], 2, place)
    assert ended.codes == [1, 1]
    assert ended.output.count("error:") == 1 and "Traceback" not in ended.output
    assert "No space left on device; checkpoints written before are whole" in ended.outputs[0]
    found = newest_checkpoint(place / "run")
    assert found is not None and found[0].name == "step-16"


def test_an_error_of_all_processes_is_told_once(place):
    ended = launch([TRAIN, *LONG, "lr=1e30", "grad_norm_strategy=none"], 2, place)
    assert ended.codes == [1, 1]
    assert ended.output.count("error:") == 1 and "lower lr" in ended.output


def test_torchrun_ends_all_when_one_is_killed(place):
    line = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", TRAIN, *LONG]
    unset = dict.fromkeys(("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    with Launched(line, 1, place, unset | {"PYTHON_EXEC": python()}, anew=True) as launched:
        launched.until(place / "run" / "step-16" / "policy.pt")
        agent = launched.processes[0].pid
        workers = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
        os.kill(int(workers[-1]), signal.SIGKILL)
        ended = launched.ended()
    assert ended.codes == [1] and newest_checkpoint(place / "run") is not None
    for worker in workers:
        assert not Path(f"/proc/{worker}").exists() or "zombie" in Path(f"/proc/{worker}/status").read_text()


# Before the start


def test_processes_must_have_one_command(place):
    own = (["lr=1e-3"], ["lr=1e-2"])
    ended = launch([TRAIN, *LONG], 2, place, own=own)
    assert ended.codes == [1, 1]
    assert ended.output.count("error: the command or its configuration of process 1 differs") == 1
    assert not (place / "run").exists()


def test_what_cannot_be_honoured_is_told_once_before_a_model_loads(place):
    cases = {
        ("mask_path=null",): "mask_path=null trains densely, and 2 processes would send whole gradients",
        ("batch_size=4", "gradient_accumulation_steps=4"): "2 processes share the 1 examples of a part",
        ("batchsize=4",): "unknown key batchsize=4",
    }
    for overrides, message in cases.items():
        ended = launch([TRAIN, *LONG, *overrides], 2, place)
        assert 0 not in ended.codes
        assert ended.output.count(message) == (2 if "unknown" in message else 1), ended.output
        assert "Loading weights" not in ended.output and not (place / "run").exists()


def test_a_process_that_does_not_start_is_named(place):
    ended = launch(["-c", MEET, "3"], 2, place, variables={"WORLD_SIZE": "4"})
    assert ended.output.count("of 4 processes, 2, 3 did not start within 3 s") == 1
    assert sorted(ended.codes) == [0, 1]


def test_a_port_that_is_taken_is_named(place):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        given = {"MASTER_PORT": port, "RANK": "0"}
        ended = launch(["-c", MEET, "5"], 1, place, variables={**given, "WORLD_SIZE": "2"})
    assert ended.codes == [1]
    assert f"the processes cannot meet at 127.0.0.1:{port}" in ended.output
    assert "Choose another MASTER_PORT, or fsdp_port=PORT" in ended.output


def test_the_port_can_be_a_setting(place):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    short = ["n_examples=16", "n_epochs=1", f"fsdp_port={port}"]
    ended = launch([TRAIN, *LONG, *short], 2, place, variables={"MASTER_PORT": None})
    assert ended.codes == [0, 0], ended.output
    assert "not used here: fsdp_port" not in ended.output
