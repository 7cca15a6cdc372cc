"""An engine that several processes share: each has the model whole, the first deals out batches.

Batches are those of one process: sequences are put in order, longest first, and cut into batches, which the
processes take in turns. Only if that leaves some without work are batches smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lota.distributed.processes import Processes
from lota.evaluate.batching import longest_first
from lota.evaluate.decoding import Decoding
from lota.evaluate.engine import Engine
from lota.evaluate.loglik import Request, request_order


@dataclass(frozen=True)
class _Batch:
    """What one process does next: a call of `complete` if there is a decoding, else of `logliks`."""

    rows: Sequence[int]  # numbers of the sequences in the first process's call
    sequences: Sequence[Any]  # prompts or requests
    decoding: Decoding | None = None
    indices: Sequence[int] = ()
    sample: int = 0


class SharedEngine:
    """The engine of the first process, which all of them answer for; the others are in `answer_first`.

    Leave its `with` block without an error to let the others go.
    """

    def __init__(self, engine: Engine, processes: Processes) -> None:
        self.engine, self.processes = engine, processes
        self.context, self.readable, self.batch_size = engine.context, engine.readable, engine.batch_size
        self.key, self.settings, self.check = engine.key, engine.settings, engine.check

    def __enter__(self) -> SharedEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.processes.broadcast(None)

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding,
        *,
        indices: Sequence[int],
        sample: int = 0,
        on_done: Callable[[int, str], object],
    ) -> None:
        def batch(rows: Sequence[int]) -> _Batch:
            return _Batch(rows, [prompts[i] for i in rows], decoding, [indices[i] for i in rows], sample)

        self._deal(longest_first(prompts), batch, on_done)

    def logliks(self, requests: Sequence[Request], *, on_done: Callable[[int, float], object]) -> None:
        self._deal(request_order(requests), lambda rows: _Batch(rows, [requests[i] for i in rows]), on_done)

    def _deal(
        self,
        order: Sequence[int],
        batch: Callable[[Sequence[int]], _Batch],
        on_done: Callable[[int, Any], object],
    ) -> None:
        """Rounds of a batch for each process; what a round has answered is handed on after it."""
        count = self.processes.count
        size = max(1, min(self.batch_size, -(-len(order) // count)))
        for start in range(0, len(order), size * count):
            firsts = range(start, start + size * count, size)
            batches = [batch(order[at : at + size]) for at in firsts]
            self.processes.broadcast(batches)
            for found in self.processes.gather(_answers(self.engine, batches[0])):
                for row, answer in found:
                    on_done(row, answer)


def answer_first(engine: Engine, processes: Processes) -> None:
    """Work on the batches that the first process deals out, until it has no more."""
    while (batches := processes.broadcast(None)) is not None:
        processes.gather(_answers(engine, batches[processes.rank]))


def _answers(engine: Engine, batch: _Batch) -> list[tuple[int, Any]]:
    """(number of the sequence, its completion or log-likelihood) of each sequence of a batch."""
    found: list[tuple[int, Any]] = []

    def keep(at: int, answer: Any) -> None:
        found.append((batch.rows[at], answer))

    if not batch.rows:
        pass
    elif batch.decoding is None:
        engine.logliks(batch.sequences, on_done=keep)
    else:
        engine.complete(
            batch.sequences, batch.decoding, indices=batch.indices, sample=batch.sample, on_done=keep
        )
    return found
