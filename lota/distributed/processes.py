"""The processes of a command: which one this is, what they sum and tell each other, who tells an error.

They are started by torchrun, or by whatever sets its variables RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT (or the setting fsdp_port instead of the last one). Without them there is one process, and
everything here returns at once.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from lota.distributed.watch import ERROR, GRACE, Watch

T = TypeVar("T")
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
START = timedelta(minutes=5)  # that processes which have started wait for the others
WAIT = timedelta(hours=2)  # for each other later: the first may be writing a large checkpoint
LAST = timedelta(seconds=GRACE + 2)  # that the first one waits for the others to end after an error
TOGETHER = timedelta(seconds=5)  # within which processes that fail alike do so
# What torch raises when a process does not answer, beside RuntimeError of gloo's pairs
LOST = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)


class ProcessLost(Exception):
    """Another process of this command has ended, so that this one cannot go on."""

    told = False  # whether somebody else tells why


def is_loss(error: BaseException) -> bool:
    """Whether an error says that another process does not answer, whoever of torch has raised it."""
    by_gloo = isinstance(error, RuntimeError) and "gloo" in str(error)
    return by_gloo or isinstance(error, (ProcessLost, *LOST))


@dataclass(frozen=True)
class Processes:
    """One process among `count`. Every method is called by all of them, in the same order, if not said
    otherwise.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0  # among those of this machine
    store: Store | None = None

    @property
    def device(self) -> torch.device:
        """The GPU of this process; the CPU if there is none."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", self.local_rank)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and logs."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of the items: every count-th one, so that parts differ by at most one item."""
        return list(items[self.rank :: self.count])

    def unshare(self, part: list[T]) -> list[T]:
        """All items in their order, of parts as `share` makes them."""
        parts = self.gather(part)
        items: list[Any] = [None] * sum(map(len, parts))
        for rank, own in enumerate(parts):
            items[rank :: self.count] = own
        return items

    def sum_(self, tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
        """The tensor, which now holds the sum over all processes, bitwise the same on each.

        group: of the processes that sum, if not all do.
        """
        if self.count > 1:
            with lost():
                dist.all_reduce(tensor, group=group)
        return tensor

    def send(self, tensor: Tensor, to: int) -> None:
        """Send a contiguous tensor of the CPU to another process, which calls `receive`."""
        with lost():
            dist.send(tensor.view(torch.uint8), to)

    def receive(self, tensor: Tensor, sender: int) -> None:
        """Fill a contiguous tensor of the CPU with what another process sends."""
        with lost():
            dist.recv(tensor.view(torch.uint8), sender)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        return self.any_of(flag)[0]

    def any_of(self, *flags: bool) -> list[bool]:
        """Whether each flag is set on any process, by one message of 8 bytes per flag."""
        return self.sum_(torch.tensor(flags, dtype=torch.int64)).bool().tolist()

    def gather(self, item: T) -> list[T]:
        """The items of all processes, in the order of their ranks, on each of them; pickled on the way."""
        if self.count == 1:
            return [item]
        items: list[Any] = [None] * self.count
        with lost():
            dist.all_gather_object(items, item)
        return items

    def broadcast(self, item: T) -> T:
        """The first process's item, on each of them; pickled on the way."""
        if self.count == 1:
            return item
        items: list[Any] = [item]
        with lost():
            dist.broadcast_object_list(items)
        return items[0]

    def barrier(self) -> None:
        """Return when all processes have called this."""
        self.any(False)

    def same(self, what: str, value: object) -> None:
        """Raise ValueError on each process unless the value is equal on all of them."""
        values = self.gather(value)
        others = [rank for rank, other in enumerate(values) if other != values[0]]
        if others:
            raise ValueError(
                f"{what} of process {others[0]} differs from the first one's: give all processes the same "
                "command, code and files"
            )

    def tells(self) -> bool:
        """Whether this process is the first one to end with an error, and so tells it; called by that one."""
        if self.store is None:
            return True
        try:
            teller = self.store.compare_set(ERROR, "", str(self.rank))
            self.store.set(_ENDED.format(self.rank), "")
        except (RuntimeError, *LOST):  # the first one held the store, and was killed
            return self.rank == 1
        return teller.decode() == str(self.rank)

    def all_fail(self, what: str) -> bool:
        """Whether all processes have failed in this very thing, so that they may go on with the next one.

        Called by each process that fails; what: told apart from anything that can fail earlier or later.
        """
        if self.store is None:
            return True
        keys = [f"lota/failed/{what}/{rank}" for rank in range(self.count)]
        try:
            self.store.set(keys[self.rank], "")
            self.store.wait(keys, TOGETHER)
            self.barrier()
            if self.first:
                self.store.delete_key(ERROR)
            self.barrier()
        except (RuntimeError, ProcessLost, *LOST):
            return False
        return True


@contextlib.contextmanager
def lost() -> Iterator[None]:
    """Turn what torch raises for a process that does not answer into ProcessLost."""
    try:
        yield
    except (RuntimeError, *LOST) as error:
        raise ProcessLost(str(error)) from error


ALONE = Processes()
_current = ALONE
_ENDED = "lota/ended/{}"  # key of the store: a process that ends with an error
_watch: Watch | None = None


def processes() -> Processes:
    """The processes of this command."""
    return _current


@contextlib.contextmanager
def joined(port: int | None = None) -> Iterator[Processes]:
    """`join` the other processes; leave them at the end, when all are there, or at once after an error."""
    outermost = not dist.is_initialized()
    try:
        yield join(port)
    except BaseException:
        if outermost:
            leave(failed=True)
        raise
    if outermost:
        leave()


def join(port: int | None = None, start: timedelta = START) -> Processes:
    """The processes of this command, which from now on are also those of `processes()`.

    port: of the first process's machine, where they meet if MASTER_PORT is not set. start: how long processes
    that have started wait for the others. Raises ValueError if the variables are not what torchrun sets, if
    the port is in use, and if a process has not started in time.
    """
    global _current, _watch
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return _current
    joined = _join(port, start)
    assert joined.store is not None
    _watch, _current = Watch(joined.rank, joined.count, joined.store, joined.tells), joined
    return joined


def leave(failed: bool = False) -> None:
    """Leave the other processes: when all do, or at once if this one has failed.

    Raises ProcessLost if another one has ended with an error.
    """
    global _current, _watch
    if _watch is None:
        return
    joined, _current = _current, ALONE
    watch, _watch = _watch, None
    try:
        if not failed:
            joined.barrier()
    finally:
        watch.stop()
        dist.destroy_process_group()
        if failed and joined.first and joined.store is not None:
            _let_others_end(joined.store, range(1, joined.count))


def _let_others_end(store: Store, others: Iterable[int]) -> None:
    """Called by the first process when it fails: the others ask its store whether they are to tell."""
    with contextlib.suppress(RuntimeError, *LOST):
        store.wait([_ENDED.format(rank) for rank in others], LAST)


def _join(port: int | None, start: timedelta) -> Processes:
    address = os.environ.get("MASTER_PORT") or (str(port) if port is not None else "")
    given = {**os.environ, "MASTER_PORT": address}
    missing = [name for name in VARIABLES if not given.get(name)]
    if missing:
        raise ValueError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} without {', '.join(missing)}: start several processes "
            "with torchrun, or set these variables (fsdp_port=PORT stands for MASTER_PORT)"
        )
    rank, count, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else None
    if n_gpus is not None and local >= n_gpus:
        raise ValueError(
            f"process {local} of this machine has no GPU of its own: start at most {n_gpus} on a machine "
            "(torchrun --nproc-per-node)"
        )
    where = f"{os.environ['MASTER_ADDR']}:{address}"
    try:
        store: Store
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun holds it
            store, _, _ = next(rendezvous("env://", rank, count, timeout=start))
        else:  # not waiting for all, so that those which are absent can be named
            host, number = os.environ["MASTER_ADDR"], int(address)
            store = dist.TCPStore(  # type: ignore[attr-defined]  # torch does not list it
                host, number, count, rank == 0, start, wait_for_workers=False
            )
    except (RuntimeError, ValueError, *LOST) as error:
        raise ValueError(
            f"the processes cannot meet at {where}: {_first_line(error)}. Is the port in use, or a machine "
            "out of reach? Choose another MASTER_PORT, or fsdp_port=PORT"
        ) from error
    store.set(f"lota/here/{rank}", "")
    try:
        store.wait([f"lota/here/{other}" for other in range(count)], start)
    except (RuntimeError, *LOST) as error:
        absent = [other for other in range(count) if not store.check([f"lota/here/{other}"])]
        tells = Processes(rank, count, local, store).tells()
        if rank == 0:
            _let_others_end(store, [other for other in range(1, count) if other not in absent])
        if not tells:
            gone = ProcessLost(f"processes {absent} did not start")
            gone.told = True
            raise gone from error
        raise ValueError(
            f"of {count} processes, {', '.join(map(str, absent))} did not start within "
            f"{start.total_seconds():g} s: look at their output, and start all of them again"
        ) from error
    backend = "gloo"
    if n_gpus is not None:
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=WAIT)
    return Processes(rank, count, local, store)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
