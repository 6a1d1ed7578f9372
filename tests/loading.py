"""Clients that come all the time, and count what they lose: plain blocking sockets.

What they talk to answers each line with a line that ends in it.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from serving import LONG

CLIENTS = 4  # of either kind


@dataclass
class Load:
    """What became of the requests."""

    port: int
    short: int = 0  # answered, on a connection of their own, which then ended by FIN
    kept: int = 0  # answered, on one of many
    crossed: int = 0  # sent while a FIN was on its way: asked again, and answered then
    lost: list[str] = field(default_factory=list)
    over: bool = False
    threads: list[threading.Thread] = field(default_factory=list)

    def call(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=LONG)

    def ask(self, sock: socket.socket, line: bytes) -> bool:
        """False if the connection ended before there was any answer."""
        sock.sendall(line)
        answer = b""
        while not answer.endswith(b"\n"):
            chunk = sock.recv(1000)
            if not chunk:
                assert not answer, f"FIN after {answer!r}"
                return False
            answer += chunk
        assert answer.endswith(line), f"{answer!r} to {line!r}"
        return True

    def come_and_go(self, name: str) -> None:
        with self.call() as sock:
            time.sleep(0.002)  # it comes from far away
            assert self.ask(sock, name.encode()), "FIN instead of an answer"
            sock.shutdown(socket.SHUT_WR)
            assert sock.recv(1) == b""
        self.short += 1

    def come_and_stay(self, name: str) -> None:
        """Until the server ends it."""
        with self.call() as sock:
            while not self.over:
                if not self.ask(sock, name.encode()):
                    self.crossed += 1
                    return
                self.kept += 1
                time.sleep(0.001)

    def repeat(self, once: Callable[[str], None], name: str) -> None:
        while not self.over:
            try:
                once(f"{name}\n")
            except (OSError, AssertionError) as exc:
                self.lost.append(f"{name}: {exc!r}")

    def wait_for(self, answers: int) -> None:
        """Until there are *answers* more of either kind."""
        short, kept = self.short + answers, self.kept + answers
        deadline = time.monotonic() + LONG
        while self.short < short or self.kept < kept:
            assert time.monotonic() < deadline, self
            time.sleep(0.01)

    def end(self) -> None:
        """While there is a server still."""
        self.over = True
        for thread in self.threads:
            thread.join(LONG)
        assert not any(thread.is_alive() for thread in self.threads)


@contextmanager
def loaded(port: int) -> Iterator[Load]:
    load = Load(port)
    load.threads = [
        threading.Thread(target=load.repeat, args=(once, f"{once.__name__} {number}"))
        for once in (load.come_and_go, load.come_and_stay)
        for number in range(CLIENTS)
    ]
    for thread in load.threads:
        thread.start()
    try:
        yield load
    finally:
        load.end()
