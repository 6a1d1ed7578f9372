"""A connection of asyncio's streams from start to end: who may end it, and how.

The transport has the I/O. A second descriptor of its socket, in a `NativeStream`, is what
keeps the connection, and what ends it.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from anyio import move_on_after
from outcome import Error, Value

from . import _sockets, _tcp_info, lowlevel
from ._asyncio_between import Between, Writer
from ._ending import (
    KIND_OF,
    Cause,
    CloseKind,
    Ending,
    TLSSession,
    cause_of_exit,
    exception_leaving,
)
from ._lifecycle import Lifecycle
from ._limits import DEFAULT_DRAIN, Drain
from ._native import NativeStream
from ._origin import why_not_resettable
from ._peer import PeerClose
from ._waiting import is_writable, wait_for_room

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

logger = logging.getLogger("anyio_rst")

# Turns of the loop in which a transport that has something to send, and room for it,
# does send it: uvloop collects for one, and a TLS session has a transport below it.
TURNS_TO_SEND = 3
TURNS_TO_SEND_UNSEEN = 10


class Course:
    """From the scope's entry to the :class:`Ending`."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        finish_on: tuple[type[BaseException], ...],
        drain: Drain | None,
        keepalive: float | None,
        on_ending: Callable[[Ending], object] | None,
        closed_outside: Cause,
    ) -> None:
        reason = why_not_resettable()
        if reason is not None:
            raise RuntimeError(reason)
        if writer.is_closing():
            raise ConnectionError("the connection is lost or closed")
        lowlevel.arm(writer)
        sock = _sockets.duplicate(writer.get_extra_info("socket"))
        if keepalive is not None:
            _sockets.keep_alive(sock, keepalive)
        self._finish_on = finish_on
        self._drain = drain
        self._on_ending = on_ending
        self._closed_outside = closed_outside
        self._between = Between(self, writer)
        native = NativeStream(
            sock, _sockets.remote_address(sock), origin=cast("Any", self._between)
        )
        self._native = native
        self._life = Lifecycle(native)
        self._finishing: asyncio.Task[None] | None = None
        self.at_entry: BaseException | None = None
        self._tls: TLSSession | None = None
        self._has_closed_tls = False
        self._own = Writer(self, reader, writer, self._between)
        self.is_closing: bool = False
        """`writer.close()` or `writer.transport.abort()` was called."""
        self.reader = reader
        self.writer: asyncio.StreamWriter = self._own
        self.ending: Ending | None = None

    def close(self) -> None:
        """`writer.close()`."""
        if self.is_closing or self._life.cause is not None:
            return
        self.is_closing = True
        if exception_leaving(None, self.at_entry) is None:
            finish = self._finish(Cause.CLOSED, None)
            self._finishing = asyncio.get_running_loop().create_task(finish)

    async def wait_closed(self) -> None:
        """`writer.wait_closed()`."""
        if self._finishing is not None:
            await asyncio.wait({self._finishing})

    def abort(self) -> None:
        """`writer.transport.abort()`."""
        self.is_closing = True
        self._reset(Cause.ABORTED, None)

    def lost(self) -> None:
        """The transport has closed, and it was not us."""
        between = self._between
        # Before Python 3.11 nobody is told of a close_notify.
        has_ended = between.has_ended or sys.version_info < (3, 11)
        by_peer = between.loss() is not None or (has_ended and self._is_tls())
        if not by_peer and self._closed_outside is Cause.ABORTED:
            self._reset(Cause.ABORTED, None)

    async def end(self, exc: BaseException | None) -> None:
        """The body has been left by *exc*."""
        outcome = Value(None) if exc is None else Error(exc)
        cause = cause_of_exit(exc, self._finish_on)
        if self._finishing is not None:
            await self._wait_for(self._finishing, cut_short=cause is Cause.CANCELLED)
            # A task that is cancelled before its first step does nothing.
            await self._send_fin(Cause.CLOSED, None, None)
        elif KIND_OF[cause] is CloseKind.RST:
            self._reset(cause, outcome)
        else:
            await self._finish(cause, outcome)

    async def _wait_for(self, task: asyncio.Task[None], *, cut_short: bool) -> None:
        if cut_short:
            task.cancel()
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait({task})
            await self._send_fin(Cause.CLOSED, None, None)
            raise

    def _reset(self, cause: Cause, outcome: Value[object] | Error | None) -> None:
        if self._life.ending is None:
            self._note()
            self._native._ask_origin()
            self._between.is_reset = True
            self._life.reset(cause, outcome)
            self._has_ended()

    async def _finish(self, cause: Cause, outcome: Value[object] | Error | None) -> None:
        if self._life.cause is not None:
            return
        try:
            await self._flush(_limits_of_sending(self._drain or DEFAULT_DRAIN))
        except BaseException:  # a cancellation only cuts the waiting short
            await self._send_fin(cause, outcome, None)
            raise
        await self._send_fin(cause, outcome, self._drain)

    async def _send_fin(
        self, cause: Cause, outcome: Value[object] | Error | None, drain: Drain | None
    ) -> None:
        if self._life.cause is not None:
            return
        if not self._is_flushed() or self._own.has_dropped:
            self._reset(Cause.TORN_SEND, outcome)
            return
        self._note()
        self._between.close()
        try:
            await self._life.finish(cause, outcome, drain)
        finally:
            self._has_ended()

    async def _flush(self, limits: Drain) -> None:
        """Let the transport send what it has, and read and discard all the while."""
        between = self._between
        if not self._is_tls() and not between.waiting():
            return
        between.discard(self._native, limits)
        with move_on_after(limits.total):
            await self._while_taken(limits, between.sent_all)
            if self._is_tls() and not between.waiting():
                await self._while_taken(limits, self._close_tls)

    async def _close_tls(self) -> None:
        await self._until_sent()
        self._between.close_tls()
        await self._until_sent()
        self._has_closed_tls = True

    async def _until_sent(self) -> None:
        """Until the transport below the TLS session, which shows nothing, has sent all.

        That is so if it had room in each of a few turns, and gave the kernel nothing in
        them. Where the kernel cannot tell that, the first has to do, in more of them.
        """
        sock = self._native._sock
        while True:
            before = _tcp_info.given(sock)
            await wait_for_room(sock)
            had_room = True
            for _ in range(TURNS_TO_SEND if before else TURNS_TO_SEND_UNSEEN):
                await asyncio.sleep(0)
                had_room = had_room and is_writable(sock)
            if had_room and before == _tcp_info.given(sock):
                return

    async def _while_taken(
        self, limits: Drain, wait: Callable[[], Awaitable[object]]
    ) -> None:
        """*wait*, for as long as the peer goes on taking what was sent."""
        left = self._left()
        while True:
            with move_on_after(limits.timeout) as patience:
                await wait()
            before, left = left, self._left()
            if not patience.cancelled_caught or left >= before:
                return

    def _left(self) -> int:
        return self._between.waiting() + (self._native._unacknowledged() or 0)

    def _is_flushed(self) -> bool:
        """Whether the kernel has all that was written, or there is nobody to have it."""
        between = self._between
        if between.lost.is_set():
            return True
        return not between.waiting() and (self._has_closed_tls or not self._is_tls())

    def _is_tls(self) -> bool:
        return self._between.transport.get_extra_info("ssl_object") is not None

    def _note(self) -> None:
        """What the transport knows, before it is closed."""
        native, between = self._native, self._between
        native.sent = max(0, self._own.written - between.waiting())
        native.received = between.received
        native.mid_send = native.mid_send or self._own.has_dropped
        tls = between.transport.get_extra_info("ssl_object")
        if tls is not None and tls.version() is not None:
            self._tls = TLSSession(tls.version(), tls.cipher()[0])
        elif between.has_ended and native.peer is PeerClose.NONE:
            native.peer = PeerClose.FIN

    def _has_ended(self) -> None:
        ending = self._life.ending
        if self.ending is not None or ending is None:
            return
        self.ending = replace(ending, tls=self._tls)
        if self._on_ending is not None:
            try:
                self._on_ending(self.ending)
            except Exception:
                logger.exception("on_ending failed: %r", self.ending)


def _limits_of_sending(drain: Drain) -> Drain:
    """Where there is no time to drain, there is some to send."""
    timeout = drain.timeout or DEFAULT_DRAIN.timeout
    return replace(drain, timeout=timeout, total=drain.total or None)
