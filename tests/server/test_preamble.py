"""`serve_tcp(preamble=)`: what comes in the clear, before TLS and before the handler."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
import outcome
import pytest
from anyio.abc import SocketAttribute
from anyio.streams.buffered import BufferedByteReceiveStream
from conftest import on_one_loop

from anyio_rst import Cause, CloseKind, Connection, Ending, PeerClose, Server, serve_tcp

from securing import CLEAN, TLSPeer, client_context, server_context, shake_hands
from serving import LONG, Peer, Seen, error_of, said

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("secure", [False, True])]

ORIGIN = ("192.0.2.7", 4711)  # RFC 5737
HEADER = b"FOR 192.0.2.7 4711\r\n"


class Failure(Exception):
    pass


async def read_header(conn: Connection) -> None:
    """A byte at a time: what follows belongs to TLS."""
    header = b""
    while not header.endswith(b"\r\n"):
        header += await conn.receive(1)
    _, host, port = header.split()
    conn.remote_address = host.decode(), int(port)


class Service:
    def __init__(self) -> None:
        self.server: Server
        self.endings: list[Ending] = []
        self.shown: list[str] = []
        self.handled = 0

    def report(self, conn: Connection) -> None:
        assert conn.ending is not None
        self.shown.append(repr(conn))
        self.endings.append(conn.ending)

    async def ending(self) -> Ending:
        while not self.endings:
            await anyio.sleep(0.001)
        return self.endings.pop()

    async def echo(self, conn: Connection) -> None:
        self.handled += 1
        async for chunk in conn:
            await conn.send(chunk)

    @asynccontextmanager
    async def peer(self, first: bytes) -> AsyncIterator[Peer]:
        """A peer that has sent *first* in the clear."""
        with Peer(self.server.port) as raw:
            await raw.send(first)
            yield raw


@asynccontextmanager
async def serving(preamble: Any, secure: bool, **options: Any) -> AsyncIterator[Service]:
    service = Service()
    handler = options.pop("handler", service.echo)
    if secure:
        options["ssl_context"] = server_context()

    async def serve(*, task_status: Any) -> None:
        await serve_tcp(
            handler,
            host="127.0.0.1",
            preamble=preamble,
            on_ending=service.report,
            task_status=task_status,
            **options,
        )

    with anyio.fail_after(LONG):
        async with anyio.create_task_group() as tg:
            service.server = await tg.start(serve)
            yield service
            service.server.stop()


async def exchange(peer: Peer, secure: bool) -> None:
    """Say hello, hear it, and end."""
    if not secure:
        await peer.send(b"hello")
        peer.send_eof()
        assert await peer.read_to_end() == Seen(b"hello", PeerClose.FIN)
        return
    tls = await shake_hands(peer)
    await tls.send(b"hello")
    assert await tls.receive(5) == b"hello"
    tls.say_close_notify()
    assert await tls.end() == (b"", CLEAN)


def above_debug(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage() for record in said(caplog) if record.levelno > logging.DEBUG
    ]


@pytest.fixture(autouse=True)
def everything_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "anyio_rst")


async def test_it_reads_to_the_byte_and_says_for_whom_the_peer_speaks(
    secure: bool, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[Any] = []

    async def handler(conn: Connection) -> None:
        told.append(conn.remote_address)
        told.append(conn.extra(SocketAttribute.remote_address))
        told.append(conn.extra(SocketAttribute.remote_port))
        told.append(repr(conn))
        await service.echo(conn)
        raise Failure

    async with serving(read_header, secure, handler=handler) as service:
        with Peer(service.server.port) as peer:
            if secure:
                tls = TLSPeer(peer, client_context(), server_side=False)
                # In one segment with the first flight of TLS.
                await peer.send(HEADER + tls.hello())
                await tls.handshake()
                await tls.send(b"hello")
                assert await tls.receive(5) == b"hello"
                tls.say_close_notify()
                assert await tls.end() == (b"", ["RST"])
            else:
                await peer.send(HEADER + b"hello")
                peer.send_eof()
                assert await peer.receive(5) == b"hello"
                assert await peer.read_to_end() == Seen(b"", PeerClose.RST)
        ending = await service.ending()
    assert told == [ORIGIN, ORIGIN, ORIGIN[1], "<Connection with 192.0.2.7:4711 (open)>"]
    assert service.shown == ["<Connection with 192.0.2.7:4711 (RST, RAISED)>"]
    assert ending.remote_address == ORIGIN
    assert ending.as_dict()["remote_address"] == list(ORIGIN)
    assert (ending.sent, ending.received) == (5, 5)  # without the header
    assert above_debug(caplog) == [
        "a handler failed: <Connection with 192.0.2.7:4711 (RST, RAISED)>"
    ]


async def test_it_may_speak_first(secure: bool) -> None:
    async def greet(conn: Connection) -> None:
        await conn.send(b"220 hello\r\n")
        assert await conn.receive(4) == b"ehlo"
        conn.state.greeted = True

    async with serving(greet, secure) as service:
        with Peer(service.server.port) as peer:
            assert await peer.receive(11) == b"220 hello\r\n"
            await peer.send(b"ehlo")
            await exchange(peer, secure)
        ending = await service.ending()
    assert (ending.kind, ending.cause) == (CloseKind.FIN, Cause.RETURNED)
    assert (ending.sent, ending.received) == (5, 5)


@pytest.mark.parametrize("how", ["abort", "aclose"])
@pytest.mark.parametrize("goes_on", [False, True])
async def test_it_may_end_the_connection_quietly(
    secure: bool, how: str, goes_on: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether it returns then, or finds it closed."""

    async def refuse(conn: Connection) -> None:
        if how == "abort":
            conn.abort()
        else:
            await conn.aclose()
        if goes_on:
            await conn.receive()

    async with serving(refuse, secure) as service:
        with Peer(service.server.port) as peer:
            seen = await peer.read_to_end()
        ending = await service.ending()
    assert service.handled == 0
    assert above_debug(caplog) == []
    if how == "abort":
        assert seen == Seen(b"", PeerClose.RST)
        assert (ending.kind, ending.cause) == (CloseKind.RST, Cause.ABORTED)
    else:
        assert seen == Seen(b"", PeerClose.FIN)
        assert (ending.kind, ending.cause) == (CloseKind.FIN, Cause.CLOSED)
    assert isinstance(ending.outcome, outcome.Error) is goes_on


async def test_it_fails(secure: bool, caplog: pytest.LogCaptureFixture) -> None:
    async def fail(conn: Connection) -> None:
        await conn.receive(1)
        raise Failure("no header")

    async with serving(fail, secure, propagate_errors=True) as service:
        async with service.peer(b"x") as peer:
            assert await peer.read_to_end() == Seen(b"", PeerClose.RST)
        ending = await service.ending()
    assert service.handled == 0
    assert (ending.kind, ending.cause) == (CloseKind.RST, Cause.RAISED)
    assert isinstance(error_of(ending).__cause__, Failure)
    (record,) = above_debug(caplog)
    assert record.startswith("the preamble failed (Failure('no header')): <Connection ")
    (it,) = [record for record in caplog.records if "preamble" in record.getMessage()]
    assert it.levelno == logging.INFO
    assert it.exc_info is None


@pytest.mark.parametrize("how", ["FIN", "RST"])
@pytest.mark.parametrize("buffered", [False, True])
async def test_health_checks_are_no_news(
    secure: bool, how: str, buffered: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def in_a_buffer(conn: Connection) -> None:
        await BufferedByteReceiveStream(conn).receive_exactly(10)

    async with serving(in_a_buffer if buffered else read_header, secure) as service:
        with Peer(service.server.port) as peer:
            if how == "RST":
                peer.reset()
            else:
                peer.send_eof()
                assert await peer.read_to_end() == Seen(b"", PeerClose.RST)
        await service.ending()
    assert service.handled == 0
    assert above_debug(caplog) == []


async def test_a_health_check_with_a_header_is_no_news(
    secure: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(read_header, secure) as service:
        async with service.peer(HEADER) as peer:
            peer.send_eof()
            await peer.read_to_end()
        await service.ending()
    assert above_debug(caplog) == []


async def test_half_a_header_is_news(
    secure: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(read_header, secure) as service:
        async with service.peer(HEADER[:5]) as peer:
            peer.send_eof()
            assert await peer.read_to_end() == Seen(b"", PeerClose.RST)
        await service.ending()
    (record,) = above_debug(caplog)
    assert record.startswith("the preamble failed (EndOfStream()): <Connection ")


async def test_it_is_bounded_by_the_handshakes_time_out(
    secure: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(read_header, secure, handshake_timeout=0.05) as service:
        async with service.peer(HEADER[:5]) as peer:
            assert await peer.read_to_end() == Seen(b"", PeerClose.RST)
        await service.ending()
    (record,) = above_debug(caplog)
    assert record.startswith("no preamble within 0.05 s: <Connection ")


async def test_the_time_is_that_of_both(
    secure: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def slow(conn: Connection) -> None:
        await read_header(conn)
        await anyio.sleep(0.1)

    async with serving(slow, secure, handshake_timeout=0.2) as service:
        async with service.peer(HEADER) as peer:
            if secure:  # nothing of it comes
                assert await peer.read_to_end() == Seen(b"", PeerClose.RST)
            else:
                await anyio.sleep(0.2)
                await exchange(peer, secure)
        await service.ending()
    messages = [
        f"no TLS handshake within 0.2 s: <Connection with {ORIGIN[0]}:{ORIGIN[1]}"
    ]
    assert [told.split(" (")[0] for told in above_debug(caplog)] == messages * secure


async def test_a_cancelled_server_cancels_it(secure: bool) -> None:
    begun = anyio.Event()

    async def wait(conn: Connection) -> None:
        begun.set()
        await conn.receive()

    with anyio.CancelScope() as scope:
        async with serving(wait, secure) as service:
            with Peer(service.server.port) as peer:
                await begun.wait()
                scope.cancel()
                with anyio.CancelScope(shield=True):
                    assert await peer.read_to_end() == Seen(b"", PeerClose.RST)
            await anyio.lowlevel.checkpoint()
    (ending,) = service.endings
    assert ending.cause is Cause.CANCELLED


@on_one_loop
@pytest.mark.parametrize("wrong", [3, print, "read_header"])
async def test_what_is_no_async_function_is_refused(secure: bool, wrong: Any) -> None:
    context = server_context() if secure else None
    with pytest.raises(TypeError, match="preamble takes an async function"):
        await serve_tcp(read_header, preamble=wrong, ssl_context=context)


async def test_start_tls_in_it_counts_from_its_return_as_well(secure: bool) -> None:
    async def upgrade(conn: Connection) -> None:
        assert await conn.receive(8) == b"STARTTLS"
        await conn.send(b"OK")
        await conn.start_tls(server_context())

    async with serving(upgrade, secure=False) as service:
        async with service.peer(b"STARTTLS") as peer:
            assert await peer.receive(2) == b"OK"
            await exchange(peer, secure=True)
        ending = await service.ending()
    assert ending.tls is not None
    assert (ending.sent, ending.received) == (5, 5)
