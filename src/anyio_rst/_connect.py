"""`connect_tcp`: the client's side."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, cast

import anyio

from . import _sockets
from ._drain import DEFAULT_DRAIN, Drain, check_drain
from ._ending import check_finish_on
from ._scope import connection_scope
from ._tls import check_tls

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator
    from contextlib import AbstractAsyncContextManager
    from ipaddress import IPv4Address, IPv6Address

    from ._connection import Connection
    from ._ending import FinishOn

__all__ = ["connect_tcp"]


def connect_tcp(
    host: str | IPv4Address | IPv6Address,
    port: int,
    *,
    local_host: str | IPv4Address | IPv6Address | None = None,
    happy_eyeballs_delay: float = 0.25,
    tls: bool = False,
    ssl_context: ssl.SSLContext | None = None,
    tls_hostname: str | None = None,
    finish_on: FinishOn = (),
    drain: Drain | None = DEFAULT_DRAIN,
) -> AbstractAsyncContextManager[Connection, None]:
    """Connect over TCP, and end the connection the way the body ends.

    ::

        async with connect_tcp("example.org", 80) as conn:
            await conn.send(request)

    Args:
      host, port, local_host, happy_eyeballs_delay: those of :func:`anyio.connect_tcp`,
        which makes the connection (RFC 6555).
      tls: speak TLS, as :meth:`Connection.start_tls` does, on the client's side. Not
        needed with one of the next two.
      ssl_context: None for the default context of :mod:`ssl`.
      tls_hostname: the name to check the peer's certificate for, if it is not *host*.
      finish_on: see :func:`connection_scope`.
      drain: see :func:`connection_scope`.

    Raises:
      OSError: the connection could not be made.
      ssl.SSLError, anyio.BrokenResourceError: the TLS handshake failed; the connection
        was reset.
      TypeError, ValueError: *finish_on* or *drain* is of the wrong type, or
        *ssl_context* is, or is for a server.
      RuntimeError: this platform cannot reset a stream of this AnyIO. No connection was
        made.
    """
    finish_on = check_finish_on(finish_on)
    check_drain(drain)
    hostname = tls_hostname or str(host)
    secure = tls or ssl_context is not None or tls_hostname is not None
    if secure:
        check_tls(ssl_context, False, hostname)

    @asynccontextmanager
    async def connected() -> AsyncIterator[Connection]:
        reason = _sockets.why_not_resettable()
        if reason is not None:
            raise RuntimeError(f"connect_tcp() could not reset a connection: {reason}")
        stream = await anyio.connect_tcp(
            host, port, local_host=local_host, happy_eyeballs_delay=happy_eyeballs_delay
        )
        async with connection_scope(stream, finish_on=finish_on, drain=drain) as conn:
            if secure:
                await conn.start_tls(ssl_context, server_side=False, hostname=hostname)
            yield conn

    # It never swallows an exception, which its type would leave open.
    return cast("AbstractAsyncContextManager[Connection, None]", connected())
