"""Connections under test, each joined to what is on its other side."""

from __future__ import annotations

import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, cast

from anyio import create_task_group
from anyio.lowlevel import checkpoint

from anyio_rst import _sockets
from anyio_rst._connection import Connection, conclude, conclude_failed
from anyio_rst._drain import DEFAULT_DRAIN, Drain, check_drain
from anyio_rst._ending import CloseKind
from anyio_rst._native import NativeStream

from ._observer import Peer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AbstractAsyncContextManager

    from ._faults import Faults

LOOPBACK = "127.0.0.1"

# The kernel raises it to the least that it allows (SO_RCVBUF, SO_SNDBUF: socket(7)).
SMALLEST_BUFFER = 1


def open_pair(
    *, drain: Drain | None = DEFAULT_DRAIN
) -> AbstractAsyncContextManager[tuple[Connection, Connection], None]:
    """Two connections, joined over TCP on loopback, each in a scope of its own.

    ::

        async with open_pair() as (client, server):
            await client.send(b"ping")
            assert await server.receive() == b"ping"

    When the block returns, both end with FIN, and drain at the same time. When an
    exception leaves it, both are reset, and it goes on unchanged.

    Args:
      drain: see :func:`~anyio_rst.connection_scope`.

    Raises:
      TypeError: *drain* is of the wrong type.
    """
    check_drain(drain)

    @asynccontextmanager
    async def opened() -> AsyncIterator[tuple[Connection, Connection]]:
        one, other = (_connection(sock, drain) for sock in _loopback())
        try:
            # On asyncio, AnyIO forgets a waiter by its descriptor: those of sockets
            # closed just now, whose numbers these have, have to be gone.
            await checkpoint()
            yield one, other
        except BaseException as exc:
            await conclude_failed(one, exc)
            await conclude_failed(other, exc)
            raise
        async with create_task_group() as tg:
            tg.start_soon(conclude, one, None)
            tg.start_soon(conclude, other, None)

    # It never swallows an exception, which its type would leave open.
    return cast(
        "AbstractAsyncContextManager[tuple[Connection, Connection], None]", opened()
    )


def open_peer(
    *,
    drain: Drain | None = DEFAULT_DRAIN,
    faults: Faults | None = None,
    small_buffers: bool = False,
) -> AbstractAsyncContextManager[tuple[Connection, Peer], None]:
    """A connection in a scope of its own, and a :class:`Peer` that judges it.

    ::

        with pytest.raises(ValueError):
            async with open_peer() as (conn, peer):
                await peer.send(b"garbage")
                await protocol(conn)
        await assert_rst(peer)

    The connection ends when the block does, the way it does. The peer then does what a
    client does, unless it has stopped reading or is closed: it reads to the end, and
    closes. What it has seen can be asked for after the block.

    Args:
      drain: see :func:`~anyio_rst.connection_scope`.
      faults: what shall go wrong.
      small_buffers: the smallest that the kernel allows, on both sides. As long as the
        peer does not read, its window closes, and a send waits, after about 5 KB on
        Linux.

    Raises:
      TypeError: *drain* is of the wrong type.
      RuntimeError: *faults* are those of another connection.
    """
    check_drain(drain)

    @asynccontextmanager
    async def opened() -> AsyncIterator[tuple[Connection, Peer]]:
        if faults is not None:
            faults.take()
        sock, peers = _loopback(small_buffers=small_buffers)
        peer = Peer(peers)
        if faults is not None:
            sock = faults.wrap(sock)
        connection = _connection(sock, drain)
        try:
            try:
                await checkpoint()  # as in open_pair()
                if faults is not None:
                    faults.start(peer)
                yield connection, peer
            except BaseException as exc:
                await conclude_failed(connection, exc)
                raise
            async with create_task_group() as tg:
                tg.start_soon(conclude, connection, None)
                if not _is_detached(connection):
                    await peer.leave()
        finally:
            if _is_detached(connection):
                peer.close()
            else:
                peer.leave_now()

    # It never swallows an exception, which its type would leave open.
    return cast("AbstractAsyncContextManager[tuple[Connection, Peer], None]", opened())


def _is_detached(connection: Connection) -> bool:
    ending = connection.ending
    return ending is not None and ending.kind is CloseKind.DETACHED


def _connection(sock: socket.socket, drain: Drain | None) -> Connection:
    """As `serve_tcp` makes them."""
    sock.setblocking(False)
    _sockets.prepare_accepted(sock)
    address = _sockets.host_and_port(sock.getpeername())
    return Connection(NativeStream(sock, address), finish_on=(), drain=drain)


def _loopback(*, small_buffers: bool = False) -> tuple[socket.socket, socket.socket]:
    """Both ends of a connection."""
    sock = socket.socket()
    try:
        with socket.create_server((LOOPBACK, 0)) as listener:
            if small_buffers:  # before connect(), which agrees on the window's scale
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALLEST_BUFFER)
            # A connection to a listening socket needs nobody to accept it.
            sock.connect(listener.getsockname())
            accepted, _ = listener.accept()
    except BaseException:
        sock.close()
        raise
    if small_buffers:
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALLEST_BUFFER)
    return accepted, sock
