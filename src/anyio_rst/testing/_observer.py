"""The peer: a plain TCP socket that says what arrived, and how it ended."""

from __future__ import annotations

import os
import socket
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from anyio import (
    CancelScope,
    ClosedResourceError,
    Lock,
    ResourceGuard,
    current_time,
    move_on_after,
    notify_closing,
    wait_readable,
    wait_writable,
)
from anyio.lowlevel import checkpoint

from anyio_rst import _sockets
from anyio_rst._io import bytes_in
from anyio_rst._origin import RECEIVE_SIZE
from anyio_rst._peer import PeerClose

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AbstractAsyncContextManager

# Seconds to wait for what is expected. Only a test that fails waits so long.
PATIENCE = 10.0

# Seconds for what is on its way on loopback, and has arrived already as a rule.
ARRIVAL = 1.0

# Bytes that a message shows.
SHOWN = 40


@dataclass(frozen=True)
class Seen:
    """What a :class:`Peer` read. Two are equal if their *data* and *close* are."""

    data: bytes
    """What came since the peer last read."""

    close: PeerClose
    """What ended it, a FIN or an RST; `NONE` if neither came in time."""

    elapsed: float = field(default=0.0, compare=False)
    """Seconds that the reading took."""


class Peer:
    """A plain non-blocking TCP socket, without this library's streams.

    It reads only when you tell it to. It raises the :exc:`OSError` of the socket, and
    :exc:`anyio.ClosedResourceError` once it is closed here, also in tasks that were
    waiting in it.

    Args:
      sock: a connected socket. It becomes non-blocking, and the peer owns it.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket: socket.socket = sock
        """The socket, for what this class does not do."""
        self._data = bytearray()
        self._seen: Seen | None = None
        self._was_reset = False
        self._stopped = False
        self._turn = Lock()
        self._reading: CancelScope | None = None
        self._sending = ResourceGuard("writing to")

    async def send(self, data: bytes) -> None:
        """Send all of *data*, any bytes-like object.

        Raises:
          OSError: the other side is gone: :exc:`ConnectionResetError` after its RST,
            :exc:`BrokenPipeError` after that.
          anyio.BusyResourceError: another task is sending.
          anyio.ClosedResourceError: the peer is closed.
        """
        await checkpoint()
        with self._sending:
            view = bytes_in(data)
            while view:
                self._refuse_if_closed()
                try:
                    view = view[self.socket.send(view) :]
                except BlockingIOError:
                    await wait_writable(self.socket)
                except ConnectionResetError:
                    # The kernel tells of it once, and then of an end like any other.
                    self._was_reset = True
                    raise

    def send_eof(self) -> None:
        """Send the FIN. The peer can still read."""
        self._refuse_if_closed()
        self.socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Send an RST, and close. Idempotent."""
        if self.socket.fileno() != -1:
            _sockets.arm(self.socket)
            self.close()

    def close(self) -> None:
        """Close as any program does. Idempotent.

        That sends a FIN, or an RST if there is unread input.
        """
        if self.socket.fileno() != -1:
            with suppress(RuntimeError):  # no event loop: nobody is waiting
                notify_closing(self.socket)
            self.socket.close()

    def stop_reading(self) -> None:
        """Interrupt a :meth:`read_to_end` that is under way, which returns `NONE`.

        Then data that is sent to the peer fills its buffer, and the receive window
        closes, after a few KB if the buffer is small. At the end of :func:`open_peer`
        such a peer reads only after the connection has closed, so the drain lasts until
        its limit.
        """
        self._stopped = True
        if self._reading is not None:
            self._reading.cancel()

    async def receive_exactly(self, size: int, *, timeout: float = PATIENCE) -> bytes:
        """Read *size* bytes.

        Raises:
          AssertionError: the end came first, or the bytes did not come within *timeout*
            seconds.
          OSError: the connection was lost other than by an RST.
          anyio.ClosedResourceError: the peer is closed.
        """
        close = await self._read(size, timeout)
        if len(self._data) < size:
            end = "no more in time" if close is PeerClose.NONE else close.value
            raise AssertionError(
                f"expected {size:,} bytes; got {end} after {described(self._data)}"
            )
        data = bytes(self._data[:size])
        del self._data[:size]
        return data

    async def read_to_end(self, *, timeout: float = PATIENCE) -> Seen:
        """Read until the other side's FIN or RST.

        After it has seen the end, it returns the same result again. While another task is
        reading, it waits for that task.

        Args:
          timeout: seconds after which the result is `PeerClose.NONE`.

        Raises:
          OSError: the connection was lost other than by an RST.
          anyio.ClosedResourceError: the peer was closed before it had seen the end.
        """
        start = current_time()
        close = await self._read(None, timeout)
        if self._seen is not None:
            return self._seen
        seen = Seen(bytes(self._data), close, current_time() - start)
        self._data.clear()
        if close is not PeerClose.NONE:
            self._seen = seen
        return seen

    async def _read(self, size: int | None, timeout: float) -> PeerClose:
        """Read until there are *size* bytes, or until the end; say what that is."""
        await checkpoint()
        with move_on_after(timeout) as scope:
            async with self._turn:
                self._reading = scope
                try:
                    while size is None or len(self._data) < size:
                        if self._seen is not None:
                            return self._seen.close
                        self._refuse_if_closed()
                        try:
                            close = self._receive(size)
                        except BlockingIOError:
                            with suppress(ClosedResourceError):  # told above, if so
                                await wait_readable(self.socket)
                        else:
                            if close is not None:
                                return close
                            await checkpoint()
                finally:
                    self._reading = None
        return PeerClose.NONE

    def _receive(self, size: int | None = None) -> PeerClose | None:
        """Read some of what has arrived; the end, if it is that."""
        most = RECEIVE_SIZE if size is None else size - len(self._data)
        try:
            data = self.socket.recv(most)
        except (ConnectionResetError, BrokenPipeError):
            # The kernel tells of it once, and then of an end like any other. EPIPE is
            # MPTCP's word for an RST behind a FIN.
            self._was_reset = True
            return PeerClose.RST
        except OSError:  # ENOTCONN: MPTCP that fell back has no such end
            if not self._was_reset:
                raise
            return PeerClose.RST
        if data:
            self._data += data
            return None
        return PeerClose.RST if self._was_reset else PeerClose.FIN

    async def _leave(self) -> None:
        """What a client does at the end: read it, and close."""
        if self.socket.fileno() != -1 and not self._stopped:
            with suppress(OSError, ClosedResourceError):
                await self.read_to_end()
            self.close()

    def _leave_now(self) -> None:
        """The same without a checkpoint, when the end is here or on its way."""
        if self.socket.fileno() == -1:
            return
        if self._seen is None:
            close = None
            self.socket.settimeout(ARRIVAL)
            with suppress(OSError):
                while close is None:
                    close = self._receive()
            self._seen = Seen(bytes(self._data), close or PeerClose.NONE)
        self.close()

    def _refuse_if_closed(self) -> None:
        if self.socket.fileno() == -1:
            raise ClosedResourceError


def connect_peer(
    port: int, *, host: str = "127.0.0.1", receive_buffer: int | None = None
) -> AbstractAsyncContextManager[Peer, None]:
    """Connect a :class:`Peer` to a server under test, and close it after the block.

    ::

        async with connect_peer(server.port) as peer:
            await peer.send(request)
            await assert_fin(peer, answer)

    Args:
      port, host: of the server; an IPv4 or IPv6 address.
      receive_buffer: SO_RCVBUF, in bytes, set before connecting; None for the kernel's
        choice. With a small buffer, the window closes soon if nothing is read.

    Raises:
      OSError: the connection could not be made.
    """

    @asynccontextmanager
    async def connected() -> AsyncIterator[Peer]:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as sock:
            if receive_buffer is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            peer = Peer(sock)
            # On asyncio, AnyIO forgets a waiter by its descriptor: that of a socket
            # closed just now, whose number this one has, has to be gone.
            await checkpoint()
            with suppress(BlockingIOError):
                sock.connect((host, port))
            await wait_writable(sock)
            error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                raise OSError(error, f"cannot connect: {os.strerror(error)}")
            try:
                yield peer
            finally:
                peer.close()

    # It never swallows an exception, which its type would leave open.
    return cast("AbstractAsyncContextManager[Peer, None]", connected())


def described(data: bytes | bytearray) -> str:
    """How many bytes, and the last of them, for a message."""
    if not data:
        return "0 bytes"
    count = "1 byte" if len(data) == 1 else f"{len(data):,} bytes"
    if len(data) <= SHOWN:
        return f"{count}, {bytes(data)!r}"
    return f"{count}, the last of them {bytes(data[-SHOWN:])!r}"
