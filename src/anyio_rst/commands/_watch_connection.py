"""What is known of one connection that is followed: pure values, no I/O.

It is counted by sequence numbers, not by packets. What is captured twice, or sent again,
counts once, and what the capture lost is known from what follows it.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from ._watch_segments import source

if TYPE_CHECKING:
    from ._watch_segments import Endpoint

# Sequence numbers are modulo this: RFC 9293, 3.4.
MODULUS = 2**32

# The largest window (RFC 7323, 2.3): what is farther away is not of this connection.
WINDOW = 2**30


class End(enum.Enum):
    """How a connection ended."""

    FIN = "FIN"
    """With a FIN of each side, or of one that nobody answered any more."""

    RST = "RST"
    """With an RST, whatever came before it."""

    REFUSED = "REFUSED"
    """The SYN was answered by an RST."""

    UNANSWERED = "UNANSWERED"
    """The SYN, or the answer to it, was not answered."""

    UNSEEN = "UNSEEN"
    """A new connection has its place, or it was the oldest of too many."""


class Half:
    """What one side sends. Numbers are counted from its first byte, and do not wrap."""

    __slots__ = (
        "acknowledged",
        "connection",
        "fin",
        "first_sequence",
        "next",
        "other",
        "reached",
        "ttl",
        "way",
    )

    connection: Connection
    other: Half

    def __init__(self, way: bytes) -> None:
        self.way = way
        self.first_sequence: int | None = None  # of the SYN, if that was seen
        self.next: int | None = None  # the sequence number that follows what it sent
        self.reached = 0  # the same: bytes, and one for the FIN
        self.acknowledged = 0
        self.fin: float | None = None  # when
        self.ttl: int | None = None

    @property
    def endpoint(self) -> Endpoint:
        return source(self.way)

    @property
    def sent(self) -> int:
        """Bytes."""
        return self.reached - (self.fin is not None)

    @property
    def unacknowledged(self) -> int:
        """Bytes of these that the other side has not acknowledged."""
        return max(0, self.sent - self.acknowledged)

    def advance(self, sequence: int, length: int) -> bool:
        """It sends so much from there on; whether some of that is new."""
        if self.next is None:
            self.next = sequence
        end = sequence + length
        ahead = (end - self.next) % MODULUS
        if not 0 < ahead <= WINDOW:
            return False
        self.reached += ahead
        self.next = end % MODULUS
        return True

    def acknowledge(self, number: int) -> None:
        """The other side has everything up to *number*."""
        if self.next is None:
            self.next = number
        behind = (self.next - number) % MODULUS
        if behind <= WINDOW:
            self.acknowledged = max(self.acknowledged, self.reached - behind)
        elif MODULUS - behind <= WINDOW:  # the capture lost what it acknowledges
            self.reached += MODULUS - behind
            self.acknowledged = self.reached
            self.next = number


class Connection:
    """One that is followed, or has ended. Times are seconds since the epoch."""

    __slots__ = (
        "began",
        "client",
        "end",
        "ended",
        "established",
        "first",
        "from_start",
        "last",
        "reset_by",
        "reset_ttl",
        "server",
        "syns",
        "tried",
        "unacknowledged",
    )

    def __init__(
        self, client: bytes, server: bytes, now: float, *, from_start: bool
    ) -> None:
        self.client, self.server = Half(client), Half(server)
        for half, other in (
            (self.client, self.server),
            (self.server, self.client),
        ):
            half.connection, half.other = self, other
        self.from_start = from_start
        """Whether its handshake was seen. Otherwise the server is a guess."""
        self.began = now
        self.tried = now  # the last SYN, or answer to one
        self.syns = 0
        self.established = not from_start
        self.last: Half | None = None
        """Who has sent the last data that was new."""
        self.first: Half | None = None
        """Who was the first to end it."""
        self.reset_by: Half | None = None
        self.reset_ttl: int | None = None
        self.end: End | None = None
        self.ended: float | None = None
        self.unacknowledged: tuple[int, int] = (0, 0)
        """Bytes of the client and of the server that were in flight at the end."""

    @property
    def duration(self) -> float:
        """Seconds, from when it, or the watch over it, began."""
        return (self.ended or self.began) - self.began

    @property
    def first_by_rst(self) -> bool:
        return self.first is not None and self.first.fin is None

    @property
    def half_closed(self) -> float | None:
        """Seconds from the first FIN to the other, or to the RST; None without one."""
        fins = [each.fin for each in (self.client, self.server) if each.fin is not None]
        if not fins or self.ended is None:
            return None
        if len(fins) == 2:
            return max(fins) - min(fins)
        return self.ended - fins[0]

    @property
    def usual_ttl(self) -> int | None:
        """The TTL of what came before the RST, if that had another one."""
        if self.reset_by is None or self.reset_by.ttl == self.reset_ttl:
            return None
        return self.reset_by.ttl
