"""`serve_tcp`: a server whose connections end truthfully."""

from __future__ import annotations

import errno
import inspect
import logging
import math
import os
import sys
from typing import TYPE_CHECKING

from anyio import (
    TASK_STATUS_IGNORED,
    CancelScope,
    Event,
    create_task_group,
    create_tcp_listener,
    current_effective_deadline,
    get_cancelled_exc_class,
    sleep,
    wait_readable,
)
from anyio.abc import SocketAttribute

from . import _sockets
from ._connection import Connection, cut_short, run
from ._drain import DEFAULT_DRAIN, Drain, check_drain
from ._ending import Cause, all_leaves, check_finish_on
from ._native import NativeStream
from ._peer import PeerReset
from ._scope import check_handler

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable
    from ipaddress import IPv4Address, IPv6Address

    import trio
    from anyio.abc import TaskGroup, TaskStatus

    from ._ending import FinishOn

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

__all__ = ["Server", "serve_tcp"]

logger = logging.getLogger("anyio_rst")

# How long to leave the backlog alone when there is no descriptor or memory for another
# connection. Trio's number.
CAPACITY_RETRY = 0.1

# Connections accepted before the tasks that are there already get a turn.
ACCEPTS_PER_TURN = 64

# As AnyIO; the kernel cuts it to what it allows (net.core.somaxconn, listen(2)).
DEFAULT_BACKLOG = 65536


class Server:
    """A running :func:`serve_tcp`."""

    def __init__(
        self,
        sockets: list[socket.socket],
        handler: Callable[[Connection], Awaitable[object]],
        *,
        finish_on: tuple[type[BaseException], ...],
        drain: Drain | None,
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
        self._propagate_errors = propagate_errors
        self._on_ending = on_ending
        self._open: set[Connection] = set()
        self._accepting = CancelScope()
        self._idle: Event | None = None

    @property
    def connections(self) -> frozenset[Connection]:
        """The connections whose handlers are running or whose drains are under way."""
        return frozenset(self._open)

    def stop(self) -> None:
        """Stop accepting. `serve_tcp` returns when the last handler is done.

        Connections still in the backlog are reset by the kernel. Idempotent.
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
            self._idle = Event()
            await self._idle.wait()

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
            for _ in range(ACCEPTS_PER_TURN):
                try:
                    sock, address = listener.accept()
                except BlockingIOError:
                    break
                except OSError as exc:
                    if exc.errno in _sockets.CAPACITY_ERRNOS:
                        logger.error(
                            "accept: %s (%s); trying again in %s s",
                            errno.errorcode[exc.errno],
                            os.strerror(exc.errno),
                            CAPACITY_RETRY,
                        )
                        await sleep(CAPACITY_RETRY)
                        break
                    if exc.errno in _sockets.LOST_CLIENT_ERRNOS:
                        continue
                    raise
                self._start(sock, _sockets.host_and_port(address), tasks)

    def _start(
        self,
        sock: socket.socket,
        address: tuple[str, int],
        tasks: TaskGroup | trio.Nursery,
    ) -> None:
        sock.setblocking(False)
        if not _sockets.ACCEPTED_SOCKETS_INHERIT:
            _sockets.prepare_accepted(sock)
        connection = Connection(
            NativeStream(sock, address), finish_on=self._finish_on, drain=self._drain
        )
        self._open.add(connection)
        try:
            tasks.start_soon(self._handle, connection)
        except BaseException:  # a task group that is over
            self._open.discard(connection)
            connection.abort()
            raise

    async def _handle(self, connection: Connection) -> None:
        try:
            await run(connection, self._handler)
        except BaseException as exc:
            remaining = self._settle(connection, exc)
            if remaining is exc:
                raise
            if remaining is not None:
                raise remaining from None
        finally:
            self._open.discard(connection)
            if self._idle is not None and not self._open:
                self._idle.set()
            self._report(connection)

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
        if self._propagate_errors or not isinstance(failure, Exception):
            return exc
        ending = connection.ending
        if ending is not None and ending.cause is Cause.FINISH_ON:
            logger.debug("a handler ended with %r: %r", failure, connection)
        elif all_leaves(failure, PeerReset):
            logger.info("the peer reset the connection: %r", connection)
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
    finish_on: FinishOn = (),
    drain: Drain | None = DEFAULT_DRAIN,
    propagate_errors: bool = False,
    task_group: TaskGroup | trio.Nursery | None = None,
    on_ending: Callable[[Connection], object] | None = None,
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
      finish_on: exceptions that are a clean end: the peer gets FIN, and nothing is
        logged above DEBUG.
      drain: the limits of a clean end.
      propagate_errors: let exceptions of handlers out, as Trio's `serve_tcp` does,
        instead of logging them.
      task_group: the task group or Trio nursery that handlers run in, instead of one of
        the server's own. Then it is this group's cancellation that resets them, and
        cancelling `serve_tcp` only stops accepting.
      on_ending: called with each :class:`Connection` once it has ended.
      task_status: for `tg.start()`; gets the :class:`Server`.

    Error handling:
      An exception of a handler costs its own connection an RST, and is logged on the
      `anyio_rst` logger at ERROR with its traceback; if it is :exc:`PeerReset`, at INFO
      without. An exception of *on_ending* is logged in the same way.
      :exc:`KeyboardInterrupt`, :exc:`SystemExit` and other exceptions that are no
      :exc:`Exception` get out. When there are no descriptors or is no memory to accept
      a connection with, that is logged at ERROR, and tried again after 100 ms.

    Raises:
      TypeError, ValueError: an argument is of the wrong type or out of range. Nothing
        was bound.
      OSError: the address is in use or cannot be had. Nothing stays bound.
    """
    check_handler(handler, "serve_tcp")
    _check_number("port", port, 0, 65535)
    _check_number("backlog", backlog, 1, None)
    finish_on = check_finish_on(finish_on)
    check_drain(drain)
    if task_group is not None and not hasattr(task_group, "start_soon"):
        raise TypeError(f"task_group has no start_soon(): {task_group!r}")
    reporter: object = on_ending
    if reporter is not None and (
        not callable(reporter) or inspect.iscoroutinefunction(reporter)
    ):
        raise TypeError(f"on_ending takes a function that is not async: {on_ending!r}")

    sockets = await _listen(host, port, backlog)
    server = Server(
        sockets,
        handler,
        finish_on=finish_on,
        drain=drain,
        propagate_errors=propagate_errors,
        on_ending=on_ending,
    )
    if task_group is not None:
        await server._serve(task_group, task_status)
        return
    async with create_task_group() as tasks:
        try:
            await server._serve(tasks, task_status)
        except BaseException:
            server._cut_short()
            raise


async def _listen(
    host: str | IPv4Address | IPv6Address | None, port: int, backlog: int
) -> list[socket.socket]:
    try:
        bound = await create_tcp_listener(
            local_host=host, local_port=port, backlog=backlog
        )
    except OSError as exc:
        where = f"port {port}" if host is None else f"{host}, port {port}"
        raise type(exc)(exc.errno, f"cannot listen on {where}: {exc}") from exc
    sockets = [listener.extra(SocketAttribute.raw_socket) for listener in bound.listeners]
    for sock in sockets:
        _sockets.prepare_listener(sock)
    return sockets


def _check_number(name: str, value: object, least: int, most: int | None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, not {value!r}")
    if value < least or (most is not None and value > most):
        bounds = f">= {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be {bounds}, not {value!r}")
