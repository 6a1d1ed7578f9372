"""`connection_scope`: the ending of a connection, bound to a block of code."""

from __future__ import annotations

import functools
import inspect
import sys
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from anyio import ClosedResourceError
from anyio.abc import ByteStream
from anyio.streams.buffered import BufferedByteReceiveStream

from ._body import body_raised, body_returned, run
from ._connection import Connection
from ._conversation import ConnectionAttribute
from ._ending import check_finish_on, exception_leaving
from ._lifecycle import Lifecycle
from ._limits import DEFAULT_DRAIN, Drain, check_drain, check_keepalive
from ._takeover import Source, attributes_of, discard, is_anyios, put_under
from ._tls import SecureStream
from ._tls_engines import engine_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Mapping
    from contextlib import AbstractAsyncContextManager
    from types import TracebackType

    import trio

    from ._ending import FinishOn
    from ._tls_engines import Engine

# In one string: what reads types joins none.
TCPStream: TypeAlias = "ByteStream | BufferedByteReceiveStream | trio.SocketStream | trio.SSLStream[trio.SocketStream]"  # noqa: E501
"""What a scope can be put around; see :func:`connection_scope`."""

__all__ = ["TCPStream", "connection_scope", "scoped"]


def connection_scope(
    stream: TCPStream,
    *,
    finish_on: FinishOn = (),
    drain: Drain | None = DEFAULT_DRAIN,
    keepalive: float | None = None,
) -> AbstractAsyncContextManager[Connection, None]:
    """End a TCP connection the way the body ends: FIN for success, RST for the rest.

    ::

        async with connection_scope(stream) as conn:
            await conn.send(answer)

    - If the body returns, the connection sends everything and FIN, drains, and closes.
    - If an exception, an exception group, a cancellation, :exc:`KeyboardInterrupt`,
      :exc:`SystemExit` or :exc:`GeneratorExit` leaves the body, the connection sends
      RST before any checkpoint. The exception propagates unchanged. If the process
      dies, the kernel sends RST.
    - If the body returns, but a send was cut short before, or is half done in another
      task, the connection sends RST.
    - If the scope is left without an exception while one that began inside it is being
      handled, for example by `finally: await stack.aclose()`, the connection sends RST.

    A cancellation during the drain only ends the drain.

    :attr:`Ending.outcome` refers to the exception, its traceback to the frames that it
    went through, and these to the connection. Only the garbage collector frees this
    cycle, unless you break it with `exc.with_traceback(None)`.

    Args:
      stream: AnyIO's own :class:`~anyio.abc.SocketStream`, on TCP, a `TLSStream` or
        buffered streams over one; or a :class:`trio.SocketStream`, or a
        :class:`trio.SSLStream` over one. The scope takes its socket over at entry, with
        the data that was read ahead. The stream rests until :meth:`Connection.detach`,
        or is closed with the connection.

        Or a :class:`Connection`, or any wrapper around one: a nested scope. The ending
        of the inner scope stands, and the outer one adds nothing. A clean end closes
        the wrapper first, because it may have kept data back. If that fails, the
        connection is reset.
      finish_on: exception types that count as a clean end; all the leaves of an
        exception group have to match. The exception still propagates.
        :exc:`GeneratorExit` never counts.
      drain: the limits of the drain; None closes right after the FIN.
      keepalive: seconds after which a peer that is gone is noticed, see
        :func:`serve_tcp`; None changes nothing.

    Raises:
      TypeError: *stream* is not a TCP connection, or is a wrapper around a stream that
        is no Connection; or another argument is of the wrong type. The stream is
        untouched then, and after the others as well.
      anyio.ClosedResourceError: *stream* is closed. If its peer is gone, the connection
        will say so later.
      anyio.BusyResourceError: a task is receiving or sending on it. Trio does not show
        that, so there the two take each other's input.
      RuntimeError: it is in another scope already, or this platform cannot reset it.
      OSError: no descriptor is left (EMFILE, ENFILE); asyncio's streams need a copy.
    """
    check_drain(drain)
    check_keepalive(keepalive)
    return ConnectionScope(Entry(stream, check_finish_on(finish_on), drain, keepalive))


class Entry:
    """The way into a scope on *stream*, which is checked, and not touched before."""

    __slots__ = (
        "_drain",
        "_engine",
        "_finish_on",
        "_keepalive",
        "_outer",
        "_sink",
        "_source",
        "_stream",
    )

    def __init__(
        self,
        stream: object,
        finish_on: tuple[type[BaseException], ...],
        drain: Drain | None,
        keepalive: float | None,
    ) -> None:
        self._stream = stream
        self._finish_on = finish_on
        self._drain = drain
        self._keepalive = keepalive
        self._engine: Engine | None = None
        self._sink: ByteStream | None = None
        inner = stream
        while isinstance(inner, BufferedByteReceiveStream):
            inner = inner.receive_stream
        self._outer = _connection_in(inner)
        if self._outer is None:
            if (found := engine_of(inner)) is not None:
                self._engine, inner = found
            self._source = Source(inner)
        elif engine_of(inner) is not None:
            raise TypeError("a Connection starts TLS itself, by Connection.start_tls()")
        elif self._outer._life.cause is not None:
            raise ClosedResourceError("the connection has ended")
        elif inner is not self._outer:
            self._sink = cast("ByteStream", inner)

    def enter(self) -> Connection:
        """The connection, armed."""
        stream = self._stream
        outer = self._outer
        if outer is None:
            native = self._source.take()
            session = None
            if self._engine is not None:
                session = SecureStream(native, self._engine)
            life = Lifecycle(native, session)
        else:
            life = outer._life
            if life.cause is not None:
                raise ClosedResourceError("the connection has ended")
        if self._keepalive is not None:
            life.native.keep_alive(self._keepalive)
        connection = self._on(life)
        if isinstance(stream, BufferedByteReceiveStream):
            if outer is None:
                put_under(stream, self._on(life))
            buffer: object = stream
            while isinstance(buffer, BufferedByteReceiveStream):
                life.add_buffer(buffer)
                buffer = buffer.receive_stream
            connection._source = stream
        if outer is not None:
            connection._lent = stream
            connection._sink = self._sink
            if connection._source is None:
                connection._source = self._sink
        return connection

    def _on(self, life: Lifecycle) -> Connection:
        return Connection(
            life.native, finish_on=self._finish_on, drain=self._drain, shared=life
        )


def _connection_in(stream: object) -> Connection | None:
    """The connection that *stream* is, or is a wrapper around."""
    if isinstance(stream, Connection):
        return stream
    if isinstance(stream, ByteStream) and not is_anyios(stream):
        attributes: Mapping[Any, Callable[[], Any]] = attributes_of(stream)
        found = attributes.get(ConnectionAttribute.connection)
        return None if found is None else cast("Connection", found())
    return None


class ConnectionScope:
    """The block of one connection: the end of the block is that of the connection."""

    __slots__ = ("_at_entry", "_connection", "_entry")

    def __init__(self, entry: Entry | None) -> None:
        self._entry = entry
        self._at_entry: BaseException | None = None
        self._connection = cast("Connection", None)

    async def __aenter__(self) -> Connection:
        if self._entry is None:
            raise RuntimeError("a connection_scope() can only be entered once")
        self._connection = self._entry.enter()
        self._entry = None
        self._at_entry = sys.exc_info()[1]
        return self._connection

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        try:
            exc = exception_leaving(exc_val, self._at_entry)
            self._at_entry = None
            if exc is None:
                await body_returned(self._connection, None)
            else:
                await body_raised(self._connection, exc)
        except BaseException as exc:
            self._connection._end_after(exc)
            raise


def scoped(
    handler: Callable[[Connection], Awaitable[object]],
    *,
    finish_on: FinishOn = (),
    drain: Drain | None = DEFAULT_DRAIN,
    keepalive: float | None = None,
) -> Callable[[TCPStream], Coroutine[Any, Any, None]]:
    """Turn *handler* into what any AnyIO listener's `serve()` accepts.

    ::

        listener = await anyio.create_tcp_listener(local_port=8000)
        await listener.serve(scoped(handler))

    `trio.serve_tcp(scoped(handler), 8000)` works as well. With both, the handler's
    exceptions propagate to the server's task group.

    Args:
      handler: async function of one :class:`Connection`. If it returns, the peer gets
        FIN, and if it fails RST.
      finish_on, drain, keepalive: see :func:`connection_scope`.

    Raises:
      TypeError: *handler* is not an async function, or another argument is of the wrong
        type.
    """
    check_handler(handler, "scoped()")
    finish_on = check_finish_on(finish_on)
    check_drain(drain)
    check_keepalive(keepalive)

    @functools.wraps(handler)
    async def serve_one(stream: TCPStream) -> None:
        try:
            connection = Entry(stream, finish_on, drain, keepalive).enter()
        except OSError:  # for want of a descriptor
            await discard(stream)
            raise
        await run(connection, handler)

    return serve_one


def check_handler(handler: object, taker: str) -> None:
    """Refuse what cannot be an async function of one argument.

    A lambda or a callable object may return a coroutine, so only calling it would tell.
    """
    if inspect.iscoroutine(handler):
        handler.close()
        raise TypeError(
            f"{taker} takes an async function; this is a coroutine already: pass the "
            "function itself, without calling it"
        )
    if not callable(handler):
        raise TypeError(f"{taker} takes an async function, not {handler!r}")
    function: object = handler
    while isinstance(function, functools.partial):
        function = function.func
    is_lambda = getattr(function, "__name__", None) == "<lambda>"
    if inspect.isclass(function) or (
        inspect.isroutine(function)
        and not inspect.iscoroutinefunction(function)
        and not is_lambda
    ):
        raise TypeError(f"{taker} takes an async function; {handler!r} is not async")


def check_on_ending(on_ending: object) -> None:
    """Refuse what cannot be a function that is not async."""
    if on_ending is not None and (
        not callable(on_ending) or inspect.iscoroutinefunction(on_ending)
    ):
        raise TypeError(f"on_ending takes a function that is not async: {on_ending!r}")
