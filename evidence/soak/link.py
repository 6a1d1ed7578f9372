"""A lossy link: its two ends.

Two network namespaces without a name, a TUN device in each, and a process between them
(`soak.relay`), which loses, delays, reorders and doubles packets. All of it disappears
with the processes that use it, in whatever way they end.

Netem (tc-netem(8)) does the same to a veth pair, but it does not tell which packets it
has lost. This link knows that, and what the receiver made of those that it delivered.
So a peer that has never seen the RST of a server can be told from one whose server has
never sent any.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from .plans import NATIVE_WAYS, Way
from .wire import PEER_ADDRESS, SERVER_ADDRESS, VANISHING_PORTS

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

MTU = 1500
# Longer than any burst: what overflows would be lost without a trace.
QUEUE = 20_000
BACKLOG = 4096

CLONE_NEWNET = 0x40000000  # linux/sched.h
# linux/if_tun.h and linux/sockios.h
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 0x1
SIOCSIFADDR, SIOCSIFNETMASK, SIOCSIFMTU, SIOCSIFTXQLEN = 0x8916, 0x891C, 0x8922, 0x8943
NAME = b"soak"

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


def in_new_namespace(function: Callable[[], T]) -> T:
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


def _open_counters() -> list[int]:
    return [_open_namespace_file(f"net/{name}") for name in ("netstat", "snmp")]


def _server_end() -> tuple[int, int, int, dict[Way, socket.socket], list[int]]:
    tun = _open_tun(SERVER_ADDRESS)
    listeners = {
        way: socket.create_server((SERVER_ADDRESS, 0), backlog=BACKLOG)
        for way in NATIVE_WAYS
    }
    table, devices = _open_namespace_file("net/tcp"), _open_namespace_file("net/dev")
    return tun, table, devices, listeners, _open_counters()


def _peer_end() -> tuple[int, int, int, list[int]]:
    tun = _open_tun(PEER_ADDRESS)
    namespace, devices = _open_namespace_file("ns/net"), _open_namespace_file("net/dev")
    return tun, namespace, devices, _open_counters()


class Link:
    """The two ends, for the process that starts the others.

    Raises:
      LinkUnavailable: not on this system, or not with these privileges.
    """

    def __init__(self) -> None:
        self._descriptors: list[int] = []
        self.listeners: dict[Way, socket.socket] = {}
        try:
            server = in_new_namespace(_server_end)
            self.server_tun, self._table, server_devices, self.listeners, ours = server
            self._descriptors += [*server[:3], *ours]
            peer = in_new_namespace(_peer_end)
            self.peer_tun, self.namespace, peer_devices, theirs = peer
            self._descriptors += [*peer[:3], *theirs]
        except (OSError, AttributeError) as exc:
            self.close()
            raise LinkUnavailable(
                f"it needs /dev/net/tun, CAP_SYS_ADMIN and CAP_NET_ADMIN ({exc})"
            ) from exc
        self._devices = server_devices, peer_devices
        self._counters = {"server": ours, "peers": theirs}

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

    def counters(self) -> Counter[str]:
        """What the kernels of both ends count: netstat(8), with -s."""
        counts: Counter[str] = Counter()
        for end, descriptors in self._counters.items():
            for descriptor in descriptors:
                lines = iter(_read_all(descriptor).splitlines())
                for names, values in zip(lines, lines, strict=True):
                    group, *fields = names.split()
                    for name, value in zip(fields, values.split()[1:], strict=True):
                        counts[f"{end} {group}{name}"] = int(value)
        return counts

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


def available() -> str | None:
    """Why there can be no link, or None."""
    if not Path("/dev/net/tun").exists():
        return "there is no /dev/net/tun"
    try:
        Link().close()
    except LinkUnavailable as exc:
        return str(exc)
    return None
