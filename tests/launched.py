"""Commands in several processes, started as torchrun would, each within a time limit whatever fails."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prepared import python

LIMIT = 600.0  # seconds, on a machine with much else to do
ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@dataclass
class Ended:
    """What processes have left, in the order of their ranks."""

    codes: list[int]
    outputs: list[str]  # stdout and stderr together

    @property
    def output(self) -> str:
        return "\n".join(self.outputs)


@dataclass
class Launched:
    """Context manager: processes of a command; those that still run at the end are killed."""

    command: Sequence[str]
    count: int
    folder: Path  # where they run
    variables: dict[str, str | None] = field(default_factory=dict)  # None: not set
    own: Sequence[Sequence[str]] = ()  # further arguments of each
    anew: bool = False  # by interpreters that have imported nothing yet; else by forks (prepared.py)

    def __enter__(self) -> Launched:
        port, paths = free_port(), (str(ROOT), str(ROOT / "tests"))
        self.processes, self.logs = [], []
        for rank in range(self.count):
            given = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.count),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
                "PROJECT_CACHE": str(self.folder), "PYTHONPATH": os.pathsep.join(paths),
            } | self.variables  # fmt: skip
            variables = {k: v for k, v in {**os.environ, **given}.items() if v is not None}
            log = self.folder / f"output-{os.getpid()}-{port}-{rank}.txt"
            self.logs.append(log)
            more = self.own[rank] if self.own else ()
            with log.open("wb") as file:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable if self.anew else python(), *self.command, *more],
                        cwd=self.folder, env=variables, stdout=file, stderr=subprocess.STDOUT,
                    )
                )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def signal(self, rank: int, number: signal.Signals) -> None:
        self.processes[rank].send_signal(number)

    def until(self, path: Path, seconds: float = LIMIT) -> None:
        """Wait for a file."""
        end = time.monotonic() + seconds
        while not path.exists():
            assert time.monotonic() < end and None in [p.poll() for p in self.processes], self.read()
            time.sleep(0.02)

    def read(self) -> str:
        return "\n".join(log.read_text(errors="replace") for log in self.logs)

    def ended(self, seconds: float = LIMIT) -> Ended:
        """Wait for the end of all; AssertionError, with what they said, if it does not come in time."""
        began = time.monotonic()
        try:
            codes = [p.wait(max(0.1, began + seconds - time.monotonic())) for p in self.processes]
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"still running after {seconds} s:\n{self.read()}") from error
        return Ended(codes, [log.read_text(errors="replace") for log in self.logs])


def launch(command: Sequence[str], count: int, folder: Path, seconds: float = LIMIT, **more: object) -> Ended:
    """Run a command in several processes to the end of all."""
    with Launched(command, count, folder, **more) as launched:  # type: ignore[arg-type]
        return launched.ended(seconds)
