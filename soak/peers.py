"""The peers: `python -m soak.peers FILE SEED PORT [NAMESPACE]`.

Plain non-blocking sockets, which know nothing of anyio_rst. What each peer saw becomes a
line of FILE. PORT is that of the server on loopback, or across the link whose peers' end
is in the network namespace of the descriptor NAMESPACE.

Commands come on the standard input. `round FIRST COUNT` runs that many connections.
`settled N` is the answer when all have begun, N of them with success, and all that can
end without further ado have ended; the others wait for `finish`, read what there is, and
then it is `over`.
"""

from __future__ import annotations

import errno
import heapq
import json
import os
import resource
import select
import socket
import struct
import sys
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeAlias

from . import link
from .plans import (
    DRAIN_TIMEOUT,
    ENDLESS,
    FLOOD,
    KIB,
    LINK_PORTS,
    LOOPBACK_PORTS,
    PATTERN,
    PEER_ADDRESS,
    REQUEST,
    SERVER_ADDRESS,
    VANISH_AFTER,
    VANISHING_PORTS,
    Manner,
    Plan,
    Work,
    place,
    plans,
    request,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from typing import TextIO

# What a peer yields: None to wait for an event, seconds to sleep, or PARKED.
Pause: TypeAlias = "float | None"
Steps: TypeAlias = "Generator[Pause, None, None]"
PARKED = -1.0  # until there is nothing left to wait for

LOOPBACK_AT_ONCE = 128
LINK_AT_ONCE = 600
RECEIVE_SIZE = 256 * KIB
PATIENCE = 60.0  # seconds; a peer that has not seen an end by then sees none
# The same behind `finish`. Across the link all has arrived then.
FINISH_LOOPBACK, FINISH_LINK = 20.0, 0.5
REPORT_EVERY = 20  # connections
LINGER_RESET = struct.pack("ii", 1, 0)
EVENTS = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET
GONE = (errno.ECONNRESET, errno.EPIPE)


class Peer:
    """One connection, and what was seen of it."""

    def __init__(self, plan: Plan, address: tuple[str, int], sock: socket.socket) -> None:
        self.plan = plan
        self.address = address
        self.sock = sock
        self.steps = self.BEHAVIOURS[plan.kind](self)
        self.connected = False
        self.close = "NONE"
        self.received = 0
        self.sent = 0  # behind the request
        self.wrong = False
        self.sleeping = self.parked = False
        self._place = place(plan.number)

    def line(self) -> str:
        plan = self.plan
        fields = (
            plan.number,
            plan.kind,
            plan.work,
            plan.manner.value,
            plan.size,
            plan.lossy,
            *self.address,
            self.connected,
            self.close,
            self.received,
            self.sent,
            self.wrong,
        )
        return json.dumps(fields) + "\n"

    # How the kinds of peers behave.

    def good(self) -> Steps:
        yield from self._send(request(self.plan))
        yield from self._read_to_end()

    def slow(self) -> Steps:
        yield from self._send(request(self.plan))
        if self.plan.manner is Manner.LATE:
            yield DRAIN_TIMEOUT * 1.5
        for _ in range(10):
            yield 0.01
            if self._read(4 * KIB):
                return
        yield from self._read_to_end()

    def failing(self) -> Steps:
        yield from self._send(request(self.plan))
        if self.plan.work is Work.TORN:  # in the middle of it, so it has to begin
            yield from self._read_to_end(at_most=1)
            self.sent += self.sock.send(b"!")
            yield PARKED
        yield from self._read_to_end()

    def flooding(self) -> Steps:
        plan = self.plan
        yield from self._send(request(plan))
        endless = plan.manner is Manner.ENDLESS
        ended = False
        while endless or self.sent < plan.upload:
            before = self.received
            if not ended:
                ended = self._read(RECEIVE_SIZE)
                if ended and (plan.manner is Manner.STOPPING or self.close != "FIN"):
                    return
            try:
                piece = FLOOD if endless else FLOOD[: plan.upload - self.sent]
                self.sent += self.sock.send(piece)
                if endless:
                    yield 0.05
            except BlockingIOError:
                if self.received == before:  # an event tells of what is new, only
                    yield None
            except OSError as exc:
                yield from self._read_behind(exc, ended=ended)
                return
        if not ended:
            yield from self._read_to_end()

    def half_closing(self) -> Steps:
        yield from self._send(request(self.plan))
        try:
            while self.sent < self.plan.upload:
                try:
                    self.sent += self.sock.send(FLOOD[: self.plan.upload - self.sent])
                except BlockingIOError:
                    yield None
            self.sock.shutdown(socket.SHUT_WR)
        except OSError as exc:
            yield from self._read_behind(exc, ended=False)
            return
        yield from self._read_to_end()

    def resetting(self) -> Steps:
        plan = self.plan
        header = request(plan)
        if plan.manner is Manner.BEFORE_REQUEST:
            header = b""
        elif plan.manner is Manner.IN_REQUEST:
            header = header[: REQUEST.size // 2]
        yield from self._send(header)
        if plan.manner is Manner.WAITING:
            yield 0.01
        elif plan.manner is Manner.IN_ANSWER:
            yield from self._read_to_end(at_most=8 * KIB)
        elif plan.manner is Manner.AFTER_END:
            yield from self._read_to_end()
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
        self.close = "RESET" if self.close in ("NONE", "FIN") else self.close

    def vanishing(self) -> Steps:
        """On loopback nothing can get lost: it stays, and does nothing any more."""
        manner = self.plan.manner
        yield from self._send(
            b"" if manner is Manner.BEFORE_REQUEST else request(self.plan)
        )
        if not self.plan.lossy:
            yield PARKED
        yield from self._read_to_end()

    BEHAVIOURS: ClassVar[dict[str, Callable[[Peer], Steps]]] = {
        "good": good,
        "failing": failing,
        "slow": slow,
        "flooding": flooding,
        "half-closing": half_closing,
        "resetting": resetting,
        "vanishing": vanishing,
    }

    # What they do it with.

    def _send(self, data: bytes) -> Steps:
        """The first thing that is sent. Raises OSError if nobody can be reached."""
        while not self.connected:
            error = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                raise OSError(error, os.strerror(error))
            try:
                self.sock.getpeername()
                self.connected = True
            except OSError:
                yield None
        if data and self.sock.send(data) != len(data):
            raise AssertionError("a send buffer that does not hold a request")

    def _read(self, size: int) -> bool:
        """Read once; True at the end."""
        try:
            data = self.sock.recv(size)
        except BlockingIOError:
            return False
        except OSError as exc:
            self.close = "RST" if exc.errno in GONE else errno.errorcode[exc.errno or 0]
            return True
        if not data:
            self.close = "FIN"
            return True
        start = self._place + self.received
        self.received += len(data)
        # What lies behind the end of the answer is in the pattern too.
        if PATTERN[start : start + len(data)] != data or self.received > self.plan.size:
            self.wrong = True
        return False

    def _read_to_end(self, at_most: int = sys.maxsize) -> Steps:
        while self.received < at_most:
            before = self.received
            if self._read(min(RECEIVE_SIZE, at_most)):
                return
            if self.received == before:
                yield None

    def _read_behind(self, exc: OSError, *, ended: bool) -> Steps:
        """Sending failed with *exc*; what there was before that can still be read.

        The error has been told, and the end looks like a FIN now. It is one if the
        error is EPIPE, and not ECONNRESET: tcp_reset() in net/ipv4/tcp_input.c.
        """
        if not ended:
            yield from self._read_to_end()
            if exc.errno != errno.EPIPE:
                self.close = "RST" if exc.errno in GONE else str(exc)


class Peers:
    def __init__(self, lines: TextIO, seed: int, port: int, *, lossy: bool) -> None:
        self._lines = lines
        self._seed = seed
        self._lossy = lossy
        self._server = (SERVER_ADDRESS if lossy else "127.0.0.1", port)
        self._ordinary = link_addresses(LINK_PORTS) if lossy else loopback_addresses()
        self._vanishing = {
            manner: link_addresses(VANISHING_PORTS[index :: len(VANISH_AFTER)])
            for index, manner in enumerate(VANISH_AFTER)
        }
        self._epoll = select.epoll()
        self._epoll.register(sys.stdin.fileno(), select.EPOLLIN)
        self._read = b""
        self._commands: deque[list[str]] = deque()

    def run(self) -> None:
        while command := self._wait_for_command():
            assert command[0] == "round", command
            self._round(int(command[1]), int(command[2]))

    def _wait_for_command(self) -> list[str] | None:
        while not self._commands:
            self._epoll.poll()
            if not self._read_commands():
                return None
        return self._commands.popleft()

    def _read_commands(self) -> bool:
        arrived = os.read(sys.stdin.fileno(), 4096)
        *lines, self._read = (self._read + arrived).split(b"\n")
        self._commands += [line.decode().split() for line in lines]
        return bool(arrived)

    def _round(self, first: int, count: int) -> None:
        self._to_come = plans(first, count, self._seed, lossy=self._lossy)
        self._all_begun = False
        self._open: dict[int, Peer] = {}  # by descriptor
        self._timers: list[tuple[float, int, Peer]] = []
        self._busy = self._connecting = self._connected = self._done = 0
        finishing = settled = False
        deadline = time.monotonic() + PATIENCE
        at_once = LINK_AT_ONCE if self._lossy else LOOPBACK_AT_ONCE
        while self._open or not self._all_begun:
            while self._busy < at_once and not self._all_begun:
                self._start_next()
                deadline = time.monotonic() + PATIENCE
            if not settled and self._is_settled():
                settled = True
                say(f"settled {self._connected}")
            now = time.monotonic()
            until = self._timers[0][0] if self._timers else deadline
            for descriptor, _ in self._epoll.poll(max(0, min(until, deadline) - now)):
                if descriptor == sys.stdin.fileno():
                    if not self._read_commands():
                        raise SystemExit
                    continue
                peer = self._open.get(descriptor)  # one that has just been closed?
                if peer is not None and not peer.sleeping:
                    self._step(peer)
            now = time.monotonic()
            while self._timers and self._timers[0][0] <= now:
                peer = heapq.heappop(self._timers)[2]
                if peer.sleeping:
                    self._step(peer)
            if now >= deadline:
                for peer in list(self._open.values()):
                    if finishing or not peer.parked:
                        self._end(peer)
                deadline = now + PATIENCE
            if self._commands and self._commands[0] == ["finish"]:
                self._commands.popleft()
                finishing = True
                deadline = now + (FINISH_LINK if self._lossy else FINISH_LOOPBACK)
                for peer in list(self._open.values()):
                    self._step(peer)
        if not settled:
            say(f"settled {self._connected}")
        while not finishing:
            if self._wait_for_command() != ["finish"]:
                raise SystemExit
            finishing = True
        self._lines.flush()
        say("over")

    def _is_settled(self) -> bool:
        """Whether what there is to wait for lies with the server, or is all over.

        Across the link, some wait for an RST that has been lost.
        """
        waiting = self._connecting if self._lossy else self._busy
        return self._all_begun and not waiting

    def _start_next(self) -> None:
        plan = next(self._to_come, None)
        if plan is None:
            self._all_begun = True
            return
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        # Not across the link, which could not tell what the peer's TCP has taken.
        if not plan.lossy and (plan.kind == "slow" or plan.size == ENDLESS):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 * KIB)
        addresses = self._ordinary
        if plan.lossy and plan.kind == "vanishing":
            manner = plan.manner
            addresses = self._vanishing.get(manner, self._vanishing[Manner.WAITING])
        peer = Peer(plan, bound(sock, addresses), sock)
        sock.connect_ex(self._server)
        self._open[sock.fileno()] = peer
        self._epoll.register(sock, EVENTS)
        self._busy += 1
        self._connecting += 1
        self._step(peer)

    def _step(self, peer: Peer) -> None:
        was_connected = peer.connected
        peer.sleeping = False
        try:
            pause = next(peer.steps)
        except StopIteration:
            self._end(peer)
        except OSError as exc:
            peer.close = errno.errorcode.get(exc.errno or 0, str(exc))
            self._end(peer)
        else:
            if pause == PARKED:
                self._park(peer)
                peer.sleeping = True
            elif pause is not None:
                peer.sleeping = True
                until = time.monotonic() + pause
                heapq.heappush(self._timers, (until, peer.plan.number, peer))
        if peer.connected and not was_connected:
            self._connected += 1
            self._connecting -= 1

    def _park(self, peer: Peer) -> None:
        if not peer.parked:
            peer.parked = True
            self._busy -= 1

    def _end(self, peer: Peer) -> None:
        if not peer.connected:
            self._connecting -= 1
        self._park(peer)
        del self._open[peer.sock.fileno()]
        peer.sleeping = False
        peer.sock.close()
        self._lines.write(peer.line())
        self._done += 1
        if self._done % REPORT_EVERY == 0:
            say(f"done {REPORT_EVERY}")


def loopback_addresses() -> Iterator[tuple[str, int]]:
    while True:
        for network in range(1, 255):
            for port in LOOPBACK_PORTS:
                yield f"127.0.{network}.1", port


def link_addresses(ports: range) -> Iterator[tuple[str, int]]:
    while True:
        for port in ports:
            yield PEER_ADDRESS, port


def bound(sock: socket.socket, addresses: Iterator[tuple[str, int]]) -> tuple[str, int]:
    """The next of the *addresses* that no other program has."""
    while True:
        address = next(addresses)
        try:
            sock.bind(address)
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE:
                raise
        else:
            return address


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(path: str, seed: str, port: str, namespace: str | None = None) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if namespace is not None:
        link.enter(int(namespace))
    with Path(path).open("a") as lines:
        Peers(lines, int(seed), int(port), lossy=namespace is not None).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
