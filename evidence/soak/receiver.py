"""Which segments of a connection a TCP obeys, by the rules of RFC 9293."""

from __future__ import annotations

FIN, SYN, RST = 0x01, 0x02, 0x04


class Receiver:
    """What one side's TCP has received, so that it is known which RSTs it obeys.

    RFC 5961, 3.2: only one that has exactly the expected sequence number; any other it
    answers with a challenge ACK. Linux obeys one at the end of the last block that it has
    reported by SACK, too (tcp_validate_incoming()).
    """

    __slots__ = ("expected", "later", "latest", "lost", "obeyed", "reached", "refused")

    def __init__(self) -> None:
        self.expected: int | None = None
        self.later: dict[int, int] = {}  # begin and end of what came too early
        self.reached = 0  # segments that can complete a handshake, before any RST
        self.latest = 0  # the number of the latest packet
        self.lost = self.refused = self.obeyed = 0  # RSTs

    def deliver(self, flags: int, seq: int, length: int) -> None:
        if flags & RST:
            if self.expected is None or seq in (self.expected, self._last()):
                self.obeyed += 1
            else:
                self.refused += 1
            return
        if flags & SYN:
            if self.expected is None:  # and not a copy that is late
                self.expected = (seq + 1) % 2**32
            return
        self.reached += not self.obeyed
        end = (seq + length + bool(flags & FIN)) % 2**32
        if self.expected is None or not _is_beyond(end, self.expected):
            return
        if end == seq:
            return  # SACK reports no ACK
        self.later[seq] = end
        while joined := [b for b in self.later if not _is_beyond(b, self.expected)]:
            for begin in joined:
                end = self.later.pop(begin)
                if _is_beyond(end, self.expected):
                    self.expected = end

    def _last(self) -> int | None:
        """The end of all that came too early."""
        expected = self.expected or 0
        ends = self.later.values()
        return max(ends, key=lambda end: (end - expected) % 2**32, default=None)


def _is_beyond(seq: int, other: int) -> bool:
    """Whether *seq* comes after *other*: RFC 9293, 3.4."""
    return 0 < (seq - other) % 2**32 < 2**31
