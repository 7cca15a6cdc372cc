"""Stages of a study that are commands of the project, each run once."""

from __future__ import annotations

import os
import runpy
import shlex
import sys
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Stages:
    """Commands in one folder; those whose result is there are not run again."""

    def __init__(self, out: Path):
        self.out = out
        self.commands: list[str] = []

    def run(self, line: str, result: Path) -> None:
        """A command, unless it has been run; ends the study when it fails."""
        self.commands.append(f"python {line}")
        if result.exists():
            return
        log = self.out / "log.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        # a fork has torch and transformers loaded, which takes longer than most of these commands
        child = get_context("fork").Process(target=_as_command, args=(shlex.split(line), log))
        child.start()
        child.join()
        if child.exitcode:
            sys.exit(f"study stopped with exit code {child.exitcode}, see {log}:\n  python {line}")


def _as_command(words: list[str], log: Path) -> None:
    """Run a script of the project as `python` does, its output appended to `log`."""
    sys.stdout = sys.stderr = log.open("a", buffering=1)
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stdout.fileno(), 2)
    sys.argv = words
    runpy.run_path(str(ROOT / words[0]), run_name="__main__")
