"""Training runs in each of several processes: `process_runs.py runs.json`, a list of lists of overrides.

What each process found goes to found-RANK.json, one entry per run: hashes of the replica or the parts, bytes
that left the process and by which it grew, the end of the run. An override `!name` arranges something first
(see ARRANGED).
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from runs import stopped_after, train

from benchmarks.processes import tcp_bytes
from lota.distributed.processes import join, leave, processes
from lota.masks import Mask
from lota.system import peak_memory_bytes
from lota.train.loaded_run import LoadedRun
from lota.train.trainer import Trainer


@contextmanager
def one_goes_astray() -> Iterator[None]:
    """A frozen weight of the second process changes before the third step, as by faulty memory."""
    learn = Trainer.learn

    def astray(trainer, examples):
        if trainer.processes.rank == 1 and trainer.progress.step == 2:
            with torch.no_grad():
                trainer.model.get_parameter("model.norm.weight")[0] += 1e-3
        learn(trainer, examples)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "learn", astray)
        yield


@contextmanager
def one_is_stopped() -> Iterator[None]:
    """The last process alone is asked to stop after the second step."""
    if processes().rank == processes().count - 1:
        with stopped_after(2):
            yield
    else:
        from lota.train.interrupt import Interrupted

        with pytest.raises(Interrupted):
            yield


@contextmanager
def other_mask() -> Iterator[None]:
    """The second process reads another mask under the same name."""
    from lota.train import preflight

    find = preflight.find_mask

    def other(config, model, snip):
        mask = find(config, model, snip)
        flipped = {name: ~mask.dense(name) for name in mask.names}
        return Mask.from_dense(flipped) if processes().rank == 1 else mask

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "find_mask", other)
        yield


@contextmanager
def as_it_is() -> Iterator[None]:
    yield


M_MMAP_THRESHOLD = -3  # of malloc.h
ARRANGED = {"!astray": one_goes_astray, "!stopped": one_is_stopped, "!mask": other_mask, "": as_it_is}


def digest(tensors) -> str:
    sha = hashlib.sha256()
    for tensor in tensors:
        tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # of a sharded model
        sha.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def found(trainer: LoadedRun, sent: int) -> dict:
    optimizer = trainer.optimizer
    state = [v for p in optimizer.names for v in optimizer.state[p].values() if torch.is_tensor(v)]
    return {
        "weights": digest(p for p in trainer.model.parameters()),
        "state": digest(state),
        "counted": getattr(optimizer.peers, "sent_bytes", 0),
        "sent": sent,
        "kept": optimizer.n_trained,
        "steps": trainer.progress.step,
    }


@contextmanager
def counted(sent: list[int]) -> Iterator[None]:
    """`tcp_bytes` before the first backward pass and after each step's vote."""
    learn, agree = Trainer.learn, Trainer.agree

    def learning(trainer, examples):
        if not sent:
            sent.append(tcp_bytes())
        learn(trainer, examples)

    def agreeing(trainer):
        answer = agree(trainer)
        sent.append(tcp_bytes())
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "learn", learning)
        patch.setattr(Trainer, "agree", agreeing)
        yield


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def held_before_loading(held: list[int]) -> Iterator[None]:
    """Resident bytes when a run has prepared, and its modules are imported."""
    load = Trainer.load

    def loading(trainer):
        held.append(resident_bytes())
        load(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "load", loading)
        yield


def run(overrides: list[str]) -> dict:
    arranged = next((name for name in overrides if name in ARRANGED), "")
    sent: list[int] = []
    trainer, before = None, []
    try:
        with counted(sent), held_before_loading(before), ARRANGED[arranged]():
            trainer, _ = train(*(each for each in overrides if each != arranged))
    except ValueError as error:
        return {"error": str(error)}
    grown = peak_memory_bytes(torch.device("cpu")) - before[0] if before else 0
    return {"stopped": True} if trainer is None else found(trainer, sent[-1] - sent[0]) | {"grown": grown}


def give_freed_memory_back() -> None:
    """From now on, so that what a process takes is what it holds; as MALLOC_MMAP_THRESHOLD_ does."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536)


def main() -> None:
    join()
    if "HOLDS_LITTLE" in os.environ:
        give_freed_memory_back()
    runs = json.loads(Path(sys.argv[1]).read_text())
    answers = [run(overrides) for overrides in runs]
    Path(f"found-{processes().rank}.json").write_text(json.dumps(answers))
    leave()


if __name__ == "__main__":
    main()
