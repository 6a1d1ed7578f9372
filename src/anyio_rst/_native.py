"""Ending a TCP connection: the reset, the FIN, the drain and the close."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

from anyio import create_task_group, move_on_after
from anyio.lowlevel import checkpoint

from . import _sockets, _tcp_info
from ._forking import disown, own
from ._io import SocketIO
from ._origin import RECEIVE_SIZE
from ._peer import PeerClose
from ._waiting import close_copy, wait_for_room

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable, Iterator

    from anyio.abc import SocketStream

    from ._limits import Drain

# Bytes that the drain discards before it lets other tasks run.
DISCARDED_PER_TURN = 2**20

# And before it closes at a limit: what a receive buffer may hold, and not what a peer may
# send meanwhile (tcp_rmem of tcp(7)).
DISCARDED_AT_LAST = 2**23


class NativeStream(SocketIO):
    """A complete `anyio.abc.SocketStream` on *sock*, which it owns.

    An ending is :meth:`reset`, or :meth:`send_fin`, :meth:`drain` and :meth:`close` in
    this order. A :meth:`close` before the FIN is out is a reset.
    """

    __slots__ = (
        "_is_measured",
        "_last",
        "_undrained",
        "began",
        "discarded",
        "fin_has_left",
        "is_free",
        "unacknowledged",
    )

    mid_send: bool  # which the close_notify counts for as well
    session: None = None  # of TLS

    def __init__(
        self,
        sock: socket.socket,
        remote_address: tuple[str, int] | None,
        **taken_over: Any,
    ) -> None:
        super().__init__(sock, remote_address, **taken_over)
        own(sock)
        self.began: float = monotonic()
        self.discarded: int = 0
        self.is_free: bool = False  # detached: the next scope may have it
        self.unacknowledged: int | None = None
        self.fin_has_left: bool = False  # or is left to the kernel; known at the close
        self._is_measured = False
        self._undrained: Drain | None = None  # the limits of a drain, once it has begun
        self._last = b""  # of the session's words, what the socket has not taken

    def __del__(self) -> None:
        # Forgotten by everybody but the event loop. The socket is armed: closed, it
        # resets the connection.
        reader = getattr(self, "_reader", None)
        if reader is not None and self._sock.fileno() != -1:
            reader.forget(self._sock)

    def send_now(self, data: bytes) -> None:
        """Send what the socket takes of *data* at once, unless a send is half done."""
        if data and not (self._closed or self.mid_send or self.eof_sent):
            with suppress(OSError):
                self._sock.send(data, _sockets.DONTWAIT)

    def look(self) -> bool:
        """Whether a receive would not have to wait: for input, the peer's end, a loss."""
        if self._ahead or self.has_lost_peer():
            return True
        try:
            if not self._sock.recv(1, _sockets.DONTWAIT | _sockets.PEEK):
                self._input_ended()
        except BlockingIOError:
            return False
        except OSError as exc:
            self._fail(exc)  # it is told only once
        return True

    def has_lost_peer(self) -> bool:
        """Whether the end of the peer's side has been seen, or a loss."""
        return self._loss is not None or self.peer is not PeerClose.NONE

    def has_finished(self) -> bool:
        """Whether nothing more can be sent."""
        return self._closed or self.mid_send or self.fin_is_out()

    def is_stale(self) -> bool:
        """See :meth:`Connection.is_stale`."""
        return self.has_finished() or self.look()

    def arm(self) -> None:
        """Let every end but :meth:`send_fin` be an RST."""
        with suppress(OSError):  # a connection that is gone has no end any more
            _sockets.arm(self._sock)

    def keep_alive(self, seconds: float) -> None:
        """Notice a peer that is gone, see :func:`_sockets.keep_alive`."""
        with suppress(OSError):  # it is gone already
            _sockets.keep_alive(self._sock, seconds)

    def reset(self) -> None:
        """Send the RST and close. Synchronous, and good without an event loop."""
        if not self._is_measured:  # before the reset, which empties the queue
            self.fin_has_left = self.fin_is_out() and _tcp_info.fin_has_left(self._sock)
            self._measure(_tcp_info.queued(self._sock))
        is_reset = _sockets.reset(self._sock)
        self._close()
        if not is_reset:
            self._close_the_last()

    def both_finished(self) -> bool:
        """Whether it has ended by both FINs, and no reset can be sent any more."""
        if not (self._loss is None and self.fin_is_out()):
            return False
        if not _tcp_info.both_finished(self._sock):
            return False
        self.peer = PeerClose.FIN
        return True

    async def send_fin(self, last: bytes = b"") -> None:
        """Send *last* and the FIN behind what the users sent, who are refused now.

        It waits for nothing, and is not cut short by a cancellation. What the socket
        does not take at once is left to :meth:`drain`. When the FIN is out,
        :attr:`eof_sent` is true, and the socket disarmed; it never is if the connection
        was gone.
        """
        self.refuse_users()
        self._last = self._finish(last)

    def _finish(self, last: bytes) -> bytes:
        """Send *last* and the FIN as far as the socket takes them; return the rest."""
        flags = _sockets.DONTWAIT | _sockets.MSG_MORE
        try:
            while last:
                self.mid_send = True
                last = last[self._sock.send(last, flags) :]
        except BlockingIOError:
            return last
        except OSError as exc:
            self._lost(exc)
            return b""
        self.mid_send = False
        try:
            # Before the FIN: one that waits behind an answer would be lost with the
            # process.
            _sockets.disarm(self._sock)
            if not self.eof_sent:
                self._send_fin()
        except OSError as exc:
            self._lost(exc)
            self._ask_origin()
        return b""

    async def drain(self, limits: Drain) -> None:
        """Read and discard until the peer's FIN or a limit; complete :meth:`send_fin`.

        What is found goes to :attr:`discarded` and :attr:`peer`.
        """
        if self._sock.fileno() == -1:
            return
        self._undrained = limits
        while self._receiving:
            await checkpoint()  # a task that was woken is on its way out
        if limits.total is None:
            await self._read_to_end(limits)
        else:
            with move_on_after(limits.total):
                await self._read_to_end(limits)

    async def _read_to_end(self, limits: Drain) -> None:
        if self._last:
            await self._while_taken(limits, partial(self._send_last, limits))
            if self._last:
                return
        if self.peer is not PeerClose.NONE:
            return
        self._receiving = True
        try:
            # A peer that waits for our FIN answers within this turn.
            await checkpoint()
            if not self._discard(limits):
                reader = self._reader or self._new_reader()
                wait = partial(reader.wait, partial(self._discard, limits))
                await self._while_taken(limits, wait)
        finally:
            self._receiving = False

    async def _while_taken(
        self, limits: Drain, wait: Callable[[], Awaitable[None]]
    ) -> None:
        """*wait*, for as long as the peer goes on taking what was sent."""
        left = self._unacknowledged()
        while True:
            with move_on_after(limits.timeout) as patience:
                await wait()
            if not patience.cancelled_caught or not limits.timeout:
                return
            before, left = left, self._unacknowledged()
            if before is None or left is None or left >= before:
                return

    async def _send_last(self, limits: Drain) -> None:
        """Complete :meth:`send_fin`, and read all the while.

        A peer that is sending may read nothing before it is done.
        """
        await checkpoint()
        self._receiving = True
        try:
            async with create_task_group() as tg:
                reader = self._reader or self._new_reader()
                tg.start_soon(reader.wait, partial(self._discard, limits))
                while self._last:
                    await wait_for_room(self._sock)
                    self._last = self._finish(self._last)
                tg.cancel_scope.cancel()
        finally:
            self._receiving = False

    def _discard(self, limits: Drain, most: int = DISCARDED_PER_TURN) -> bool:
        """Discard what has arrived; True when there is nothing more to wait for."""
        while most > 0:
            size = RECEIVE_SIZE
            if limits.max_bytes is not None:
                size = min(size, limits.max_bytes - self.discarded)
                if size == 0:
                    return True
            data = self._read(size)
            if data is None:
                return False
            if not data:
                self._input_ended()
                return True
            self.discarded += len(data)
            most -= len(data)
        return False

    def close(self) -> None:
        """Close the socket behind the FIN, or with an RST; as it is, once released."""
        if not self.is_free and not self._is_measured:
            if not self.fin_is_out():
                self.reset()  # it may be disarmed
                return
            self.eof_sent = True
            if self._undrained is not None and self.peer is PeerClose.NONE:
                # Whatever cut the drain short: unread, what has arrived by now would
                # be answered by an RST, and the answer under way be lost.
                self._discard(self._undrained, DISCARDED_AT_LAST)
            # What is still queued for a peer that is there, the kernel goes on sending.
            queued = _tcp_info.queued(self._sock)
            self.fin_has_left = (
                queued == 0 or _tcp_info.fin_has_left(self._sock) or not self._is_lost()
            )
            self._measure(queued)
            with suppress(OSError):
                # Others may have changed it: with a time, closing would block.
                _sockets.disarm(self._sock)
        self._close()

    async def aclose(self) -> None:
        self.close()
        await checkpoint()

    def release(self) -> SocketStream:
        """Disarm, and return the stream that the next owner uses."""
        with suppress(OSError):
            _sockets.disarm(self._sock)
        if self._reader is not None:
            self._reader.pause()
        origin, self._origin = self._origin, None
        if origin is None or self._ahead:
            if origin is not None:
                origin.close()
            self.is_free = True
            for sock in self._own_sockets():
                disown(sock)
            return self
        self.refuse_users()
        self._close_copy()
        disown(self._sock)
        if not origin.shares_socket:
            self._sock.close()
        return origin.give_back()

    def take_again(self) -> None:
        """Take :meth:`release` back, which has returned this stream itself."""
        self.is_free = False
        self.began = monotonic()
        self.sent = self.received = 0
        for sock in self._own_sockets():
            own(sock)

    def _own_sockets(self) -> Iterator[socket.socket]:
        yield self._sock
        if self._copy is not None:
            yield self._copy

    def _close(self) -> None:
        self.refuse_users()
        self._close_copy()
        if self._origin is not None:
            self._origin.close()
        self._sock.close()

    def _close_the_last(self) -> None:
        """Close at once what an event loop would close a turn later.

        With the last descriptor the RST goes out.
        """
        last = [] if self._copy is None else [self._copy.fileno()]
        if self._origin is not None and self._origin.is_at_rest:
            last.append(self._origin.fileno())
        with suppress(OSError):  # for want of a descriptor: then a turn later
            if open_ones := [number for number in last if number != -1]:
                _sockets.vacate(open_ones)

    def _close_copy(self) -> None:
        if self._copy is not None and self._copy.fileno() != -1:
            close_copy(self._copy)

    def _is_lost(self) -> bool:
        if self._loss is None and (loss := _tcp_info.loss(self._sock)) is not None:
            self._lost(loss)
        return self._loss is not None

    def _measure(self, queued: int | None) -> None:
        self.unacknowledged = self._without_fin(queued)
        self._is_measured = True

    def _unacknowledged(self) -> int | None:
        return self._without_fin(_tcp_info.queued(self._sock))

    def _without_fin(self, queued: int | None) -> int | None:
        return queued - 1 if queued and self.eof_sent else queued
