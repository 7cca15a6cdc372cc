"""A training run that kills itself with SIGKILL at a named moment: `killed_run.py MOMENT N overrides...`.

Moments: `policy` and `resume`: halfway through the N-th write of that file; `rename`: before the N-th
checkpoint gets its name; `backward`: in the midst of the N-th optimizer step; `nospace`: the N-th write of
policy.pt finds a full disk instead.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from pathlib import Path

from runs import train

import lota.checkpoint
import trainers
from lota.masked_optimizer import MaskedOptimizer


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


def arrange(moment: str, n: int) -> None:
    counter = Counter(n)
    save, replace, apply = lota.checkpoint.torch.save, os.replace, MaskedOptimizer._apply

    def save_half(content, path):
        save(content, path)
        written = Path(path).stem

        def half(after=die):
            with open(path, "r+b") as file:
                file.truncate(Path(path).stat().st_size // 2)
            after()

        def full():
            half(lambda: None)
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

        if written == moment:
            counter.hit(half)
        elif written == "policy" and moment == "nospace":
            counter.hit(full)

    def replace_late(source, target):
        if Path(target).name.startswith(("epoch-", "step-")) and moment == "rename":
            counter.hit()
        replace(source, target)

    def apply_some(self, p, grad):
        apply(self, p, grad)
        if moment == "backward" and p is list(self.names)[3]:
            counter.hit()

    lota.checkpoint.torch.save = save_half
    os.replace = replace_late
    MaskedOptimizer._apply = apply_some


if __name__ == "__main__":
    trainers.torch.set_num_threads(1)
    arrange(sys.argv[1], int(sys.argv[2]))
    train(*sys.argv[3:])
