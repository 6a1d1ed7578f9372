"""What is written down of a connection: by its peer, by the server, and by the link."""

from __future__ import annotations

import errno
import socket
import ssl
import struct
from fcntl import ioctl
from termios import FIONREAD
from typing import TYPE_CHECKING, NamedTuple

from .plans import DRAIN_TIMEOUT

if TYPE_CHECKING:
    from collections.abc import Sequence

LATE = 1.0  # seconds, which no machine is that has time for the soak
GONE = (errno.ECONNRESET, errno.EPIPE)


class Seen(NamedTuple):
    """A line of the peers."""

    number: int
    kind: str
    work: int
    manner: str
    size: int
    lossy: bool
    way: str
    host: str
    port: int
    connected: bool
    close: str
    """FIN, RST, NONE, RESET by the peer itself, or the name of another error."""
    received: int
    sent: int
    """Bytes behind the request; over TLS the encrypted ones."""
    wrong: bool
    close_notify: bool
    """Over TLS: whether one came."""
    pause: float
    """Of a sipping peer: the longest time between two of its sips, in seconds."""
    left: str
    """If it saw no end, its kernel's tcpi_state (tcp(7)), and what it had not read."""


class Ended(NamedTuple):
    """A line of the server: the fields of an `Ending`."""

    host: str | None
    port: int | None
    """None if the peer had reset before a scope could ask."""
    number: int | None
    """The id that the handler has read; None if it never came."""
    kind: str
    """REFUSED where there is no Ending, since there was nothing to scope any more."""
    cause: str
    peer: str
    discarded: int
    unacknowledged: int | None
    fin_sent_before_reset: bool
    error: str | None
    """The type of the exception in `outcome`."""
    drained: float | None
    """Seconds from the end of the handler's work to that of the connection."""
    way: str
    late: float
    """How much of the last 3 seconds the server's event loop was late, in seconds."""

    @property
    def had_no_time(self) -> bool:
        """Whether the loop may have found a time-out before what came before it.

        A peer's process may be stopped for half of the time, too.
        """
        return self.late > LATE

    @property
    def waited_in_vain(self) -> bool:
        """Whether the drain went to its limit. 10 ms are for what clocks are worth."""
        return self.drained is not None and self.drained > DRAIN_TIMEOUT - 0.01


class Arrived(NamedTuple):
    """What the link did to one side's segments."""

    lost: int
    """RSTs that it dropped."""
    refused: int
    """RSTs that the receiver's TCP did not accept, since a segment before was missing."""
    obeyed: int
    """RSTs that the receiver's TCP accepted."""
    reached: int
    """Segments that can complete a handshake, and came before any RST."""

    @property
    def reset_is_lost(self) -> bool:
        return not self.obeyed and self.lost + self.refused > 0


class Flow(NamedTuple):
    """A connection, as the link has seen it."""

    peer: Arrived
    server: Arrived


def flow(record: tuple[Sequence[int], Sequence[int]]) -> Flow:
    peer, server = record
    return Flow(Arrived(*peer), Arrived(*server))


def name_of(exc: OSError) -> str:
    """For `Seen.close`."""
    if isinstance(exc, ssl.SSLError):  # its number is one of OpenSSL's
        return f"SSL: {exc.reason}"
    if exc.errno in GONE:
        return "RST"
    return errno.errorcode.get(exc.errno or 0, str(exc))


def left_of(sock: socket.socket) -> str:
    """For `Seen.left`."""
    state = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    (unread,) = struct.unpack("i", ioctl(sock, FIONREAD, b"\0" * 4))
    return f"state {state}, {unread} bytes unread"
