"""`serve_tcp`: a server whose connections end truthfully."""

from __future__ import annotations

import errno
import inspect
import logging
import math
import os
import socket
import ssl
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from anyio import (
    TASK_STATUS_IGNORED,
    CancelScope,
    Event,
    Lock,
    create_task_group,
    create_tcp_listener,
    current_effective_deadline,
    fail_after,
    get_cancelled_exc_class,
    sleep,
    wait_readable,
)
from anyio.abc import SocketAttribute

from . import _sockets
from ._connection import Connection, conclude, conclude_failed, cut_short
from ._drain import DEFAULT_DRAIN, Drain, check_drain, check_seconds
from ._ending import Cause, CloseKind, all_leaves, check_finish_on
from ._foreign import trio_class
from ._native import NativeStream
from ._peer import ConnectionLost
from ._scope import check_handler
from ._tls import check_tls

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence
    from contextlib import AbstractAsyncContextManager
    from ipaddress import IPv4Address, IPv6Address

    import trio
    from anyio.abc import TaskGroup, TaskStatus

    from ._ending import FinishOn

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

__all__ = ["Server", "ServerStatistics", "serve_tcp"]

K = TypeVar("K")

logger = logging.getLogger("anyio_rst")

# How long to leave the backlog alone when there is no descriptor or memory for another
# connection. Trio's number.
CAPACITY_RETRY = 0.1

# Connections accepted before the tasks that are there already get a turn.
ACCEPTS_PER_TURN = 64

# As AnyIO; the kernel cuts it to what it allows (net.core.somaxconn, listen(2)).
DEFAULT_BACKLOG = 65536

# Seconds. A client that takes longer is not going to.
DEFAULT_HANDSHAKE_TIMEOUT = 30.0


@dataclass(frozen=True)
class ServerStatistics:
    """What a :class:`Server` has done up to one moment.

    *accepted_connections* is the sum of *open_connections* and of either mapping.
    """

    open_connections: int
    """Connections whose handlers are running or whose drains are under way."""

    accepted_connections: int
    """Connections accepted since the start."""

    endings_by_kind: Mapping[CloseKind, int]
    """Connections that have ended, by :attr:`Ending.kind`; every kind is in it."""

    endings_by_cause: Mapping[Cause, int]
    """Connections that have ended, by :attr:`Ending.cause`; every cause is in it."""


class _Totals(Mapping[K, int]):
    """Read-only. Unlike a mapping proxy, it can be copied, and pickled for a parent."""

    __slots__ = ("_totals",)

    def __init__(self, totals: dict[K, int]) -> None:
        self._totals = totals

    def __getitem__(self, key: K) -> int:
        return self._totals[key]

    def __iter__(self) -> Iterator[K]:
        return iter(self._totals)

    def __len__(self) -> int:
        return len(self._totals)

    def __repr__(self) -> str:
        return repr(self._totals)


class HandshakeFailed(Exception):
    """The outcome of a connection whose handler was never called."""


class Server:
    """A running :func:`serve_tcp`."""

    def __init__(
        self,
        sockets: list[socket.socket],
        handler: Callable[[Connection], Awaitable[object]],
        *,
        finish_on: tuple[type[BaseException], ...],
        drain: Drain | None,
        max_connections: int | None,
        propagate_errors: bool,
        on_ending: Callable[[Connection], object] | None,
    ) -> None:
        self.addresses: tuple[tuple[str, int], ...] = tuple(
            _sockets.host_and_port(sock.getsockname()) for sock in sockets
        )
        """(host, port) of each listening socket."""
        self.port: int = self.addresses[0][1]
        """The port of the first of :attr:`addresses`, and usually of all."""
        self._sockets = sockets
        self._handler = handler
        self._finish_on = finish_on
        self._drain = drain
        self._max_connections = (
            sys.maxsize if max_connections is None else max_connections
        )
        self._propagate_errors = propagate_errors
        self._on_ending = on_ending
        self._open: set[Connection] = set()
        self._accepted = 0
        self._endings: Counter[tuple[CloseKind, Cause]] = Counter()
        self._accepting = CancelScope()
        # Listening sockets whose backlog has been empty: what they accept now inherits.
        # Who connected before they were prepared has to be armed by itself.
        self._emptied: set[socket.socket] = set()
        # Where room or descriptors are short, the listening sockets take turns, and one
        # of them at a time says so in the log.
        self._turn = Lock(fast_acquire=True)
        self._next_end: Event | None = None

    @property
    def connections(self) -> frozenset[Connection]:
        """The connections whose handlers are running or whose drains are under way."""
        return frozenset(self._open)

    def statistics(self) -> ServerStatistics:
        """The totals up to now. They stay readable when the server is over."""
        by_kind = dict.fromkeys(CloseKind, 0)
        by_cause = dict.fromkeys(Cause, 0)
        for (kind, cause), total in self._endings.items():
            by_kind[kind] += total
            by_cause[cause] += total
        return ServerStatistics(
            open_connections=len(self._open),
            accepted_connections=self._accepted,
            endings_by_kind=_Totals(by_kind),
            endings_by_cause=_Totals(by_cause),
        )

    def stop(self) -> None:
        """Stop accepting. `serve_tcp` returns when the last handler is done.

        Connections still in the backlog are reset by the kernel, unless another process
        has the listening socket too. Idempotent.
        """
        self._accepting.cancel()

    async def _serve(
        self,
        tasks: TaskGroup | trio.Nursery,
        task_status: TaskStatus[Server],
    ) -> None:
        """Accept until stopped, then wait for the handlers."""
        try:
            with self._accepting:
                async with create_task_group() as listeners:
                    for sock in self._sockets:
                        listeners.start_soon(self._accept, sock, tasks)
                    task_status.started(self)
        finally:
            self._stop_listening()
        while self._open:
            await self._wait_for_an_end()

    async def _wait_for_an_end(self) -> None:
        if self._next_end is None:
            self._next_end = Event()
        await self._next_end.wait()

    def _stop_listening(self) -> None:
        for sock in self._sockets:
            sock.close()

    def _cut_short(self) -> None:
        for connection in self.connections:
            cut_short(connection)

    async def _accept(
        self, listener: socket.socket, tasks: TaskGroup | trio.Nursery
    ) -> None:
        while True:
            await wait_readable(listener)
            async with self._turn:
                while (room := self._max_connections - len(self._open)) <= 0:
                    await self._wait_for_an_end()
                await self._accept_up_to(min(room, ACCEPTS_PER_TURN), listener, tasks)

    async def _accept_up_to(
        self, most: int, listener: socket.socket, tasks: TaskGroup | trio.Nursery
    ) -> None:
        inherits = listener in self._emptied
        for _ in range(most):
            try:
                sock, address = listener.accept()
            except BlockingIOError:
                if _sockets.ACCEPTED_SOCKETS_INHERIT:
                    self._emptied.add(listener)
                return
            except OSError as exc:
                if exc.errno in _sockets.CAPACITY_ERRNOS:
                    logger.error(
                        "accept: %s (%s); trying again in %s s",
                        errno.errorcode[exc.errno],
                        os.strerror(exc.errno),
                        CAPACITY_RETRY,
                    )
                    await sleep(CAPACITY_RETRY)
                    return
                if exc.errno in _sockets.LOST_CLIENT_ERRNOS:
                    continue
                raise
            if not inherits:
                _sockets.prepare_accepted(sock)
            self._start(sock, _sockets.host_and_port(address), tasks)

    def _start(
        self,
        sock: socket.socket,
        address: tuple[str, int],
        tasks: TaskGroup | trio.Nursery,
    ) -> None:
        sock.setblocking(False)
        connection = Connection(
            NativeStream(sock, address), finish_on=self._finish_on, drain=self._drain
        )
        self._open.add(connection)
        self._accepted += 1
        try:
            tasks.start_soon(self._handle, connection)
        except BaseException:  # a task group that is over
            connection.abort()
            self._ended(connection)
            raise

    async def _handle(self, connection: Connection) -> None:
        try:
            # As in run(), which would be one more coroutine for each connection.
            try:
                result = await self._handler(connection)
            except BaseException as exc:
                await conclude_failed(connection, exc)
                raise
            await conclude(connection, result)
        except BaseException as exc:
            remaining = self._settle(connection, exc)
            if remaining is exc:
                raise
            if remaining is not None:
                raise remaining from None
        finally:
            self._ended(connection)
            self._report(connection)

    def _ended(self, connection: Connection) -> None:
        self._open.discard(connection)
        ending = connection.ending
        if ending is not None:
            self._endings[ending.kind, ending.cause] += 1
        if self._next_end is not None:
            self._next_end.set()
            self._next_end = None

    def _settle(self, connection: Connection, exc: BaseException) -> BaseException | None:
        """Log what *exc* says of the handler; what of it has to leave the task."""
        cancelled, failure = _split_cancelled(exc)
        if cancelled is not None and current_effective_deadline() != -math.inf:
            # No scope around this task asked for it, and AnyIO would end the server.
            logger.error(
                "a handler was cancelled from inside: %r", connection, exc_info=exc
            )
            cancelled = None
        if failure is None:
            return cancelled
        if not isinstance(failure, Exception) or (
            self._propagate_errors and not isinstance(failure, HandshakeFailed)
        ):
            return exc
        ending = connection.ending
        if ending is not None and ending.cause is Cause.FINISH_ON:
            logger.debug("a handler ended with %r: %r", failure, connection)
        elif isinstance(failure, HandshakeFailed):
            logger.info("%s: %r", failure, connection)
        elif all_leaves(failure, ConnectionLost):
            logger.info("the peer went away: %r: %s", connection, failure)
        else:
            logger.error("a handler failed: %r", connection, exc_info=failure)
        return cancelled

    def _report(self, connection: Connection) -> None:
        if self._on_ending is not None:
            try:
                self._on_ending(connection)
            except Exception:
                logger.exception("on_ending failed: %r", connection)


def _split_cancelled(
    exc: BaseException,
) -> tuple[BaseException | None, BaseException | None]:
    cancelled = get_cancelled_exc_class()
    if isinstance(exc, BaseExceptionGroup):
        return exc.split(cancelled)
    return (exc, None) if isinstance(exc, cancelled) else (None, exc)


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
    propagate_errors: bool = False,
    task_group: TaskGroup | trio.Nursery | None = None,
    on_ending: Callable[[Connection], object] | None = None,
    ssl_context: ssl.SSLContext | None = None,
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
      backlog: connections that may wait to be accepted (listen(2)).
      reuse_port: let other processes serve the same port, each on a socket of its own
        (SO_REUSEPORT of socket(7)). All of them have to ask for it.
      sockets: listening TCP sockets to serve on, instead of *host*, *port*, *backlog*
        and *reuse_port*: those of systemd's socket activation, or of a parent process.
        They belong to `serve_tcp` from the moment it has accepted its arguments, and it
        closes them. They become non-blocking, and pass SO_LINGER {1, 0} and TCP_NODELAY
        on to what they accept, for all processes that share them.
      max_connections: how many may be open at once, drains included; None for no limit.
        At the limit nothing is accepted, and the backlog holds the rest, in order.
      finish_on: exceptions that are a clean end: the peer gets FIN, and nothing is
        logged above DEBUG.
      drain: the limits of a clean end.
      propagate_errors: let exceptions of handlers out, as Trio's `serve_tcp` does,
        instead of logging them.
      task_group: the task group or Trio nursery that handlers run in, instead of one of
        the server's own. Then it is this group's cancellation that resets them, and
        cancelling `serve_tcp` only stops accepting.
      ssl_context: speak TLS, as by :meth:`Connection.start_tls`, before the handler is
        called. A handshake that fails costs its own connection an RST and one record at
        INFO; it is never propagated.
      handshake_timeout: seconds for a handshake.
      on_ending: called with each :class:`Connection` once it has ended.
      task_status: for `tg.start()`; gets the :class:`Server`.

    Error handling:
      An exception of a handler costs its own connection an RST, and is logged on the
      `anyio_rst` logger at ERROR with its traceback; if it tells that a connection was
      lost (:exc:`PeerReset`, or an :exc:`anyio.BrokenResourceError` of another loss), at
      INFO without. An exception of *on_ending* is logged in the same way.
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
    check_handler(handler, "serve_tcp")
    _check_number("port", port, 0, 65535)
    _check_number("backlog", backlog, 1, None)
    finish_on = check_finish_on(finish_on)
    check_drain(drain)
    timeout = check_seconds("handshake_timeout", handshake_timeout)
    if not timeout:
        raise ValueError("handshake_timeout must be > 0: no handshake takes no time")
    if ssl_context is not None:
        check_tls(ssl_context, True, None)
    if max_connections is not None:
        _check_number("max_connections", max_connections, 1, None)
    _check_reuse_port(reuse_port)
    if task_group is not None and not hasattr(task_group, "start_soon"):
        raise TypeError(f"task_group has no start_soon(): {task_group!r}")
    reporter: object = on_ending
    if reporter is not None and (
        not callable(reporter) or inspect.iscoroutinefunction(reporter)
    ):
        raise TypeError(f"on_ending takes a function that is not async: {on_ending!r}")

    if sockets is None:
        listening = await _listen(host, port, backlog, reuse_port)
    else:
        if host is not None or backlog != DEFAULT_BACKLOG or reuse_port:
            raise ValueError(
                "sockets are bound and listening already: host, backlog and reuse_port "
                "do not go with them"
            )
        listening = _check_sockets(sockets, port)
    for sock in listening:
        _sockets.prepare_listener(sock)
    server = Server(
        listening,
        handler if ssl_context is None else _secured(handler, ssl_context, timeout),
        finish_on=finish_on,
        drain=drain,
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
            server._cut_short()
            raise


def _open_group() -> AbstractAsyncContextManager[TaskGroup | trio.Nursery]:
    """A place for the handlers: on Trio a nursery, in which a task costs half."""
    if get_cancelled_exc_class() is trio_class("Cancelled"):
        nursery: AbstractAsyncContextManager[trio.Nursery]
        nursery = sys.modules["trio"].open_nursery(strict_exception_groups=True)
        return nursery
    return create_task_group()


def _secured(
    handler: Callable[[Connection], Awaitable[object]],
    ssl_context: ssl.SSLContext,
    handshake_timeout: float,
) -> Callable[[Connection], Awaitable[object]]:
    """*handler* after a TLS handshake, in the connection's own task."""

    async def secured(connection: Connection) -> object:
        try:
            with fail_after(handshake_timeout):
                await connection.start_tls(ssl_context, server_side=True)
        except TimeoutError as exc:
            raise HandshakeFailed(
                f"no TLS handshake within {handshake_timeout} s"
            ) from exc
        except Exception as exc:
            raise HandshakeFailed(f"the TLS handshake failed ({exc})") from exc
        return await handler(connection)

    return secured


async def _listen(
    host: str | IPv4Address | IPv6Address | None,
    port: int,
    backlog: int,
    reuse_port: bool,
) -> list[socket.socket]:
    try:
        bound = await create_tcp_listener(
            local_host=host, local_port=port, backlog=backlog, reuse_port=reuse_port
        )
    except OSError as exc:
        where = f"port {port}" if host is None else f"{host}, port {port}"
        raise type(exc)(exc.errno, f"cannot listen on {where}: {exc}") from exc
    return [listener.extra(SocketAttribute.raw_socket) for listener in bound.listeners]


def _check_sockets(sockets: object, port: int) -> list[socket.socket]:
    """The listening sockets that the caller has brought, looked at and not changed."""
    if not isinstance(sockets, (list, tuple)):
        raise TypeError(f"sockets must be a list or tuple of sockets, not {sockets!r}")
    if not sockets:
        raise ValueError("sockets is empty: there is nothing to serve on")
    checked: dict[int, str] = {}
    for index, sock in enumerate(sockets):
        name = f"sockets[{index}]"
        if isinstance(sock, int):
            raise TypeError(
                f"{name} must be a socket, not {sock!r}; if that is a descriptor: "
                f"socket.socket(fileno={sock!r})"
            )
        if not isinstance(sock, socket.socket):
            raise TypeError(f"{name} must be a socket.socket, not {sock!r}")
        if isinstance(sock, ssl.SSLSocket):
            raise TypeError(f"{name} is an SSLSocket; serve_tcp takes plain ones")
        _sockets.refuse_unless_listening(sock, name)
        if sock.fileno() in checked:
            raise ValueError(f"{name} is the same as {checked[sock.fileno()]}")
        checked[sock.fileno()] = name
        bound = sock.getsockname()[1]
        if port not in (0, bound):
            raise ValueError(f"port is {port}, but {name} listens on {bound}")
    return list(sockets)


def _check_reuse_port(reuse_port: object) -> None:
    if not isinstance(reuse_port, bool):
        raise TypeError(f"reuse_port must be True or False, not {reuse_port!r}")
    if reuse_port and not _sockets.CAN_REUSE_PORT:
        raise ValueError("reuse_port: this platform has no SO_REUSEPORT")


def _check_number(name: str, value: object, least: int, most: int | None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, not {value!r}")
    if value < least or (most is not None and value > most):
        bounds = f">= {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be {bounds}, not {value!r}")
