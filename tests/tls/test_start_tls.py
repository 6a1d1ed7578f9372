"""start_tls() on a connection that others use, too, in scopes within scopes."""

from __future__ import annotations

import ssl
from contextlib import suppress
from typing import Any

import anyio
import anyio.abc
import anyio.to_thread
import pytest
from anyio.streams.buffered import BufferedByteStream

from anyio_rst import (
    Cause,
    Connection,
    connection_scope,
)
from anyio_rst.testing import assert_rst

from securing import CLEAN, TLSPeer, client_context, server_context
from serving import (
    LONG,
    arrived,
    assert_reset,
    connection_of,
    foreign_pair,
    serve,
    settled,
    value_of,
)

pytestmark = pytest.mark.anyio


async def test_others_are_busy_during_the_handshake_and_none_of_theirs_is_sent(
    kind: str,
) -> None:
    async with connection_of(kind) as (conn, peer):
        async with anyio.create_task_group() as tg:
            tg.start_soon(conn.start_tls, server_context())
            await settled()
            with pytest.raises(anyio.BusyResourceError):
                await conn.send(b"secret")
            with pytest.raises(anyio.BusyResourceError):
                await conn.receive()
            with pytest.raises(anyio.BusyResourceError):
                conn.detach()
            with pytest.raises(RuntimeError, match="has been started"):
                await conn.start_tls(server_context())
            tg.cancel_scope.cancel()
        await assert_reset(conn, peer, Cause.CANCELLED, b"")


async def test_half_close_during_the_handshake_is_busy_too(kind: str) -> None:
    async with connection_of(kind) as (conn, peer):
        async with anyio.create_task_group() as tg:
            tg.start_soon(conn.start_tls, server_context())
            await settled()
            with pytest.raises(anyio.BusyResourceError):
                await conn.send_eof()
            tg.cancel_scope.cancel()
        await assert_reset(conn, peer, Cause.CANCELLED, b"")


class Inner:
    """A scope within a scope: around the connection, or a buffered stream around it."""

    def __init__(self, conn: Connection, depth: int) -> None:
        stream: anyio.abc.ByteStream = conn
        self.buffers = []
        for _ in range(depth):
            stream = BufferedByteStream(stream)
            self.buffers.append(stream)
        self.scope = connection_scope(stream)


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("who", ["outer", "inner"])
async def test_start_tls_holds_for_all_scopes(kind: str, depth: int, who: str) -> None:
    async def handler(conn: Connection) -> None:
        inner = Inner(conn, depth)
        async with inner.scope as inside:
            await inside.send(b"go\n")
            await (conn if who == "outer" else inside).start_tls(server_context())
            await inside.send(b"from inside")
            await conn.send(b"from outside")
            for buffer in inner.buffers:
                await buffer.send(b"from a buffer")
            assert await inside.receive(4) == b"true"
            assert await conn.receive(4) == b"true"
            for stream in (conn, inside):
                with pytest.raises(RuntimeError, match="has been started"):
                    await stream.start_tls(server_context())

    said = b"from inside" + b"from outside" + depth * b"from a buffer"
    async with serve(kind, handler) as service:
        with service.connect() as raw:
            assert await raw.receive(3) == b"go\n"
            peer = TLSPeer(raw, client_context(), server_side=False)
            await peer.handshake()
            await peer.send(b"true")
            await peer.send(b"true")
            assert await peer.end() == (said, CLEAN)
            raw.send_eof()
            value_of(await service.ending())


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("who", ["outer", "inner"])
async def test_plaintext_in_a_buffer_of_an_inner_scope_never_surfaces(
    kind: str, depth: int, who: str
) -> None:
    """CVE-2011-0411, whichever of the buffers it waits in."""
    for holder in range(depth):
        async with connection_of(kind) as (conn, peer):
            await peer.send(b"STARTTLS\nDELETE everything\n")
            inner = Inner(conn, depth)
            async with inner.scope as inside:
                line = await inner.buffers[holder].receive_until(b"\n", 100)
                assert line == b"STARTTLS"
                refused = pytest.raises(anyio.BrokenResourceError, match="18 bytes of pl")
                with refused, anyio.fail_after(1):
                    await (conn if who == "outer" else inside).start_tls(server_context())
                with pytest.raises(anyio.ClosedResourceError):
                    await inside.receive()
            await assert_rst(peer)
            assert conn.ending is not None
            assert conn.ending.cause is Cause.RAISED


@pytest.mark.parametrize("depth", [0, 1])
async def test_client_hello_that_was_read_ahead_is_used(depth: int) -> None:
    stream, raw = await foreign_pair()
    with raw:
        peer = TLSPeer(raw, client_context(), server_side=False)
        with suppress(ssl.SSLWantReadError):
            peer.tls.do_handshake()
        await raw.send(peer.outgoing.read())
        await arrived(raw)
        await settled()  # an accepted stream reads from the start
        wrapped: Any = stream
        for _ in range(depth):
            wrapped = BufferedByteStream(wrapped)

        async def ours() -> None:
            async with connection_scope(wrapped) as conn:
                await conn.start_tls(server_context())
                await conn.send(b"secret")

        with anyio.fail_after(LONG):
            async with anyio.create_task_group() as tg:
                tg.start_soon(ours)
                await peer.handshake()
                assert await peer.end() == (b"secret", CLEAN)
                raw.send_eof()
