"""Handshakes that fail, and sessions that never had one."""

from __future__ import annotations

import logging
import socket
import ssl
from collections.abc import Callable
from functools import partial
from typing import Any

import anyio
import anyio.abc
import anyio.to_thread
import pytest
import trio
import trustme
from conftest import BACKENDS, on_one_loop

from anyio_rst import (
    Cause,
    CloseKind,
    Connection,
    PeerClose,
    PeerReset,
    connect_tcp,
    connection_scope,
    serve_tcp,
)

from securing import CLEAN, client_context, client_hello, server_context, shake_hands
from serving import (
    LONG,
    Peer,
    Seen,
    accepted,
    assert_reset,
    connection_of,
    echo,
    said,
    serve,
    settled,
    stream_and_peer,
    timeout_once_settled,
    value_of,
)

pytestmark = pytest.mark.anyio

TLS12 = ssl.TLSVersion.TLSv1_2
TRIES = 5

on_trio = pytest.mark.parametrize("anyio_backend", BACKENDS[2:], indirect=True)

# Who starts TLS: serve_tcp() or connect_tcp(), or start_tls().
each_starter = pytest.mark.parametrize("starter", ["own", "start_tls"])


# The alert that says why.


@each_starter
async def test_client_is_told_why_its_handshake_was_refused(
    starter: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "anyio_rst")
    context = server_context()

    async def handler(conn: Connection) -> None:
        assert starter == "start_tls"
        with pytest.raises(ssl.SSLError, match="UNSUPPORTED_PROTOCOL"):
            await conn.start_tls(context)

    def connect(peer: Peer) -> str:
        with pytest.raises(ssl.SSLError) as caught:
            client_context(TLS12).wrap_socket(peer.sock, server_hostname="localhost")
        return caught.value.reason

    options = {"ssl_context": context} if starter == "own" else {}
    async with serve("native", handler, **options) as service:
        for _ in range(TRIES):
            with service.connect() as peer:
                reason = await anyio.to_thread.run_sync(connect, peer)
                assert reason == "TLSV1_ALERT_PROTOCOL_VERSION"
            if starter == "start_tls":
                ending = await service.ending()
                assert (ending.kind, ending.cause) == (CloseKind.RST, Cause.RAISED)
    if starter == "own":
        records = [it for it in said(caplog) if "more" not in it.message]
        assert len(records) == TRIES
        assert records[0].levelno == logging.INFO
        for record in records:
            assert record.exc_info is None
            assert "UNSUPPORTED_PROTOCOL" in record.message


@each_starter
async def test_server_is_told_why_its_certificate_was_refused(starter: str) -> None:
    stranger = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trustme.CA().configure_trust(stranger)

    def accept(listener: socket.socket) -> str:
        with listener.accept()[0] as sock:
            sock.settimeout(LONG)
            with pytest.raises(ssl.SSLError) as caught:
                server_context().wrap_socket(sock, server_side=True)
        return caught.value.reason

    async def connect(port: int) -> None:
        if starter == "own":
            opened = connect_tcp(
                "127.0.0.1", port, ssl_context=stranger, tls_hostname="localhost"
            )
            with pytest.raises(ssl.SSLCertVerificationError):
                await opened.__aenter__()
            return
        async with connect_tcp("127.0.0.1", port) as conn:
            with pytest.raises(ssl.SSLCertVerificationError):
                await conn.start_tls(stranger, hostname="localhost")
        assert conn.ending is not None
        assert (conn.ending.kind, conn.ending.cause) == (CloseKind.RST, Cause.RAISED)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        for _ in range(TRIES):
            async with anyio.create_task_group() as tg:
                tg.start_soon(connect, listener.getsockname()[1])
                reason = await anyio.to_thread.run_sync(accept, listener)
            assert reason == "TLSV1_ALERT_UNKNOWN_CA"


@each_starter
async def test_client_without_the_certificate_that_is_demanded_is_told_so(
    starter: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It has done its handshake by then: RFC 8446, 4.4.2.4."""
    caplog.set_level(logging.DEBUG, "anyio_rst")
    context = server_context()
    context.verify_mode = ssl.CERT_REQUIRED

    async def handler(conn: Connection) -> None:
        assert starter == "start_tls"
        with pytest.raises(ssl.SSLError, match="PEER_DID_NOT_RETURN_A_CERTIFICATE"):
            await conn.start_tls(context)

    def read(peer: Peer) -> str:
        tls = client_context().wrap_socket(peer.sock, server_hostname="localhost")
        with tls, pytest.raises(ssl.SSLError) as caught:
            tls.recv(100)
        return caught.value.reason

    options = {"ssl_context": context} if starter == "own" else {}
    async with serve("native", handler, **options) as service:
        for _ in range(TRIES):
            with service.connect() as peer:
                reason = await anyio.to_thread.run_sync(read, peer)
                assert reason == "TLSV13_ALERT_CERTIFICATE_REQUIRED"
    if starter == "own":
        record = said(caplog)[0]
        assert (record.levelno, record.exc_info) == (logging.INFO, None)
        assert "TLS handshake failed" in record.message


@each_starter
async def test_alert_of_the_peer_is_an_ssl_error(starter: str) -> None:
    def accept(listener: socket.socket) -> None:
        with listener.accept()[0] as sock:
            sock.settimeout(LONG)
            with pytest.raises(ssl.SSLError, match="UNSUPPORTED_PROTOCOL"):
                server_context().wrap_socket(sock, server_side=True)

    async def connect(port: int) -> None:
        options: dict[str, Any] = {}
        if starter == "own":
            options = {"ssl_context": client_context(TLS12), "tls_hostname": "localhost"}
        async with connect_tcp("127.0.0.1", port, **options) as conn:
            await conn.start_tls(client_context(TLS12), hostname="localhost")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        for _ in range(TRIES):
            async with anyio.create_task_group() as tg:
                tg.start_soon(anyio.to_thread.run_sync, accept, listener)
                with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
                    await connect(listener.getsockname()[1])


# A peer that goes away.


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("FIN", "the peer closed before the TLS handshake"),
        ("RST", "the peer reset the connection"),
    ],
)
async def test_client_that_goes_away_before_its_first_byte_is_logged_as_that(
    how: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(conn: Connection) -> None:
        pytest.fail("called without a handshake")

    caplog.set_level(logging.DEBUG, "anyio_rst")
    async with serve("native", handler, ssl_context=server_context()) as service:
        with service.connect() as peer:
            await settled()
            if how == "FIN":
                peer.send_eof()
                assert await peer.read_to_end() == Seen(b"", PeerClose.RST)
            else:
                peer.reset()
            with anyio.fail_after(LONG):
                while not said(caplog):
                    await anyio.sleep(0.001)
    (record,) = said(caplog)
    assert (record.levelno, record.exc_info) == (logging.DEBUG, None)
    assert message in record.message


@each_starter
@pytest.mark.parametrize("how", ["FIN", "RST"])
@pytest.mark.parametrize("when", ["before", "in"])
async def test_server_that_goes_away_without_a_handshake_is_a_loss(
    starter: str, how: str, when: str
) -> None:
    def accept(listener: socket.socket) -> None:
        with accepted(listener) as peer:
            peer.sock.recv(65536)  # so it has connected; and unread, FIN would be a reset
            if when == "in":
                # A part of a ServerHello: RFC 8446, 5.1.
                peer.sock.sendall(b"\x16\x03\x03\x00\x7a\x02\x00")
            if how == "RST":
                peer.reset()

    async def connect(port: int) -> None:
        options: dict[str, Any] = {}
        if starter == "own":
            options = {"ssl_context": client_context(), "tls_hostname": "localhost"}
        async with connect_tcp("127.0.0.1", port, **options) as conn:
            await conn.start_tls(client_context(), hostname="localhost")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with anyio.create_task_group() as tg:
            tg.start_soon(anyio.to_thread.run_sync, accept, listener)
            with pytest.raises(anyio.BrokenResourceError) as caught:
                await connect(listener.getsockname()[1])
    if how == "RST":
        assert isinstance(caught.value, PeerReset)
        assert isinstance(caught.value.__cause__, OSError)
    else:
        assert str(caught.value) == f"the peer closed {when} the TLS handshake"


# No handshake at all.


async def unshaken(*, server_side: bool) -> tuple[trio.SSLStream[Any], Peer]:
    """A session on Trio that has not done its handshake, and its peer."""
    stream, peer = await stream_and_peer("trio")
    context = server_context() if server_side else client_context()
    name = None if server_side else "localhost"
    return (
        trio.SSLStream(stream, context, server_side=server_side, server_hostname=name),
        peer,
    )


each_side = pytest.mark.parametrize(
    "server_side", [True, False], ids=["server", "client"]
)


@on_trio
@each_side
async def test_session_that_never_did_its_handshake_is_reset(server_side: bool) -> None:
    tls, peer = await unshaken(server_side=server_side)
    with peer:
        async with connection_scope(tls) as conn:
            pass
        assert await peer.read_to_end() == Seen(b"", PeerClose.RST)
    assert conn.ending is not None
    assert (conn.ending.kind, conn.ending.cause) == (CloseKind.RST, Cause.TORN_SEND)


@on_trio
@each_side
@pytest.mark.parametrize("how", ["receive", "send"])
async def test_body_that_is_cancelled_in_the_handshake_is_reset(
    server_side: bool, how: str
) -> None:
    tls, peer = await unshaken(server_side=server_side)
    with peer:
        async with timeout_once_settled():
            async with connection_scope(tls) as conn:
                await (conn.receive() if how == "receive" else conn.send(b"x"))
        seen = await peer.read_to_end()
    assert seen.close is PeerClose.RST
    assert bool(seen.data) is not server_side
    assert conn.ending is not None
    assert (conn.ending.kind, conn.ending.cause) == (CloseKind.RST, Cause.CANCELLED)


@on_trio
@each_side
@pytest.mark.parametrize("how", ["receive", "send"])
async def test_handshake_that_was_cancelled_leaves_a_session_that_is_reset(
    server_side: bool, how: str
) -> None:
    tls, peer = await unshaken(server_side=server_side)
    with peer:
        async with connection_scope(tls) as conn:
            async with timeout_once_settled():
                await (conn.receive() if how == "receive" else conn.send(b"x"))
            with pytest.raises(anyio.BrokenResourceError):
                await conn.send(b"x")
            with pytest.raises(anyio.BrokenResourceError):
                await conn.receive()
        assert (await peer.read_to_end()).close is PeerClose.RST
    assert conn.ending is not None
    assert (conn.ending.kind, conn.ending.cause) == (CloseKind.RST, Cause.TORN_SEND)


@on_trio
@each_side
async def test_handshake_is_shared_by_who_sends_and_who_receives(
    server_side: bool,
) -> None:
    tls, raw = await unshaken(server_side=server_side)

    async def ours() -> None:
        async with connection_scope(tls) as conn:
            async with conn.create_task_group() as tg:
                tg.start_soon(conn.send, b"question")
                assert await conn.receive() == b"answer"

    with raw, anyio.fail_after(LONG):
        async with anyio.create_task_group() as tg:
            tg.start_soon(ours)
            peer = await shake_hands(raw, server_side=not server_side)
            assert await peer.receive(8) == b"question"
            await peer.send(b"answer")
            assert await peer.end() == (b"", CLEAN)
            raw.send_eof()


async def test_body_that_returns_in_the_middle_of_a_handshake_resets(kind: str) -> None:
    async def start(conn: Connection) -> None:
        with pytest.raises(anyio.ClosedResourceError):
            await conn.start_tls(server_context())

    async with anyio.create_task_group() as tg:
        async with connection_of(kind) as (conn, peer):
            async with conn:
                tg.start_soon(start, conn)
                await settled()
            await assert_reset(conn, peer, Cause.TORN_SEND, b"")


# One of many connections of a server.


async def reset_in_the_middle(peer: Peer) -> None:
    await peer.send(client_hello()[:20])
    peer.reset()


async def with_an_old_version(peer: Peer) -> None:
    with pytest.raises((ssl.SSLError, ConnectionResetError)):
        await shake_hands(peer, version=TLS12)


async def say_nothing(peer: Peer) -> None:
    assert await peer.read_to_end() == Seen(b"", PeerClose.RST)


async def send_garbage(peer: Peer) -> None:
    await peer.send(b"GET / HTTP/1.0\r\n\r\n")
    assert (await peer.read_to_end()).close is PeerClose.RST


@pytest.mark.parametrize(
    "fail", [reset_in_the_middle, with_an_old_version, say_nothing, send_garbage]
)
async def test_handshake_that_fails_costs_one_connection_and_one_line(
    fail: Callable[[Peer], Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "anyio_rst")
    endings: list[Any] = []
    ended = anyio.Event()

    def on_ending(conn: Connection) -> None:
        if conn.ending is not None and conn.ending.kind is CloseKind.RST:
            endings.append(conn.ending)
            ended.set()

    async with anyio.create_task_group() as tg:
        server = await tg.start(
            partial(
                serve_tcp,
                echo,
                host="127.0.0.1",
                ssl_context=server_context(),
                handshake_timeout=0.2 if fail is say_nothing else LONG,
                on_ending=on_ending,
            )
        )
        with Peer(server.port) as raw:
            other = await shake_hands(raw)
            await other.send(b"before")
            assert await other.receive(6) == b"before"
            with Peer(server.port) as peer:
                await fail(peer)
                await ended.wait()
            await other.send(b"after")
            assert await other.receive(5) == b"after"
            other.say_close_notify()
            assert await other.end() == (b"", CLEAN)
        server.stop()
    assert len(endings) == 1
    (record,) = said(caplog)
    assert (record.levelno, record.exc_info) == (logging.INFO, None)
    assert "TLS handshake" in record.message


# What is refused.


@on_one_loop
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ssl_context": "context"}, TypeError, "ssl_context must be an ssl.SSLContext"),
        ({"ssl_context": client_context()}, ValueError, "is for the client's side"),
        ({"handshake_timeout": 0}, ValueError, "handshake_timeout must be > 0"),
        ({"handshake_timeout": -1}, ValueError, "handshake_timeout must be finite"),
        ({"handshake_timeout": float("nan")}, ValueError, "must be finite"),
        ({"handshake_timeout": "30"}, TypeError, "must be a number of seconds"),
    ],
)
async def test_bad_tls_options_of_a_server_are_refused(
    options: Any, error: type[Exception], message: str
) -> None:
    async def handler(conn: Connection) -> None: ...

    with pytest.raises(error, match=message):
        await serve_tcp(handler, **options)


async def test_connect_tcp_refuses_an_unknown_certificate_with_a_reset() -> None:
    async def handler(conn: Connection) -> None:
        with pytest.raises((ssl.SSLError, anyio.BrokenResourceError)):
            await conn.start_tls(server_context())
            await conn.receive()

    async with serve("native", handler) as service:
        with pytest.raises(ssl.SSLCertVerificationError):
            async with connect_tcp("127.0.0.1", service.port, tls=True):
                pytest.fail("the certificate is nobody's")
        value_of(await service.ending())


@on_one_loop
@pytest.mark.parametrize(
    ("options", "error"),
    [({"ssl_context": 3}, TypeError), ({"ssl_context": server_context()}, ValueError)],
)
async def test_connect_tcp_refuses_a_bad_context(
    options: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match="ssl_context"):
        connect_tcp("127.0.0.1", 9, **options)
