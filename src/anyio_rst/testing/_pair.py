"""Connections under test, each joined to what is on its other side."""

from __future__ import annotations

import socket
from contextlib import asynccontextmanager, suppress
from ipaddress import ip_address
from typing import TYPE_CHECKING, cast

from anyio import create_task_group
from anyio.lowlevel import checkpoint

from anyio_rst import _sockets
from anyio_rst._body import body_raised, body_returned
from anyio_rst._connection import Connection
from anyio_rst._ending import Cause, CloseKind, cause_of_exit, check_finish_on
from anyio_rst._limits import DEFAULT_DRAIN, Drain, check_drain
from anyio_rst._native import NativeStream

from ._observer import Peer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AbstractAsyncContextManager

    from anyio_rst._ending import FinishOn

    from ._faults import Faults

LOOPBACK = "127.0.0.1"

# The kernel raises it to the least that it allows (SO_RCVBUF, SO_SNDBUF: socket(7)).
SMALLEST_BUFFER = 1


def open_pair(
    *,
    host: str = LOOPBACK,
    finish_on: FinishOn = (),
    drain: Drain | None = DEFAULT_DRAIN,
) -> AbstractAsyncContextManager[tuple[Connection, Connection], None]:
    """Two connections, joined over TCP on loopback, each in a scope of its own.

    ::

        async with open_pair() as (client, server):
            await client.send(b"ping")
            assert await server.receive() == b"ping"

    When the block returns, both end with FIN, and drain at the same time. When an
    exception leaves the block, both are reset, and the exception propagates unchanged.

    Args:
      host: a loopback address, IPv4 or IPv6 ("::1").
      finish_on, drain: see :func:`~anyio_rst.connection_scope`.

    Raises:
      TypeError: *finish_on* or *drain* is of the wrong type.
      ValueError: *host* is not a loopback address.
      OSError: on entry, this machine does not have that address.
    """
    _check_host(host)
    types = check_finish_on(finish_on)
    check_drain(drain)

    @asynccontextmanager
    async def opened() -> AsyncIterator[tuple[Connection, Connection]]:
        one, other = (_connection(sock, types, drain) for sock in _loopback(host))
        try:
            # On asyncio, AnyIO forgets a waiter by its descriptor: those of sockets
            # closed just now, whose numbers these have, have to be gone.
            await checkpoint()
            yield one, other
        except BaseException as exc:
            if cause_of_exit(exc, types) is Cause.FINISH_ON:
                async with create_task_group() as tg:
                    tg.start_soon(body_raised, one, exc)
                    tg.start_soon(body_raised, other, exc)
            else:
                await body_raised(one, exc)
                await body_raised(other, exc)
            raise
        async with create_task_group() as tg:
            tg.start_soon(body_returned, one, None)
            tg.start_soon(body_returned, other, None)

    # It never swallows an exception, which its type would leave open.
    return cast(
        "AbstractAsyncContextManager[tuple[Connection, Connection], None]", opened()
    )


def open_peer(
    *,
    host: str = LOOPBACK,
    finish_on: FinishOn = (),
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

    The connection ends as the block ends. Then the peer does what a client does, unless
    it has stopped reading or is closed: it reads to the end, and closes. Its results are
    available after the block.

    Args:
      host: a loopback address, IPv4 or IPv6 ("::1").
      finish_on, drain: see :func:`~anyio_rst.connection_scope`.
      faults: what is to go wrong.
      small_buffers: use the smallest buffers that the kernel allows, on both sides. While
        the peer does not read, its window closes, and a send waits, after about 5 KB on
        Linux.

    Raises:
      TypeError: *finish_on* or *drain* is of the wrong type.
      ValueError: *host* is not a loopback address.
      OSError: on entry, this machine does not have that address.
      RuntimeError: on entry, *faults* belong to another connection.
    """
    _check_host(host)
    types = check_finish_on(finish_on)
    check_drain(drain)

    @asynccontextmanager
    async def opened() -> AsyncIterator[tuple[Connection, Peer]]:
        if faults is not None:
            faults._take()
        sock, peers = _loopback(host, small_buffers=small_buffers)
        peer = Peer(peers)
        if faults is not None:
            sock = faults._wrap(sock)
        connection = _connection(sock, types, drain)
        try:
            try:
                await checkpoint()  # as in open_pair()
                if faults is not None:
                    faults._start(peer)
                yield connection, peer
            except BaseException as exc:
                if cause_of_exit(exc, types) is Cause.FINISH_ON:
                    async with create_task_group() as tg:
                        tg.start_soon(body_raised, connection, exc)
                        await _leave(peer, connection)
                else:
                    await body_raised(connection, exc)
                raise
            async with create_task_group() as tg:
                tg.start_soon(body_returned, connection, None)
                await _leave(peer, connection)
        finally:
            if _is_detached(connection):
                peer.close()
            else:
                peer._leave_now()

    # It never swallows an exception, which its type would leave open.
    return cast("AbstractAsyncContextManager[tuple[Connection, Peer], None]", opened())


async def _leave(peer: Peer, connection: Connection) -> None:
    if not _is_detached(connection):
        await peer._leave()


def _is_detached(connection: Connection) -> bool:
    ending = connection.ending
    return ending is not None and ending.kind is CloseKind.DETACHED


def _check_host(host: str) -> None:
    given: object = host  # ip_address() would take more than a string
    is_loopback = False
    if isinstance(given, str):
        with suppress(ValueError):
            is_loopback = ip_address(given).is_loopback
    if not is_loopback:
        raise ValueError(
            f"host must be a loopback address such as 127.0.0.1 or ::1, not {host!r}"
        )


def _connection(
    sock: socket.socket,
    finish_on: tuple[type[BaseException], ...],
    drain: Drain | None,
) -> Connection:
    """As `serve_tcp` makes them."""
    sock.setblocking(False)
    _sockets.prepare_accepted(sock)
    address = _sockets.host_and_port(sock.getpeername())
    return Connection(NativeStream(sock, address), finish_on=finish_on, drain=drain)


def _loopback(
    host: str, *, small_buffers: bool = False
) -> tuple[socket.socket, socket.socket]:
    """Both ends of a connection."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family)
    try:
        with socket.create_server((host, 0), family=family) as listener:
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
