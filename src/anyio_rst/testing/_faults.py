"""Faults of a connection, at the byte that a test chooses."""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING

from ._observer import ARRIVAL

if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed import ReadableBuffer

    from ._observer import Peer


class Faults:
    """Faults of one connection of :func:`open_peer`.

    ::

        faults = Faults()
        async with open_peer(faults=faults) as (conn, peer):
            faults.reset_after(1000)
            await protocol(conn)

    The methods may be called before the block and in it. Bytes and sends count from the
    call on.
    """

    def __init__(self) -> None:
        self._short_sends = 0
        self._short_size = 0
        self._until_reset: int | None = None
        self._taken = False
        self._sock: socket.socket | None = None
        self._peer: Peer | None = None

    def shorten_sends(self, count: int, size: int) -> None:
        """Let each of the next *count* send() calls take *size* bytes at most.

        These are system calls. One :meth:`~anyio_rst.Connection.send` makes as many as it
        needs.

        Raises:
          ValueError: *count* is negative, or *size* less than 1.
        """
        if count < 0 or size < 1:
            raise ValueError(f"cannot shorten {count} sends to {size} bytes")
        self._short_sends = count
        self._short_size = size

    def reset_after(self, size: int) -> None:
        """Let the peer reset when *size* more bytes have been sent; 0 is now.

        The RST arrives before the next system call of the connection. Then the peer is
        closed.

        Raises:
          ValueError: *size* is negative.
        """
        if size < 0:
            raise ValueError(f"cannot reset after {size} bytes")
        self._until_reset = size
        self._reset_if_due()

    def _take(self) -> None:
        """They are for one connection.

        Raises:
          RuntimeError: they are those of another one.
        """
        if self._taken:
            raise RuntimeError("these Faults belong to another connection: make new ones")
        self._taken = True

    def _wrap(self, sock: socket.socket) -> socket.socket:
        """*sock*, with these faults."""
        self._sock = _FaultySocket(sock, self._send)
        return self._sock

    def _start(self, peer: Peer) -> None:
        """*peer* is the one that resets, at once if that is due."""
        self._peer = peer
        self._reset_if_due()

    def _send(self, send: Callable[[memoryview], int], view: memoryview) -> int:
        most = len(view)
        if self._short_sends:
            most = min(most, self._short_size)
        if self._until_reset is not None:
            most = min(most, self._until_reset)
        taken = send(view[:most])
        if self._short_sends:
            self._short_sends -= 1
        if self._until_reset is not None:
            self._until_reset -= taken
            self._reset_if_due()
        return taken

    def _reset_if_due(self) -> None:
        if self._until_reset != 0 or self._peer is None or self._sock is None:
            return
        self._until_reset = None
        self._peer.reset()
        deadline = time.monotonic() + ARRIVAL
        while time.monotonic() < deadline:
            try:
                self._sock.getpeername()
            except OSError:  # it has arrived
                return


class _FaultySocket(socket.socket):
    """The connection of *sock*, whose place it takes."""

    def __init__(
        self,
        sock: socket.socket,
        send: Callable[[Callable[[memoryview], int], memoryview], int],
    ) -> None:
        super().__init__(sock.family, sock.type, sock.proto, fileno=sock.detach())
        self.setblocking(False)
        self._send = send

    def send(self, data: ReadableBuffer, flags: int = 0, /) -> int:
        def send(view: memoryview) -> int:
            return super(_FaultySocket, self).send(view, flags)

        return self._send(send, memoryview(data).cast("B"))
