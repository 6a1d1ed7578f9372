"""examples/limits.py, with plain sockets as its clients."""

from __future__ import annotations

import logging
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from ipaddress import ip_address, ip_network
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.to_thread
import pytest
from test_readme import connect, free_port
from test_serve_processes import (
    call,
    echoes,
    example,
    finish,
    loops,
    read_to_end,
    running,
)

from anyio_rst import Cause, CloseKind, Connection, Drain, Ending, PeerClose, serve_tcp

import limits
from securing import server_context, shake_hands
from serving import LONG, Peer, Seen

pytestmark = pytest.mark.anyio


class Limited:
    """A server with the limits of the example, which is to be quiet."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.limits = limits.Limits()
        self._send, self._receive = anyio.create_memory_object_stream[Ending](100)

    def on_ending(self, conn: Connection) -> None:
        self.limits.release(conn)
        assert conn.ending is not None
        self._send.send_nowait(conn.ending)

    async def ended(self, kind: CloseKind, cause: Cause) -> None:
        """So the next one has ended."""
        with anyio.fail_after(LONG):
            ending = await self._receive.receive()
        assert (ending.kind, ending.cause) == (kind, cause)

    def close(self) -> None:
        self._send.close()
        self._receive.close()


@asynccontextmanager
async def serving_quietly(
    caplog: pytest.LogCaptureFixture, **options: Any
) -> AsyncIterator[Limited]:
    # Listening already, so that it is known before there is a connection.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        it = Limited(listener.getsockname()[1])
        sock = listener.dup()

    async def serve(*, task_status: Any) -> None:
        await serve_tcp(
            limits.echo,
            sockets=[sock],
            finish_on=anyio.EndOfStream,
            preamble=it.limits.admit,
            on_ending=it.on_ending,
            drain=limits.DRAIN,
            task_status=task_status,
            **options,
        )

    caplog.set_level(logging.DEBUG, "anyio_rst")
    try:
        async with anyio.create_task_group() as tg:
            await tg.start(serve)
            caplog.clear()  # that it listens
            yield it
            tg.cancel_scope.cancel()
    finally:
        it.close()
    assert {record.levelno for record in caplog.records} <= {logging.DEBUG}


LimitedTo = Callable[..., AbstractAsyncContextManager[Limited]]


@pytest.fixture
def limited(
    anyio_backend: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> LimitedTo:
    """A server with the limits of the example, but for those given."""

    def serve(
        *, ssl_context: ssl.SSLContext | None = None, **constants: object
    ) -> AbstractAsyncContextManager[Limited]:
        for name, value in constants.items():
            monkeypatch.setattr(limits, name, value)
        return serving_quietly(caplog, ssl_context=ssl_context)

    return serve


def refused(port: int) -> bool:
    """By a reset, which may be there before connect() has returned."""
    try:
        with socket.create_connection(("127.0.0.1", port), LONG) as sock:
            return read_to_end(sock) == Seen(b"", PeerClose.RST)
    except ConnectionResetError:
        return True


async def is_refused(server: Limited) -> None:
    assert await anyio.to_thread.run_sync(refused, server.port)
    await server.ended(CloseKind.RST, Cause.ABORTED)


async def is_served(peer: Peer) -> None:
    await peer.send(b"hello")
    assert await peer.receive(5) == b"hello"


async def has_finished(peer: Peer) -> None:
    peer.send_eof()
    assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)


async def test_one_too_many_is_reset_and_the_others_are_served(
    limited: LimitedTo,
) -> None:
    async with limited(MAX_PER_SOURCE=2) as server:
        with Peer(server.port) as first, Peer(server.port) as second:
            await is_served(first)
            await is_served(second)
            await is_refused(server)
            await is_served(second)
            await has_finished(first)
            await server.ended(CloseKind.FIN, Cause.FINISH_ON)
            with Peer(server.port) as third:  # there is a place again
                await is_served(third)
                await is_refused(server)
                await has_finished(third)
            await server.ended(CloseKind.FIN, Cause.FINISH_ON)
            await has_finished(second)
            await server.ended(CloseKind.FIN, Cause.FINISH_ON)
    assert not server.limits._open


async def test_one_too_many_is_reset_before_its_tls_handshake(limited: LimitedTo) -> None:
    async with limited(MAX_PER_SOURCE=1, ssl_context=server_context()) as server:
        with Peer(server.port) as first:
            secure = await shake_hands(first)
            await is_refused(server)  # without a word
            await secure.send(b"hello")
            assert await secure.receive(5) == b"hello"


async def test_other_sources_are_served(
    limited: LimitedTo,
) -> None:
    async with limited(MAX_PER_SOURCE=1) as server:
        with Peer(server.port) as first:
            await is_served(first)
            await is_refused(server)
            other = socket.create_connection(
                ("127.0.0.1", server.port), LONG, source_address=("127.0.0.2", 0)
            )
            with other:
                await anyio.to_thread.run_sync(echoes, other, b"hello")


@pytest.mark.parametrize(
    ("address", "source"),
    [
        ("192.0.2.1", ip_address("192.0.2.1")),
        ("::ffff:192.0.2.1", ip_address("192.0.2.1")),
        ("2001:db8:1:2:3:4:5:6", ip_network("2001:db8:1:2::/64")),
        ("fe80::1%lo", ip_network("fe80::/64")),
        (None, None),
    ],
)
def test_source(address: str | None, source: object) -> None:
    conn: Any = SimpleNamespace(remote_address=address and (address, 4000))
    assert limits.source_of(conn) == source


async def test_silence_is_ended_with_fin(limited: LimitedTo) -> None:
    async with limited(IDLE=0.2) as server:
        with Peer(server.port) as silent, Peer(server.port) as talking:
            await is_served(talking)
            await is_served(talking)
            for peer in (silent, talking):
                assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)
        for _ in range(2):
            await server.ended(CloseKind.FIN, Cause.RETURNED)


async def test_time_is_up_between_requests_with_fin(limited: LimitedTo) -> None:
    async with limited(TOTAL=0.3) as server:
        with Peer(server.port) as peer:
            await is_served(peer)
            assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)
        await server.ended(CloseKind.FIN, Cause.RETURNED)


async def test_time_is_up_in_the_middle_of_an_answer_with_rst(limited: LimitedTo) -> None:
    async with limited(TOTAL=0.3) as server:
        with Peer(server.port, buffer=4096) as peer:
            with pytest.raises((ConnectionResetError, BrokenPipeError)):
                await peer.send(bytes(100_000_000))  # and takes nothing
            await server.ended(CloseKind.RST, Cause.ABORTED)


@pytest.mark.parametrize(
    "drain", [Drain(timeout=0.2), Drain(timeout=60.0, total=0.2)], ids=["stuck", "total"]
)
async def test_answer_that_is_not_taken_is_left_to_the_kernel(
    limited: LimitedTo, drain: Drain
) -> None:
    async with limited(IDLE=0.2, DRAIN=drain) as server:
        with Peer(server.port, buffer=4096) as peer:
            await peer.send(bytes(100_000))
            await server.ended(CloseKind.FIN, Cause.RETURNED)
            assert not server.limits._open
            assert await peer.read_to_end() == Seen(bytes(100_000), PeerClose.FIN)


@loops
def test_program(loop: str) -> None:
    port = free_port()
    with (
        running([*example("limits.py", loop), str(port)]) as process,
        ExitStack() as stack,
    ):
        admitted = [stack.enter_context(connect(port, process))]
        admitted += [stack.enter_context(call(port)) for _ in range(9)]
        for sock in admitted:
            echoes(sock, b"hello")
        assert refused(port)
        for sock in admitted:
            finish(sock)
        process.kill()
        _, errors = process.communicate()
    assert "failed" not in errors
