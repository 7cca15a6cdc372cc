"""Run commands of the project in forks of a process that has imported their libraries, in no time."""

from __future__ import annotations

import os
import runpy
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What the commands import, apart from what they are themselves.
MODULES = (
    "hydra", "peft", "matplotlib.pyplot", "datasets", "trainers", "train_single_gpu", "lotto",
    "extract_masks", "eval_model_all", "generate_samples", "merge_models", "convert_policy_to_hf_resize",
    "lota.masks.__main__", "lota.share.delta.cli",
)  # fmt: skip


def import_all() -> None:
    """Import what commands need, and let torch use one thread: its pool does not survive a fork."""
    import torch

    torch.set_num_threads(1)
    for module in MODULES:
        __import__(module)


def start(
    argv: Sequence[str],
    folder: Path,
    log: Path,
    before: Callable[[], object] = int,
    after: Callable[[], object] = int,
) -> int:
    """Run `python ARGV` in a fork, in that folder; returns its exit status, or minus the signal.

    log: file for what it prints. before, after: called in the fork, around the command.
    """
    pid = os.fork()
    if pid == 0:
        _run(list(argv), folder, log, before, after)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def _run(
    argv: list[str], folder: Path, log: Path, before: Callable[[], object], after: Callable[[], object]
) -> None:
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(folder)
        os.environ.update(PROJECT_CACHE=str(folder / "cache"), HF_HUB_OFFLINE="1", WANDB_MODE="disabled")
        before()
        if argv[0] == "-m":
            sys.argv = argv[1:]
            sys.modules.pop(argv[1], None)  # or runpy warns that it was imported before
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [str(ROOT / argv[0]), *argv[1:]]
            runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if not isinstance(stop.code, int | None):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        after()
        os._exit(code)
