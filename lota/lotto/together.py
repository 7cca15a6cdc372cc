"""A sequence on several processes: the first one leads, the others train what it trains."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from lota.config import Config
from lota.distributed.processes import Processes

Train = Callable[[Config], Path | None]


@contextlib.contextmanager
def led(train: Train, processes: Processes) -> Iterator[Train]:
    """For the first process: a `train` that lets the others train the same, until the block ends."""

    def lead(run: Config) -> Path | None:
        processes.broadcast(run)
        return train(run)

    yield lead
    processes.broadcast(None)


def follow(train: Train, processes: Processes) -> None:
    """For each other process: train what the first one trains, until it has come to the end."""
    while (run := processes.broadcast(None)) is not None:
        train(run)
