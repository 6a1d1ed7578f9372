"""TLS that cannot be truncated quietly, judged by Python's blocking `ssl` client."""

from __future__ import annotations

import logging
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
import trio
import trustme
from anyio.abc import SocketAttribute
from anyio.streams.buffered import BufferedByteStream
from anyio.streams.tls import TLSAttribute, TLSStream

from anyio_rst import (
    Cause,
    CloseKind,
    Connection,
    Drain,
    PeerClose,
    PeerReset,
    connect_tcp,
    connection_scope,
    serve_tcp,
)
from anyio_rst.testing import Direction, TCPFlag, assert_fin, assert_rst, open_peer

from serving import (
    LONG,
    Handler,
    Peer,
    Seen,
    Service,
    assert_reset,
    connection_of,
    fill_buffers,
    foreign_pair,
    said,
    serve,
    timeout_once_settled,
    value_of,
)

pytestmark = pytest.mark.anyio

BIG = 4 * 2**20
LATEST = ssl.TLSVersion.TLSv1_3


class Failure(Exception):
    pass


AUTHORITY = trustme.CA()
SERVER_CONTEXT = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
AUTHORITY.issue_cert("localhost").configure_cert(SERVER_CONTEXT)


def client_context(version: ssl.TLSVersion = LATEST) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # without the system's authorities
    AUTHORITY.configure_trust(context)
    context.minimum_version = context.maximum_version = version
    return context


@pytest.fixture(params=[ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=str)
def version(request: pytest.FixtureRequest) -> Any:
    return request.param


@asynccontextmanager
async def serve_tls(
    wrapping: str, handler: Handler, **options: Any
) -> AsyncIterator[Service]:
    """Serve *handler* over TLS; *options* are those of `connection_scope`.

    *wrapping* says who wraps the connection: `serve_tcp` ("served"), its handler
    ("start_tls"), or the user, in a `connection_scope`: with AnyIO's `TLSStream`, bare
    ("wrapped") or with a buffer around it ("buffered"), or with a `trio.SSLStream`
    ("trio").
    """
    if wrapping == "served":
        async with serve("native", handler, ssl_context=SERVER_CONTEXT, **options) as it:
            yield it
        return

    if wrapping == "start_tls":

        async def started(conn: Connection) -> object:
            await conn.start_tls(SERVER_CONTEXT)
            return await handler(conn)

        async with serve("native", started, **options) as service:
            yield service
        return

    async def wrap(conn: Connection) -> object:
        if wrapping == "trio":
            await handle_on_trio(conn.detach())
            return None
        # AnyIO's own stream, as a listener would have handed it over.
        stream = conn.detach()
        tls: Any = await TLSStream.wrap(stream, ssl_context=SERVER_CONTEXT)
        if wrapping == "buffered":
            tls = BufferedByteStream(tls)
        async with connection_scope(tls, **options) as inner:
            inners.append(inner)
            await handler(inner)
        return None

    async def handle_on_trio(stream: trio.SocketStream) -> None:
        tls = trio.SSLStream(stream, SERVER_CONTEXT, server_side=True)
        await tls.do_handshake()  # else it is a part of what the handler does first
        async with connection_scope(tls, **options) as inner:
            inners.append(inner)
            await handler(inner)

    inners: list[Connection] = []
    async with serve("trio" if wrapping == "trio" else "foreign", wrap) as service:
        service.ending = lambda: ending_of_inner(service, inners)  # type: ignore[method-assign]
        yield service


async def ending_of_inner(service: Service, inners: list[Connection]) -> Any:
    await (await service.next()).ending()
    (inner,) = inners
    return inner.ending


class SecurePeer:
    """A blocking TLS client that takes no truncation for an end."""

    def __init__(self, port: int, version: ssl.TLSVersion, **options: Any) -> None:
        self.peer = Peer(port, **options)
        self.version = version
        self.tls: ssl.SSLSocket

    async def __aenter__(self) -> SecurePeer:
        def wrap() -> ssl.SSLSocket:
            return client_context(self.version).wrap_socket(
                self.peer.sock, server_hostname="localhost", suppress_ragged_eofs=False
            )

        self.tls = await anyio.to_thread.run_sync(wrap)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.tls.close()
        self.peer.sock.close()

    async def send(self, data: bytes) -> None:
        await anyio.to_thread.run_sync(self.tls.sendall, data)

    def without_tls(self) -> Peer:
        """The connection below TLS, which knows nothing of all this."""
        self.peer.sock = socket.socket(fileno=self.tls.detach())
        self.peer.sock.settimeout(LONG)
        return self.peer

    async def read_to_end(self) -> tuple[bytes, list[str]]:
        """The data, and what ended it: close_notify, FIN, RST, in this order."""

        def read() -> tuple[bytes, list[str]]:
            data = bytearray()
            try:
                while chunk := self.tls.recv(65536):
                    data += chunk
            except ConnectionResetError:
                return bytes(data), ["RST"]
            except ssl.SSLEOFError as exc:
                # Before Python 3.13 a reset is one, too, but without this reason.
                truncated = exc.reason == "UNEXPECTED_EOF_WHILE_READING"
                return bytes(data), ["FIN" if truncated else "RST"]
            # Below TLS, the end of the connection itself.
            with socket.socket(fileno=self.tls.detach()) as sock:
                sock.settimeout(LONG)
                try:
                    while sock.recv(65536):
                        pass
                except ConnectionResetError:
                    return bytes(data), ["close_notify", "RST"]
            return bytes(data), ["close_notify", "FIN"]

        return await anyio.to_thread.run_sync(read)


CLEAN = ["close_notify", "FIN"]


async def test_clean_end_is_close_notify_then_fin(
    wrapping: str, version: ssl.TLSVersion
) -> None:
    async def handler(conn: Connection) -> None:
        if wrapping != "trio":  # whose stream tells that in its own way
            assert conn.extra(TLSAttribute.tls_version) == version.name.replace("_", ".")
        await conn.send(await conn.receive())

    async with serve_tls(wrapping, handler) as service:
        async with SecurePeer(service.port, version) as peer:
            await peer.send(b"all of it")
            assert await peer.read_to_end() == (b"all of it", CLEAN)
        ending = await service.ending()
    value_of(ending)
    assert (ending.kind, ending.cause) == (CloseKind.FIN, Cause.RETURNED)
    assert ending.peer is PeerClose.FIN


@pytest.mark.parametrize("how", ["raise", "group", "cancel", "abort"])
async def test_any_other_end_is_an_rst_without_close_notify(
    wrapping: str, version: ssl.TLSVersion, how: str
) -> None:
    async def fail() -> None:
        raise Failure

    async def handler(conn: Connection) -> None:
        await conn.send(b"half")
        if how == "raise":
            raise Failure
        if how == "abort":
            conn.abort()
        elif how == "group":
            async with conn.create_task_group() as tg:
                tg.start_soon(fail)
        else:
            with anyio.CancelScope() as scope:
                async with conn:
                    scope.cancel()
                    await anyio.sleep_forever()

    async with serve_tls(wrapping, handler) as service:
        async with SecurePeer(service.port, version) as peer:
            assert await peer.read_to_end() == (b"half", ["RST"])
        if how in ("abort", "cancel"):
            ending = await service.ending()
            assert ending.kind is CloseKind.RST


async def test_default_client_of_an_old_python_takes_a_reset_for_an_end() -> None:
    """As docs/explanation.md has it: suppress_ragged_eofs suppresses that, too."""

    async def handler(conn: Connection) -> None:
        await conn.send(b"half")
        raise Failure

    def read(port: int) -> bytes:
        with socket.create_connection(("127.0.0.1", port), timeout=LONG) as sock:
            with client_context().wrap_socket(sock, server_hostname="localhost") as tls:
                return b"".join(iter(partial(tls.recv, 100), b""))

    async with serve_tls("served", handler) as service:
        if sys.version_info < (3, 13):
            assert await anyio.to_thread.run_sync(read, service.port) == b"half"
        else:
            with pytest.raises(ConnectionResetError):
                await anyio.to_thread.run_sync(read, service.port)


async def test_whole_answer_reaches_a_client_that_is_still_uploading(
    wrapping: str, version: ssl.TLSVersion
) -> None:
    async def handler(conn: Connection) -> None:
        await conn.receive(1)
        await conn.send(bytes(BIG))

    async with serve_tls(wrapping, handler, drain=Drain(LONG)) as service:
        async with SecurePeer(service.port, version) as peer:
            # One thread may not read and write one SSLSocket at once with another, so
            # the upload is on its way, and stuck, before the answer is read.
            peer.tls.setblocking(False)
            with suppress(ssl.SSLWantWriteError):
                while True:
                    peer.tls.send(bytes(2**16))
            peer.tls.settimeout(LONG)
            data, end = await peer.read_to_end()
        ending = await service.ending()
    assert (len(data), end) == (BIG, CLEAN)
    assert (ending.kind, ending.cause) == (CloseKind.FIN, Cause.RETURNED)
    if wrapping not in ("wrapped", "buffered"):
        # There asyncio's and uvloop's transports may have read all of it ahead.
        assert ending.discarded > 0


async def test_close_notify_to_a_peer_that_has_closed_goes_out_with_the_fin(
    wrapping: str, version: ssl.TLSVersion, rst_segments: Any
) -> None:
    """Sent by itself it is answered by an RST, and then there is no FIN to be sent."""
    gone = anyio.Event()

    async def handler(conn: Connection) -> None:
        await conn.send(b"x")
        with pytest.raises(anyio.EndOfStream):
            await conn.receive()
        await gone.wait()

    async with serve_tls(wrapping, handler) as service:
        async with SecurePeer(service.port, version) as peer:
            # Whatever the server sends for TLS itself comes before.
            assert await anyio.to_thread.run_sync(peer.tls.recv, 10) == b"x"
            peer.tls.setblocking(False)
            with pytest.raises(ssl.SSLWantReadError):  # for ours, which it does not await
                peer.tls.unwrap()
        with rst_segments(service.port) as capture:
            gone.set()
            ending = await service.ending()
            # Besides, the kernel may acknowledge the peer's end only now, and the peer's
            # may send it again before.
            ends = TCPFlag.FIN | TCPFlag.RST
            segments = [s for s in capture.segments if s.length or s.flags & ends]
            sent = [s for s in segments if s.direction is Direction.FROM_PORT]
            answers = [s for s in segments if s.direction is Direction.TO_PORT]
    assert [(TCPFlag.FIN in s.flags, s.length > 0) for s in sent] == [(True, True)]
    assert [TCPFlag.RST in s.flags for s in answers if TCPFlag.FIN not in s.flags] == [
        True
    ]
    assert (ending.kind, ending.peer) == (CloseKind.FIN, PeerClose.FIN)


async def test_cancellation_that_the_body_never_noticed_still_says_close_notify(
    wrapping: str, version: ssl.TLSVersion
) -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(b"all of it")
        with anyio.CancelScope() as scope:
            async with conn:
                scope.cancel()

    async with serve_tls(wrapping, handler) as service:
        async with SecurePeer(service.port, version) as peer:
            data, end = await peer.read_to_end()
    assert data == b"all of it"
    assert end[0] == "close_notify"


async def test_clean_end_wakes_a_task_that_receives(
    wrapping: str, version: ssl.TLSVersion
) -> None:
    woken: list[bool] = []

    async def receive(conn: Connection) -> None:
        with pytest.raises(anyio.ClosedResourceError):
            await conn.receive()
        woken.append(True)

    async def handler(conn: Connection) -> None:
        async with anyio.create_task_group() as tg:
            async with conn:
                await conn.send(b"all of it")
                tg.start_soon(receive, conn)
                await anyio.wait_all_tasks_blocked()

    async with serve_tls(wrapping, handler) as service:
        async with SecurePeer(service.port, version) as peer:
            assert await peer.read_to_end() == (b"all of it", CLEAN)
        value_of(await service.ending())
    assert woken


async def test_session_that_is_broken_cannot_end_cleanly(
    wrapping: str, version: ssl.TLSVersion
) -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(b"x")
        with pytest.raises((ssl.SSLError, anyio.BrokenResourceError)):
            await conn.receive()

    async with serve_tls(wrapping, handler) as service:
        async with SecurePeer(service.port, version) as peer:
            assert await anyio.to_thread.run_sync(peer.tls.recv, 10) == b"x"
            raw = peer.without_tls()
            await raw.send(b"this is not what TLS looks like")
            assert (await raw.read_to_end()).close is PeerClose.RST
        ending = await service.ending()
    value_of(ending)
    assert (ending.kind, ending.cause) == (CloseKind.RST, Cause.TORN_SEND)


async def test_send_cut_short_resets(wrapping: str, version: ssl.TLSVersion) -> None:
    async def handler(conn: Connection) -> None:
        async with timeout_once_settled():
            await conn.send(bytes(8 * 2**20))
        with pytest.raises(anyio.BrokenResourceError):
            await conn.send(b"more")

    async with serve_tls(wrapping, handler) as service:
        async with SecurePeer(service.port, version, buffer=4096) as peer:
            ending = await service.ending()
            _, end = await peer.read_to_end()
    assert end == ["RST"]
    assert (ending.kind, ending.cause) == (CloseKind.RST, Cause.TORN_SEND)


# Less than it takes TCP to probe a closed window, which may open it a little: 200 ms, the
# least RTO of Linux.
SOON = 0.1


async def test_close_notify_that_finds_no_room_is_sent_in_the_drain(
    wrapping: str, version: ssl.TLSVersion
) -> None:
    filled = 0
    full = anyio.Event()

    async def handler(conn: Connection) -> None:
        nonlocal filled
        filled = fill_buffers(conn.extra(SocketAttribute.raw_socket))
        full.set()

    async with serve_tls(wrapping, handler, drain=Drain(LONG)) as service:
        async with SecurePeer(service.port, version, buffer=4096) as peer:
            raw = peer.without_tls()
            await full.wait()
            seen = await raw.read_to_end()
            raw.send_eof()
            ending = await service.ending()
    # Behind what is no TLS, an alert: RFC 8446, 5.1 and 6.
    assert len(seen.data) > filled
    assert seen.close is PeerClose.FIN
    assert (ending.kind, ending.cause) == (CloseKind.FIN, Cause.RETURNED)


async def test_close_notify_that_never_finds_room_is_a_reset(
    wrapping: str, version: ssl.TLSVersion
) -> None:
    async def handler(conn: Connection) -> None:
        fill_buffers(conn.extra(SocketAttribute.raw_socket))

    for _ in range(10):  # on a busy machine the window may be probed in time
        async with serve_tls(wrapping, handler, drain=Drain(SOON)) as service:
            async with SecurePeer(service.port, version, buffer=4096) as peer:
                raw = peer.without_tls()
                ending = await service.ending()
                seen = await raw.read_to_end()
        assert seen.close.value == ending.kind.value
        if ending.kind is CloseKind.RST:
            assert ending.cause is Cause.TORN_SEND
            return
    pytest.fail("it found room, each time")


async def test_close_notify_that_finds_no_room_costs_one_time_out() -> None:
    ends: list[float] = []

    async def handler(conn: Connection) -> None:
        fill_buffers(conn.extra(SocketAttribute.raw_socket))
        ends.append(anyio.current_time() + 2 * SOON)

    async with serve_tls("served", handler, drain=Drain(SOON)) as service:
        for _ in range(10):  # the machine may be busy with something else
            async with SecurePeer(service.port, LATEST, buffer=4096):
                await service.ending()
            if anyio.current_time() < ends[-1]:
                return
    pytest.fail("it took two, each time")


# The peer's end.


@pytest.mark.parametrize("says", ["nothing", "fin", "rst", "data", "close_notify"])
async def test_answer_to_close_notify_is_bounded_and_no_exception(
    wrapping: str, version: ssl.TLSVersion, says: str
) -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(b"x")

    drain = Drain(timeout=0.05 if says == "nothing" else LONG)
    async with serve_tls(wrapping, handler, drain=drain) as service:
        async with SecurePeer(service.port, version) as peer:
            assert await anyio.to_thread.run_sync(peer.tls.recv, 10) == b"x"
            assert await anyio.to_thread.run_sync(peer.tls.recv, 10) == b""
            if says == "close_notify":
                await anyio.to_thread.run_sync(peer.tls.unwrap)
                peer.tls.shutdown(socket.SHUT_WR)
            elif says != "nothing":
                raw = peer.without_tls()
                if says == "data":
                    await raw.send(b"not even TLS")
                if says == "rst":
                    raw.reset()
                else:
                    raw.send_eof()
            ending = await service.ending()
    value_of(ending)
    assert (ending.kind, ending.cause) == (CloseKind.FIN, Cause.RETURNED)
    expected = {"nothing": PeerClose.NONE, "rst": PeerClose.RST}
    assert ending.peer is expected.get(says, PeerClose.FIN)


async def receive_end(conn: Connection, ends: list[BaseException]) -> None:
    try:
        while True:
            await conn.receive()
    except BaseException as exc:
        ends.append(exc)
        raise


@pytest.mark.parametrize(
    ("says", "expected"),
    [
        ("close_notify", anyio.EndOfStream),
        ("fin", anyio.BrokenResourceError),
        ("rst", PeerReset),
    ],
)
async def test_only_a_close_notify_is_a_clean_end_of_the_peer(
    wrapping: str,
    version: ssl.TLSVersion,
    says: str,
    expected: type[BaseException],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "anyio_rst")

    async def handler(conn: Connection) -> None:
        await conn.send(b"x")
        await receive_end(conn, ends)

    ends: list[BaseException] = []
    async with serve_tls(wrapping, handler) as service:
        async with SecurePeer(service.port, version) as peer:
            assert await anyio.to_thread.run_sync(peer.tls.recv, 10) == b"x"
            if says == "close_notify":
                with suppress(OSError):  # it is answered by the failure of the handler
                    await anyio.to_thread.run_sync(peer.tls.unwrap)
            else:
                raw = peer.without_tls()
                if says == "rst":
                    raw.reset()
                else:
                    raw.send_eof()
                ending = await service.ending()
        if says == "close_notify":
            ending = await service.ending()
    (end,) = ends
    assert isinstance(end, expected)
    assert isinstance(end, PeerReset) is (says == "rst")
    assert (ending.peer is PeerClose.RST) is (says == "rst")
    if wrapping == "served":
        # Peers that go away are everyday life, all the more without a word.
        levels = [record.levelno for record in said(caplog)]
        assert levels == ([] if says == "close_notify" else [logging.INFO])


# STARTTLS.


async def test_start_tls_in_the_middle_of_a_connection(version: ssl.TLSVersion) -> None:
    async def handler(conn: Connection) -> None:
        assert await conn.receive() == b"STARTTLS\n"
        await conn.send(b"go\n")
        await conn.start_tls(SERVER_CONTEXT)
        await conn.send(await conn.receive())
        with pytest.raises(RuntimeError, match="has been started"):
            await conn.start_tls(SERVER_CONTEXT)
        with pytest.raises(NotImplementedError):
            await conn.send_eof()

    async with serve("native", handler) as service:
        peer = SecurePeer(service.port, version)
        await peer.peer.send(b"STARTTLS\n")
        assert await peer.peer.receive(3) == b"go\n"
        async with peer:
            await peer.send(b"secret")
            assert await peer.read_to_end() == (b"secret", CLEAN)
        value_of(await service.ending())


async def test_start_tls_on_both_sides(kind: str) -> None:
    async def handler(conn: Connection) -> None:
        assert await conn.receive() == b"STARTTLS\n"
        await conn.send(b"go\n")
        await conn.start_tls(SERVER_CONTEXT)
        await conn.send(await conn.receive())

    async with serve(kind, handler) as service:
        async with connect_tcp("127.0.0.1", service.port) as conn:
            await conn.send(b"STARTTLS\n")
            assert await conn.receive() == b"go\n"
            await conn.start_tls(client_context(), hostname="localhost")
            await conn.send(b"secret")
            assert await conn.receive() == b"secret"
            with pytest.raises(anyio.EndOfStream):
                await conn.receive()
        value_of(await service.ending())
    assert conn.ending is not None
    assert conn.ending.kind is CloseKind.FIN


def client_hello() -> bytes:
    out = ssl.MemoryBIO()
    session = client_context().wrap_bio(ssl.MemoryBIO(), out, server_hostname="localhost")
    with suppress(ssl.SSLWantReadError):
        session.do_handshake()
    return out.read()


async def test_plaintext_before_the_handshake_never_surfaces_after_it(kind: str) -> None:
    """CVE-2011-0411: STARTTLS, a command and the ClientHello in one segment."""

    async with connection_of(kind) as (conn, peer):
        await peer.send(b"STARTTLS\nDELETE everything\n" + client_hello())
        assert await conn.receive(len(b"STARTTLS\n")) == b"STARTTLS\n"
        with pytest.raises((ssl.SSLError, anyio.BrokenResourceError)):
            await conn.start_tls(SERVER_CONTEXT)
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
                await conn.start_tls(SERVER_CONTEXT)
        assert (await peer.read_to_end()).close is PeerClose.RST


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
            await conn.start_tls(SERVER_CONTEXT)
        await assert_reset(conn, peer, Cause.RAISED, b"")


async def test_handshake_that_is_cancelled_resets(kind: str) -> None:
    async with connection_of(kind) as (conn, peer):
        async with timeout_once_settled():
            await conn.start_tls(SERVER_CONTEXT)
        await assert_reset(conn, peer, Cause.CANCELLED, b"")


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("context",), {}, TypeError, "ssl_context must be an ssl.SSLContext"),
        ((), {}, TypeError, "server's side of TLS needs an ssl_context"),
        ((), {"server_side": False}, ValueError, "needs the hostname"),
        ((SERVER_CONTEXT,), {"server_side": False}, ValueError, "for the server's side"),
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


# Handshakes of a server.


async def reset_in_the_middle(peer: Peer) -> None:
    await peer.send(client_hello()[:20])
    peer.reset()


async def with_an_old_version(peer: Peer) -> None:
    context = client_context(ssl.TLSVersion.TLSv1_2)
    with pytest.raises((ssl.SSLError, ConnectionResetError)):
        await anyio.to_thread.run_sync(
            partial(context.wrap_socket, peer.sock, server_hostname="localhost")
        )


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
    async def handler(conn: Connection) -> None:
        async for chunk in conn:
            await conn.send(chunk)

    caplog.set_level(logging.DEBUG, "anyio_rst")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    AUTHORITY.issue_cert("localhost").configure_cert(context)
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
                handler,
                host="127.0.0.1",
                ssl_context=context,
                handshake_timeout=0.2 if fail is say_nothing else LONG,
                on_ending=on_ending,
            )
        )
        async with SecurePeer(server.port, ssl.TLSVersion.TLSv1_3) as other:
            await other.send(b"before")
            assert await anyio.to_thread.run_sync(other.tls.recv, 10) == b"before"
            with Peer(server.port) as peer:
                await fail(peer)
                await ended.wait()
            await other.send(b"after")
            assert await anyio.to_thread.run_sync(other.tls.recv, 10) == b"after"
            await anyio.to_thread.run_sync(other.tls.unwrap)
        server.stop()
    assert len(endings) == 1
    (record,) = said(caplog)
    assert (record.levelno, record.exc_info) == (logging.INFO, None)
    assert "TLS handshake" in record.message


async def test_client_without_a_certificate_is_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def handler(conn: Connection) -> None:
        pytest.fail("called before the handshake was over")

    caplog.set_level(logging.DEBUG, "anyio_rst")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    AUTHORITY.issue_cert("localhost").configure_cert(context)
    context.verify_mode = ssl.CERT_REQUIRED
    async with serve("native", handler, ssl_context=context) as service:
        async with SecurePeer(service.port, ssl.TLSVersion.TLSv1_3) as peer:
            with suppress(ssl.SSLError, OSError):
                data, end = await peer.read_to_end()
                assert (data, end) == (b"", ["RST"])
    (record,) = said(caplog)
    assert (record.levelno, record.exc_info) == (logging.INFO, None)
    assert "TLS handshake failed" in record.message


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


# The client's side.


async def test_connect_tcp_speaks_tls() -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(await conn.receive())

    async with serve_tls("start_tls", handler) as service:
        async with connect_tcp(
            "127.0.0.1",
            service.port,
            ssl_context=client_context(),
            tls_hostname="localhost",
        ) as conn:
            await conn.send(b"secret")
            assert await conn.receive() == b"secret"
        assert conn.ending is not None
        assert conn.ending.kind is CloseKind.FIN
        assert (await service.ending()).peer is PeerClose.FIN


async def test_connect_tcp_refuses_an_unknown_certificate_with_a_reset() -> None:
    async def handler(conn: Connection) -> None:
        with pytest.raises((ssl.SSLError, anyio.BrokenResourceError)):
            await conn.start_tls(SERVER_CONTEXT)
            await conn.receive()

    async with serve("native", handler) as service:
        with pytest.raises(ssl.SSLCertVerificationError):
            async with connect_tcp("127.0.0.1", service.port, tls=True):
                pytest.fail("the certificate is nobody's")
        value_of(await service.ending())


@pytest.mark.parametrize(
    ("options", "error"),
    [({"ssl_context": 3}, TypeError), ({"ssl_context": SERVER_CONTEXT}, ValueError)],
)
async def test_connect_tcp_refuses_a_bad_context(
    options: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match="ssl_context"):
        connect_tcp("127.0.0.1", 9, **options)


DYING = """
import os, signal, ssl, sys
import anyio
from anyio_rst import serve_tcp

context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(sys.argv[1])

async def handler(conn):
    await conn.receive()
    await conn.send(b"half")
    os.kill(os.getpid(), signal.SIGKILL)

class Status:
    def started(self, server):
        print(server.port, flush=True)

async def main():
    await serve_tcp(handler, host="127.0.0.1", ssl_context=context, task_status=Status())

anyio.run(main, backend=sys.argv[2], backend_options={"use_uvloop": True}
          if sys.argv[3] == "uvloop" else {})
"""


async def test_process_that_is_killed_says_no_close_notify(
    anyio_backend: Any, version: ssl.TLSVersion, tmp_path: Path
) -> None:
    certificate = tmp_path / "server.pem"
    AUTHORITY.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(
        certificate
    )
    name, options = anyio_backend
    loop = "uvloop" if options.get("use_uvloop") else name
    with subprocess.Popen(
        [sys.executable, "-c", DYING, str(certificate), name, loop],
        stdout=subprocess.PIPE,
    ) as process:
        try:
            assert process.stdout is not None
            port = int(await anyio.to_thread.run_sync(process.stdout.readline))
            async with SecurePeer(port, version) as peer:
                await peer.send(b"?")
                assert await peer.read_to_end() == (b"half", ["RST"])
        finally:
            process.kill()


async def test_openssl_sees_a_clean_end_and_a_reset() -> None:
    async def handler(conn: Connection) -> None:
        word = await conn.receive()
        await conn.send(b"answer\n")
        if word.startswith(b"fail"):
            raise Failure

    def s_client(word: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["openssl", "s_client", "-connect", f"127.0.0.1:{service.port}", "-quiet"],
            input=word,
            capture_output=True,
            text=True,
            timeout=LONG,
            check=False,
        )

    async with serve_tls("start_tls", handler) as service:
        clean = await anyio.to_thread.run_sync(s_client, "fine\n")
        failed = await anyio.to_thread.run_sync(s_client, "fail\n")
    assert clean.stdout == failed.stdout == "answer\n"
    assert clean.returncode == 0
    assert "errno=104" in failed.stderr
    assert failed.returncode != 0
