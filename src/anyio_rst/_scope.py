"""`connection_scope`: the ending of a connection, bound to a block of code."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

from ._connection import Connection, arm, conclude, conclude_failed, open_connection, run
from ._drain import DEFAULT_DRAIN, Drain, check_drain
from ._ending import check_finish_on

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from contextlib import AbstractAsyncContextManager
    from types import TracebackType
    from typing import TypeAlias

    import trio
    from anyio.abc import ByteStream

    from ._ending import FinishOn

    TCPStream: TypeAlias = (
        ByteStream | trio.SocketStream | trio.SSLStream[trio.SocketStream]
    )

__all__ = ["connection_scope", "scoped"]


def connection_scope(
    stream: TCPStream,
    *,
    finish_on: FinishOn = (),
    drain: Drain | None = DEFAULT_DRAIN,
) -> AbstractAsyncContextManager[Connection, None]:
    """End a TCP connection the way the body ends: FIN for success, RST for the rest.

    ::

        async with connection_scope(stream) as conn:
            await conn.send(answer)

    - The body returns: everything sent, FIN, *drain*, close.
    - Anything else leaves the body, be it an exception, an exception group, a
      cancellation, :exc:`KeyboardInterrupt`, :exc:`SystemExit` or
      :exc:`GeneratorExit`: RST, sent before any checkpoint, and the exception goes on
      unchanged. So it is when the process dies.
    - The body returns, but a send was cut short before, or is half done in another
      task: RST.

    A cancellation during the drain only ends the drain.

    Args:
      stream: an AnyIO byte stream with a TCP socket under it
        (:attr:`anyio.abc.SocketAttribute.raw_socket`), an AnyIO `TLSStream` over one, a
        :class:`Connection`, a :class:`trio.SocketStream`, or a :class:`trio.SSLStream`
        over one. The scope owns it from entry. On a
        :class:`Connection`, or a wrapper around one, the ending of the inner scope
        stands, and the outer one adds nothing.
      finish_on: exception types that count as a clean end; all the leaves of an
        exception group have to match. The exception goes on all the same.
        :exc:`GeneratorExit` never counts.
      drain: the limits of the drain; None closes right after the FIN.

    Raises:
      TypeError: *stream* is not a TCP connection, or another argument is of the wrong
        type. The stream is untouched then, and after the other two as well.
      anyio.ClosedResourceError: *stream* is closed.
      RuntimeError: this platform cannot reset such a stream with this AnyIO.
    """
    check_drain(drain)
    finish_on = check_finish_on(finish_on)
    return _ConnectionScope(open_connection(stream, finish_on=finish_on, drain=drain))


class _ConnectionScope:
    __slots__ = ("_connection", "_entered")

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._entered = False

    async def __aenter__(self) -> Connection:
        if self._entered:
            raise RuntimeError("a connection_scope() can only be entered once")
        self._entered = True
        arm(self._connection)
        return self._connection

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        if exc_val is None:
            await conclude(self._connection, None)
        else:
            await conclude_failed(self._connection, exc_val)


def scoped(
    handler: Callable[[Connection], Awaitable[object]],
    *,
    finish_on: FinishOn = (),
    drain: Drain | None = DEFAULT_DRAIN,
) -> Callable[[TCPStream], Coroutine[Any, Any, None]]:
    """Turn *handler* into what any AnyIO listener's `serve()` accepts.

    ::

        listener = await anyio.create_tcp_listener(local_port=8000)
        await listener.serve(scoped(handler))

    `trio.serve_tcp(scoped(handler), 8000)` works as well. The handler's exceptions go
    on to whoever serves, which with these two means: to the server's task group.

    Args:
      handler: async function of one :class:`Connection`. Its return is FIN, its
        failure RST.
      finish_on: see :func:`connection_scope`.
      drain: see :func:`connection_scope`.

    Raises:
      TypeError: *handler* is not an async function, or another argument is of the wrong
        type.
    """
    check_handler(handler, "scoped")
    finish_on = check_finish_on(finish_on)
    check_drain(drain)

    @functools.wraps(handler)
    async def serve_one(stream: TCPStream) -> None:
        connection = open_connection(stream, finish_on=finish_on, drain=drain)
        arm(connection)
        await run(connection, handler)

    return serve_one


def check_handler(handler: object, user: str) -> None:
    """Refuse what cannot be an async function of one argument.

    A lambda or a callable object may return a coroutine, so only calling it would tell.
    """
    if inspect.iscoroutine(handler):
        handler.close()
        raise TypeError(
            f"{user}() takes an async function; this is a coroutine already: pass the "
            "function itself, without calling it"
        )
    if not callable(handler):
        raise TypeError(f"{user}() takes an async function, not {handler!r}")
    function: object = handler
    while isinstance(function, functools.partial):
        function = function.func
    is_lambda = getattr(function, "__name__", None) == "<lambda>"
    if inspect.isclass(function) or (
        inspect.isroutine(function)
        and not inspect.iscoroutinefunction(function)
        and not is_lambda
    ):
        raise TypeError(f"{user}() takes an async function; {handler!r} is not async")
