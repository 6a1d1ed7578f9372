"""What a type checker knows of a program for Trio's streams. It is never run.

It is checked against the sources alone: the wheel is checked where Trio is not installed.
"""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

import trio
import trio.socket
from typing_extensions import assert_type

from anyio_rst.trio_streams import (
    SocketOptions,
    TrioStream,
    TrioTLSStream,
    as_trio_stream,
    scoped,
)

if TYPE_CHECKING:
    from anyio_rst import Connection


async def use_trio_streams(conn: Connection, tls: TrioTLSStream) -> None:
    stream = as_trio_stream(conn)
    half_closeable: trio.abc.HalfCloseableStream = stream
    assert_type(await stream.receive_some(), bytes)
    assert_type(await stream.send_all(b""), None)
    assert_type(await half_closeable.send_eof(), None)
    assert_type(stream.socket, trio.socket.SocketType)
    async with stream as entered:
        assert_type(entered, TrioStream)
    never_half_closed: trio.abc.Stream = tls
    assert_type(await tls.do_handshake(), None)
    assert_type(tls.transport_stream, SocketOptions)
    await never_half_closed.aclose()


async def unmodified(stream: trio.SocketStream) -> None:
    await stream.send_all(b"")


async def unmodified_over_tls(stream: trio.SSLStream[trio.SocketStream]) -> None:
    await stream.send_all(b"")


async def serve_on_trio(context: ssl.SSLContext) -> None:
    await trio.serve_tcp(scoped(unmodified, finish_on=OSError), 0)
    await trio.serve_ssl_over_tcp(
        scoped(unmodified_over_tls, drain=None, keepalive=60), 0, context
    )
