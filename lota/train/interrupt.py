"""Stopping a run between two optimizer steps, so that what is saved is a state the run really had."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lota.distributed.processes import Processes  # slow to import: torch

PREEMPTION = (signal.SIGUSR1, signal.SIGUSR2)  # what clusters send before they take a machine away


class Interrupted(Exception):
    """The run was asked to stop. exit_code: 128 + signal number, as a shell reports it."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.exit_code = 128 + number

    def passed_on(self) -> bool:
        """Give a signal of preemption to who handled it before the run did; whether there is anyone.

        submitit's handler requeues the job and ends the first process; it returns in the others.
        """
        if self.number not in PREEMPTION or not callable(signal.getsignal(self.number)):
            return False
        signal.raise_signal(self.number)
        return True


class StopBetweenSteps:
    """Context manager: Ctrl-C, SIGTERM or a signal of PREEMPTION is remembered, and `check`, called when it
    is safe to stop, raises Interrupted on all processes if any of them was asked.

    A fused step changes weights during the backward pass, so an exception in its midst would leave half a
    step. A second Ctrl-C stops at once, without saving.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, *PREEMPTION)

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.received: int | None = None
        self.received_at = 0.0
        self.saving = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopBetweenSteps:
        for number in self.SIGNALS:
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self.received_at = number, now
        elif number == signal.SIGINT and not self.saving and now - self.received_at > 1.0:
            raise KeyboardInterrupt

    def check(self) -> None:
        """Raise Interrupted if a stop was asked for. Every process calls this at the same place."""
        self.settle(self.processes.any(self.received is not None))

    def settle(self, asked: bool) -> None:
        """The same when processes have agreed already whether one of them was asked."""
        if self.processes.count == 1:
            asked = self.received is not None
        if asked:
            numbers = [number for number in self.processes.gather(self.received) if number is not None]
            raise Interrupted(next((number for number in numbers if number in PREEMPTION), numbers[0]))
