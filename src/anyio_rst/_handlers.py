"""The tasks that handlers run in, on asyncio.

Anybody can cancel one of asyncio's tasks, by `Task.cancel()`. Before its first step, or
in its last, no code of the task learns of that, and a task group takes it for the end of
all of its tasks. So handlers run in tasks of their own, and one child of the task group,
the proxy, passes the group's cancellation on to them, and holds it open until they are
done.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

from anyio import CancelScope

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any

    from anyio.abc import TaskGroup

    from ._connection import Connection

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup


class HandlerTasks:
    """Tasks in *group*, none of which can be the end of the others by being cancelled.

    A deadline around the group cancels them, too, but is not known to them before.
    *on_cancelled* is called with the connection of one that was, in so far as it did not
    see to that itself.
    """

    def __init__(
        self, group: TaskGroup, on_cancelled: Callable[[Connection], None]
    ) -> None:
        self._group = group
        self._on_cancelled = on_cancelled
        self._running: dict[asyncio.Task[None], tuple[Connection, CancelScope]] = {}
        self._failed: list[tuple[Connection, BaseException]] = []
        self._is_cancelled = False
        self._is_closed = False
        self._has_proxy = False
        self._wait: asyncio.Future[None] | None = None  # the proxy's
        self._start_proxy()

    def start_soon(
        self,
        handle: Callable[[Connection], Coroutine[Any, Any, None]],
        connection: Connection,
    ) -> None:
        """Run `handle(connection)`. An exception of that is one of the group's.

        Raises:
          RuntimeError: the group is over.
        """
        self._start_proxy()  # the group may be cancelled, and not be over
        scope = CancelScope()
        if self._is_cancelled:
            scope.cancel()
        task = asyncio.get_running_loop().create_task(_run(handle, connection, scope))
        self._running[task] = connection, scope
        task.add_done_callback(self._done)

    def close(self) -> None:
        """There will be no more."""
        self._is_closed = True
        self._wake_proxy()

    def _done(self, task: asyncio.Task[None]) -> None:
        connection, _ = self._running.pop(task)
        failure: BaseException | None = asyncio.CancelledError()
        if not task.cancelled():
            failure = task.exception()
        if failure is not None:
            self._failed.append((connection, failure))
        self._wake_proxy()

    def _wake_proxy(self) -> None:
        is_over = not self._running and (self._is_closed or self._is_cancelled)
        wait = self._wait
        if wait is not None and not wait.done() and (is_over or self._failed):
            wait.set_result(None)

    def _start_proxy(self) -> None:
        if not self._has_proxy:
            self._group.start_soon(self._stand_for_all)
            self._has_proxy = True

    async def _stand_for_all(self) -> None:
        try:
            while self._running or not self._is_closed:
                self._wait = _Bell(self._cancel)
                await self._wait
                self._tell_failures()
        except BaseException:
            self._cancel()
            raise
        finally:
            self._tell_failures()
            while self._running:
                self._wait = asyncio.get_running_loop().create_future()
                with CancelScope(shield=True), suppress(asyncio.CancelledError):
                    await self._wait
                self._tell_failures()
            self._wait = None
            self._has_proxy = False

    def _cancel(self) -> None:
        self._is_cancelled = True
        for _, scope in self._running.values():
            scope.cancel()

    def _tell_failures(self) -> None:
        failed, self._failed = self._failed, []
        for connection, exc in failed:
            if isinstance(exc, asyncio.CancelledError):
                self._on_cancelled(connection)
            else:
                self._group.start_soon(_raise, exc)


class _Bell(asyncio.Future[None]):
    """Calls *ring* when the task that waits for it is cancelled, in that very call.

    Unless that is `asyncio.run()` at its end, whose loop is not running then.
    """

    def __init__(self, ring: Callable[[], None]) -> None:
        super().__init__()
        self._ring = ring

    def cancel(self, msg: Any | None = None) -> bool:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            pass
        else:
            self._ring()
        return super().cancel(msg)


async def _run(
    handle: Callable[[Connection], Coroutine[Any, Any, None]],
    connection: Connection,
    scope: CancelScope,
) -> None:
    running = handle(connection)
    del connection  # this frame is in the traceback of what the handler raises
    with scope:
        await running


async def _raise(exc: BaseException) -> NoReturn:
    if isinstance(exc, (KeyboardInterrupt, SystemExit)):
        # It has ended the event loop, and would end the clean-up after that, too.
        raise BaseExceptionGroup("a handler has ended the event loop", [exc])
    raise exc
