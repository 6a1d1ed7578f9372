"""Connections for programs that are written for Trio's streams.

For Trio alone, which importing this imports; `anyio_rst` itself does not.
"""

from __future__ import annotations

import functools
import math
import operator
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import anyio
import trio
import trio.abc
from anyio import current_effective_deadline
from anyio.abc import SocketAttribute
from anyio.lowlevel import checkpoint
from anyio.streams.tls import TLSAttribute

from ._connection import Connection
from ._ending import all_leaves, exception_leaving
from ._limits import DEFAULT_DRAIN
from ._origin import RECEIVE_SIZE
from ._scope import check_handler
from ._scope import scoped as scoped_connection
from ._tls import SecureStream

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterator
    from types import TracebackType

    from typing_extensions import Self

    from ._ending import FinishOn
    from ._limits import Drain
    from ._scope import TCPStream

__all__ = ["SocketOptions", "TrioStream", "TrioTLSStream", "as_trio_stream", "scoped"]


def as_trio_stream(conn: Connection) -> TrioStream:
    """Return *conn* as a Trio stream, for a library that takes one.

    ::

        async with connect_tcp(host, port) as conn:
            stream = as_trio_stream(conn)
            ws = await trio_websocket.wrap_client_stream(nursery, stream, host, path)

    The connection's owner still decides how it ends, unless the stream is closed first:
    see :meth:`TrioStream.aclose`. Over TLS, `send_eof()` raises
    :exc:`NotImplementedError`.

    Raises:
      TypeError: *conn* is no :class:`~anyio_rst.Connection`.
    """
    if not isinstance(conn, Connection):
        raise TypeError(f"as_trio_stream() takes a Connection, not {conn!r}")
    return TrioStream(conn)


def scoped(
    handler: Callable[[Any], Awaitable[object]],
    *,
    finish_on: FinishOn = (),
    drain: Drain | None = DEFAULT_DRAIN,
    keepalive: float | None = None,
) -> Callable[[TCPStream], Coroutine[Any, Any, None]]:
    """Give an unchanged handler of :func:`trio.serve_tcp` truthful endings.

    ::

        await trio.serve_tcp(trio_streams.scoped(handler), 8000)

    If the handler returns, the peer gets FIN, and if it fails RST. What the handler
    closes itself ends as :meth:`TrioStream.aclose` says. As always with Trio, its
    exceptions end the server. An exception that the handler catches itself is no failure.
    To change that, scope the function inside the `try`.

    Args:
      handler: async function of one stream, which is a :class:`TrioStream`, or a
        :class:`TrioTLSStream` with :func:`trio.serve_ssl_over_tcp`.
      finish_on, drain, keepalive: see :func:`~anyio_rst.connection_scope`.

    Raises:
      TypeError: *handler* is not an async function, or another argument is of the wrong
        type.
    """
    check_handler(handler, "trio_streams.scoped()")

    @functools.wraps(handler)
    async def over_connection(conn: Connection) -> object:
        is_tls = isinstance(conn._life.stream, SecureStream)
        return await handler(TrioTLSStream(conn) if is_tls else TrioStream(conn))

    return scoped_connection(
        over_connection, finish_on=finish_on, drain=drain, keepalive=keepalive
    )


class SocketOptions:
    """The socket and its options, as in a :class:`trio.SocketStream`."""

    def __init__(self, conn: Connection) -> None:
        self._conn = conn
        self._socket: trio.socket.SocketType | None = None

    @property
    def socket(self) -> trio.socket.SocketType:
        """A copy of the connection's socket, to read its state and options.

        It is closed with the connection; to close it earlier closes nothing else. The
        :class:`~anyio_rst.Ending` does not count what is sent or received on it directly.

        Raises:
          OSError: the connection has ended (EBADF), or no descriptor is left.
        """
        if self._socket is None:
            sock = self._conn.extra(SocketAttribute.raw_socket)
            self._socket = trio.socket.from_stdlib_socket(sock)
        return self._socket

    def setsockopt(
        self, level: int, option: int, value: Any, length: int | None = None
    ) -> None:
        """See :meth:`socket.socket.setsockopt`. SO_LINGER is set again at the end."""
        values = (value,) if length is None else (value, length)
        self._conn._life.native._sock.setsockopt(level, option, *values)

    def getsockopt(self, level: int, option: int, buffersize: int = 0) -> Any:
        """See :meth:`socket.socket.getsockopt`."""
        sock = self._conn._life.native._sock
        if buffersize == 0:
            return sock.getsockopt(level, option)
        return sock.getsockopt(level, option, buffersize)


class _Stream(trio.abc.Stream):
    """What streams with and without TLS have in common."""

    def __init__(self, conn: Connection) -> None:
        self._conn = conn
        self._at_entry = sys.exc_info()[1]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} over {self._conn!r}>"

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See :meth:`trio.abc.SendStream.send_all`.

        If it is cancelled after some of the bytes, the connection is torn: it can only
        end with an RST, and sending more is :exc:`trio.BrokenResourceError`.
        """
        with _errors_of_trio():
            await self._conn.send(data)  # type: ignore[arg-type]

    async def wait_send_all_might_not_block(self) -> None:
        """See :meth:`trio.abc.SendStream.wait_send_all_might_not_block`."""
        life = self._conn._life
        with _errors_of_trio():
            await life.stream.wait_writable()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """See :meth:`trio.abc.ReceiveStream.receive_some`; at most 64 KiB by default.

        The peer's reset is :exc:`trio.BrokenResourceError` from a
        :exc:`~anyio_rst.PeerReset`.
        """
        size = RECEIVE_SIZE if max_bytes is None else operator.index(max_bytes)
        try:
            with _errors_of_trio():
                return await self._conn.receive(size)
        except anyio.EndOfStream:
            return b""

    async def aclose(self) -> None:
        """End the connection, or leave that to its owner.

        - Normally it is :meth:`anyio_rst.Connection.aclose`: FIN, drain, close.
        - If it is cancelled, or called by :func:`trio.aclose_forcefully`, it resets.
        - While an exception is handled (`finally: await stream.aclose()`), it closes the
          stream for its users here. The end of the handler, or of the scope, decides what
          the peer gets: RST if the exception leaves it, FIN if it returns.

        `async with stream:` ends the connection as the block ends.
        """
        exc = exception_leaving(None, self._at_entry)
        gives_up = current_effective_deadline() == -math.inf
        if exc is None or gives_up or all_leaves(exc, trio.Cancelled):
            await self._conn.aclose()
        else:
            self._conn._life.native.refuse_users()
            await checkpoint()

    async def __aenter__(self) -> Self:
        await self._conn.__aenter__()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Trio's own would call aclose(), however the block was left.
        await self._conn.__aexit__(exc_type, exc_value, traceback)


class TrioStream(_Stream, trio.abc.HalfCloseableStream, SocketOptions):
    """A :class:`~anyio_rst.Connection` with the methods, meanings and exceptions of Trio.

    It has everything that a :class:`trio.SocketStream` has, but is no instance of that
    final class. The exception of the connection is the `__cause__` of Trio's exception.
    """

    def __init__(self, conn: Connection) -> None:
        _Stream.__init__(self, conn)
        SocketOptions.__init__(self, conn)

    async def send_eof(self) -> None:
        """See :meth:`trio.abc.HalfCloseableStream.send_eof`.

        The FIN cannot be taken back, see :meth:`anyio_rst.Connection.send_eof`.
        """
        with _errors_of_trio():
            await self._conn.send_eof()


# Of ssl.SSLObject, as trio.SSLStream has them.
_OF_THE_SESSION = {
    "cipher",
    "compression",
    "context",
    "get_channel_binding",
    "getpeercert",
    "pending",
    "selected_alpn_protocol",
    "server_hostname",
    "server_side",
    "session",
    "session_reused",
    "shared_ciphers",
    "version",
}


class TrioTLSStream(_Stream):
    """The same over TLS, with what a :class:`trio.SSLStream` has.

    It has the read-only attributes and methods of :class:`ssl.SSLObject`: `version()`,
    `cipher()`, `getpeercert()`, `selected_alpn_protocol()`, `server_hostname` and the
    others. It has no `unwrap()`. A close_notify goes before a FIN, but not before an RST.
    """

    def __init__(self, conn: Connection) -> None:
        super().__init__(conn)
        self._below = SocketOptions(conn)

    async def do_handshake(self) -> None:
        """Do the handshake now, if it has not been done yet.

        Raises:
          trio.BrokenResourceError: it failed, or the connection was lost.
        """
        stream = self._conn._life.stream
        assert isinstance(stream, SecureStream)
        with _errors_of_trio():
            await stream.handshake()

    @property
    def transport_stream(self) -> SocketOptions:
        """The socket of the stream below and its options, and nothing else."""
        return self._below

    def __getattr__(self, name: str) -> Any:
        if name not in _OF_THE_SESSION:
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")
        stream = self._conn._life.stream
        assert isinstance(stream, SecureStream)
        session = stream.given
        if not isinstance(session, trio.SSLStream):
            session = self._conn.extra(TLSAttribute.ssl_object)
        return getattr(session, name)


@contextmanager
def _errors_of_trio() -> Iterator[None]:
    try:
        yield
    except anyio.ClosedResourceError as exc:
        raise trio.ClosedResourceError(*exc.args) from exc
    except anyio.BrokenResourceError as exc:
        raise trio.BrokenResourceError(*exc.args) from exc
    except anyio.BusyResourceError as exc:
        raise trio.BusyResourceError(*exc.args) from exc
