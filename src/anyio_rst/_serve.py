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

    or, to go on while it serves, `server = await tg.start(serve_tcp, handler, 8000)`.

    The return of a handler is FIN, its failure RST, by the rules of
    :func:`connection_scope`. It serves until it is cancelled, which resets every open
    connection at once, or until :meth:`Server.stop`, after which it returns when the
    last handler is done.

    Args:
      handler: async function of one :class:`Connection`.
      port: 0 to 65535; 0 lets the kernel choose, see :attr:`Server.port`.
      host: address or name of the interface; None serves IPv4 and IPv6 on all of them.
        Addresses, dual stack and port are those of :func:`anyio.create_tcp_listener`.
      backlog: connections that may wait to be accepted (listen(2)). Of clients that come
        when it is full, those that only read may hang for good.
      reuse_port: let other processes serve the same port, each on a socket of its own
        (SO_REUSEPORT of socket(7)). All of them have to ask for it.
      sockets: listening sockets, of TCP or MPTCP, to serve on instead of *host*, *port*,
        *backlog* and *reuse_port*: those of systemd's socket activation, or of a parent
        process. They belong to `serve_tcp` from the moment it has accepted its
        arguments, and it closes them. They become non-blocking, for all processes that
        share them, and stay so; nothing else of them is changed.
      max_connections: how many may be open at once, drains included; None for no limit.
        At the limit nothing is accepted, and the backlog holds the rest, in order.
      finish_on: exceptions that are a clean end: the peer gets FIN, and nothing is
        logged above DEBUG.
      drain: the limits of a clean end.
      keepalive: seconds, from 1 to 32767, after about which it is noticed that the
        machine of a peer is gone, or the way to it: as a :exc:`ConnectionLost` from
        ETIMEDOUT, whether the connection is idle or something on it is not acknowledged
        (tcp(7); RFC 9293, 3.8.4; RFC 5482). On Linux a peer that is there, and for so
        long takes nothing of what waits for it, counts as gone, too: choose more than
        the longest pause of an honest reader. None leaves all that to the system, which
        may wait for ever.
      propagate_errors: let exceptions of handlers out, as Trio's `serve_tcp` does,
        instead of logging them.
      task_group: the task group or Trio nursery that handlers run in, instead of one of
        the server's own. Then it is this group's cancellation that resets them, and
        cancelling `serve_tcp` only stops accepting.
      ssl_context: speak TLS, as by :meth:`Connection.start_tls`, before the handler is
        called. A handshake that fails costs its own connection an RST and one record at
        INFO; it is never propagated.
      tls_standard_compatible: False for protocols that delimit themselves; see
        :meth:`Connection.start_tls`.
      handshake_timeout: seconds for the *preamble* and the handshake.
      preamble: async function that is called with each :class:`Connection` before the
        handshake, for what comes in the clear: the header of a proxy, a banner. It may
        set :attr:`Connection.remote_address`, and may end the connection, which is no
        failure. If it fails, that is as a handshake that fails. :attr:`Ending.sent` and
        :attr:`~Ending.received` count from its return on.
      on_ending: called with each :class:`Connection` once it has ended.
      task_status: for `tg.start()`; gets the :class:`Server`.

    Error handling:
      An exception of a handler costs its own connection an RST, and is logged on the
      `anyio_rst` logger at ERROR with its traceback; if it tells that a connection was
      lost (:exc:`PeerReset`, or an :exc:`anyio.BrokenResourceError` of another loss), at
      INFO without, once a second at the most. What was ordered, and a peer that leaves
      without a word, is DEBUG. An exception of *on_ending* is logged at ERROR.

      When *on_ending* has returned, the tracebacks of an exception that is not let out
      are cut off: they refer to the handler's variables, and those to the connection,
      which would then have to wait for the garbage collector.

      :exc:`KeyboardInterrupt`, :exc:`SystemExit` and other exceptions that are no
      :exc:`Exception` get out. When there are no descriptors or is no memory to accept
      a connection with, that is logged at ERROR, and tried again after 100 ms.

      A handler that does not await holds up everything else in its thread; those who
      connect wait in the backlog. One that swallows a cancellation of the server keeps
      `serve_tcp` from returning, but not its connection from being reset; only if it
      returns at once, it has returned: FIN. A task that a handler has left behind gets
      :exc:`anyio.ClosedResourceError` from the connection; if it was in the middle of a
      send, the connection is reset.

    Raises:
      TypeError, ValueError: an argument is of the wrong type or out of range, or does
        not go with *sockets*. Nothing was bound, and *sockets* are untouched.
      OSError: the address is in use or cannot be had. Nothing stays bound.
    """
    check_handler(handler, "serve_tcp()")
    check_number("port", port, 0, 65535)
    check_number("backlog", backlog, 1, None)
    finish_on = check_finish_on(finish_on)
    check_drain(drain)
    check_keepalive(keepalive)
    timeout = check_seconds("handshake_timeout", handshake_timeout)
    if not timeout:
        raise ValueError("handshake_timeout must be > 0: no handshake takes no time")
    if ssl_context is not None:
        check_tls(ssl_context, True, None)
    if preamble is not None:
        check_handler(preamble, "preamble")
    if max_connections is not None:
        check_number("max_connections", max_connections, 1, None)
    check_reuse_port(reuse_port)
    if task_group is not None and not hasattr(task_group, "start_soon"):
        raise TypeError(f"task_group has no start_soon(): {task_group!r}")
    check_on_ending(on_ending)

    if sockets is None:
        listening = await listen(host, port, backlog, reuse_port)
    else:
        if host is not None or backlog != DEFAULT_BACKLOG or reuse_port:
            raise ValueError(
                "sockets are bound and listening already: host, backlog and reuse_port "
                "do not go with them"
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
