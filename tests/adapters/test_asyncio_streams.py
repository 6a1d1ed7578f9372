"""Unmodified handlers of asyncio's streams, judged by plain sockets and curl."""

from __future__ import annotations

import asyncio
import signal
import socket
import ssl
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import pytest
from conftest import ASYNCIO

from anyio_rst import Cause, CloseKind, Drain, Ending, PeerClose, asyncio_streams

from securing import (
    CERTIFICATE,
    CLEAN,
    LATEST,
    VERSIONS,
    TLSPeer,
    client_context,
    server_context,
    shake_hands,
)
from serving import (
    LONG,
    TELLS_OF_QUEUES,
    Peer,
    Seen,
    accepted,
    arrived,
    fill_buffers,
    told,
)

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True),
]

HALF = b"half"
WHOLE = HALF + b" and half"
LARGE = bytes(3_000_000)

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Failure(Exception):
    pass


class Service:
    """A server on asyncio's streams, and how its connections ended."""

    def __init__(self, secure: bool) -> None:
        self.port = 0
        self.server: Any = None
        self.secure = secure
        self.endings: asyncio.Queue[Ending] = asyncio.Queue()

    async def ending(self) -> Ending:
        with anyio.fail_after(LONG):
            return await self.endings.get()

    @asynccontextmanager
    async def peer(
        self, version: ssl.TLSVersion = LATEST, **options: Any
    ) -> AsyncIterator[Any]:
        with Peer(self.port, **options) as peer:
            if not self.secure:
                yield peer
                return
            tls = await shake_hands(peer, version=version)
            yield tls


@asynccontextmanager
async def serving(
    handler: Handler, *, secure: bool = False, **options: Any
) -> AsyncIterator[Service]:
    service = Service(secure)
    context = server_context() if secure else None
    loop = asyncio.get_running_loop()
    # Unhandled exceptions of handlers are the server's to log.
    loop.set_exception_handler(lambda *_: None)
    served = asyncio_streams.scoped(
        handler, on_ending=service.endings.put_nowait, **options
    )
    service.server = await asyncio.start_server(served, "127.0.0.1", 0, ssl=context)
    service.port = service.server.sockets[0].getsockname()[1]
    try:
        yield service
    finally:
        service.server.close()
        await service.server.wait_closed()
        await asyncio.sleep(0.01)  # in which transports close their sockets
        loop.set_exception_handler(None)


async def end_of(peer: Any) -> tuple[bytes, list[str]]:
    if isinstance(peer, TLSPeer):
        return await peer.end()
    seen = await peer.read_to_end()
    return seen.data, [seen.close.value]


def finished(secure: bool) -> list[str]:
    return CLEAN if secure else ["FIN"]


each_security = pytest.mark.parametrize("secure", [False, True], ids=["plain", "TLS"])


@each_security
async def test_return_finishes(secure: bool) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readexactly(1) == b"?"
        writer.writelines([HALF, WHOLE[4:]])

    async with serving(answer, secure=secure) as service, service.peer() as peer:
        await peer.send(b"?")
        assert await end_of(peer) == (WHOLE, finished(secure))
        raw = peer.raw.sock if secure else peer.sock
        address = raw.getsockname()
        raw.close()
        ending = await service.ending()
    assert (ending.kind, ending.cause) == (CloseKind.FIN, Cause.RETURNED)
    assert ending.remote_address == address
    assert (ending.sent, ending.received) == (len(WHOLE), 1)
    assert (ending.unacknowledged, ending.peer) == (told(0), PeerClose.FIN)
    assert (ending.tls is not None) == secure
    assert ending.duration > 0


@each_security
async def test_failure_resets_at_once(secure: bool) -> None:
    failure = Failure()
    cleaning, clean = asyncio.Event(), asyncio.Event()

    async def fail(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)
        writer.write(HALF)
        raise failure

    async def served(*streams: Any) -> None:
        with pytest.raises(Failure) as caught:
            await scoped(*streams)
        assert caught.value is failure
        cleaning.set()
        await clean.wait()

    scoped = asyncio_streams.scoped(fail)
    context = server_context() if secure else None
    server = await asyncio.start_server(served, "127.0.0.1", 0, ssl=context)
    service = Service(secure)
    service.port = server.sockets[0].getsockname()[1]
    async with service.peer() as peer:
        await peer.send(b"?")
        data, how = await end_of(peer)
        assert data in (b"", HALF)  # uvloop sends it in a turn to come
        assert how == ["RST"]
        await cleaning.wait()
        clean.set()
    server.close()
    await server.wait_closed()
    await asyncio.sleep(0.01)


@each_security
async def test_failure_half_way_resets(secure: bool) -> None:
    async def fail(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HALF)
        await writer.drain()
        await reader.readexactly(1)
        raise Failure

    async with serving(fail, secure=secure) as service, service.peer() as peer:
        assert await peer.receive(4) == HALF
        await peer.send(b"?")
        assert await end_of(peer) == (b"", ["RST"])
        ending = await service.ending()
    assert (ending.kind, ending.cause) == (CloseKind.RST, Cause.RAISED)
    assert isinstance(getattr(ending.outcome, "error", None), Failure)
    assert (ending.sent, ending.received) == (4, 1)


@each_security
async def test_cancellation_resets(secure: bool) -> None:
    tasks: list[Any] = []

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.append(asyncio.current_task())
        writer.write(HALF)
        try:
            await reader.read()
        finally:
            writer.close()
            await writer.wait_closed()

    async with serving(hang, secure=secure) as service, service.peer() as peer:
        assert await peer.receive(4) == HALF
        tasks[0].cancel()
        assert await end_of(peer) == (b"", ["RST"])
        ending = await service.ending()
    assert (ending.kind, ending.cause) == (CloseKind.RST, Cause.CANCELLED)


@each_security
async def test_what_finish_on_names_finishes(secure: bool) -> None:
    async def fail(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(WHOLE)
        raise Failure

    async with (
        serving(fail, secure=secure, finish_on=Failure) as service,
        service.peer() as peer,
    ):
        assert await end_of(peer) == (WHOLE, finished(secure))
        (peer.raw.sock if secure else peer.sock).close()
        ending = await service.ending()
    assert (ending.kind, ending.cause) == (CloseKind.FIN, Cause.FINISH_ON)


@each_security
async def test_slow_reader_gets_everything(secure: bool) -> None:
    """Progress counts, not the time that it takes in all."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(LARGE)

    # The kernel that does not tell how much is left shows progress in leaps.
    drain = Drain(timeout=0.3 if TELLS_OF_QUEUES else LONG)
    async with (
        serving(answer, secure=secure, drain=drain) as service,
        service.peer(buffer=65536) as peer,
    ):
        for _ in range(8):
            await asyncio.sleep(0.1)
            assert len(await peer.receive(100_000)) == 100_000
        data, how = await end_of(peer)
        assert (len(data), how) == (len(LARGE) - 800_000, finished(secure))
        (peer.raw.sock if secure else peer.sock).close()
        ending = await service.ending()
    assert (ending.kind, ending.sent) == (CloseKind.FIN, len(LARGE))


@each_security
async def test_reader_that_stops_is_reset(secure: bool) -> None:
    """What it was not sent cannot be followed by a FIN."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(LARGE * 4)

    drain = Drain(timeout=0.1)
    async with (
        serving(answer, secure=secure, drain=drain) as service,
        service.peer(buffer=65536) as peer,
    ):
        ending = await service.ending()
        data, how = await end_of(peer)
        assert how == ["RST"]
        assert len(data) < len(LARGE * 4)
    assert (ending.kind, ending.cause) == (CloseKind.RST, Cause.TORN_SEND)
    if not secure:  # a TLS session takes everything
        assert ending.sent < len(LARGE * 4)


async def test_unread_input_does_not_destroy_the_answer() -> None:
    answered = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)
        writer.write(LARGE)
        answered.set()

    async with serving(answer) as service, service.peer() as peer:
        # It reads nothing before it has sent everything.
        await peer.send(bytes(2_000_000))
        await answered.wait()
        await peer.send(bytes(2_000_000))
        seen = await peer.read_to_end()
        assert (len(seen.data), seen.close) == (len(LARGE), PeerClose.FIN)
        peer.sock.close()
        ending = await service.ending()
    assert ending.received + ending.discarded == 4_000_000
    assert (ending.kind, ending.peer) == (CloseKind.FIN, PeerClose.FIN)


async def test_limit_of_what_is_discarded() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)
        writer.write(WHOLE)

    async with (
        serving(answer, drain=Drain(max_bytes=0)) as service,
        service.peer() as peer,
    ):
        await peer.send(b"?")
        ending = await service.ending()
        assert await peer.read_to_end() == Seen(WHOLE, PeerClose.FIN)
    assert (ending.kind, ending.peer) == (CloseKind.FIN, PeerClose.NONE)


@each_security
async def test_close_is_the_explicit_success(secure: bool) -> None:
    closed = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(LARGE)
        writer.close()
        assert writer.is_closing()
        writer.write(b"dropped")
        await writer.wait_closed()
        closed.set()
        raise Failure

    async with serving(answer, secure=secure) as service, service.peer() as peer:
        data, how = await end_of(peer)
        assert (len(data), how) == (len(LARGE), finished(secure))
        (peer.raw.sock if secure else peer.sock).close()
        await closed.wait()
        ending = await service.ending()
    assert (ending.kind, ending.cause) == (CloseKind.FIN, Cause.CLOSED)


@pytest.mark.parametrize("drain", [None, Drain(timeout=0), Drain(total=0)], ids=repr)
@each_security
async def test_without_time_to_drain_all_is_sent(
    secure: bool, drain: Drain | None
) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(LARGE)

    async with (
        serving(answer, secure=secure, drain=drain) as service,
        service.peer() as peer,
    ):
        data, how = await end_of(peer)
        assert (len(data), how) == (len(LARGE), finished(secure))


async def test_cancelled_right_after_the_close() -> None:
    """Before anything else has run."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(WHOLE)
        await asyncio.sleep(0.01)  # uvloop sends in a turn to come
        writer.close()
        raise asyncio.CancelledError

    async with serving(answer) as service, service.peer() as peer:
        ending = await service.ending()
        assert await peer.read_to_end() == Seen(WHOLE, PeerClose.FIN)
    assert (ending.kind, ending.cause) == (CloseKind.FIN, Cause.CLOSED)


async def test_close_sends_the_fin_while_the_handler_goes_on() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(WHOLE)
        writer.close()
        await release.wait()

    release = asyncio.Event()
    async with serving(answer) as service, service.peer() as peer:
        assert await peer.read_to_end() == Seen(WHOLE, PeerClose.FIN)
        peer.sock.close()
        await service.ending()
        release.set()


@each_security
async def test_close_while_an_exception_is_handled_leaves_the_decision(
    secure: bool,
) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await reader.readexactly(1)
        writer.write(HALF)
        await writer.drain()
        try:
            try:
                raise Failure
            finally:
                writer.close()
                await writer.wait_closed()
        except Failure:
            if asked == b"x":
                raise

    async with serving(answer, secure=secure) as service:
        for asks, how in ((b"x", ["RST"]), (b"y", finished(secure))):
            async with service.peer() as peer:
                await peer.send(asks)
                assert await peer.receive(4) == HALF
                assert await end_of(peer) == (b"", how)
            await service.ending()


@each_security
async def test_abort_of_the_transport_resets(secure: bool) -> None:
    async def abort(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HALF)
        await reader.readexactly(1)
        writer.transport.abort()
        assert writer.is_closing()

    async with serving(abort, secure=secure) as service, service.peer() as peer:
        assert await peer.receive(4) == HALF
        await peer.send(b"?")
        assert await end_of(peer) == (b"", ["RST"])
        ending = await service.ending()
    assert (ending.kind, ending.cause) == (CloseKind.RST, Cause.ABORTED)


async def test_a_child_that_reads_does_not_take_the_reset_for_the_end() -> None:
    children: list[asyncio.Task[bytes]] = []

    async def fail(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        children.append(asyncio.create_task(reader.read()))
        await asyncio.sleep(0)
        raise Failure

    async with serving(fail) as service, service.peer() as peer:
        assert await peer.read_to_end() == Seen(b"", PeerClose.RST)
        with pytest.raises(ConnectionAbortedError, match="was reset here"):
            await children[0]


async def test_tls_answer_survives_what_the_peer_still_sends() -> None:
    """OpenSSL may keep its close_notify back then."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)
        writer.write(WHOLE)

    async with serving(answer, secure=True) as service, service.peer() as peer:
        await peer.send(bytes(1_000_000))
        await peer.send(bytes(1_000_000))
        data, how = await peer.end()
        assert (data, how[-1]) == (WHOLE, "FIN")
        peer.raw.sock.close()
        ending = await service.ending()
    assert ending.kind is CloseKind.FIN


async def test_half_close_then_failure_is_recorded() -> None:
    async def fail(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(WHOLE)
        writer.write_eof()
        await reader.readexactly(1)
        raise Failure

    async with serving(fail) as service, service.peer() as peer:
        assert await peer.read_to_end() == Seen(WHOLE, PeerClose.FIN)
        await peer.send(b"?")
        ending = await service.ending()
    assert ending.kind is CloseKind.RST
    assert ending.fin_sent_before_reset


@each_security
async def test_reset_by_the_peer_is_recorded(secure: bool) -> None:
    async def read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HALF)
        await reader.read()

    async with serving(read, secure=secure) as service, service.peer() as peer:
        assert await peer.receive(4) == HALF
        (peer.raw if secure else peer).reset()
        ending = await service.ending()
    assert (ending.peer, ending.cause) == (PeerClose.RST, Cause.RAISED)


async def test_peer_that_finished_first_gets_the_answer() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.read() == b"?"
        writer.write(LARGE)

    async with serving(answer) as service, service.peer() as peer:
        await peer.send(b"?")
        peer.send_eof()
        seen = await peer.read_to_end()
        assert (len(seen.data), seen.close) == (len(LARGE), PeerClose.FIN)
        ending = await service.ending()
    assert (ending.kind, ending.peer) == (CloseKind.FIN, PeerClose.FIN)


async def test_tls_answer_after_the_peers_close_notify_is_no_fin() -> None:
    """asyncio has closed its transport by then, and drops what is written."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.read() == b"?"
        writer.write(WHOLE)

    async with serving(answer, secure=True) as service, service.peer() as peer:
        await peer.send(b"?")
        peer.say_close_notify()
        ending = await service.ending()
        assert (await peer.end())[1][-1] == "RST"
    assert (ending.kind, ending.cause) == (CloseKind.RST, Cause.TORN_SEND)


async def test_tls_peer_that_finishes_first_is_answered_by_a_fin() -> None:
    async def read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.read() == b"?"

    async with serving(read, secure=True) as service, service.peer() as peer:
        await peer.send(b"?")
        peer.say_close_notify()
        data, how = await peer.end()
        # Before Python 3.11 asyncio does not answer a close_notify.
        assert (data, how[-1]) == (b"", "FIN")
        peer.raw.sock.close()
        ending = await service.ending()
    assert (ending.kind, ending.cause) == (CloseKind.FIN, Cause.RETURNED)


@pytest.mark.skipif(sys.version_info < (3, 13), reason="new in 3.13")
@pytest.mark.parametrize("call", ["close_clients", "abort_clients"])
async def test_a_server_that_closes_its_clients_resets(call: str) -> None:
    async def read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HALF)
        await reader.read()

    async with serving(read) as service, service.peer() as peer:
        assert await peer.receive(4) == HALF
        if not hasattr(service.server, call):
            return  # uvloop's
        getattr(service.server, call)()
        assert await peer.read_to_end() == Seen(b"", PeerClose.RST)
        assert (await service.ending()).cause is Cause.ABORTED


async def test_cancelled_while_it_sends_what_is_left() -> None:
    """A part of an answer gets no FIN behind it."""
    tasks: list[Any] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.append(asyncio.current_task())
        await reader.readexactly(1)
        fill_buffers(writer.get_extra_info("socket"))
        writer.write(WHOLE)

    async with serving(answer) as service, service.peer(buffer=65536) as peer:
        await peer.send(b"?")
        while not tasks or service.endings.qsize():
            await asyncio.sleep(0.001)
        await arrived(peer)
        await asyncio.sleep(0.05)
        tasks[0].cancel()
        ending = await service.ending()
        assert (await peer.read_to_end()).close is PeerClose.RST
    assert ending.cause is Cause.TORN_SEND


async def test_cancelled_in_the_drain() -> None:
    """It cuts the drain short, and a finished answer stays one."""
    tasks: list[Any] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.append(asyncio.current_task())
        writer.write(WHOLE)

    async with serving(answer) as service, service.peer() as peer:
        assert await peer.read_to_end() == Seen(WHOLE, PeerClose.FIN)
        tasks[0].cancel()
        ending = await service.ending()
    assert (ending.kind, ending.cause) == (CloseKind.FIN, Cause.RETURNED)


@pytest.mark.parametrize("version", VERSIONS, ids=str)
async def test_tls_peer_that_does_not_answer_the_close_notify(
    version: ssl.TLSVersion,
) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(WHOLE)

    context = server_context(version)
    drain = Drain(timeout=0.1)
    served = asyncio_streams.scoped(answer, drain=drain)
    server = await asyncio.start_server(served, "127.0.0.1", 0, ssl=context)
    service = Service(secure=True)
    service.port = server.sockets[0].getsockname()[1]
    async with service.peer(version) as peer:
        assert await peer.end() == (WHOLE, CLEAN)
    server.close()
    await server.wait_closed()
    await asyncio.sleep(0.01)


# STARTTLS, from Python 3.11 on.


@pytest.mark.skipif(sys.version_info < (3, 11), reason="StreamWriter.start_tls()")
@pytest.mark.parametrize("fails", [False, True])
async def test_start_tls(fails: bool) -> None:
    async def upgrade(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        start_tls: Any = getattr(writer, "start_tls")  # noqa: B009 - not in 3.10
        await start_tls(server_context())
        assert await reader.readexactly(1) == b"?"
        writer.write(WHOLE)
        await writer.drain()
        await reader.readexactly(1)
        if fails:
            raise Failure

    async with serving(upgrade) as service, service.peer() as raw:
        peer = await shake_hands(raw)
        await peer.send(b"?")
        assert await peer.receive(len(WHOLE)) == WHOLE
        await peer.send(b"!")
        assert await peer.end() == (b"", ["RST"] if fails else CLEAN)
        raw.sock.close()
        ending = await service.ending()
    assert (ending.sent, ending.received) == (len(WHOLE), 2)
    assert ending.tls is not None


# Clients.


@asynccontextmanager
async def connected(secure: bool) -> AsyncIterator[tuple[Any, Any, Any]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        tls: dict[str, Any] = {}
        if secure:
            tls = {"ssl": client_context(), "server_hostname": "localhost"}
        opening = asyncio.create_task(
            asyncio.open_connection("127.0.0.1", listener.getsockname()[1], **tls)
        )
        with await anyio.to_thread.run_sync(accepted, listener) as raw:
            peer: Any = raw
            if secure:
                peer = await shake_hands(raw, server_side=True)
            reader, writer = await opening
            yield reader, writer, peer
    await asyncio.sleep(0.01)


@each_security
async def test_client(secure: bool) -> None:
    async with connected(secure) as (reader, writer, peer):
        scope = asyncio_streams.connection_scope(reader, writer, drain=None)
        async with scope as streams:
            streams.writer.write(WHOLE)
            assert streams.reader is reader
            assert streams.ending is None
        assert await end_of(peer) == (WHOLE, finished(secure))
        assert streams.ending is not None
        assert streams.ending.cause is Cause.RETURNED
        with pytest.raises(RuntimeError, match="only be entered once"):
            await scope.__aenter__()


@each_security
async def test_client_that_fails(secure: bool) -> None:
    async with connected(secure) as (reader, writer, peer):
        with pytest.raises(Failure):
            async with asyncio_streams.connection_scope(reader, writer) as streams:
                streams.writer.write(HALF)
                await streams.writer.drain()
                assert await peer.receive(4) == HALF
                raise Failure
        assert await end_of(peer) == (b"", ["RST"])
        assert streams.ending is not None
        assert streams.ending.kind is CloseKind.RST


@pytest.mark.parametrize("call", ["close", "abort"])
@pytest.mark.parametrize("fails", [False, True])
async def test_of_the_writer_that_was_given_the_block_decides(
    call: str, fails: bool
) -> None:
    async with connected(secure=False) as (reader, writer, peer):
        with suppress(Failure):
            async with asyncio_streams.connection_scope(reader, writer, drain=None):
                writer.write(WHOLE)
                getattr(writer if call == "close" else writer.transport, call)()
                with suppress(ConnectionError):
                    await writer.wait_closed()
                if fails:
                    assert await peer.receive(len(WHOLE)) == WHOLE
                    raise Failure
        seen = await peer.read_to_end()
        assert seen.close is (PeerClose.RST if fails else PeerClose.FIN)


# What is refused.


async def test_what_is_no_tcp_connection_is_refused(tmp_path: Path) -> None:
    refused: asyncio.Queue[BaseException] = asyncio.Queue()

    async def served(*streams: Any) -> None:
        try:
            await asyncio_streams.scoped(served)(*streams)
        except TypeError as exc:
            refused.put_nowait(exc)

    path = str(tmp_path / "socket")
    server = await asyncio.start_unix_server(served, path)
    reader, writer = await asyncio.open_unix_connection(path)
    with pytest.raises(TypeError, match="is not a TCP connection"):
        await asyncio_streams.connection_scope(reader, writer).__aenter__()
    assert "is not a TCP connection" in str(await refused.get())
    writer.close()
    server.close()
    await server.wait_closed()
    await asyncio.sleep(0.01)


async def test_a_closed_writer_is_refused() -> None:
    async with connected(secure=False) as (reader, writer, _):
        writer.close()
        with pytest.raises(ConnectionError, match="closed"):
            await asyncio_streams.connection_scope(reader, writer).__aenter__()


async def test_wrong_arguments_are_refused() -> None:
    scoped: Any = asyncio_streams.scoped
    with pytest.raises(TypeError, match="is not async"):
        scoped(print)
    for options in ({"drain": 5}, {"finish_on": 5}):
        with pytest.raises(TypeError):
            scoped(test_client, **options)
    with pytest.raises(TypeError, match="on_ending takes a function that is not async"):
        scoped(test_client, on_ending=test_client)


async def test_a_failing_on_ending_is_logged(caplog: Any) -> None:
    def fail(_: Ending) -> None:
        raise Failure

    async with connected(secure=False) as (reader, writer, _):
        async with asyncio_streams.connection_scope(
            reader, writer, drain=None, on_ending=fail
        ):
            pass
    assert "on_ending failed" in caplog.text


# Programs on asyncio alone.

PROGRAM = """
    import asyncio, ssl, sys

    from anyio_rst import asyncio_streams

    async def handler(reader, writer):
        request = await reader.readuntil(b"\\r\\n\\r\\n")
        writer.write(b"HTTP/1.0 200 OK\\r\\n\\r\\nanswer")
        await writer.drain()
        if b"/half" in request:
            raise RuntimeError
        if b"/hang" in request:
            await asyncio.sleep(60)
        writer.close()

    async def main():
        context = None
        if sys.argv[2:]:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(sys.argv[2])
        served = asyncio_streams.scoped(handler)
        server = await asyncio.start_server(served, "127.0.0.1", 0, ssl=context)
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()

    run = asyncio.run
    if sys.argv[1] == "uvloop":
        import uvloop
        run = uvloop.run
    run(main())
"""


@asynccontextmanager
async def program(backend: Any, *arguments: str) -> AsyncIterator[tuple[Any, int]]:
    loop = "uvloop" if backend[1]["use_uvloop"] else "asyncio"
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), loop, *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        try:
            yield process, int(await anyio.to_thread.run_sync(process.stdout.readline))
        finally:
            process.kill()


@each_security
async def test_curl_knows_half_an_answer(
    anyio_backend: Any, secure: bool, tmp_path: Path
) -> None:
    arguments: list[str] = []
    if secure:
        pem = tmp_path / "server.pem"
        CERTIFICATE.private_key_and_cert_chain_pem.write_to_path(str(pem))
        arguments = [str(pem)]
    async with program(anyio_backend, *arguments) as (_, port):
        for path, status in (("whole", 0), ("half", 56)):
            url = f"{'https' if secure else 'http'}://127.0.0.1:{port}/{path}"
            curl = ["curl", "-ksS", "--http1.0", url]
            result = await anyio.run_process(curl, check=False, stderr=None)
            assert (result.returncode, result.stdout) == (status, b"answer")


@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGTERM])
async def test_death_resets(anyio_backend: Any, death: signal.Signals) -> None:
    async with program(anyio_backend) as (process, port):
        with Peer(port) as peer:
            await peer.send(b"GET /hang HTTP/1.0\r\n\r\n")
            answer = b"HTTP/1.0 200 OK\r\n\r\nanswer"
            assert await peer.receive(len(answer)) == answer
            process.send_signal(death)
            assert await peer.read_to_end() == Seen(b"", PeerClose.RST)
