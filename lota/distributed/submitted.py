"""A job of several processes that submitit starts gets the variables that torchrun would have set."""

from __future__ import annotations

import os


def export_variables() -> bool:
    """In a job of several tasks, set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; whether it is
    one.

    Every process keeps all GPUs of its machine in sight, and takes that of its local rank.
    """
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return False
    from submitit import JobEnvironment  # of the extra lota[slurm]
    from submitit.helpers import TorchDistributedEnvironment

    if JobEnvironment().num_tasks == 1:
        return False
    found = TorchDistributedEnvironment()
    if os.environ["SUBMITIT_EXECUTOR"] == "local":  # the machine's own name need not be known to itself
        found.master_addr = "127.0.0.1"
    found.export(set_cuda_visible_devices=False, overwrite=True)
    return True
