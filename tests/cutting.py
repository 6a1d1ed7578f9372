"""Two machines for a test, and the cable between them, which can be cut.

Network namespaces, and the TUN devices of the soak's link; see `evidence.soak.link`.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import anyio

from evidence.soak import link
from evidence.soak.wire import PEER_ADDRESS as PEERS_ADDRESS
from evidence.soak.wire import SERVER_ADDRESS as OUR_ADDRESS

from serving import Peer

__all__ = [
    "OUR_ADDRESS",
    "PEERS_ADDRESS",
    "Cable",
    "cable",
    "carry",
    "in_a_thread_that_ends",
    "link",
    "on_machine",
]

T = TypeVar("T")

SIOCGSKNS = 0x894C  # the network namespace of a socket: linux/sockios.h


def on_machine(namespace: int, function: Callable[..., T], *args: Any) -> T:
    """Call it in a thread of that network namespace."""
    with ThreadPoolExecutor(1, initializer=link.enter, initargs=(namespace,)) as thread:
        return thread.submit(function, *args).result()


async def in_a_thread_that_ends(function: Callable[..., Any], *args: Any) -> Any:
    """Trio keeps its threads for other runs, which are on another machine then."""
    thread = ThreadPoolExecutor(1)
    called = thread.submit(function, *args)
    thread.shutdown(wait=False)
    while not called.done():
        await anyio.sleep(0.001)
    return called.result()


def carry(packet: bytes, sender: int, receiver: int) -> None:
    os.write(receiver, packet)


class Cable:
    """Between our machine and that of the peers."""

    def __init__(self, machines: link.Link) -> None:
        self.theirs: int = machines.namespace
        self.peers_end: int = machines.peer_tun
        listener = next(iter(machines.listeners.values()))
        self.ours: int = fcntl.ioctl(listener, SIOCGSKNS)
        self._ends = {
            machines.server_tun: machines.peer_tun,
            machines.peer_tun: machines.server_tun,
        }
        self._is_cut = threading.Event()
        # What becomes of a packet: the TUN devices of its sender and its receiver follow.
        self.carry: Callable[[bytes, int, int], object] = carry
        self._stop, self._stopped = os.pipe()
        self._thread = threading.Thread(target=self._carry)
        self._thread.start()

    def close(self) -> None:
        os.close(self._stopped)
        self._thread.join()
        os.close(self._stop)
        os.close(self.ours)

    def _carry(self) -> None:
        while True:
            ready, _, _ = select.select([self._stop, *self._ends], [], [])
            if self._stop in ready:
                return
            for tun in ready:
                with suppress(BlockingIOError):
                    packet = os.read(tun, 2 * link.MTU)
                    if not self._is_cut.is_set():
                        self.carry(packet, tun, self._ends[tun])

    def cut(self) -> None:
        self._is_cut.set()

    def mend(self) -> None:
        self._is_cut.clear()

    def connect(self, port: int, **options: Any) -> Peer:
        """A peer, over there, that connects to us."""
        return on_machine(self.theirs, lambda: Peer(port, host=OUR_ADDRESS, **options))

    def listen(self) -> socket.socket:
        """A socket over there."""
        return on_machine(self.theirs, socket.create_server, (PEERS_ADDRESS, 0))


@contextmanager
def cable() -> Iterator[Cable]:
    machines = link.Link()
    try:
        between = Cable(machines)
        try:
            yield between
        finally:
            between.close()
    finally:
        machines.close()
