"""A run or sequence that kills itself with SIGKILL: `killed_run.py MOMENT N [lotto] overrides...`.

Moments: `policy` and `resume`: halfway through the N-th write of that file; `rename`: before the N-th
checkpoint gets its name; `ledger`: before the N-th ledger.json does; `backward`: in the midst of the N-th
optimizer step; `nospace`: the N-th write of policy.pt finds a full disk.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path

import lotto_runs
from runs import train

import lota.storage
import lota.train.checkpoint
import lota.train.saved_model
from lota.optim.masked import MaskedOptimizer


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Counter:
    """Calls `then` at the n-th time it is hit."""

    def __init__(self, n: int):
        self.left = n

    def hit(self, then=die) -> None:
        self.left -= 1
        if self.left == 0:
            then()


def fill_the_disk() -> None:
    """From now on no file grows beyond 100 kB: a write fails in its midst, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))


def arrange(moment: str, n: int) -> None:
    counter = Counter(n)
    save, replace, apply = lota.storage.save_tensors, os.replace, MaskedOptimizer._apply

    def save_half(content, path, values=None):
        written = Path(path).stem
        if written == "policy" and moment == "nospace":
            counter.hit(fill_the_disk)
        checksum = save(content, path, values)

        def half():
            with open(path, "r+b") as file:
                file.truncate(Path(path).stat().st_size // 2)
            die()

        if written == moment:
            counter.hit(half)
        return checksum

    def replace_late(source, target):
        late = {"rename": ("epoch-", "step-"), "ledger": ("ledger.json",)}.get(moment)
        if late and Path(target).name.startswith(late):
            counter.hit()
        replace(source, target)

    def apply_some(self, p, *more):
        apply(self, p, *more)
        if moment == "backward" and p is list(self.names)[3]:
            counter.hit()

    lota.train.checkpoint.save_tensors = lota.train.saved_model.save_tensors = save_half
    os.replace = replace_late
    MaskedOptimizer._apply = apply_some


if __name__ == "__main__":
    arrange(sys.argv[1], int(sys.argv[2]))
    try:
        if sys.argv[3:4] == ["lotto"]:
            lotto_runs.run(*sys.argv[4:])
        else:
            train(*sys.argv[3:])
    except OSError as error:
        sys.exit(f"OSError: {error}")
