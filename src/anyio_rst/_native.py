"""A byte stream straight on a non-blocking TCP socket.

One implementation for asyncio, uvloop and Trio, on AnyIO's public `wait_readable`,
`wait_writable` and `notify_closing`. It knows to the byte what the kernel took.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from anyio import (
    BusyResourceError,
    ClosedResourceError,
    create_task_group,
    move_on_after,
    notify_closing,
    wait_readable,
    wait_writable,
)
from anyio.lowlevel import (
    cancel_shielded_checkpoint,
    checkpoint,
    checkpoint_if_cancelled,
)

from . import _sockets
from ._peer import PeerClose
from ._stream import RECEIVE_SIZE, EndableStream

if TYPE_CHECKING:
    import socket

    from ._drain import Drain

# A receive gives what is under way one turn of the loop to arrive, since waiting for the
# socket costs several. After 1, 2, 3 ... in a row that did so in vain, 0, 1, 3 ... others
# wait at once before the next one tries: 15 at the most.
MOST_MISSES = 5

# Bytes that the drain discards before it lets other tasks run.
DISCARDED_PER_TURN = 2**20


class NativeStream(EndableStream):
    """A complete `anyio.abc.SocketStream` on the non-blocking *sock*, which it owns."""

    __slots__ = ("_last", "_misses", "_sock", "_waits")

    def __init__(
        self, sock: socket.socket, remote_address: tuple[str, int] | None
    ) -> None:
        super().__init__(remote_address)
        self._sock = sock
        self._misses = 0  # receives in a row that found nothing after one turn
        self._waits = 0  # receives to come that wait at once
        self._last = b""

    @property
    def _raw_socket(self) -> socket.socket:
        return self._sock

    async def receive(self, max_bytes: int = RECEIVE_SIZE) -> bytes:
        if max_bytes < 1 or self._closed or self._receiving:
            await self._refuse_to_receive(max_bytes)
        self._receiving = True
        try:
            data = None
            if self._waits:
                self._waits -= 1
                await checkpoint_if_cancelled()  # uvloop may see the input first
                self._refuse_if_closed()
            else:
                await checkpoint()
                self._refuse_if_closed()
                data = self._read(max_bytes)
                self._learn(hit=data is not None)
            while data is None:
                await wait_readable(self._sock)
                self._refuse_if_closed()
                data = self._read(max_bytes)
        except ClosedResourceError:
            await checkpoint_if_cancelled()  # which may be why it was closed
            raise
        finally:
            self._receiving = False
        if not data:
            self._raise_end()
        return data

    def _learn(self, *, hit: bool) -> None:
        """Of a receive that gave the input one turn to arrive: in vain, or not."""
        if hit:
            self._misses = 0
        else:
            self._misses = min(self._misses + 1, MOST_MISSES)
            self._waits = 2 ** (self._misses - 1) - 1

    async def send(self, item: bytes) -> None:
        if self._sending:
            raise BusyResourceError("writing to")
        self._sending = True
        try:
            if self._closed or self.eof_sent or self.mid_send or self._loss is not None:
                await checkpoint()
                self._refuse_to_send()
            view = memoryview(item).cast("B")
            # A peer that we wait for has its answer before the checkpoint, not after.
            at_once = self._misses > 0
            if at_once:
                await checkpoint_if_cancelled()
            else:
                await checkpoint()
            self._refuse_if_closed()
            while view := self._write(view):
                await wait_writable(self._sock)
                self._refuse_if_closed()
            if at_once:
                await cancel_shielded_checkpoint()
        except ClosedResourceError:
            await checkpoint_if_cancelled()  # which may be why it was closed
            raise
        finally:
            self._sending = False

    def _write(self, view: memoryview) -> memoryview:
        """Send what the kernel takes, and return the rest."""
        try:
            rest = view[self._sock.send(view) :]
        except BlockingIOError:
            return view
        except OSError as exc:
            raise self._lost(exc) from exc
        self.mid_send = bool(rest)
        return rest

    async def _send_eof(self) -> None:
        loss = _sockets.send_fin(self._sock)
        if loss is not None:
            raise self._lost(loss) from loss
        self.eof_sent = True

    async def aclose(self) -> None:
        self.close()
        await checkpoint()

    def arm(self) -> None:
        _sockets.arm(self._sock)

    def reset(self) -> None:
        self._measure(self._sock)
        _sockets.reset(self._sock)
        self._close()

    async def send_fin(self, last: bytes = b"") -> None:
        self._closed = True
        self._wake()
        self._last = self._finish(self._sock, last)

    async def drain(self, limits: Drain) -> None:
        if self._sock.fileno() == -1:
            return
        while self._receiving:
            # On asyncio, AnyIO forgets a waiter by its descriptor. One that was woken
            # has to be gone before the drain waits for the same descriptor.
            await checkpoint()
        if self._last:
            with move_on_after(limits.timeout):
                await self._send_last(limits)
            if self._last:
                return
        if self.peer is not PeerClose.NONE:
            return
        self._receiving = True
        done = False
        try:
            # A peer that waits for our FIN answers within this turn. And the same again
            # for the waiter of another socket that was closed just now, if this one has
            # got its number.
            await checkpoint()
            if done := self._discard(limits):
                return
            with move_on_after(limits.timeout):
                while not (done := self._discard(limits)):
                    await wait_readable(self._sock)
        finally:
            self._receiving = False
            if not done and self._sock.fileno() != -1:
                # Cut short, it leaves nothing unread that has arrived by now.
                self._discard(limits, _sockets.unread(self._sock))

    async def _send_last(self, limits: Drain) -> None:
        """Complete :meth:`send_fin`, and read all the while.

        A peer that is sending may read nothing before it is done.
        """

        async def read() -> None:
            while not self._discard(limits):
                await wait_readable(self._sock)

        await checkpoint()
        self._receiving = True
        try:
            async with create_task_group() as tg:
                tg.start_soon(read)
                while self._last:
                    await wait_writable(self._sock)
                    self._last = self._finish(self._sock, self._last)
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
                if self._loss is None:
                    self.peer = PeerClose.FIN
                return True
            self.discarded += len(data)
            most -= len(data)
        return False

    def _read(self, max_bytes: int) -> bytes | None:
        """What has arrived; nothing at the end or after a loss; None if not yet."""
        try:
            return self._sock.recv(max_bytes)
        except BlockingIOError:
            return None
        except OSError as exc:
            self._lost(exc)
            return b""

    def close(self) -> None:
        if self._sock.fileno() != -1:
            self._measure(self._sock)
            self._close()

    def release(self) -> NativeStream:
        _sockets.disarm(self._sock)
        return self

    def _close(self) -> None:
        self._closed = True
        self._wake()
        self._sock.close()

    def _wake(self) -> None:
        if self.busy and self._sock.fileno() != -1:
            with suppress(RuntimeError):  # no event loop: nobody is waiting
                notify_closing(self._sock)
