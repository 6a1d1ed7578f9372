"""Truthful endings for programs on asyncio's streams, which stay as they are.

::

    server = await asyncio.start_server(asyncio_streams.scoped(handler), port=8000)

The I/O stays with the transport of asyncio or uvloop. Beside it there is a second
descriptor of the socket, so that no close of the transport is the end of the connection:
that is a reset, or FIN and drain, made as for any :class:`anyio_rst.Connection`.

What holds:

- The verdict falls when the handler or block is left, and an RST goes out in that call,
  below the transport, over TLS without a close_notify. (In gVisor and on all but Linux it
  may be a turn later on uvloop: over TLS, or with something left to send.)
- It is armed from its entry on, so a process that dies resets. (Until then it is if the
  listening sockets are: `lowlevel.arm(sock)` for each of `server.sockets`.)
- After a success all that was written is sent, however slow the peer reads, and input
  that nobody wants does not destroy it.
- `writer.write()` takes all or nothing, so that no time-out of `writer.drain()` tears
  anything. What cannot be sent any more makes the end an RST.

What does not, or not quite:

- Over TLS a transport of asyncio's closes itself when the peer's close_notify comes: what
  is written after that is lost, and the connection reset.
- Over TLS the close_notify is the transport's. If the peer is sending just then, OpenSSL
  may keep it back, and the peer gets its answer and a bare FIN.
- What a child task has yet to write when the handler returns is not known to anybody.
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
    """Turn *handler* into what :func:`asyncio.start_server` takes, and ends truthfully.

    The handler returns: what was written is sent, FIN, *drain*, close. It raises, or is
    cancelled: RST, and the exception goes on unchanged, to asyncio, which logs it.

    - `writer.close()` is the explicit success: what the handler does after that changes
      nothing. While an exception is handled (`finally: writer.close()`) it is not, and
      how the handler ends decides.
    - `writer.transport.abort()` is a reset, which it is not without this.
    - A transport that is closed from outside (`Server.close_clients()`,
      `Server.abort_clients()`) is a reset, too.

    Args:
      handler: async function of a reader and a writer.
      finish_on, drain, keepalive: see :func:`anyio_rst.connection_scope`. The limits of
        *drain* are those of sending what is left as well, for which there are 5 s without
        progress if they leave none.
      on_ending: called with the :class:`anyio_rst.Ending` of each connection. An
        exception in it is logged at ERROR.

    Raises:
      TypeError: *handler* is not an async function, or another argument is of the wrong
        type. Of the handler's task: there is no TCP connection.
      ConnectionError: of the handler's task: the connection was gone before it began.
      OSError: of the handler's task: no descriptor is left (EMFILE, ENFILE).
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
    """The same for a block, of a client for example.

    ::

        reader, writer = await asyncio.open_connection("localhost", 8000)
        async with asyncio_streams.connection_scope(reader, writer) as streams:
            streams.writer.write(request)
            answer = await streams.reader.read()
        print(streams.ending)

    Use the writer of *streams*. What is done with the one that was given goes out as
    well, but it is not in :attr:`anyio_rst.Ending.sent`, and its `close()` and its
    `transport.abort()` are not told from each other: how the block ends decides.

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
    """What a scope is entered with: the streams of one connection, and its ending."""

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
        """None while the connection is open, then how it ended."""
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
