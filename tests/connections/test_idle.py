"""`Connection.idle()`: a wait for the next request that a server's stop ends."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import trio
from anyio.streams.buffered import BufferedByteReceiveStream
from conftest import ASYNCIO, BACKEND, on_one_loop

from anyio_rst import (
    Cause,
    CloseKind,
    Connection,
    Ending,
    PeerClose,
    Server,
    connection_scope,
    serve_tcp,
)
from anyio_rst.testing import assert_fin, assert_rst, open_peer

from securing import (
    CLEAN,
    TLSPeer,
    client_context,
    each_way,
    server_context,
    talk,
)
from serving import (
    LONG,
    Peer,
    Seen,
    arrived,
    assert_finished,
    assert_reset,
    connection_of,
    error_of,
    serve,
    settled,
)

pytestmark = pytest.mark.anyio


class Failure(Exception):
    pass


async def answer(conn: Connection) -> None:
    """The loop of the documentation."""
    while True:
        with conn.idle(30) as idle:
            request = await conn.receive()
        if idle.ended:
            return
        await conn.send(request.upper())


class Service:
    def __init__(self) -> None:
        self.server: Server
        self.endings: list[Ending] = []
        self.returned = anyio.Event()

    def report(self, conn: Connection) -> None:
        assert conn.ending is not None
        self.endings.append(conn.ending)

    @property
    def causes(self) -> set[tuple[CloseKind, Cause]]:
        return {(ending.kind, ending.cause) for ending in self.endings}


@asynccontextmanager
async def stopped_at_last(handler: Any, **options: Any) -> AsyncIterator[Service]:
    """A server that the block stops; it has to return by itself."""
    service = Service()

    async def serve(*, task_status: Any) -> None:
        options.setdefault("host", "127.0.0.1")
        options.setdefault("on_ending", service.report)
        await serve_tcp(handler, task_status=task_status, **options)
        service.returned.set()

    async with anyio.create_task_group() as tg:
        service.server = await tg.start(serve)
        with anyio.fail_after(LONG):
            yield service
            assert service.server.stopping
            await service.returned.wait()


FINISHED = {(CloseKind.FIN, Cause.RETURNED)}


# The server stops.


async def test_stop_ends_idle_connections_with_fin(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "anyio_rst")
    count = 50
    async with stopped_at_last(answer) as service:
        assert not service.server.stopping
        peers = [Peer(service.server.port) for _ in range(count)]
        for peer in peers[: count // 2]:
            await peer.send(b"hello")
            assert await peer.receive(5) == b"HELLO"
        while len(service.server.connections) < count:
            await anyio.sleep(0.001)
        await settled()
        service.server.stop()
        for peer in peers:
            with peer:
                assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)
    assert len(service.endings) == count
    assert service.causes == FINISHED
    above = [record for record in caplog.records if record.levelno > logging.DEBUG]
    assert [record.getMessage() for record in above] == [
        f"listening on 127.0.0.1:{service.server.port}"
    ]


async def test_stop_lets_requests_under_way_be_answered() -> None:
    may_answer = anyio.Event()

    async def handler(conn: Connection) -> None:
        while True:
            with conn.idle() as idle:
                request = await conn.receive()
            if idle.ended:
                return
            await conn.send(b"working")
            await may_answer.wait()
            await conn.send(request)

    async with stopped_at_last(handler) as service:
        with Peer(service.server.port) as peer:
            await peer.send(b"hello")
            assert await peer.receive(7) == b"working"
            service.server.stop()
            await settled()
            may_answer.set()
            assert await peer.read_to_end() == Seen(b"hello", PeerClose.FIN)
    assert service.causes == FINISHED


async def test_idle_after_stop_ends_at_once() -> None:
    told: list[tuple[bool, bool, bool]] = []
    begun = anyio.Event()

    async def handler(conn: Connection) -> None:
        begun.set()
        await conn.receive(4)
        for timeout in (None, 30, 0):
            with conn.idle(timeout) as idle:
                await conn.receive()
            told.append((idle.ended, idle.stopping, idle.timed_out))

    async with stopped_at_last(handler) as service:
        with Peer(service.server.port) as peer:
            await begun.wait()
            service.server.stop()
            await peer.send(b"late")
            assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)
    assert told == [(True, True, False)] * 3


async def test_the_one_that_stops_the_server_may_be_idle_itself() -> None:
    async def handler(conn: Connection) -> None:
        with conn.idle() as idle:
            service.server.stop()
            await conn.receive()
        assert idle.stopping

    async with stopped_at_last(handler) as service:
        with Peer(service.server.port) as peer:
            assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)
    assert service.causes == FINISHED


# Data that arrived is never lost.


def tls_peer(port: int) -> TLSPeer:
    return TLSPeer(Peer(port), client_context(), server_side=False)


@pytest.mark.parametrize("secure", [False, True])
async def test_request_that_comes_with_the_stop_is_answered(secure: bool) -> None:
    """In the same turn of the loop, while the handler waits."""
    options = {"ssl_context": server_context()} if secure else {}
    async with stopped_at_last(answer, **options) as service:
        peer = tls_peer(service.server.port)
        with peer.raw:
            if secure:
                await peer.handshake()
                await peer.send(b"one")
                assert await peer.receive(3) == b"ONE"
            await settled()
            peer.raw.sock.sendall(peer.encrypted(b"two") if secure else b"two")
            service.server.stop()
            if secure:
                assert await peer.end() == (b"TWO", CLEAN)
            else:
                assert await peer.raw.read_to_end() == Seen(b"TWO", PeerClose.FIN)
    assert service.causes == FINISHED


@pytest.mark.parametrize("secure", [False, True])
async def test_requests_that_came_before_the_stop_are_answered(secure: bool) -> None:
    """Each in a receive of its own, before the first of them is answered."""
    may_go_on, begun = anyio.Event(), anyio.Event()

    async def handler(conn: Connection) -> None:
        begun.set()
        await may_go_on.wait()
        while True:
            with conn.idle() as idle:
                request = await conn.receive(3)
            if idle.ended:
                return
            await conn.send(request.upper())

    options = {"ssl_context": server_context()} if secure else {}
    async with stopped_at_last(handler, **options) as service:
        peer = tls_peer(service.server.port)
        with peer.raw:
            if secure:
                await peer.handshake()
                requests = [peer.encrypted(b"onetwo"), peer.encrypted(b"sixten")]
            else:
                requests = [b"onetwosixten"]
            for request in requests:
                await peer.raw.send(request)
            await arrived(peer.raw)
            await begun.wait()
            service.server.stop()
            may_go_on.set()
            if secure:
                assert await peer.end() == (b"ONETWOSIXTEN", CLEAN)
            else:
                seen = await peer.raw.read_to_end()
                assert seen == Seen(b"ONETWOSIXTEN", PeerClose.FIN)


async def test_backlog_of_a_server_that_stops_is_answered() -> None:
    """Who waits there has sent a request, and is idle for the first time after that."""
    async with stopped_at_last(answer) as service:
        peers = [Peer(service.server.port) for _ in range(10)]
        for peer in peers:
            peer.sock.sendall(b"hello")
        service.server.stop()
        for peer in peers:
            with peer:
                assert await peer.read_to_end() == Seen(b"HELLO", PeerClose.FIN)


async def test_lines_in_a_buffer_are_answered() -> None:
    may_go_on = anyio.Event()

    async def handler(conn: Connection) -> None:
        lines = BufferedByteReceiveStream(conn)
        while True:
            with conn.idle() as idle:
                line = await lines.receive_until(b"\n", 100)
            if idle.ended:
                return
            await conn.send(b"".join([line, b"!"]))
            await may_go_on.wait()

    async with stopped_at_last(handler) as service:
        with Peer(service.server.port) as peer:
            await peer.send(b"one\ntwo\nthree")
            assert await peer.receive(4) == b"one!"
            await peer.send(b"\nfour\nfi")  # in the kernel
            await arrived(peer)
            service.server.stop()
            may_go_on.set()
            seen = await peer.read_to_end()
    assert seen == Seen(b"two!three!four!", PeerClose.FIN)


async def test_request_that_comes_with_the_time_out_counts(
    anyio_backend: Any, kind: str
) -> None:
    async with connection_of(kind) as (conn, peer):

        async def late() -> None:
            await settled()
            peer.socket.sendall(b"hello")
            time.sleep(0.11)

        async with anyio.create_task_group() as tg:
            tg.start_soon(late)
            with conn.idle(0.1) as idle:
                assert await conn.receive() == b"hello"
            assert not idle.ended
            assert not idle.timed_out
            assert not idle.stopping
        # What waits for who comes too late, and what is more than it asks for.
        peer.socket.sendall(b"onetwo")
        for word in (b"one", b"two"):
            with conn.idle(0) as idle:
                assert await conn.receive(3) == word
            assert not idle.ended
        with conn.idle(0) as idle:
            await conn.receive(3)
        assert idle.timed_out
    await assert_finished(conn, peer, Cause.RETURNED)


@each_way
async def test_what_a_tls_session_has_counts(way: str, side: str) -> None:
    """Decrypted; received and not decrypted; in the kernel; none of it all."""
    may_send, has_sent = anyio.Event(), anyio.Event()
    received: list[bytes] = []

    async def body(conn: Connection) -> None:
        received.append(await conn.receive(3))
        for _ in range(3):
            with conn.idle(0) as idle:
                received.append(await conn.receive(3))
            assert not idle.ended
        may_send.set()
        await has_sent.wait()
        with conn.idle(0) as idle:
            received.append(await conn.receive(3))
        assert not idle.ended
        for _ in range(2):
            with conn.idle(0) as idle:
                await conn.receive(3)
            assert idle.timed_out
        await conn.send(b"bye")

    async def script(peer: TLSPeer) -> None:
        await peer.raw.send(peer.encrypted(b"onetwo") + peer.encrypted(b"sixten"))
        await may_send.wait()
        await peer.send(b"now")
        await arrived(peer.raw)
        has_sent.set()
        assert await peer.end() == (b"bye", CLEAN)

    await talk(way, side, body, script, drain=None)
    assert received == [b"one", b"two", b"six", b"ten", b"now"]


@each_way
async def test_half_a_record_is_kept(way: str, side: str) -> None:
    """Idle ends in the middle of it; it goes on in the next receive."""
    ended = anyio.Event()
    received: list[bytes] = []

    async def body(conn: Connection) -> None:
        received.append(await conn.receive(3))
        with conn.idle(0.05) as idle:
            await conn.receive()
        assert idle.timed_out
        ended.set()
        received.append(await conn.receive())

    async def script(peer: TLSPeer) -> None:
        first, second = peer.encrypted(b"one"), peer.encrypted(b"two")
        await peer.raw.send(first + second[:10])
        await ended.wait()
        await peer.raw.send(second[10:])
        assert await peer.end() == (b"", CLEAN)

    await talk(way, side, body, script, drain=None)
    assert received == [b"one", b"two"]


# The time-out.


async def test_time_out_without_a_server(anyio_backend: Any, kind: str) -> None:
    async with serve(kind, timed_out) as service:
        with service.connect() as peer:
            assert await peer.read_to_end() == Seen(b"timed out", PeerClose.FIN)
        ending = await service.ending()
    assert (ending.kind, ending.cause) == (CloseKind.FIN, Cause.RETURNED)


async def timed_out(conn: Connection) -> None:
    before = time.monotonic()
    with conn.idle(0.05) as idle:
        await conn.receive()
    assert time.monotonic() - before >= 0.045
    assert (idle.ended, idle.stopping, idle.timed_out) == (True, False, True)
    await conn.send(b"timed out")


async def test_what_comes_first_is_what_ended_it() -> None:
    told: list[Any] = []

    async def handler(conn: Connection) -> None:
        with conn.idle(0.02) as idle:
            # The time-out has passed before the server stops, and nobody knows yet.
            async with anyio.create_task_group() as tg:
                tg.start_soon(stop_late)
                await conn.receive()
        told.append((idle.ended, idle.stopping, idle.timed_out))

    async def stop_late() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            service.server.stop()

    async with stopped_at_last(handler) as service:
        with Peer(service.server.port) as peer:
            assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)
    assert told == [(True, False, True)]


async def test_nothing_is_ended_before_its_time() -> None:
    async with open_peer() as (conn, peer):
        with conn.idle(0.2) as idle:
            assert (idle.ended, idle.stopping, idle.timed_out) == (False,) * 3
            await peer.send(b"hello")
            assert await conn.receive() == b"hello"
        await anyio.sleep(0.25)
        assert (idle.ended, idle.stopping, idle.timed_out) == (False,) * 3
        await conn.send(b"bye")
    await assert_fin(peer, b"bye")


@on_one_loop
@pytest.mark.parametrize(
    ("timeout", "error"),
    [(-1, ValueError), (float("nan"), ValueError), ("3", TypeError), (True, TypeError)],
)
async def test_bad_time_outs_are_refused(timeout: Any, error: type[Exception]) -> None:
    async with open_peer() as (conn, _):
        with pytest.raises(error, match="timeout must be"):
            conn.idle(timeout)
        with conn.idle(0):
            pass


# With what else a handler does.


async def test_idle_twice_is_refused() -> None:
    async with open_peer(drain=None) as (conn, peer):
        async with connection_scope(conn, drain=None) as inner:
            with conn.idle(LONG):
                for same in (conn, inner):
                    with pytest.raises(RuntimeError, match="already in an idle"):
                        with same.idle():
                            pytest.fail("entered")
                await peer.send(b"hello")
                assert await conn.receive() == b"hello"
            with inner.idle(0) as idle:
                await inner.receive()
            assert idle.timed_out
            await peer.send(b"hello")
            with idle:  # as often as one likes, after one another
                assert await conn.receive() == b"hello"
            assert not idle.ended


async def test_nested_scopes_are_told_that_the_server_stops() -> None:
    async def handler(conn: Connection) -> None:
        async with connection_scope(BufferedByteReceiveStream(conn)) as inner:
            await answer(inner)
        await conn.aclose()

    async with stopped_at_last(handler) as service:
        with Peer(service.server.port) as peer:
            await peer.send(b"hello")
            assert await peer.receive(5) == b"HELLO"
            service.server.stop()
            assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)


@pytest.mark.parametrize("how", ["child", "body", "around", "nested", "closing"])
async def test_an_end_of_idle_is_no_failure(how: str) -> None:
    """In a task group of the connection, around one, and where all is cleaned up."""

    async def handler(conn: Connection) -> None:
        if how == "child":
            async with conn.create_task_group() as tg:
                tg.start_soon(answer, conn)
        elif how == "body":
            async with conn.create_task_group() as tg:
                tg.start_soon(anyio.sleep_forever)
                await answer(conn)
                tg.cancel_scope.cancel()
        elif how == "around":
            with conn.idle() as idle:
                async with conn.create_task_group() as tg:
                    tg.start_soon(anyio.sleep_forever)
                    await conn.receive()
            assert idle.stopping
        elif how == "nested":
            with conn.idle() as idle:
                async with connection_scope(conn) as inner:
                    await inner.receive()
            assert idle.stopping
        else:
            with conn.idle() as idle:
                try:
                    await conn.receive()
                finally:
                    await conn.aclose()
            assert idle.stopping
        await conn.send(b"bye") if how != "closing" else None

    async with stopped_at_last(handler) as service:
        with Peer(service.server.port) as peer:
            while not service.server.connections:
                await anyio.sleep(0.001)
            await settled()
            service.server.stop()
            expected = b"" if how == "closing" else b"bye"
            assert await peer.read_to_end() == Seen(expected, PeerClose.FIN)
    (ending,) = service.endings
    assert ending.kind is CloseKind.FIN


async def test_a_failure_in_it_is_a_failure(anyio_backend: Any, kind: str) -> None:
    async def handler(conn: Connection) -> None:
        with conn.idle(LONG):
            await conn.receive()
            raise Failure

    async with serve(kind, handler) as service:
        with service.connect() as peer:
            await peer.send(b"hello")
            assert await peer.read_to_end() == Seen(b"", PeerClose.RST)
        ending = await service.ending()
    assert isinstance(error_of(ending), Failure)


async def test_the_peers_end_is_what_it_always_is() -> None:
    async with open_peer() as (conn, peer):
        with pytest.raises(anyio.EndOfStream):
            with conn.idle(LONG):
                peer.send_eof()
                await conn.receive()
        await conn.send(b"bye")
    await assert_fin(peer, b"bye")


@pytest.mark.parametrize("ended", [False, True])
async def test_cancellation_from_outside_goes_through(
    anyio_backend: Any, kind: str, ended: bool
) -> None:
    """Also in the turn in which idle has ended."""
    idles: list[Any] = []
    with anyio.CancelScope() as scope:
        async with connection_of(kind) as (conn, peer):

            async def cancel() -> None:
                await settled()
                scope.cancel()
                if ended:
                    idles[0]._stop()

            async with anyio.create_task_group() as tg:
                tg.start_soon(cancel)
                with conn.idle() as idle:
                    idles.append(idle)
                    await conn.receive()
                pytest.fail("it went on")
    assert scope.cancelled_caught
    assert not idles[0].ended
    await assert_reset(conn, peer, Cause.CANCELLED)


async def test_cancellation_from_outside_waits_for_a_checkpoint_behind_the_data() -> None:
    with anyio.CancelScope() as scope:
        async with open_peer() as (conn, peer):
            await peer.send(b"hello")
            with conn.idle(0):
                scope.cancel()
                assert await conn.receive() == b"hello"
            await conn.send(b"too late")
    assert scope.cancelled_caught
    await assert_rst(peer)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="no Task.cancelling() to tell by")
@pytest.mark.parametrize("has_data", [False, True])
@pytest.mark.parametrize("first", ["task", "idle"])
@pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=BACKEND)
async def test_task_cancel_is_not_taken_for_the_end_of_idle(
    first: str, has_data: bool
) -> None:
    got: list[bytes] = []

    async def receive(conn: Connection) -> None:
        with conn.idle() as idle:
            idles.append(idle)
            got.append(await conn.receive())
        await anyio.lowlevel.checkpoint()
        pytest.fail("it went on")

    idles: list[Any] = []
    async with open_peer() as (conn, peer):
        task = asyncio.create_task(receive(conn))
        await settled()
        if has_data:
            peer.socket.sendall(b"hello")
        acts: list[Callable[[], object]] = [task.cancel, idles[0]._stop]
        for act in acts if first == "task" else reversed(acts):
            act()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not idles[0].ended


@pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=BACKEND)
async def test_data_leaves_no_cancellation_behind() -> None:
    """The end of an idle that data has come before is nothing to the task."""
    async with open_peer() as (conn, peer):
        task = asyncio.current_task()
        assert task is not None
        before = task.cancelling() if sys.version_info >= (3, 11) else 0
        for _ in range(3):
            await peer.send(b"hello")
            with conn.idle(0):
                assert await conn.receive() == b"hello"
            for _ in range(5):
                await anyio.sleep(0)
        if sys.version_info >= (3, 11):
            assert task.cancelling() == before


async def test_who_only_sends_may_be_idle() -> None:
    news = anyio.Event()

    async def handler(conn: Connection) -> None:
        while True:
            with conn.idle() as idle:
                await news.wait()
            if idle.ended:
                return
            await conn.send(b"news")
            news_was_sent()

    def news_was_sent() -> None:
        nonlocal news
        news = anyio.Event()

    async with stopped_at_last(handler) as service:
        with Peer(service.server.port) as peer:
            news.set()
            assert await peer.receive(4) == b"news"
            await settled()
            service.server.stop()
            assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)
    assert service.causes == FINISHED


async def test_a_send_that_idle_cuts_is_torn() -> None:
    """The wait is for a request; what is sent in it is not complete."""
    cut: list[bool] = []

    async def handler(conn: Connection) -> None:
        with conn.idle() as idle:
            await conn.send(bytes(10_000_000))
        cut.append(idle.ended)

    async with stopped_at_last(handler) as service:
        with Peer(service.server.port, buffer=4096) as peer:
            assert await peer.receive(1)  # some of it has been sent
            await settled()
            service.server.stop()
            assert (await peer.read_to_end()).close is PeerClose.RST
    assert cut == [True]
    assert service.causes == {(CloseKind.RST, Cause.TORN_SEND)}


def test_in_a_nursery_of_trio() -> None:
    async def main() -> None:
        async with trio.open_nursery() as handlers, trio.open_nursery() as nursery:
            server: Any = await nursery.start(
                partial(serve_tcp, answer, host="127.0.0.1", task_group=handlers)
            )
            with Peer(server.port) as peer:
                await peer.send(b"hello")
                assert await peer.receive(5) == b"HELLO"
                while not handlers.child_tasks:
                    await trio.sleep(0)
                server.stop()
                assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)

    trio.run(main)
