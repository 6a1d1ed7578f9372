"""start_tls(), also on a connection that others use, in scopes within scopes."""

from __future__ import annotations

import ssl
from typing import Any

import anyio
import anyio.abc
import anyio.to_thread
import pytest
from anyio.streams.buffered import BufferedByteStream
from conftest import on_one_loop

from anyio_rst import Cause, CloseKind, Connection, PeerClose, connection_scope
from anyio_rst.testing import assert_fin, assert_rst, open_peer

from securing import (
    CLEAN,
    TLSPeer,
    client_context,
    client_hello,
    each_version,
    server_context,
    shake_hands,
)
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


@each_version
async def test_start_tls_in_the_middle_of_a_connection(
    anyio_backend: object, version: ssl.TLSVersion
) -> None:
    async def handler(conn: Connection) -> None:
        assert await conn.receive() == b"STARTTLS\n"
        await conn.send(b"go\n")
        await conn.start_tls(server_context(version))
        await conn.send(await conn.receive())
        with pytest.raises(RuntimeError, match="has been started"):
            await conn.start_tls(server_context(version))
        with pytest.raises(NotImplementedError):
            await conn.send_eof()

    async with serve("native", handler) as service:
        with service.connect() as raw:
            await raw.send(b"STARTTLS\n")
            assert await raw.receive(3) == b"go\n"
            peer = await shake_hands(raw, version=version)
            await peer.send(b"secret")
            assert await peer.end() == (b"secret", CLEAN)
        value_of(await service.ending())


@on_one_loop
@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("context",), {}, TypeError, "ssl_context must be an ssl.SSLContext"),
        ((), {}, TypeError, "server's side of TLS needs an ssl_context"),
        ((), {"server_side": False}, ValueError, "needs the hostname"),
        (
            (server_context(),),
            {"server_side": False},
            ValueError,
            "for the server's side",
        ),
        ((client_context(),), {"server_side": True}, ValueError, "the client's side"),
        ((client_context(),), {}, ValueError, "needs the hostname"),
    ],
)
async def test_bad_arguments_are_refused_and_nothing_is_changed(
    arguments: Any, options: Any, error: type[Exception], message: str
) -> None:
    async with open_peer() as (conn, peer):
        with pytest.raises(error, match=message):
            await conn.start_tls(*arguments, **options)
        await conn.send(b"fine")
    await assert_fin(peer, b"fine")


# The handshake.


@pytest.mark.parametrize(
    ("data", "eof"),
    [(b"GET / HTTP/1.0\r\n\r\n", False), (b"", True), (client_hello()[:20], True)],
    ids=["garbage", "FIN", "half a ClientHello"],
)
async def test_handshake_that_fails_resets(kind: str, data: bytes, eof: bool) -> None:
    async with connection_of(kind) as (conn, peer):
        await peer.send(data)
        if eof:
            peer.send_eof()
        with pytest.raises((ssl.SSLError, anyio.BrokenResourceError)):
            await conn.start_tls(server_context())
        await assert_reset(conn, peer, Cause.RAISED, b"")


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
                await conn.send_eof()
            with pytest.raises(anyio.BusyResourceError):
                await conn.receive()
            with pytest.raises(anyio.BusyResourceError):
                conn.detach()
            with pytest.raises(RuntimeError, match="has been started"):
                await conn.start_tls(server_context())
            tg.cancel_scope.cancel()
        await assert_reset(conn, peer, Cause.CANCELLED, b"")


# Plaintext that came before.


async def test_plaintext_before_the_handshake_never_surfaces_after_it(kind: str) -> None:
    """CVE-2011-0411: STARTTLS, a command and the ClientHello in one segment."""

    async with connection_of(kind) as (conn, peer):
        await peer.send(b"STARTTLS\nDELETE everything\n" + client_hello())
        assert await conn.receive(len(b"STARTTLS\n")) == b"STARTTLS\n"
        with pytest.raises((ssl.SSLError, anyio.BrokenResourceError)):
            await conn.start_tls(server_context())
        assert conn.ending is not None
        assert conn.ending.kind is CloseKind.RST
        await assert_rst(peer)


async def test_start_tls_refuses_a_buffer_that_holds_plaintext() -> None:
    stream, peer = await foreign_pair()
    with peer:
        await peer.send(b"STARTTLS\nDELETE everything\n")
        buffered = BufferedByteStream(stream)
        assert await buffered.receive_until(b"\n", 100) == b"STARTTLS"
        async with connection_scope(buffered) as conn:
            message = "18 bytes of plaintext came before the TLS handshake"
            with pytest.raises(anyio.BrokenResourceError, match=message):
                await conn.start_tls(server_context())
        assert (await peer.read_to_end()).close is PeerClose.RST


# Scopes within scopes.


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
            peer = await shake_hands(raw)
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
        await raw.send(peer.hello())
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
