"""What a type checker knows of a user's program. It is checked, and never run.

`nox -s types` checks it against the sources, and `nox -s package` against the wheel.
"""

from __future__ import annotations

import socket
import ssl
from asyncio import StreamReader, StreamWriter, start_server
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import anyio
import outcome
from anyio.abc import SocketAttribute, SocketStream, TaskGroup
from typing_extensions import assert_type

from anyio_rst import (
    Cause,
    CloseKind,
    Connection,
    ConnectionLost,
    Drain,
    Ending,
    FinishOn,
    Idle,
    PeerClose,
    PeerReset,
    Server,
    ServerStatistics,
    TCPStream,
    TLSSession,
    connect_tcp,
    connection_scope,
    scoped,
    serve_tcp,
)
from anyio_rst.asyncio_streams import Streams
from anyio_rst.asyncio_streams import connection_scope as streams_scope
from anyio_rst.asyncio_streams import scoped as scoped_streams
from anyio_rst.lowlevel import (
    arm,
    disarm,
    finish,
    reset,
    reset_on_failure,
    set_keepalive,
    unacknowledged,
)
from anyio_rst.testing import (
    Capture,
    CaptureUnavailable,
    Direction,
    Faults,
    Peer,
    Proxy,
    ProxyConnection,
    Seen,
    Segment,
    TCPFlag,
    assert_fin,
    assert_rst,
    capture_segments,
    connect_peer,
    open_pair,
    open_peer,
    open_proxy,
)

if TYPE_CHECKING:
    from anyio.streams.buffered import BufferedByteStream
    from anyio.streams.tls import TLSStream


async def use_connection(conn: Connection) -> int:
    stream: SocketStream = conn
    assert_type(await conn.receive(), bytes)
    assert_type(await conn.receive(100), bytes)
    assert_type(await stream.receive(), bytes)
    assert_type([chunk async for chunk in conn], list[bytes])
    assert_type(await conn.send(b""), None)
    assert_type(await conn.send_eof(), None)
    assert_type(await conn.start_tls(), None)
    await conn.start_tls(ssl.create_default_context(), server_side=False, hostname="a")
    assert_type(conn.create_task_group(), TaskGroup)
    async with conn.create_task_group() as tg:
        tg.start_soon(conn.send, b"")
    assert_type(conn.abort(), None)
    assert_type(await conn.aclose(), None)
    assert_type(conn.extra(SocketAttribute.remote_port), int)
    assert_type(conn.ending, Ending | None)
    assert_type(conn.remote_address, tuple[str, int] | None)
    conn.remote_address = ("192.0.2.7", 4711)
    assert_type(conn.state, SimpleNamespace)
    conn.state.user = "Ada"
    with conn.idle(), conn.idle(timeout=30) as idle:
        assert_type(idle, Idle)
        await conn.receive()
    # It may have been ended, and what is behind it is not out of reach.
    assert_type(idle.ended, bool)
    assert_type(idle.stopping, bool)
    assert_type(idle.timed_out, bool)
    assert_type(conn.is_stale(), bool)
    async with conn as same:
        assert_type(same, Connection)
    return 1


async def use_scope(
    stream: SocketStream, buffered: BufferedByteStream, tls: TLSStream, conn: Connection
) -> str:
    for each in (stream, buffered, tls, conn):
        async with connection_scope(each):
            pass
    async with connection_scope(
        stream,
        finish_on=(EOFError, OSError),
        drain=Drain(timeout=1, max_bytes=2**20),
        keepalive=30,
    ) as conn:
        assert_type(conn, Connection)
    async with connection_scope(stream, finish_on=anyio.EndOfStream, drain=None) as conn:
        # No type checker may think that a scope swallows exceptions.
        return "returned"


async def use_listener() -> None:
    listener = await anyio.create_tcp_listener()
    await listener.serve(scoped(use_connection))
    await listener.serve(
        scoped(use_connection, finish_on=EOFError, drain=None, keepalive=None)
    )
    # That of a Trio stream is among what it takes, and need not be installed.
    handler: Callable[[SocketStream], Coroutine[Any, Any, None]] = scoped(use_connection)
    await listener.serve(handler)


def report(conn: Connection) -> None:
    ending = conn.ending
    if ending is None:
        return
    assert_type(ending.kind, CloseKind)
    assert_type(ending.cause, Cause)
    assert_type(ending.outcome, outcome.Outcome[object] | None)
    assert_type(ending.peer, PeerClose)
    assert_type(ending.remote_address, tuple[str, int] | None)
    assert_type(ending.discarded, int)
    assert_type(ending.unacknowledged, int | None)
    assert_type(ending.fin_sent_before_reset, bool)
    assert_type(ending.duration, float)
    assert_type(ending.sent, int)
    assert_type(ending.received, int)
    assert_type(ending.tls, TLSSession | None)
    if ending.tls is not None:
        assert_type(ending.tls.version, str)
        assert_type(ending.tls.cipher, str)
    assert_type(ending.as_dict(), dict[str, Any])


async def use_aliases(stream: TCPStream, finish_on: FinishOn) -> None:
    async with connection_scope(stream, finish_on=finish_on):
        pass


async def use_server(sock: socket.socket, context: ssl.SSLContext) -> None:
    handler: Callable[[Connection], Awaitable[object]] = use_connection
    assert_type(await serve_tcp(handler), None)
    await serve_tcp(handler, 8000, host="::1", backlog=100, reuse_port=True)
    await serve_tcp(handler, sockets=[sock], max_connections=1, propagate_errors=True)
    async with anyio.create_task_group() as tg:
        serve = partial(
            serve_tcp,
            handler,
            finish_on=[EOFError],
            drain=Drain(),
            on_ending=report,
            preamble=use_connection,
            ssl_context=context,
            handshake_timeout=5,
            keepalive=2.5,
            task_group=tg,
        )
        use_running_server(await tg.start(serve))


def use_running_server(server: Server) -> None:
    assert_type(server.port, int)
    assert_type(server.addresses, tuple[tuple[str, int], ...])
    assert_type(server.connections, frozenset[Connection])
    statistics = server.statistics()
    assert_type(statistics, ServerStatistics)
    assert_type(statistics.open_connections, int)
    assert_type(statistics.accepted_connections, int)
    assert_type(statistics.endings_by_kind, Mapping[CloseKind, int])
    assert_type(statistics.endings_by_cause, Mapping[Cause, int])
    assert_type(server.stop(), None)
    assert_type(server.stopping, bool)


async def use_client(context: ssl.SSLContext) -> bytes:
    assert_type(await connect_tcp("localhost", 8000), Connection)
    async with connect_tcp("localhost", 8000) as conn:
        assert_type(conn, Connection)
    async with connect_tcp(
        "localhost",
        8000,
        local_host="127.0.0.1",
        happy_eyeballs_delay=0.5,
        tls=True,
        ssl_context=context,
        tls_hostname="example.org",
        finish_on=EOFError,
        drain=None,
        keepalive=60,
    ) as conn:
        try:
            return await conn.receive()
        except PeerReset as exc:
            lost: ConnectionLost = exc
            broken: anyio.BrokenResourceError = lost
            raise broken from None


async def use_pair() -> bytes:
    async with open_pair(host="::1", finish_on=EOFError, drain=None) as (client, server):
        assert_type(client, Connection)
        assert_type(server, Connection)
        return await server.receive()


async def use_peer(port: int) -> Seen:
    faults = Faults()
    assert_type(faults.shorten_sends(1, 2), None)
    assert_type(faults.reset_after(3), None)
    async with open_peer(faults=faults, small_buffers=True) as (conn, peer):
        assert_type(conn, Connection)
        assert_type(peer, Peer)
        assert_type(peer.socket, socket.socket)
        assert_type(await peer.send(b""), None)
        assert_type(peer.send_eof(), None)
        assert_type(await peer.receive_exactly(1, timeout=2), bytes)
        assert_type(await peer.read_to_end(timeout=2), Seen)
        assert_type(peer.stop_reading(), None)
        assert_type(peer.reset(), None)
        assert_type(peer.close(), None)
    seen = await assert_fin(peer, b"", timeout=2)
    assert_type(seen, Seen)
    assert_type(seen.data, bytes)
    assert_type(seen.close, PeerClose)
    assert_type(seen.elapsed, float)
    assert_type(await assert_rst(peer, timeout=2), Seen)
    async with connect_peer(port, host="::1", receive_buffer=1) as peer:
        assert_type(peer, Peer)
        return await peer.read_to_end()


async def use_proxy(port: int) -> PeerClose:
    async with open_proxy(port, host="example.org") as proxy:
        assert_type(proxy, Proxy)
    with open_proxy(port) as proxy:
        assert_type(proxy, Proxy)
        assert_type(proxy.port, int)
        assert_type(proxy.address, tuple[str, int])
        assert_type(proxy.cut(after=1, kind="silence", direction="up", every=2), None)
        assert_type(proxy.cut(close_notify=True), None)
        assert_type(proxy.slow(delay=0.1, rate=1, chunk=1), None)
        assert_type(proxy.mend(), None)
        assert_type(proxy.connections, tuple[ProxyConnection, ...])
        return proxy.connections[0].client_end


def use_capture(port: int) -> Segment | None:
    try:
        with capture_segments(port) as capture:
            assert_type(capture, Capture)
            assert_type(capture.segments, tuple[Segment, ...])
        (segment,) = capture.having(TCPFlag.FIN | TCPFlag.ACK)
    except CaptureUnavailable as exc:
        error: RuntimeError = exc
        raise error from None
    assert_type(segment, Segment)
    assert_type(segment.direction, Direction)
    assert_type(segment.other_port, int)
    assert_type(segment.flags, TCPFlag)
    assert_type(segment.sequence, int)
    assert_type(segment.length, int)
    return segment


def the_parts(sock: socket.socket) -> None:
    assert_type(arm(sock), None)
    assert_type(disarm(sock), None)
    assert_type(finish(sock), None)
    assert_type(reset(sock), None)
    assert_type(set_keepalive(sock, 10), None)
    assert_type(unacknowledged(sock), int | None)
    with reset_on_failure(sock) as nothing:
        assert_type(nothing, None)


async def asyncios_streams(reader: StreamReader, writer: StreamWriter) -> Ending | None:
    async with streams_scope(
        reader,
        writer,
        finish_on=KeyError,
        drain=None,
        keepalive=10,
        on_ending=lambda ending: assert_type(ending, Ending),
    ) as streams:
        assert_type(streams, Streams)
        assert_type(streams.reader, StreamReader)
        assert_type(streams.writer, StreamWriter)
    return streams.ending


async def serve_asyncios_streams() -> None:
    async def handler(reader: StreamReader, writer: StreamWriter) -> None:
        pass

    await start_server(scoped_streams(handler, finish_on=(), drain=Drain()), port=8000)
