"""Start a file under torchrun, with gloo on this machine, and end whatever is left of it.

Its processes are forks that have imported everything already (prepared.py).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from prepared import python

ROOT = Path(__file__).resolve().parent.parent


def torchrun(
    n: int, *command: str | Path, timeout: float = 180, **env: str
) -> subprocess.CompletedProcess[str]:
    """The ended launcher of n processes. Its port is the operating system's choice."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", *command]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [str(word) for word in line],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHON_EXEC": python(), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(line, process.returncode, out, err)
