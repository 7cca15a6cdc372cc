"""Tensors worked through in chunks by a few threads, in order and in little memory."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import NamedTuple, TypeVar

import numpy as np

CHUNK = 1 << 17  # entries a worker reads at a time, a multiple of 8; its buffers fit into an L2 cache
Item = TypeVar("Item")
Result = TypeVar("Result")


class Span(NamedTuple):
    """Entries [start, stop) of a flattened tensor; start is a multiple of 8."""

    name: str
    start: int
    stop: int

    @property
    def packed(self) -> slice:
        """Bytes of the tensor's packed bits that hold these entries."""
        return slice(self.start // 8, (self.stop + 7) // 8)


class Scratch(threading.local):
    """Buffers of the calling thread, used again for every chunk, so that they stay in its cache."""

    def __init__(self) -> None:
        self._buffers: dict[str, np.ndarray] = {}

    def get(self, label: str, n: int, dtype: type) -> np.ndarray:
        """n entries, overwritten by the thread's next call with this label."""
        n_bytes = n * np.dtype(dtype).itemsize
        if label not in self._buffers or len(self._buffers[label]) < n_bytes:
            self._buffers[label] = np.empty(n_bytes, np.uint8)
        return self._buffers[label][:n_bytes].view(dtype)


def worker_count() -> int:
    """Reading threads: as many as this process has processors, four at most."""
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def spans(sizes: Mapping[str, int], order: Iterable[str] | None = None) -> list[Span]:
    """The chunks of every tensor."""
    return [
        Span(name, start, min(start + CHUNK, sizes[name]))
        for name in (sizes if order is None else order)
        for start in range(0, sizes[name], CHUNK)
    ]


def in_order(work: Callable[[Item], Result], todo: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
    """(item, work(item)) in the order of `todo`; threads work a few items ahead of the consumer, no more."""
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    with ThreadPoolExecutor(worker_count()) as pool:
        for item in todo:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) > 2 * worker_count():
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()


def by_threads(work: Callable[[Item], object], todo: Iterable[Item]) -> None:
    """work(item) for each, in any order, by a few threads; returns or raises when all of them have ended.

    After an error in one, or an interrupt, each ends after the item that it is at.
    """
    stop = threading.Event()
    items = iter(list(todo))  # which hands every item to one thread

    def take() -> None:
        for item in items:
            if stop.is_set():
                return
            work(item)

    with ThreadPoolExecutor(worker_count()) as pool:
        ends = [pool.submit(take) for _ in range(worker_count())]
        try:
            for end in as_completed(ends):
                end.result()
        except BaseException:
            stop.set()
            raise
