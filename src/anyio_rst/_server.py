"""A running server: it accepts, runs handlers, and says how they ended."""

from __future__ import annotations

import asyncio
import errno
import math
import os
import sys
from collections import Counter
from contextlib import suppress
from threading import get_ident
from typing import TYPE_CHECKING

from anyio import (
    CancelScope,
    Event,
    Lock,
    create_task_group,
    current_effective_deadline,
    get_cancelled_exc_class,
    sleep,
    wait_readable,
)
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint

from . import _sockets
from ._body import body_raised, body_returned
from ._connection import Connection
from ._ending import Cause, CloseKind, all_leaves
from ._failures import FailureLog, HandshakeFailed, drop_frames, logger
from ._handlers import HandlerTasks
from ._limits import check_thread
from ._listening import Listener
from ._native import NativeStream
from ._statistics import ServerStatistics, Totals
from ._takeover import is_trio

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable
    from typing import TypeAlias

    import trio
    from anyio.abc import TaskStatus

    from ._limits import Drain

    HandlersIn: TypeAlias = TaskGroup | trio.Nursery | HandlerTasks

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

__all__ = ["Server"]

# How long to leave the backlog alone when there is no descriptor or memory for another
# connection. Trio's number.
CAPACITY_RETRY = 0.1

# Connections accepted before the tasks that are there already get a turn.
ACCEPTS_PER_TURN = 64


class Server:
    """A running :func:`serve_tcp`."""

    def __init__(
        self,
        sockets: list[socket.socket],
        handler: Callable[[Connection], Awaitable[object]],
        *,
        are_own: bool,
        finish_on: tuple[type[BaseException], ...],
        drain: Drain | None,
        keepalive: float | None,
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
        self._handler = handler
        self._finish_on = finish_on
        self._drain = drain
        self._max_connections = (
            sys.maxsize if max_connections is None else max_connections
        )
        self._propagate_errors = propagate_errors
        self._on_ending = on_ending
        self._failures = FailureLog(finish_on)
        self._open: set[Connection] = set()
        self._accepted = 0
        self._endings: Counter[tuple[CloseKind, Cause]] = Counter()
        self._accepting = CancelScope()
        self._listeners = [Listener(sock, keepalive, is_own=are_own) for sock in sockets]
        # Where room or descriptors are short, the listening sockets take turns, and one
        # of them at a time says so in the log.
        self._turn = Lock(fast_acquire=True)
        self._next_end: Event | None = None
        self._thread = get_ident()

    def __str__(self) -> str:
        return ", ".join(
            f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            for host, port in self.addresses
        )

    @property
    def connections(self) -> frozenset[Connection]:
        """The connections whose handlers are running or whose drains are under way."""
        return frozenset(self._open)

    def statistics(self) -> ServerStatistics:
        """The totals up to now. They stay readable when the server has ended.

        May be called from any thread.
        """
        by_kind = dict.fromkeys(CloseKind, 0)
        by_cause = dict.fromkeys(Cause, 0)
        # Copied in one step, as another thread may ask while connections end.
        for (kind, cause), total in dict(self._endings).items():
            by_kind[kind] += total
            by_cause[cause] += total
        return ServerStatistics(
            open_connections=len(self._open),
            accepted_connections=self._accepted,
            endings_by_kind=Totals(by_kind),
            endings_by_cause=Totals(by_cause),
        )

    def stop(self) -> None:
        """Serve the clients that have already connected, and no others.

        The connections in the backlog are accepted and served. Then the listening
        sockets are closed, and `serve_tcp` returns when the last handler is done.
        Connections in :meth:`Connection.idle` are ended. Idempotent.

        The kernel resets connections that are made between the last accept and the
        close, unless another process shares the listening socket.

        Raises:
          RuntimeError: in a thread other than that of the event loop.
        """
        check_thread(self._thread, "Server.stop()")
        if self.stopping:
            return
        for listener in self._listeners:
            listener.count_waiting()
        self._accepting.cancel()
        for connection in self._open:
            idle = connection._life.native.idle
            if idle is not None:
                idle._stop()

    @property
    def stopping(self) -> bool:
        """Whether :meth:`stop` was called."""
        return self._accepting.cancel_called

    async def _serve(
        self,
        tasks: HandlersIn,
        task_status: TaskStatus[Server],
    ) -> None:
        """Accept until stopped, then wait for the handlers."""
        handlers = None
        try:
            try:
                if not is_trio() and isinstance(tasks, TaskGroup):
                    tasks = handlers = HandlerTasks(tasks, self._lost_its_task)
                with self._accepting:
                    async with create_task_group() as listeners:
                        for listener in self._listeners:
                            listeners.start_soon(self._accept, listener, tasks)
                        logger.info("listening on %s", self)
                        task_status.started(self)
                for listener in self._listeners:
                    await self._serve_backlog(listener, tasks)
            finally:
                self._stop_listening()
            while self._open:
                await self._wait_for_an_end()
        finally:
            self._failures.close()
            if handlers is not None:
                handlers.close()

    async def _wait_for_an_end(self) -> None:
        if self._next_end is None:
            self._next_end = Event()
        await self._next_end.wait()

    def _stop_listening(self) -> None:
        for listener in self._listeners:
            listener.sock.close()

    def _reset_all(self) -> None:
        for connection in self.connections:
            connection._reset(Cause.CANCELLED)

    async def _room(self) -> int:
        """Wait for room, and return for how many there is."""
        while (room := self._max_connections - len(self._open)) <= 0:
            await self._wait_for_an_end()
        return min(room, ACCEPTS_PER_TURN)

    async def _accept(self, listener: Listener, tasks: HandlersIn) -> None:
        while True:
            await wait_readable(listener.sock)
            async with self._turn:
                await self._accept_up_to(await self._room(), listener, tasks)

    async def _serve_backlog(self, listener: Listener, tasks: HandlersIn) -> None:
        """Accept those who were waiting when it was stopped, and none who came later."""
        while left := listener.waiting:
            most = min(left, await self._room())
            may_improve = bool(self._open)  # by a descriptor that becomes free
            is_empty = await self._accept_up_to(most, listener, tasks)
            if is_empty or (listener.waiting == left and not may_improve):
                break
            await checkpoint()

    async def _accept_up_to(
        self, most: int, listener: Listener, tasks: HandlersIn
    ) -> bool:
        """Accept until the backlog is empty; return whether it is."""
        listener.sock.setblocking(False)  # another process that has it may have undone it
        for _ in range(most):
            try:
                accepted = listener.accept()
            except OSError as exc:
                if exc.errno in _sockets.LOST_CLIENT_ERRNOS:
                    continue
                if exc.errno not in _sockets.CAPACITY_ERRNOS:
                    raise
                logger.error(
                    "accept: %s (%s); trying again in %s s",
                    errno.errorcode[exc.errno],
                    os.strerror(exc.errno),
                    CAPACITY_RETRY,
                )
                await sleep(CAPACITY_RETRY)
                return False
            if accepted is None:
                return True
            self._start(*accepted, tasks)
        return False

    def _start(
        self,
        sock: socket.socket,
        address: tuple[str, int] | None,
        tasks: HandlersIn,
    ) -> None:
        connection = Connection(
            NativeStream(sock, address), finish_on=self._finish_on, drain=self._drain
        )
        connection._life.server = self
        self._open.add(connection)
        self._accepted += 1
        try:
            tasks.start_soon(self._handle, connection)
        except BaseException:  # a task group that is over
            connection.abort()
            self._ended(connection)
            raise

    async def _handle(self, connection: Connection) -> None:
        spent = remaining = None
        try:
            # As in run(), which would be one more coroutine for each connection.
            try:
                result = await self._handler(connection)
            except BaseException as exc:
                await body_raised(connection, exc)
                raise
            await body_returned(connection, result)
        except BaseException as exc:
            connection._end_after(exc)
            remaining = self._report_failure(connection, exc)
            if remaining is None or all_leaves(remaining, get_cancelled_exc_class()):
                spent = exc
        finally:
            self._ended(connection)
            self._call_on_ending(connection)
        if spent is not None:
            drop_frames(spent)
        try:
            if remaining is not None:
                raise remaining
        finally:
            # The frame of this function is in the traceback.
            del connection, spent, remaining

    def _lost_its_task(self, connection: Connection) -> None:
        """It was cancelled before its first step; or in its last, and all is done."""
        if connection not in self._open:
            return
        with suppress(StopIteration):  # a reset has no checkpoint
            body_raised(connection, asyncio.CancelledError()).send(None)
        logger.error("a handler was cancelled before it began: %r", connection)
        self._ended(connection)
        self._call_on_ending(connection)

    def _ended(self, connection: Connection) -> None:
        self._open.discard(connection)
        ending = connection.ending
        if ending is not None:
            self._endings[ending.kind, ending.cause] += 1
        if self._next_end is not None:
            self._next_end.set()
            self._next_end = None

    def _report_failure(
        self, connection: Connection, exc: BaseException
    ) -> BaseException | None:
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
        self._failures.report(connection, failure)
        return cancelled

    def _call_on_ending(self, connection: Connection) -> None:
        if self._on_ending is not None:
            try:
                self._on_ending(connection)
            except Exception:
                logger.exception("on_ending failed: %r", connection)


def _split_cancelled(
    exc: BaseException,
) -> tuple[BaseException | None, BaseException | None]:
    cancelled = get_cancelled_exc_class()
    if all_leaves(exc, cancelled):
        return exc, None
    if isinstance(exc, BaseExceptionGroup):
        # Groups may be deeper than split() can go. Whoever cancelled does so again.
        with suppress(RecursionError):
            return exc.split(cancelled)
    return None, exc
