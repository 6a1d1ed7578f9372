"""What each connection is to do: all that its two sides have to agree on."""

from __future__ import annotations

import enum
import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from .shares import Share

# Seconds. The server's limits, short enough for those that run into them on purpose.
DRAIN_TIMEOUT = 1.0
REQUEST_TIMEOUT = 3.0
WORK_TIMEOUT = 60.0
CUT_AFTER = 0.05  # an aclose() whose cancellation is planned
SIP_EVERY = 0.3  # for readers that are slow, and go on
VANISHED_TIMEOUT = 1.5  # for the work of a peer that is going to disappear
LOST_TIMEOUT = 3.0  # for that of one whose RST may be lost

KIB = 1024
SMALL = KIB
# More than a send buffer and the peer's receive buffer can hold: tcp_wmem and tcp_rmem.
ENDLESS = 12 * 2**20
# A sipping peer takes several times the drain's limit, and all fits into a send buffer.
SIP = 8 * KIB
SIPPED = 8, 12  # sips, on loopback


class Way(enum.Enum):
    """How a connection comes to its handler. The server has a port for each."""

    NATIVE = "`serve_tcp`"
    NATIVE_TLS = "`serve_tcp`, TLS"
    SCOPED = "`scoped`"  # around AnyIO's stream, as the next three
    SCOPE = "`connection_scope`"
    START_TLS = "`connection_scope`, `start_tls`"
    TLS_STREAM = "`connection_scope`, `TLSStream`"
    TRIO = "`connection_scope`, `trio.SocketStream`"
    TRIO_TLS = "`connection_scope`, `trio.SSLStream`"

    @property
    def is_scope(self) -> bool:
        return self not in NATIVE_WAYS

    @property
    def is_tls(self) -> bool:
        return self in TLS_WAYS

    @property
    def handshake_is_before_scope(self) -> bool:
        return self is Way.TLS_STREAM

    @property
    def may_read_ahead(self) -> bool:
        """Whether another's stream may have read, uncounted, what the handler has not."""
        return self in (Way.SCOPED, Way.SCOPE)


NATIVE_WAYS = (Way.NATIVE, Way.NATIVE_TLS)
TLS_WAYS = (Way.NATIVE_TLS, Way.START_TLS, Way.TLS_STREAM, Way.TRIO_TLS)
TRIO_WAYS = (Way.TRIO, Way.TRIO_TLS)


class Work(enum.IntEnum):
    """What the handler is asked to do once it has the request."""

    ANSWER = enum.auto()  # send the answer, and return
    PIECES = enum.auto()  # the same, in pieces and with pauses
    CLOSE = enum.auto()  # send the answer, aclose(), and raise
    FINISH_ON = enum.auto()  # send the answer, and raise what is a clean end
    GROUP = enum.auto()  # send the answer in a task group, and stop its other child
    SHIELDED = enum.auto()  # send the answer, and aclose() under a shield, cancelled
    CUT = enum.auto()  # send the answer, and aclose(), cancelled while it drains
    CUT_BY_OTHER = enum.auto()  # the same, by the aclose() of another that is cancelled
    EOF = enum.auto()  # send the answer, send_eof(), read to the end, and return
    READ_ALL = enum.auto()  # read to the end, send the answer, and return
    RAISE = enum.auto()  # send half of the answer, and raise
    READ_ALL_RAISE = enum.auto()  # read to the end, send half, and raise
    CANCEL = enum.auto()  # send half, and be cancelled by a timeout
    GIVE_UP = enum.auto()  # the same, and aclose() on the way out
    FORCEFULLY = enum.auto()  # send half, and anyio.aclose_forcefully()
    GROUP_FAIL = enum.auto()  # send half, and have a child fail
    ABORT = enum.auto()  # send half, and abort()
    TORN = enum.auto()  # return after a send() that was cancelled in the middle
    EOF_RAISE = enum.auto()  # send the answer, send_eof(), and raise
    WAIT = enum.auto()  # read on
    HOLD = enum.auto()  # send half, and wait for the end of the process


class Manner(enum.Enum):
    """How a peer of one kind goes about it; most kinds have only one."""

    PLAIN = "plain"
    LATE = "reads when the drain is over"
    STOPPING = "stops uploading at the FIN"
    ENDLESS = "uploads until it is cut off"
    BEFORE_REQUEST = "before the request"
    IN_REQUEST = "in the middle of the request"
    WAITING = "while the server waits for more"
    IN_ANSWER = "in the middle of the answer"
    AFTER_END = "after the FIN"


GOOD = (
    *[Work.ANSWER] * 4,
    Work.PIECES,
    Work.CLOSE,
    Work.FINISH_ON,
    Work.GROUP,
    Work.SHIELDED,
    Work.EOF,
)
SLOW = (
    (Manner.PLAIN, Work.ANSWER),
    (Manner.PLAIN, Work.ANSWER),
    (Manner.LATE, Work.ANSWER),
    (Manner.LATE, Work.CUT),
    (Manner.LATE, Work.CUT_BY_OTHER),
)
SIPPING = (Work.ANSWER, Work.CLOSE, Work.FINISH_ON, Work.SHIELDED)
# The last needs an answer larger than what the lossy link should carry.
FAILING = (
    Work.RAISE,
    Work.CANCEL,
    Work.GIVE_UP,
    Work.FORCEFULLY,
    Work.GROUP_FAIL,
    Work.ABORT,
    Work.EOF_RAISE,
    Work.TORN,
)
FLOODING = (*[Work.ANSWER] * 3, Work.CLOSE, Work.RAISE)
FLOODING_MANNERS = (*[Manner.PLAIN] * 10, *[Manner.STOPPING] * 9, Manner.ENDLESS)
HALF_CLOSING = (*[Work.READ_ALL] * 3, Work.READ_ALL_RAISE)
RESETTING = (
    Manner.BEFORE_REQUEST,
    Manner.IN_REQUEST,
    Manner.WAITING,
    Manner.IN_ANSWER,
    Manner.AFTER_END,
)
# TLS has no half-close here: AnyIO's `TLSStream` and Trio's refuse it.
NOT_IN_TLS = (Work.EOF, Work.EOF_RAISE)
VANISHING = (Manner.BEFORE_REQUEST, Manner.WAITING, Manner.IN_ANSWER, Manner.AFTER_END)


@dataclass(frozen=True)
class Plan:
    number: int
    """The id of the connection."""
    kind: str
    work: Work
    manner: Manner
    size: int
    """Bytes of the whole answer."""
    upload: int
    """Bytes that the peer sends behind its request."""
    lossy: bool
    way: Way

    @property
    def shakes_hands(self) -> bool:
        """Over TLS: whether the peer gets as far as the handshake.

        Some do not that go away before the request. Where the handshake comes before the
        scope, there would be no scope then.
        """
        return (
            self.manner is not Manner.BEFORE_REQUEST
            or self.way.handshake_is_before_scope
            or self.number % 2 == 0
        )

    @property
    def says_goodbye(self) -> bool:
        """Over TLS: whether the peer answers a close_notify with its own."""
        return self.number % 2 == 0

    @property
    def has_old_tls(self) -> bool:
        """Whether the peer has TLS 1.2, and not 1.3."""
        return self.number % 5 == 0

    @property
    def timeout(self) -> float:
        if self.kind == "vanishing":
            return VANISHED_TIMEOUT
        if self.kind == "resetting" and self.lossy:
            return LOST_TIMEOUT
        return WORK_TIMEOUT


def plans(
    first: int, count: int, seed: int, share: Share, ways: Mapping[Way, int]
) -> Iterator[Plan]:
    """Those of *count* connections, numbered from *first* on.

    *ways* are those of the *share* that there are.
    """
    lossy = share.lossy
    rng = random.Random(f"{seed} {first} {lossy}")
    # Apart from the others, so that all loops have the same plans but for the ways.
    of_ways = random.Random(f"{seed} {first} ways")
    chosen_ways = of_ways.choices(tuple(ways), tuple(ways.values()), k=count)
    kinds, weights = tuple(share.kinds), tuple(share.kinds.values())
    chosen = rng.choices(kinds, weights, k=count)
    for number, (kind, way) in enumerate(zip(chosen, chosen_ways, strict=True), first):
        if lossy and kind == "vanishing":
            way = Way.NATIVE  # the link tells the request from a handshake by its place
        plan = _plan(number, kind, way, rng, lossy=lossy)
        if share.small and plan.manner is not Manner.IN_ANSWER:
            small = min(plan.size, SMALL), min(plan.upload, SMALL)
            plan = replace(plan, size=small[0], upload=small[1])
        if way.is_tls and plan.work in NOT_IN_TLS:
            instead = Work.RAISE if plan.work is Work.EOF_RAISE else Work.ANSWER
            plan = replace(plan, work=instead)
        yield plan


def _plan(number: int, kind: str, way: Way, rng: random.Random, *, lossy: bool) -> Plan:
    work, manner, upload = Work.ANSWER, Manner.PLAIN, 0
    # Most answers are small, a few fill the buffers.
    most = rng.choice((1, 4, 16, 32 if lossy else 128)) * KIB
    size = rng.randint(2, most)
    if kind == "good":
        work = rng.choice(GOOD)
    elif kind == "failing":
        work = rng.choice(FAILING[:-1] if lossy else FAILING)
        size = ENDLESS if work is Work.TORN else size
    elif kind == "slow":
        manner, work = rng.choice(SLOW)
        size = rng.randint(16, 32 if lossy else 64) * KIB
    elif kind == "sipping":
        work = rng.choice(SIPPING)
        size = SIP if lossy else rng.randint(*SIPPED) * SIP
    elif kind == "holding":
        work = Work.HOLD
    elif kind == "flooding":
        work = rng.choice(FLOODING)
        manner = rng.choice(FLOODING_MANNERS)
        upload = rng.randint(1, 16 if lossy else 128) * KIB
    elif kind == "half-closing":
        work = rng.choice(HALF_CLOSING)
        upload = rng.randint(0, 8 if lossy else 64) * KIB
    else:
        manner = rng.choice(RESETTING if kind == "resetting" else VANISHING)
        if manner is Manner.WAITING:
            work = Work.WAIT
        elif manner is Manner.IN_ANSWER:
            size = 32 * KIB if lossy else ENDLESS
    return Plan(number, kind, work, manner, size, upload, lossy, way)
