"""Connections, followed segment by segment to their ends: a table without any I/O."""

from __future__ import annotations

import heapq
from collections import Counter, deque
from itertools import count
from typing import TYPE_CHECKING

from ._watch_connection import MODULUS, WINDOW, Connection, End
from ._watch_segments import ACK, FIN, RST, SYN, reverse, source_port, target_port

if TYPE_CHECKING:
    from collections.abc import Collection

    from ._watch_connection import Half
    from ._watch_segments import Segment

# Seconds without another SYN, at least, until one is taken for given up. The next would
# come after one second, or three on older systems, and then after twice the last pause.
PATIENCE = 4.0

# Seconds within which nobody sends a SYN again: it passes a second interface.
ONCE = 0.1

# Seconds for which an end may be followed by segments that say nothing new: FINs that
# are sent again, answers to them.
LINGER = 10.0

# Connections, at most: their records take about a kilobyte each.
LIMIT = 200_000


class Table:
    """All of them.

    Args:
      ports: follow those of these servers only; empty for all. Of a connection whose
        beginning was not seen, the side with one of these is the server, or else that
        with the lower port.
      limit: how many can be followed at a time. Another one drives out the oldest.
    """

    def __init__(self, ports: Collection[int] = (), *, limit: int = LIMIT) -> None:
        self._ports = ports
        self._limit = limit
        # By the way of a segment: who sends it. None: its connection has just ended.
        self._halves: dict[bytes, Half | None] = {}
        self._followed: dict[bytes, Connection] = {}  # by the client's way, oldest first
        self._lingering: deque[tuple[float, tuple[bytes, bytes]]] = deque()
        self._timers: list[tuple[float, int, Connection]] = []
        self._numbers = count()
        self.open: Counter[int] = Counter()
        """Connections that have not ended, by the server's port."""
        self.ended: list[Connection] = []
        """Those that have. Whoever has done with them clears it."""

    def feed(self, now: float, segment: Segment) -> None:
        """A segment was captured at *now*, not earlier than those before it."""
        way, flags, sequence, acknowledgment, length, ttl = segment
        half = self._halves.get(way)
        if half is None and self._ports and not self._is_asked_for(way):
            return
        if flags & (SYN | RST) == SYN:
            half = self._begin(now, segment, half)
            sequence += 1
        elif half is None:
            half = self._meet(now, segment)
        if half is None:
            return
        connection = half.connection
        if flags & RST:
            self._reset(now, half, segment)
            return
        half.ttl = ttl
        fin = flags & FIN
        if half.advance(sequence, length + fin) and length:
            connection.last = half
        if fin and half.fin is None and half.next == (sequence + length + 1) % MODULUS:
            half.fin = now
            connection.first = connection.first or half
            if half.other.fin is not None:
                self._at(now + LINGER, connection)
        if flags & ACK:
            half.other.acknowledge(acknowledgment)
            if half is connection.client and not flags & SYN:
                connection.established = True
            if self._is_over(connection):
                self._end(connection, End.FIN, max(fins_of(connection)))

    def expire(self, now: float) -> None:
        """Nothing but what was fed has come up to *now*."""
        while self._lingering and self._lingering[0][0] <= now:
            for way in self._lingering.popleft()[1]:
                if way in self._halves and self._halves[way] is None:
                    del self._halves[way]
        while self._timers and self._timers[0][0] <= now:
            _, _, connection = heapq.heappop(self._timers)
            if connection.end is not None:
                continue
            fins = fins_of(connection)
            if len(fins) == 2:
                if max(fins) + LINGER <= now:
                    self._end(connection, End.FIN, max(fins))
            elif not connection.established:
                due = given_up(connection)
                if due <= now:
                    self._end(connection, End.UNANSWERED, connection.tried)
                else:
                    self._at(due, connection)

    def _is_asked_for(self, way: bytes) -> bool:
        return source_port(way) in self._ports or target_port(way) in self._ports

    def _begin(self, now: float, segment: Segment, half: Half | None) -> Half | None:
        """A SYN, or the answer to one. None: it says nothing new."""
        way, sequence = segment.way, segment.sequence
        if segment.flags & ACK:
            if half is None:
                if way in self._halves:
                    return None
                # The capture began, or lost something, between the two.
                half = self._open(now, reverse(way), way, from_start=True).server
                half.other.next = segment.acknowledgment
        elif half is None:
            half = self._open(now, way, reverse(way), from_start=True).client
        elif half.first_sequence != sequence and half.next is not None:
            self._end(half.connection, End.UNSEEN, now)
            half = self._open(now, way, reverse(way), from_start=True).client
        if half.next is None:
            half.first_sequence = sequence
            half.next = (sequence + 1) % MODULUS
        elif half.first_sequence != sequence:
            return None
        connection = half.connection
        if half is connection.client and (
            not connection.syns or now - connection.tried >= ONCE
        ):
            connection.syns += 1
        connection.tried = now
        return half

    def _meet(self, now: float, segment: Segment) -> Half | None:
        """A segment of a connection that is not followed, and perhaps should be."""
        way = segment.way
        # Those that only acknowledge come long after an end, too.
        if way in self._halves or not (segment.length or segment.flags & (FIN | RST)):
            return None
        back = reverse(way)
        here, there = source_port(way), target_port(way)
        if (here in self._ports) is not (there in self._ports):
            is_server = here in self._ports
        else:
            is_server = here < there
        client, server = (back, way) if is_server else (way, back)
        connection = self._open(now, client, server, from_start=False)
        return connection.server if is_server else connection.client

    def _open(
        self, now: float, client: bytes, server: bytes, *, from_start: bool
    ) -> Connection:
        if len(self._followed) >= self._limit:
            self._end(next(iter(self._followed.values())), End.UNSEEN, now)
        connection = Connection(client, server, now, from_start=from_start)
        self._halves[client] = connection.client
        self._halves[server] = connection.server
        self._followed[client] = connection
        self.open[target_port(client)] += 1
        if from_start:
            self._at(now + PATIENCE, connection)
        return connection

    def _reset(self, now: float, half: Half, segment: Segment) -> None:
        connection = half.connection
        if half.next is None and half.other.next is not None and connection.from_start:
            # The answer to a SYN has to acknowledge it (RFC 9293, 3.10.7.3), and perhaps
            # what data it had (RFC 7413).
            behind = (half.other.next - segment.acknowledgment) % MODULUS
            if segment.flags & ACK and behind <= half.other.reached:
                connection.first = connection.reset_by = half
                self._end(connection, End.REFUSED, now)
            return
        if half.next is not None:
            distance = (segment.sequence - half.next) % MODULUS
            if min(distance, MODULUS - distance) > WINDOW:
                return  # nobody will believe it
        if segment.flags & ACK:
            half.other.acknowledge(segment.acknowledgment)
        connection.first = connection.first or half
        connection.reset_by, connection.reset_ttl = half, segment.ttl
        if half.ttl is None:
            half.ttl = segment.ttl
        self._end(connection, End.RST, now)

    def _is_over(self, connection: Connection) -> bool:
        client, server = connection.client, connection.server
        return (
            client.fin is not None
            and server.fin is not None
            and client.acknowledged == client.reached
            and server.acknowledged == server.reached
        )

    def _end(self, connection: Connection, end: End, when: float) -> None:
        connection.end = end
        connection.ended = when
        client, server = connection.client, connection.server
        connection.unacknowledged = (client.unacknowledged, server.unacknowledged)
        del self._followed[client.way]
        self._halves[client.way] = self._halves[server.way] = None
        self._lingering.append((when + LINGER, (client.way, server.way)))
        port = target_port(client.way)
        self.open[port] -= 1
        if not self.open[port]:
            del self.open[port]
        self.ended.append(connection)

    def _at(self, when: float, connection: Connection) -> None:
        heapq.heappush(self._timers, (when, next(self._numbers), connection))


def fins_of(connection: Connection) -> list[float]:
    both = (connection.client.fin, connection.server.fin)
    return [fin for fin in both if fin is not None]


def given_up(connection: Connection) -> float:
    """When there should have been another SYN, if it was to come."""
    pause = connection.tried - connection.began
    return connection.tried + max(PATIENCE, 2 * pause)
