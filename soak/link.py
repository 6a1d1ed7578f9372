"""A lossy link: `python -m soak.link SEED SERVER_TUN PEER_TUN`.

Two network namespaces without a name, a TUN device in each, and this process between
them, which loses, delays, reorders and doubles packets. All of it disappears with the
processes that use it, in whatever way they end.

Netem (tc-netem(8)) does the same to a veth pair, but it does not tell which packets it
has lost. This link knows that, and what the receiver made of those that it delivered.
So a peer that has never seen the RST of a server can be told from one whose server has
never sent any.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import json
import os
import random
import select
import socket
import struct
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .plans import (
    NATIVE_WAYS,
    PEER_ADDRESS,
    SERVER_ADDRESS,
    VANISH_AFTER,
    VANISHING_PORTS,
    Manner,
    Way,
)
from .receiver import RST, SYN, Receiver

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

LOSS = 0.03  # of the packets of either direction
DOUBLED = 0.01
DELAY, JITTER = 0.002, 0.01  # seconds; a difference above 0 reorders
# Seconds without a packet, after which none is under way: two delayed ACKs (40 ms).
IDLE = 0.08
PACKETS_PER_TURN = 64
ANSWERED = 4  # segments of an answer, before the peer in the middle of it vanishes
MTU = 1500
# Longer than any burst: what overflows would be lost without a trace.
QUEUE = 20_000
TRACED = 30  # segments of a connection that are shown if it goes wrong
BACKLOG = 4096

CLONE_NEWNET = 0x40000000  # linux/sched.h
# linux/if_tun.h and linux/sockios.h
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 0x1
SIOCSIFADDR, SIOCSIFNETMASK, SIOCSIFMTU, SIOCSIFTXQLEN = 0x8916, 0x891C, 0x8922, 0x8943
NAME = b"soak"

IPPROTO_TCP = 6

# Of /proc/net/tcp: the server's kernel has nothing more to send in these states.
AT_REST = {"05", "06", "0A"}  # FIN_WAIT2, TIME_WAIT, LISTEN (net/tcp_states.h)


class LinkUnavailable(Exception):
    """Why there can be no link."""


def _call(name: str, *arguments: int) -> None:
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    if function(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def enter(namespace: int) -> None:
    """Move this thread to the network namespace of that descriptor: setns(2)."""
    _call("setns", namespace, CLONE_NEWNET)


def _in_new_namespace(function: Callable[[], T]) -> T:
    """Call it in a new network namespace, which lives as long as what it opens there."""
    results: list[T] = []
    failures: list[OSError] = []

    def run() -> None:
        try:
            _call("unshare", CLONE_NEWNET)
            results.append(function())
        except OSError as exc:
            failures.append(exc)

    # unshare(2) is for the thread that calls it.
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]


def _open_tun(address: str) -> int:
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    try:
        fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", NAME, IFF_TUN | IFF_NO_PI))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:

            def set_address(request: int, value: str) -> None:
                packed = socket.inet_aton(value)
                argument = struct.pack("16sHH4s16x", NAME, socket.AF_INET, 0, packed)
                fcntl.ioctl(sock, request, argument)

            set_address(SIOCSIFADDR, address)
            set_address(SIOCSIFNETMASK, "255.255.255.0")
            fcntl.ioctl(sock, SIOCSIFMTU, struct.pack("16si20x", NAME, MTU))
            fcntl.ioctl(sock, SIOCSIFTXQLEN, struct.pack("16si20x", NAME, QUEUE))
            flags = fcntl.ioctl(sock, SIOCGIFFLAGS, struct.pack("16sh22x", NAME, 0))
            (before,) = struct.unpack("16xh22x", flags)
            up = struct.pack("16sh22x", NAME, before | IFF_UP)
            fcntl.ioctl(sock, SIOCSIFFLAGS, up)
    except BaseException:
        os.close(tun)
        raise
    return tun


def _open_namespace_file(name: str) -> int:
    # A file below /proc/net is that of the namespace in which it was opened.
    return os.open(f"/proc/thread-self/{name}", os.O_RDONLY)


def _server_end() -> tuple[int, int, int, dict[Way, socket.socket]]:
    tun = _open_tun(SERVER_ADDRESS)
    listeners = {
        way: socket.create_server((SERVER_ADDRESS, 0), backlog=BACKLOG)
        for way in NATIVE_WAYS
    }
    table, devices = _open_namespace_file("net/tcp"), _open_namespace_file("net/dev")
    return tun, table, devices, listeners


def _peer_end() -> tuple[int, int, int]:
    tun = _open_tun(PEER_ADDRESS)
    return tun, _open_namespace_file("ns/net"), _open_namespace_file("net/dev")


class Link:
    """The two ends, for the process that starts the others.

    Raises:
      LinkUnavailable: not on this system, or not with these privileges.
    """

    def __init__(self) -> None:
        self._descriptors: list[int] = []
        self.listeners: dict[Way, socket.socket] = {}
        try:
            server = _in_new_namespace(_server_end)
            self.server_tun, self._table, server_devices, self.listeners = server
            self._descriptors += server[:3]
            peer = _in_new_namespace(_peer_end)
            self.peer_tun, self.namespace, peer_devices = peer
            self._descriptors += peer
        except (OSError, AttributeError) as exc:
            self.close()
            raise LinkUnavailable(
                f"it needs /dev/net/tun, CAP_SYS_ADMIN and CAP_NET_ADMIN ({exc})"
            ) from exc
        self._devices = server_devices, peer_devices

    def close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        for listener in self.listeners.values():
            listener.close()

    @property
    def ports(self) -> dict[str, int]:
        """By the names of the ways."""
        return {
            way.name: listener.getsockname()[1]
            for way, listener in self.listeners.items()
        }

    def is_quiet(self) -> bool:
        """Whether the server's kernel has nothing more to send to who is still there."""
        for line in _read_all(self._table).splitlines()[1:]:
            fields = line.split(maxsplit=4)
            port = int(fields[2].rpartition(":")[2], 16)
            if fields[3] not in AT_REST and port not in VANISHING_PORTS:
                return False
        return True

    def overflowed(self) -> int:
        """Packets that were lost before this link saw them."""
        total = 0
        for devices in self._devices:
            for line in _read_all(devices).splitlines():
                name, _, counts = line.partition(":")
                if name.strip() == NAME.decode():
                    # The fourth of what was received, and of what was sent: proc(5).
                    total += int(counts.split()[3]) + int(counts.split()[11])
        return total


def _read_all(descriptor: int) -> str:
    os.lseek(descriptor, 0, os.SEEK_SET)
    parts = []
    while part := os.read(descriptor, 2**16):
        parts.append(part)
    return b"".join(parts).decode()


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
        self._trace: list[str] = []

    def note(self, what: str, flags: int, seq: int, length: int) -> None:
        self._trace.append(f"{time.monotonic():.3f} {what} {flags:02x} {seq} +{length}")

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

    def record(self) -> tuple[list[int], list[int], list[str]]:
        """The fields of `judge.Flow`."""
        peer, server = (
            [side.lost, side.refused, side.obeyed, side.reached]
            for side in (self.peer, self.server)
        )
        return peer, server, self._trace[-TRACED:]


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
        self._vanished: set[int] = set()  # before; their servers try for a while
        self._totals = Totals()
        # When, the number that it came with, what, and where to.
        self._under_way: list[tuple[float, int, bytes, int]] = []
        self._arrivals = 0

    def run(self) -> None:
        """Until the standard input ends. Each line of it is answered with a report."""
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
                elif os.read(control, 4096):
                    asked = True
                else:
                    return
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
        """What became of the connections since the last report."""
        report: dict[str, Any] = {
            "totals": vars(self._totals),
            "flows": {port: flow.record() for port, flow in self._flows.items()},
        }
        self._vanished |= {port for port, flow in self._flows.items() if flow.cut}
        self._flows = {}
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.write(json.dumps(report) + "\n")
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


def available() -> str | None:
    """Why there can be no link, or None."""
    if not Path("/dev/net/tun").exists():
        return "there is no /dev/net/tun"
    try:
        Link().close()
    except LinkUnavailable as exc:
        return str(exc)
    return None


if __name__ == "__main__":
    main(*sys.argv[1:])
