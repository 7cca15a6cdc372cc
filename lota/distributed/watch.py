"""A process's watch over the others: when one has ended, this one ends too, wherever it is blocked.

A process that waits inside of a GPU's queue neither sees that another one has died nor handles a signal. Two
threads see it: one holds a connection to the next process, which breaks if that one dies or its machine is
lost; the other looks into the store, where whoever knows of a loss or has told an error says so. The main
thread gets GRACE to end by itself, with its files in order.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import sys
import threading
from collections.abc import Callable

from torch.distributed.distributed_c10d import Store

ERROR = "lota/error"  # key of the store: the process that has told an error
_LOST = "lota/lost"  # key of the store: a process has ended without a word
GRACE = 10.0  # seconds
_EVERY = 1.0  # seconds between two looks into the store
_KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3}  # seconds, seconds, times
_WELL = b"1"  # what a process that ends as it should sends
MESSAGE = (
    "error: another process has ended; checkpoints written before are whole, and the same command continues "
    "from the newest one"
)


class Watch:
    """Started by every process once all have met; each calls `stop` before it leaves them.

    tells: whether this process tells that it ends.
    """

    def __init__(self, rank: int, count: int, store: Store, tells: Callable[[], bool]):
        self.tells = tells
        # a connection of its own, as the main thread may wait on the other; torch's stub lacks `clone`
        self.store: Store = store.clone()  # type: ignore[attr-defined]
        self.leaving = threading.Event()
        self.next, self.previous = _connected(rank, count, store)
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self._listen, self._look)]
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        """Tell the process before this one that all is well, or that somebody has told an error already."""
        self.leaving.set()
        with contextlib.suppress(OSError):  # it may have gone before
            self.previous.sendall(_WELL)
        with contextlib.suppress(OSError):
            self.next.shutdown(socket.SHUT_RD)  # which ends the wait of `_listen`
        for thread in self.threads:
            thread.join()
        self.previous.close()
        self.next.close()

    def _listen(self) -> None:
        try:
            said = self.next.recv(1)
        except OSError:
            said = b""
        if said == _WELL or self.leaving.is_set():
            return
        with contextlib.suppress(RuntimeError):  # the process that held the store has ended too
            self.store.set(_LOST, "")
        if not self.leaving.wait(GRACE):
            self._end()

    def _look(self) -> None:
        while not self.leaving.wait(_EVERY):
            if self._trouble() and not self.leaving.wait(GRACE) and self._trouble():
                self._end()

    def _trouble(self) -> bool:
        try:
            return any(self.store.check([key]) for key in (ERROR, _LOST))
        except RuntimeError:  # the process that held the store has ended
            return True

    def _end(self) -> None:
        """End this process in the midst of whatever its main thread waits for."""
        if self.tells():
            print(MESSAGE, file=sys.stderr, flush=True)
        os._exit(1)


def _connected(rank: int, count: int, store: Store) -> tuple[socket.socket, socket.socket]:
    """Connections to the next process and from the one before."""
    family, own_address = _own_address()
    with socket.create_server(("", 0), family=family, backlog=1) as server:
        password = secrets.token_bytes(16)  # anybody on the network may call
        place = f"{own_address}:{server.getsockname()[1]}:{password.hex()}"
        store.set(f"lota/watch/{rank}", place)
        place = store.get(f"lota/watch/{(rank + 1) % count}").decode()
        address, port, own_password = place.rsplit(":", 2)
        following = socket.create_connection((address, int(port)), timeout=60)
        following.sendall(bytes.fromhex(own_password))
        previous = _caller(server, password)
    for connection in (following, previous):
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return following, previous


def _caller(server: socket.socket, password: bytes) -> socket.socket:
    """The connection of the one that knows the password."""
    server.settimeout(60)
    while True:
        connection, _ = server.accept()
        connection.settimeout(10)
        with contextlib.suppress(OSError):
            if connection.recv(len(password), socket.MSG_WAITALL) == password:
                return connection
        connection.close()


def _own_address() -> tuple[socket.AddressFamily, str]:
    """Of this machine, as seen from where the first process is."""
    family, kind, _, _, address = socket.getaddrinfo(os.environ["MASTER_ADDR"], 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # sends nothing
        return family, str(probe.getsockname()[0])
