"""One direction of a connection through the proxy, slowed down and cut."""

from __future__ import annotations

import enum
import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from anyio import (
    BrokenResourceError,
    CancelScope,
    EndOfStream,
    Event,
    current_time,
    sleep,
)

from anyio_rst import _tcp_info
from anyio_rst._peer import PeerClose, PeerReset

from ._close_notify import CloseNotify

if TYPE_CHECKING:
    from collections.abc import Callable

    from anyio_rst._connection import Connection

Direction = Literal["up", "down"]
Kind = Literal["fin", "rst", "silence"]

# Bytes that are read ahead of what is sent: with a delay, as many as are under way on a
# long line that is fast.
AHEAD = 2**16
AHEAD_OF_A_DELAY = 2**24

# Seconds of a limited rate that are sent in one piece.
PIECE = 0.05

# Seconds after which a record that looks like a close_notify is taken for one, if nothing
# follows it: some servers wait for the answer.
QUIET = 0.5

# Seconds without progress after which a reset does not wait for its sink any more, and
# between two looks at that: no event tells of an acknowledgement.
PATIENCE = 1.0
SHORTEST, LONGEST = 0.001, 0.05

NOW, NEVER = -math.inf, math.inf


@dataclass(frozen=True)
class Pace:
    """How what is passed on is slowed down: see :meth:`Proxy.slow`."""

    delay: float = 0.0
    rate: int | None = None
    chunk: int | None = None


@dataclass(frozen=True)
class Cut:
    """What is to be done, and where: see :meth:`Proxy.cut`."""

    direction: Direction
    after: int | None  # None: in front of the close_notify
    kind: Kind
    every: int


class Stop(enum.Enum):
    """Why a lane passes on nothing more."""

    PASSED = enum.auto()  # the FIN of the source
    BROKEN = enum.auto()  # the source was lost
    CUT = enum.auto()  # this is the byte


class Lane:
    """From *source* to *sink*: one task reads, and one writes.

    Args:
      pace: says what holds at the moment.
      saw: called with the end of the source, when it has been read.
    """

    def __init__(
        self,
        source: Connection,
        sink: Connection,
        pace: Callable[[], Pace],
        saw: Callable[[PeerClose], object],
    ) -> None:
        self.source = source
        self.sink = sink
        self._native = sink._life.native
        self._pace = pace
        self._saw = saw
        self._cut_at = math.inf  # bytes passed
        self._keeps_close_notify = False
        self._records = CloseNotify()
        self._muted = False
        # What has been read, each with the time to pass it on.
        self._queue: deque[tuple[float, memoryview | PeerClose]] = deque()
        self._queued = 0
        self._came = -math.inf
        self._free_at = -math.inf  # for the rate
        self._changed = Event()
        self._step = CancelScope()

    @property
    def passed(self) -> int:
        """Bytes that the kernel has taken for the sink."""
        return self._native.sent

    def plan(self, cut: Cut | None) -> None:
        """Cut there and nowhere else, the bytes counted from now on."""
        self._cut_at = math.inf
        self._keeps_close_notify = cut is not None and cut.after is None
        if cut is not None and cut.after is not None:
            self._cut_at = self.passed + cut.after
        self.look_again()

    def mute(self) -> None:
        """Pass on nothing more, not even the end; but go on reading."""
        self._muted = True
        self._queue.clear()
        self._queued = 0
        self.look_again()

    def look_again(self) -> None:
        """Something has changed that the next step depends on."""
        self._step.cancel()
        self._changed.set()

    # The reader.

    async def read(self) -> None:
        end = None
        while end is None:
            try:
                data = await self.source.receive()
            except EndOfStream:
                end = PeerClose.FIN
            except PeerReset:
                end = PeerClose.RST
            except BrokenResourceError:
                end = PeerClose.LOST
            else:
                self._records.feed(data)
                self._put(memoryview(data))
            while self._queued >= self._most_ahead():
                await self._change()
        self._saw(end)
        self._put(end)

    def _put(self, item: memoryview | PeerClose) -> None:
        if self._muted:
            return
        self._came = current_time()
        self._queue.append((self._came + self._pace().delay, item))
        if not isinstance(item, PeerClose):
            self._queued += len(item)
        self._changed.set()

    def _most_ahead(self) -> int:
        return AHEAD_OF_A_DELAY if self._pace().delay else AHEAD

    async def _change(self) -> None:
        if self._changed.is_set():
            self._changed = Event()
        await self._changed.wait()

    # The writer.

    async def write(self) -> Stop:
        """Pass on what has been read.

        Raises:
          anyio.BrokenResourceError: the sink is lost.
        """
        while True:
            when, what = self._next()
            waits = when > current_time()
            if isinstance(what, Stop) and not waits:
                if what is Stop.PASSED:
                    await self.sink.send_eof()
                return what
            # Whatever changes meanwhile, plan() for example, ends the step.
            with CancelScope(deadline=when if waits else math.inf) as self._step:
                if waits:
                    await self._change()
                else:
                    assert isinstance(what, memoryview)
                    await self._send(what)

    def _next(self) -> tuple[float, memoryview | Stop | None]:
        """When something is to be done, and what: send some bytes, or stop."""
        room = self._cut_at - self.passed
        if room <= 0:
            return NOW, Stop.CUT
        if not self._queue:  # as when muted
            return NEVER, None
        due, item = self._queue[0]
        if isinstance(item, PeerClose):
            return due, Stop.PASSED if item is PeerClose.FIN else Stop.BROKEN
        if self._keeps_close_notify:
            room = self._records.limit - self.passed
            if room <= 0:
                ended = isinstance(self._queue[-1][1], PeerClose)
                if self._records.is_there:
                    return NOW if ended else self._came + QUIET, Stop.CUT
                if not ended:
                    return NEVER, None
                room = math.inf  # half a record is none
        pace = self._pace()
        size = min(room, pace.chunk or math.inf, len(item))
        if pace.rate is not None:
            size = min(size, max(1, int(pace.rate * PIECE)))
        return max(due, self._free_at), item[: int(size)]

    async def _send(self, piece: memoryview) -> None:
        before = self.passed
        try:
            await self.sink.send(bytes(piece))
        finally:
            self._native.mid_send = False  # the rest follows, or is what we cut off
            self._sent(self.passed - before)

    def _sent(self, size: int) -> None:
        if self._muted:
            return
        due, item = self._queue[0]
        assert isinstance(item, memoryview)
        if size == len(item):
            self._queue.popleft()
        else:
            self._queue[0] = due, item[size:]
        self._queued -= size
        self._changed.set()
        rate = self._pace().rate
        if rate is not None:
            self._free_at = max(self._free_at, current_time()) + size / rate

    async def delivered(self) -> None:
        """Until the sink's TCP has what was passed on, or takes nothing more."""
        left = _tcp_info.queued(self._native._sock)
        progress = current_time()
        pause = SHORTEST
        while left and current_time() < progress + PATIENCE:
            await sleep(pause)
            pause = min(2 * pause, LONGEST)
            before, left = left, _tcp_info.queued(self._native._sock)
            if left is None or left < before:
                progress = current_time()
