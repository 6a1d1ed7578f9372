"""Truthful endings for programs on asyncio's streams, which stay as they are.

::

    server = await asyncio.start_server(asyncio_streams.scoped(handler), port=8000)

The transport of asyncio or uvloop still does the I/O. A second descriptor of its socket
keeps the connection open until it ends like any :class:`anyio_rst.Connection`, by a reset
or by FIN and drain. The page "asyncio's streams, unchanged" of the documentation says
which rules hold, plain and over TLS.

In gVisor and on kernels other than Linux, the RST may be sent a turn of the event loop
later on uvloop: over TLS, or with data left to send.
"""

from __future__ import annotations

import functools
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, cast

from . import lowlevel
from ._asyncio_course import Course
from ._ending import Cause, check_finish_on, exception_leaving
from ._limits import DEFAULT_DRAIN, Drain, check_drain, check_keepalive
from ._scope import check_handler, check_on_ending

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable, Coroutine
    from contextlib import AbstractAsyncContextManager
    from types import TracebackType
    from typing import Any

    from ._ending import Ending, FinishOn

__all__ = ["Streams", "connection_scope", "scoped"]


def scoped(
    handler: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[object]],
    *,
    finish_on: FinishOn = (),
    drain: Drain | None = DEFAULT_DRAIN,
    keepalive: float | None = None,
    on_ending: Callable[[Ending], object] | None = None,
) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]:
    """Turn *handler* into one for :func:`asyncio.start_server` that ends truthfully.

    If the handler returns, the connection sends what was written and FIN, drains, and
    closes. If it raises an exception or is cancelled, the connection sends RST, and the
    exception propagates to asyncio, which logs it.

    - `writer.close()` is the explicit success. What the handler does afterwards changes
      nothing. But while an exception is handled (`finally: writer.close()`), the end of
      the handler decides.
    - `writer.transport.abort()` resets, which it does not without this function.
    - Closing the transport from outside (`Server.close_clients()`,
      `Server.abort_clients()`) resets, too.

    Args:
      handler: async function of a reader and a writer.
      finish_on, drain, keepalive: see :func:`anyio_rst.connection_scope`. The limits of
        *drain* also apply to sending what is left. If they leave no time for that, it has
        5 s without progress.
      on_ending: called with the :class:`anyio_rst.Ending` of each connection. An
        exception in it is logged at ERROR.

    Raises:
      TypeError: *handler* is not an async function, or another argument is of the wrong
        type. In the handler's task: there is no TCP connection.
      ConnectionError: in the handler's task: the connection was gone before it began.
      OSError: in the handler's task: no descriptor is left (EMFILE, ENFILE).
    """
    check_handler(handler, "scoped()")
    types = check_finish_on(finish_on)
    check_drain(drain)
    check_keepalive(keepalive)
    check_on_ending(on_ending)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        arguments = reader, writer, types, drain, keepalive, on_ending, Cause.ABORTED
        try:
            course = Course(*arguments)
        except BaseException:
            writer.transport.abort()
            raise
        async with _Scope(lambda: course):
            await handler(reader, course.writer)

    @functools.wraps(handler)
    def serve_one(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> Coroutine[Any, Any, None]:
        with suppress(TypeError, ValueError, OSError):  # serve() tells
            lowlevel.arm(writer)  # a task may be cancelled before its first step
        return serve(reader, writer)

    return serve_one


def connection_scope(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    *,
    finish_on: FinishOn = (),
    drain: Drain | None = DEFAULT_DRAIN,
    keepalive: float | None = None,
    on_ending: Callable[[Ending], object] | None = None,
) -> AbstractAsyncContextManager[Streams, None]:
    """End a connection of asyncio's streams the way the block ends.

    ::

        reader, writer = await asyncio.open_connection("localhost", 8000)
        async with asyncio_streams.connection_scope(reader, writer) as streams:
            streams.writer.write(request)
            answer = await streams.reader.read()
        print(streams.ending)

    Use the writer of *streams*. The original writer sends as well, but
    :attr:`anyio_rst.Ending.sent` does not count that. Its `close()` and its
    `transport.abort()` cannot be distinguished, so the end of the block decides.

    Args:
      reader, writer: of :func:`asyncio.open_connection`, on TCP.
      finish_on, drain, keepalive, on_ending: see :func:`scoped`.

    Raises:
      TypeError: there is no TCP connection, or an argument is of the wrong type.
      ConnectionError: the connection is gone, or closed.
      RuntimeError: this platform's event loop cannot reset it.
      OSError: no descriptor is left (EMFILE, ENFILE).
    """
    types = check_finish_on(finish_on)
    check_drain(drain)
    check_keepalive(keepalive)
    check_on_ending(on_ending)
    arguments = reader, writer, types, drain, keepalive, on_ending, Cause.CLOSED
    return _Scope(lambda: Course(*arguments))


class Streams:
    """What a scope yields: the streams of one connection, and its ending."""

    def __init__(self, course: Course) -> None:
        self._course = course

    @property
    def reader(self) -> asyncio.StreamReader:
        """The reader that was given."""
        return self._course.reader

    @property
    def writer(self) -> asyncio.StreamWriter:
        """A writer whose `close()` and `transport.abort()` end the connection."""
        return self._course.writer

    @property
    def ending(self) -> Ending | None:
        """How the connection ended; None while it is open."""
        return self._course.ending


class _Scope:
    def __init__(self, enter: Callable[[], Course]) -> None:
        self._enter: Callable[[], Course] | None = enter
        self._course = cast("Course", None)

    async def __aenter__(self) -> Streams:
        if self._enter is None:
            raise RuntimeError("a connection_scope() can only be entered once")
        self._course = self._enter()
        self._enter = None
        self._course.at_entry = sys.exc_info()[1]
        return Streams(self._course)

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        await self._course.end(exception_leaving(exc_val, self._course.at_entry))
