"""A sequence of tasks that kills itself with SIGKILL: `killed_lotto.py MOMENT N overrides...`.

The moments of killed_run.py, and `ledger`: before the N-th write of ledger.json.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import killed_run
import torch
from lotto_runs import run


def arrange_ledger(n: int) -> None:
    counter, replace = killed_run.Counter(n), os.replace

    def late(source, target):
        if Path(target).name == "ledger.json":
            counter.hit()
        replace(source, target)

    os.replace = late


if __name__ == "__main__":
    torch.set_num_threads(1)
    moment, n = sys.argv[1], int(sys.argv[2])
    if moment == "ledger":
        arrange_ledger(n)
    else:
        killed_run.arrange(moment, n)
    run(*sys.argv[3:])
