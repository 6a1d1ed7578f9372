"""In the middle of the link: `python -m evidence.soak.relay SEED SERVER_TUN PEER_TUN`."""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import random
import select
import struct
import sys
import time
from collections import deque
from dataclasses import dataclass

from .link import MTU
from .plans import Manner
from .receiver import RST, SYN, Receiver
from .wire import VANISH_AFTER, VANISHING_PORTS

LOSS = 0.03  # of the packets of either direction
DOUBLED = 0.01
DELAY, JITTER = 0.002, 0.01  # seconds; a difference above 0 reorders
# Seconds without a packet, after which none is under way: two delayed ACKs (40 ms).
IDLE = 0.08
PACKETS_PER_TURN = 64
ANSWERED = 4  # segments of an answer, before the peer in the middle of it vanishes
TRACED = 100  # lines of a connection that are shown if it goes wrong

IPPROTO_TCP = 6


class Flow:
    """A connection, as the link sees it."""

    def __init__(self, port: int) -> None:
        self.peer, self.server = Receiver(), Receiver()
        self.cut = False
        self._vanishes = (
            VANISH_AFTER[(port - VANISHING_PORTS.start) % len(VANISH_AFTER)]
            if port in VANISHING_PORTS
            else None
        )
        self._requests = self._answers = 0
        self.trace: deque[str] = deque(maxlen=TRACED)

    def note(self, what: str, flags: int, seq: int, length: int) -> None:
        self.trace.append(f"{time.monotonic():.3f} {what} {flags:02x} {seq} +{length}")

    @property
    def may_vanish(self) -> bool:
        return self._vanishes is not None

    def is_cut(self, *, to_server: bool, length: int) -> bool:
        """Whether its peer has disappeared, before this segment or with it."""
        if self._vanishes is None or self.cut:
            return self.cut
        if self._vanishes is Manner.BEFORE_REQUEST:
            self.cut = length > 0
        elif self._vanishes is Manner.WAITING:
            self.cut = self._requests > 0
        else:
            self.cut = self._answers >= ANSWERED
        self._requests += to_server and length > 0
        self._answers += not to_server and length > 0
        return self.cut

    def record(self) -> tuple[list[int], list[int]]:
        """The fields of `judge.Flow`."""
        peer, server = (
            [side.lost, side.refused, side.obeyed, side.reached]
            for side in (self.peer, self.server)
        )
        return peer, server


@dataclass
class Totals:
    packets: int = 0
    lost: int = 0
    doubled: int = 0
    reordered: int = 0


class Relay:
    def __init__(self, seed: int, server_tun: int, peer_tun: int) -> None:
        self._rng = random.Random(seed)
        self._ends = {server_tun: peer_tun, peer_tun: server_tun}
        self._peer_tun = peer_tun
        self._flows: dict[int, Flow] = {}  # by the port of the peer
        self._reported = self._flows
        self._vanished: set[int] = set()  # before; their servers try for a while
        self._totals = Totals()
        # When, the number that it came with, what, and where to.
        self._under_way: list[tuple[float, int, bytes, int]] = []
        self._arrivals = 0

    def run(self) -> None:
        """Until the standard input ends.

        `report` is answered when nothing is under way: what became of the connections
        since the last one. `trace PORT` has the segments of one of these.
        """
        control = sys.stdin.fileno()
        poll = select.epoll()
        for descriptor in (control, *self._ends):
            poll.register(descriptor, select.EPOLLIN)
        asked = False
        while True:
            timeout = IDLE if asked else -1
            if self._under_way:
                timeout = max(0, self._under_way[0][0] - time.monotonic())
            ready = [descriptor for descriptor, _ in poll.poll(timeout)]
            if asked and not ready and not self._under_way:
                asked = False
                self._report()
            for descriptor in ready:
                if descriptor != control:
                    self._take(descriptor)
                    continue
                command = os.read(control, 4096).split()
                if not command:
                    return
                if command[0] == b"trace":
                    say(list(self._reported[int(command[1])].trace))
                else:
                    asked = True
            self._deliver()

    def _take(self, tun: int) -> None:
        for _ in range(PACKETS_PER_TURN):
            try:
                packet = os.read(tun, 2 * MTU)
            except BlockingIOError:
                return
            segment = parsed(packet, to_server=tun == self._peer_tun)
            if segment is not None:
                self._forward(tun, packet, *segment)

    def _forward(self, tun: int, packet: bytes, port: int, *segment: int) -> None:
        flags, _, length = segment
        self._totals.packets += 1
        self._arrivals += 1
        to_server = tun == self._peer_tun
        if port in self._vanished:
            if not (to_server and flags & SYN):
                return
            self._vanished.remove(port)  # another peer has come to this address
        flow = self._flow(port)
        flow.note("by peer" if to_server else "by server", *segment)
        if flow.is_cut(to_server=to_server, length=length):
            return
        if self._rng.random() < LOSS and not flow.may_vanish:
            self._totals.lost += 1
            flow.note("lost to server" if to_server else "lost to peer", *segment)
            if flags & RST:
                (flow.server if to_server else flow.peer).lost += 1
            return
        copies = 1
        if self._rng.random() < DOUBLED:
            self._totals.doubled += 1
            copies = 2
        for _ in range(copies):
            due = time.monotonic() + DELAY + self._rng.random() * JITTER
            item = (due, self._arrivals, packet, self._ends[tun])
            heapq.heappush(self._under_way, item)

    def _deliver(self) -> None:
        now = time.monotonic()
        while self._under_way and self._under_way[0][0] <= now:
            _, arrival, packet, tun = heapq.heappop(self._under_way)
            to_server = tun != self._peer_tun
            segment = parsed(packet, to_server=to_server)
            assert segment is not None
            port, *rest = segment
            flow = self._flow(port)
            receiver = flow.server if to_server else flow.peer
            self._totals.reordered += arrival < receiver.latest
            receiver.latest = max(arrival, receiver.latest)
            receiver.deliver(*rest)
            flow.note("to server" if to_server else "to peer", *rest)
            os.write(tun, packet)

    def _flow(self, port: int) -> Flow:
        flow = self._flows.get(port)
        if flow is None:
            flow = self._flows[port] = Flow(port)
        return flow

    def _report(self) -> None:
        flows = {port: flow.record() for port, flow in self._flows.items()}
        say({"totals": vars(self._totals), "flows": flows})
        self._vanished |= {port for port, flow in self._flows.items() if flow.cut}
        self._reported, self._flows = self._flows, {}


def say(reply: object) -> None:
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


def parsed(packet: bytes, *, to_server: bool) -> tuple[int, int, int, int] | None:
    """The peer's port, flags, sequence number and length; None if it is not TCP."""
    if packet[0] >> 4 != 4 or packet[9] != IPPROTO_TCP:
        return None  # IPv6 looks for routers
    start = (packet[0] & 15) * 4
    source, target, seq = struct.unpack_from("!HHI", packet, start)
    length = len(packet) - start - (packet[start + 12] >> 4) * 4
    return source if to_server else target, packet[start + 13], seq, length


def main(seed: str, server_tun: str, peer_tun: str) -> None:
    Relay(int(seed), int(server_tun), int(peer_tun)).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
