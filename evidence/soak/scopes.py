"""The part of the server that goes through scopes: one listener of others for each way.

They are AnyIO's own, and on Trio its own too, with the streams that those accept.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import anyio
from anyio import fail_after
from anyio.abc import SocketAttribute
from anyio.streams.tls import TLSStream
from outcome import Error

from anyio_rst import Connection, connection_scope, scoped
from evidence.sockets import HOST

from .plans import REQUEST_TIMEOUT, TRIO_WAYS, Way

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable
    from typing import Protocol, TypeAlias

    import trio
    from anyio.abc import ByteStream, SocketStream, TaskGroup

    from anyio_rst import Drain

    Handler: TypeAlias = Callable[[Connection], Awaitable[object]]
    Stream: TypeAlias = SocketStream | trio.SocketStream

    class Owner(Protocol):
        """Who is told of it."""

        async def handle(self, conn: Connection) -> None: ...

        def on_ending(self, way: Way, conn: Connection) -> None: ...

        def on_refusal(
            self, way: Way, address: tuple[str, int] | None, exc: Exception | None
        ) -> None: ...

        def note(self, fault: str) -> None: ...


class Scopes:
    def __init__(
        self,
        owner: Owner,
        context: ssl.SSLContext,
        *,
        finish_on: type[BaseException],
        drain: Drain,
        backlog: int,
    ) -> None:
        self.open = 0
        self._owner = owner
        self._context = context
        self._finish_on = finish_on
        self._drain = drain
        self._backlog = backlog

    async def listen(self, way: Way, tasks: TaskGroup) -> int:
        """Serve in *tasks*, and return the port."""
        serve_one = functools.partial(self._serve_one, way)
        if way not in TRIO_WAYS:
            listener = await anyio.create_tcp_listener(
                local_host=HOST, backlog=self._backlog
            )
            tasks.start_soon(listener.serve, serve_one)
            return listener.extra(SocketAttribute.local_port)
        import trio  # where the loop is another, it may be missing

        listeners = await trio.open_tcp_listeners(0, host=HOST, backlog=self._backlog)
        tasks.start_soon(trio.serve_listeners, serve_one, listeners)
        port: int = listeners[0].socket.getsockname()[1]
        return port

    async def _serve_one(self, way: Way, stream: Any) -> None:
        """What `serve_tcp` does around a handler: nothing of it gets out."""
        self.open += 1
        address = address_of(stream)
        conns: list[Connection] = []

        async def handle(conn: Connection) -> None:
            conns.append(conn)
            if way is Way.START_TLS:
                with fail_after(REQUEST_TIMEOUT):
                    await conn.start_tls(self._context, server_side=True)
            await self._owner.handle(conn)

        failure: Exception | None = None
        try:
            await self._serve(way, stream, handle)
        except Exception as exc:
            failure = exc
        finally:
            self.open -= 1
            if conns and conns[0].ending is not None:
                self._check(way, conns[0], failure)
                self._owner.on_ending(way, conns[0])
            else:
                if conns:
                    self._owner.note(
                        f"{way.value}: no Ending, and it let out {failure!r}"
                    )
                await anyio.aclose_forcefully(stream)
                self._owner.on_refusal(way, address, failure)

    async def _serve(self, way: Way, stream: Any, handle: Handler) -> None:
        if way is Way.SCOPED:
            serve_one = scoped(handle, finish_on=self._finish_on, drain=self._drain)
            await serve_one(stream)
            return
        if way is Way.TLS_STREAM:
            stream = await self._wrapped(stream)
        elif way is Way.TRIO_TLS:
            import trio

            stream = trio.SSLStream(stream, self._context, server_side=True)
        async with connection_scope(
            stream, finish_on=self._finish_on, drain=self._drain
        ) as conn:
            await handle(conn)

    async def _wrapped(self, stream: ByteStream) -> TLSStream:
        try:
            with fail_after(REQUEST_TIMEOUT):
                return await TLSStream.wrap(
                    stream, server_side=True, ssl_context=self._context
                )
        except BaseException:
            await anyio.aclose_forcefully(stream)
            raise

    def _check(self, way: Way, conn: Connection, failure: Exception | None) -> None:
        """What leaves a scope is what the handler has raised, unchanged."""
        ending = conn.ending
        assert ending is not None
        raised = ending.outcome.error if isinstance(ending.outcome, Error) else None
        if failure is not raised and not (
            failure is None and not isinstance(raised, Exception)
        ):
            self._owner.note(f"{way.value} let out {failure!r} instead of {raised!r}")


def address_of(stream: Stream) -> tuple[str, int] | None:
    """None if its peer has gone already."""
    try:
        if isinstance(stream, anyio.abc.SocketStream):
            host, port = stream.extra(SocketAttribute.raw_socket).getpeername()
        else:
            host, port = stream.socket.getpeername()
    except (OSError, AttributeError):  # uvloop's transport has no socket any more
        return None
    return host, port
