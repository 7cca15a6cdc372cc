"""Peak memory of a script in a process of its own, on Linux."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
PRELUDE = """
import re, sys

def memory(field):  # bytes; not getrusage: a program started by a large one begins with that one's peak
    return int(re.search(field + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

"""


def printed(script: str, *arguments: object, **environment: str) -> list[int]:
    """The numbers that a script prints. It has sys, and memory(field) of /proc/self/status in bytes."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + script, *map(str, arguments)],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]
