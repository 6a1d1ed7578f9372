"""`connect_tcp`: the client's side."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import anyio

from ._connection import Connection
from ._ending import check_finish_on
from ._limits import CLIENTS_DRAIN, Drain, check_drain, check_keepalive
from ._origin import why_not_resettable
from ._scope import ConnectionScope, Entry
from ._takeover import discard
from ._tls import check_tls

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable, Generator
    from ipaddress import IPv4Address, IPv6Address
    from typing import Any

    from anyio.abc import SocketStream

    from ._ending import FinishOn

__all__ = ["connect_tcp"]


def connect_tcp(
    host: str | IPv4Address | IPv6Address,
    port: int,
    *,
    local_host: str | IPv4Address | IPv6Address | None = None,
    local_port: int | None = None,
    happy_eyeballs_delay: float = 0.25,
    tls: bool = False,
    ssl_context: ssl.SSLContext | None = None,
    tls_hostname: str | None = None,
    tls_standard_compatible: bool = True,
    finish_on: FinishOn = (),
    drain: Drain | None = CLIENTS_DRAIN,
    keepalive: float | None = None,
) -> Connecting:
    """Connect over TCP, and end the connection the way the body ends.

    ::

        async with connect_tcp("example.org", 80) as conn:
            await conn.send(request)

    Or, for a pool or another owner that is no block::

        conn = await connect_tcp("example.org", 80)

    Then :meth:`Connection.aclose` or :meth:`Connection.abort` ends it. If it is
    forgotten, it is reset when it is garbage-collected.

    Args:
      host, port, local_host, local_port, happy_eyeballs_delay: those of
        :func:`anyio.connect_tcp`, which makes the connection (RFC 6555). *local_port*
        goes with *local_host*.
      tls: start TLS, as :meth:`Connection.start_tls` does. Not needed with *ssl_context*
        or *tls_hostname*.
      ssl_context: None for the default context of :mod:`ssl`.
      tls_hostname: the name to check the peer's certificate for, if it is not *host*.
      tls_standard_compatible: False for protocols that delimit their messages
        themselves; see :meth:`Connection.start_tls`.
      finish_on: see :func:`connection_scope`.
      drain: see :func:`connection_scope`. To return in the middle of a download is a
        success, and the drain then reads the rest of it. To give a download up, call
        :meth:`Connection.abort`.
      keepalive: see :func:`connection_scope`.

    Raises:
      OSError: the connection could not be made.
      ssl.SSLError, anyio.BrokenResourceError: the TLS handshake failed; the connection
        was reset.
      TypeError, ValueError: an argument is of the wrong type, *ssl_context* is for a
        server, or *local_port* was given without *local_host*.
      RuntimeError: this platform cannot reset a stream of the running event loop. No
        connection was made.
    """
    finish_on = check_finish_on(finish_on)
    check_drain(drain)
    check_keepalive(keepalive)
    if local_port is not None and local_host is None:
        raise ValueError("local_port goes with local_host, the address to bind")
    hostname = tls_hostname or str(host)
    secure = tls or ssl_context is not None or tls_hostname is not None
    if secure:
        check_tls(ssl_context, False, hostname)

    async def connect() -> SocketStream:
        return await anyio.connect_tcp(
            host,
            port,
            local_host=local_host,
            local_port=local_port,
            happy_eyeballs_delay=happy_eyeballs_delay,
        )

    start_tls = functools.partial(
        Connection.start_tls,
        ssl_context=ssl_context,
        server_side=False,
        hostname=hostname,
        standard_compatible=tls_standard_compatible,
    )
    return Connecting(connect, finish_on, drain, keepalive, start_tls if secure else None)


class Connecting(ConnectionScope):
    """Connects at entry, and is the scope of the connection from then on."""

    __slots__ = ("_connect", "_drain", "_finish_on", "_keepalive", "_start_tls")

    def __init__(
        self,
        connect: Callable[[], Awaitable[SocketStream]],
        finish_on: tuple[type[BaseException], ...],
        drain: Drain | None,
        keepalive: float | None,
        start_tls: Callable[[Connection], Awaitable[None]] | None,
    ) -> None:
        super().__init__(None)
        self._connect: Callable[[], Awaitable[SocketStream]] | None = connect
        self._finish_on = finish_on
        self._drain = drain
        self._keepalive = keepalive
        self._start_tls = start_tls

    def __await__(self) -> Generator[Any, Any, Connection]:
        return self.__aenter__().__await__()

    async def __aenter__(self) -> Connection:
        reason = why_not_resettable()
        if reason is not None:
            raise RuntimeError(f"connect_tcp() could not reset its connection: {reason}")
        if self._connect is None:
            raise RuntimeError("a connect_tcp() can only be entered once")
        stream = await self._connect()
        self._connect = None
        try:
            self._entry = Entry(stream, self._finish_on, self._drain, self._keepalive)
            connection = await super().__aenter__()
        except OSError:
            await discard(stream)
            raise
        if self._start_tls is not None:
            # It resets the connection when it fails, which then has an end.
            await self._start_tls(connection)
        return connection
