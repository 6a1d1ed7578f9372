"""The peers: `python -m evidence.soak.peers FILE SEED TRUST PORTS SHARE [NAMESPACE]`.

Plain non-blocking sockets, which know nothing of anyio_rst. What each peer saw becomes a
line of FILE. SHARE is the place of theirs in `ALL_SHARES`; a lossy one is across the
link whose peers' end is in the network namespace of the descriptor NAMESPACE. PORTS are
the server's for each way, as JSON. TRUST is a file with the authority behind the server's
certificate.

Commands come on the standard input. `round FIRST COUNT` runs that many connections.
`settled N` is the answer when all have begun, N of them with success, and all that can
end without further ado have ended; the others wait for `finish`, read what there is, if
need be for as many seconds as are given with it, and then it is `over`.
"""

from __future__ import annotations

import errno
import heapq
import json
import os
import select
import socket
import sys
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

from evidence.sockets import HOST, allow_descriptors

from . import link
from .peer import PARKED, Peer
from .plans import ENDLESS, KIB, SIP, Manner, Way, plans
from .processes import die_with_parent
from .records import name_of
from .shares import ALL_SHARES
from .tls import TLSSocket, peer_context
from .wire import (
    LINK_PORTS,
    LOOPBACK_PORTS,
    PEER_ADDRESS,
    SERVER_ADDRESS,
    VANISH_AFTER,
    VANISHING_PORTS,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TextIO

LOOPBACK_AT_ONCE = 128
LINK_AT_ONCE = 600
PATIENCE = 60.0  # seconds; a peer that has not seen an end by then sees none
FINISH = 20.0  # the same behind `finish`
SMALL_BUFFERS = ("slow", "sipping")
REPORT_EVERY = 20  # connections
EVENTS = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET


class Peers:
    def __init__(
        self, lines: TextIO, seed: int, trust: str, ports: dict[str, int], share: int
    ) -> None:
        self._lines = lines
        self._seed = seed
        self._share = ALL_SHARES[share]
        self._lossy = lossy = self._share.lossy
        self._ports = {way: ports[way.name] for way in Way if way.name in ports}
        self._ways = {
            way: weight for way, weight in self._share.ways.items() if way in self._ports
        }
        self._contexts = {old: peer_context(trust, old=old) for old in (False, True)}
        self._host = SERVER_ADDRESS if lossy else HOST
        self._ordinary = (
            link_addresses(LINK_PORTS) if lossy else loopback_addresses(share)
        )
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
        self._to_come = plans(first, count, self._seed, self._share, self._ways)
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
            if self._commands and self._commands[0][0] == "finish":
                _, *patience = self._commands.popleft()
                finishing = True
                deadline = now + (float(patience[0]) if patience else FINISH)
                for peer in list(self._open.values()):
                    self._step(peer)
        if not settled:
            say(f"settled {self._connected}")
        while not finishing:
            command = self._wait_for_command()
            if command is None or command[0] != "finish":
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
        if not plan.lossy and (plan.kind in SMALL_BUFFERS or plan.size == ENDLESS):
            # With half of a sip, each of them opens the window (RFC 9293, 3.8.6.2.2).
            size = SIP // 2 if plan.kind == "sipping" else 8 * KIB
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
        addresses = self._ordinary
        if plan.lossy and plan.kind == "vanishing":
            manner = plan.manner
            addresses = self._vanishing.get(manner, self._vanishing[Manner.WAITING])
        tls = None
        if plan.way.is_tls:
            tls = TLSSocket(sock, self._contexts[plan.has_old_tls], self._host)
        peer = Peer(plan, bound(sock, addresses), sock, tls)
        sock.connect_ex((self._host, self._ports[plan.way]))
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
            peer.close = name_of(exc)
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
        peer.read_what_is_left()
        peer.say_goodbye()
        self._lines.write(peer.line())
        peer.sock.close()
        self._done += 1
        if self._done % REPORT_EVERY == 0:
            say(f"done {REPORT_EVERY}")


def loopback_addresses(share: int) -> Iterator[tuple[str, int]]:
    while True:
        for network in range(1, 255):
            for port in LOOPBACK_PORTS:
                yield f"127.{share}.{network}.1", port


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
    print(line, flush=True)


def main(
    path: str,
    seed: str,
    trust: str,
    ports: str,
    share: str,
    namespace: str | None = None,
) -> None:
    die_with_parent()
    allow_descriptors()
    if namespace is not None:
        link.enter(int(namespace))
    with Path(path).open("a") as lines:
        Peers(lines, int(seed), trust, json.loads(ports), int(share)).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
