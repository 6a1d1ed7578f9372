"""`serve_tcp`: a server whose connections end truthfully."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from anyio import TASK_STATUS_IGNORED, create_task_group, fail_after

from ._ending import check_finish_on
from ._failures import HandshakeFailed
from ._limits import (
    DEFAULT_DRAIN,
    Drain,
    check_drain,
    check_keepalive,
    check_number,
    check_seconds,
)
from ._listening import DEFAULT_BACKLOG, check_reuse_port, check_sockets, listen
from ._peer import ConnectionLost, PeerReset
from ._scope import check_handler, check_on_ending
from ._server import Server
from ._takeover import is_trio
from ._tls import check_tls

if TYPE_CHECKING:
    import socket
    import ssl
    from collections.abc import Awaitable, Callable, Sequence
    from contextlib import AbstractAsyncContextManager
    from ipaddress import IPv4Address, IPv6Address

    import trio
    from anyio.abc import TaskGroup, TaskStatus

    from ._connection import Connection
    from ._ending import FinishOn

__all__ = ["serve_tcp"]

# Seconds. A client that takes longer is not going to.
DEFAULT_HANDSHAKE_TIMEOUT = 30.0


async def serve_tcp(
    handler: Callable[[Connection], Awaitable[object]],
    port: int = 0,
    *,
    host: str | IPv4Address | IPv6Address | None = None,
    backlog: int = DEFAULT_BACKLOG,
    reuse_port: bool = False,
    sockets: Sequence[socket.socket] | None = None,
    max_connections: int | None = None,
    finish_on: FinishOn = (),
    drain: Drain | None = DEFAULT_DRAIN,
    keepalive: float | None = None,
    propagate_errors: bool = False,
    task_group: TaskGroup | trio.Nursery | None = None,
    on_ending: Callable[[Connection], object] | None = None,
    preamble: Callable[[Connection], Awaitable[object]] | None = None,
    ssl_context: ssl.SSLContext | None = None,
    tls_standard_compatible: bool = True,
    handshake_timeout: float = DEFAULT_HANDSHAKE_TIMEOUT,
    task_status: TaskStatus[Server] = TASK_STATUS_IGNORED,
) -> None:
    """Accept TCP connections, and run `handler(connection)` in a task for each.

    ::

        async def handler(conn: Connection) -> None:
            async for chunk in conn:
                await conn.send(chunk)

        await serve_tcp(handler, 8000)

    To do something else while it serves, start it in a task group:
    `server = await tg.start(serve_tcp, handler, 8000)`.

    If a handler returns, its peer gets FIN, and if it fails RST, by the rules of
    :func:`connection_scope`. `serve_tcp` serves until it is cancelled, which resets
    every open connection at once. After :meth:`Server.stop` it returns when the last
    handler is done.

    Args:
      handler: async function of one :class:`Connection`.
      port: 0 to 65535; 0 lets the kernel choose, see :attr:`Server.port`.
      host: address or name of the interface; None for IPv4 and IPv6 on all interfaces.
        Addresses, dual stack and port are those of :func:`anyio.create_tcp_listener`.
      backlog: how many connections may wait to be accepted (listen(2)). If it is full,
        clients that only read may hang for ever.
      reuse_port: let other processes serve the same port, each on a socket of its own
        (SO_REUSEPORT of socket(7)). All of the processes have to set it.
      sockets: listening sockets, of TCP or MPTCP, to serve on instead of *host*, *port*,
        *backlog* and *reuse_port*, for example from systemd or a parent process.
        `serve_tcp` owns them once it has accepted its arguments, and closes them. They
        become non-blocking, for all processes that share them, and stay so. Nothing
        else about them changes.
      max_connections: how many may be open at once, including those that drain; None
        for no limit. At the limit the server accepts nothing, and the backlog holds
        further connections, in order.
      finish_on: exceptions that are a clean end: the peer gets FIN, and nothing is
        logged above DEBUG.
      drain: the limits of a clean end.
      keepalive: seconds, from 1 to 32767, after about which the handler gets
        :exc:`ConnectionLost` (from ETIMEDOUT) if the peer's machine or the path to it is
        gone, whether the connection is idle or waits for an acknowledgment (tcp(7);
        RFC 9293, 3.8.4; RFC 5482). On Linux, a peer that takes nothing for so long
        counts as gone, too, so choose more than the longest pause of an honest reader.
        None leaves this to the system, which may wait for ever.
      propagate_errors: let exceptions of handlers out, as Trio's `serve_tcp` does,
        instead of logging them.
      task_group: the task group or Trio nursery to run handlers in, instead of one of
        the server's own. Then cancelling that group resets the connections, and
        cancelling `serve_tcp` only stops accepting.
      ssl_context: start TLS, as :meth:`Connection.start_tls` does, before the handler is
        called. If a handshake fails, its connection gets RST, and the failure is logged
        at INFO, never propagated.
      tls_standard_compatible: False for protocols that delimit their messages
        themselves; see :meth:`Connection.start_tls`.
      handshake_timeout: seconds for the *preamble* and the handshake together.
      preamble: async function that is called with each :class:`Connection` before the
        handshake, for data in the clear, such as the header of a proxy or a banner. It
        may set :attr:`Connection.remote_address`, and may end the connection. If it
        fails, that is treated like a failed handshake. :attr:`Ending.sent` and
        :attr:`~Ending.received` count from its return on.
      on_ending: called with each :class:`Connection` once it has ended.
      task_status: for `tg.start()`; gets the :class:`Server`.

    Error handling:
      If a handler raises an exception, its connection gets RST. The exception is logged
      on the `anyio_rst` logger at ERROR with its traceback, or at INFO without one if it
      says that the connection was lost. An exception of *on_ending* is logged at ERROR.
      When *on_ending* has returned, the tracebacks of a logged exception are removed.

      :exc:`KeyboardInterrupt`, :exc:`SystemExit` and other exceptions that are no
      :exc:`Exception` get out. If there are no descriptors or no memory to accept a
      connection with, that is logged at ERROR, and tried again after 100 ms.

      The page "Server behaviour" of the documentation lists all log records, and says
      what happens when a handler misbehaves.

    Raises:
      TypeError, ValueError: an argument is of the wrong type or out of range, or cannot
        be combined with *sockets*. Nothing was bound, and *sockets* are untouched.
      OSError: the address is in use or not available. Nothing stays bound.
    """
    check_handler(handler, "serve_tcp()")
    check_number("port", port, 0, 65535)
    check_number("backlog", backlog, 1, None)
    finish_on = check_finish_on(finish_on)
    check_drain(drain)
    check_keepalive(keepalive)
    timeout = check_seconds("handshake_timeout", handshake_timeout)
    if not timeout:
        raise ValueError(f"handshake_timeout must be > 0, not {handshake_timeout!r}")
    if ssl_context is not None:
        check_tls(ssl_context, True, None)
    if preamble is not None:
        check_handler(preamble, "preamble")
    if max_connections is not None:
        check_number("max_connections", max_connections, 1, None)
    check_reuse_port(reuse_port)
    if task_group is not None and not hasattr(task_group, "start_soon"):
        raise TypeError(f"task_group must be a task group or nursery, not {task_group!r}")
    check_on_ending(on_ending)

    if sockets is None:
        listening = await listen(host, port, backlog, reuse_port)
    else:
        if host is not None or backlog != DEFAULT_BACKLOG or reuse_port:
            raise ValueError(
                "host, backlog and reuse_port cannot be combined with sockets, which are "
                "already bound and listening"
            )
        listening = check_sockets(sockets, port)
    server = Server(
        listening,
        handler
        if ssl_context is None and preamble is None
        else _after_handshake(
            handler, preamble, ssl_context, tls_standard_compatible, timeout
        ),
        are_own=sockets is None,
        finish_on=finish_on,
        drain=drain,
        keepalive=keepalive,
        max_connections=max_connections,
        propagate_errors=propagate_errors,
        on_ending=on_ending,
    )
    if task_group is not None:
        await server._serve(task_group, task_status)
        return
    async with _open_group() as tasks:
        try:
            await server._serve(tasks, task_status)
        except BaseException:
            server._reset_all()
            raise


def _open_group() -> AbstractAsyncContextManager[TaskGroup | trio.Nursery]:
    """A place for the handlers: on Trio a nursery, in which a task costs half."""
    if is_trio():
        nursery: AbstractAsyncContextManager[trio.Nursery]
        nursery = sys.modules["trio"].open_nursery(strict_exception_groups=True)
        return nursery
    return create_task_group()


def _after_handshake(
    handler: Callable[[Connection], Awaitable[object]],
    preamble: Callable[[Connection], Awaitable[object]] | None,
    ssl_context: ssl.SSLContext | None,
    standard_compatible: bool,
    timeout: float,
) -> Callable[[Connection], Awaitable[object]]:
    """*handler* after *preamble* and a TLS handshake, in the connection's own task."""

    async def prepared(connection: Connection) -> object:
        missing = "TLS handshake" if preamble is None else "preamble"
        try:
            with fail_after(timeout):
                if preamble is not None:
                    await _run(preamble, connection)
                if ssl_context is not None and not connection._is_over():
                    missing = "TLS handshake"
                    await _start_tls(connection, ssl_context, standard_compatible)
        except TimeoutError as exc:
            raise HandshakeFailed(f"no {missing} within {timeout} s") from exc
        return None if connection._is_over() else await handler(connection)

    return prepared


async def _run(
    preamble: Callable[[Connection], Awaitable[object]], connection: Connection
) -> None:
    try:
        await preamble(connection)
    except Exception as exc:
        raise HandshakeFailed(f"the preamble failed ({exc!r})") from exc
    connection._forget_counts()


async def _start_tls(
    connection: Connection, ssl_context: ssl.SSLContext, standard_compatible: bool
) -> None:
    try:
        await connection.start_tls(
            ssl_context, server_side=True, standard_compatible=standard_compatible
        )
    except Exception as exc:
        message = f"the TLS handshake failed ({exc})"
        if isinstance(exc, ConnectionLost) and not isinstance(exc, PeerReset):
            message = str(exc)  # the peer has closed
        raise HandshakeFailed(message) from exc
