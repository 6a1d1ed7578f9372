"""`Server.stop()` serves who waits in the backlog, and nobody else."""

from __future__ import annotations

import errno
import logging
import os
import resource
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import anyio
import pytest

from anyio_rst import Cause, CloseKind, Connection, PeerClose, Server, serve_tcp

from securing import CLEAN, TLSPeer, client_context, server_context
from serving import LONG, Peer, Seen, settled

pytestmark = pytest.mark.anyio

BACKLOG = 40


async def answer(conn: Connection) -> None:
    word = await conn.receive()
    await conn.send(word.upper())


@asynccontextmanager
async def stopped_at_last(handler: Any, **options: Any) -> AsyncIterator[Server]:
    """A server that the block stops; it has to return by itself."""
    returned = anyio.Event()

    async def serve(*, task_status: Any) -> None:
        if "sockets" not in options:
            options.setdefault("host", "127.0.0.1")
        await serve_tcp(handler, task_status=task_status, **options)
        returned.set()

    async with anyio.create_task_group() as tg:
        server = await tg.start(serve)
        with anyio.fail_after(LONG):
            yield server
            await returned.wait()


def in_the_backlog(*ports: int, count: int = BACKLOG, word: bytes = b"a") -> list[Peer]:
    """Connected and with a request sent, while the event loop stands still."""
    peers = [Peer(ports[number % len(ports)]) for number in range(count)]
    for peer in peers:
        peer.sock.sendall(word)
    return peers


async def seen_by(peers: list[Peer]) -> list[Seen]:
    """By all of them at once: a clean end waits for the peer's."""
    seen: dict[Peer, Seen] = {}

    async def see(peer: Peer) -> None:
        with peer:
            seen[peer] = await peer.read_to_end()

    async with anyio.create_task_group() as tg:
        for peer in peers:
            tg.start_soon(see, peer)
    return [seen[peer] for peer in peers]


ANSWERED = Seen(b"A", PeerClose.FIN)
RESET = Seen(b"", PeerClose.RST)


def refuses(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED


@pytest.mark.parametrize("count", [1, BACKLOG, 150])
async def test_the_backlog_is_served(count: int) -> None:
    async with stopped_at_last(answer) as server:
        peers = in_the_backlog(server.port, count=count)
        server.stop()
        assert await seen_by(peers) == [ANSWERED] * count
        assert refuses(server.port)
    statistics = server.statistics()
    assert statistics.accepted_connections == count
    assert statistics.endings_by_kind[CloseKind.FIN] == count


@pytest.mark.parametrize("most", [1, 7])
async def test_max_connections_holds(most: int) -> None:
    most_at_once = 0

    async def handler(conn: Connection) -> None:
        nonlocal most_at_once
        most_at_once = max(most_at_once, len(server.connections))
        await answer(conn)

    async with stopped_at_last(handler, max_connections=most) as server:
        peers = in_the_backlog(server.port)
        server.stop()
        assert await seen_by(peers) == [ANSWERED] * BACKLOG
    assert most_at_once == most


@pytest.mark.parametrize("most", [None, 1])
async def test_each_listening_socket_has_its_own(most: int | None) -> None:
    listeners = [socket.create_server(("127.0.0.1", 0), backlog=100) for _ in range(2)]
    async with stopped_at_last(answer, sockets=listeners, max_connections=most) as server:
        peers = in_the_backlog(*(port for _, port in server.addresses))
        server.stop()
        assert await seen_by(peers) == [ANSWERED] * BACKLOG
    assert [listener.fileno() for listener in listeners] == [-1, -1]


async def test_both_families_of_an_address() -> None:
    async with stopped_at_last(answer, host=None) as server:
        peers = [Peer(server.port, host=host) for host in ("127.0.0.1", "::1") * 5]
        for peer in peers:
            peer.sock.sendall(b"a")
        server.stop()
        assert await seen_by(peers) == [ANSWERED] * 10


async def test_over_tls() -> None:
    async with stopped_at_last(answer, ssl_context=server_context()) as server:
        peers = [
            TLSPeer(Peer(server.port), client_context(), server_side=False)
            for _ in range(BACKLOG)
        ]
        server.stop()
        for peer in peers:
            with peer.raw:
                await peer.handshake()
                await peer.send(b"a")
                assert await peer.end() == (b"A", CLEAN)


async def test_connected_behind_a_handler_that_blocks() -> None:
    """Which is where a backlog comes from."""
    peers: list[Peer] = []

    async def handler(conn: Connection) -> None:
        if not peers:
            peers.extend(in_the_backlog(server.port))
            time.sleep(0.05)
            server.stop()
        await answer(conn)

    async with stopped_at_last(handler) as server:
        first = in_the_backlog(server.port, count=1)
        assert await seen_by(first) == [ANSWERED]
        assert await seen_by(peers) == [ANSWERED] * BACKLOG


async def test_who_has_left_the_backlog_costs_nobody_else() -> None:
    async with stopped_at_last(answer) as server:
        peers = in_the_backlog(server.port)
        for peer in peers[::2]:
            peer.reset()
        for peer in peers[1::4]:
            peer.send_eof()
        server.stop()
        assert await seen_by(peers[1::2]) == [ANSWERED] * (BACKLOG // 2)


async def test_later_arrivals_are_reset_and_hold_nothing_open() -> None:
    may_end = anyio.Event()

    async def handler(conn: Connection) -> None:
        await answer(conn)
        await may_end.wait()

    async with stopped_at_last(handler, max_connections=1) as server:
        (holder,) = in_the_backlog(server.port, count=1)
        assert await holder.receive(1) == b"A"
        waiting = in_the_backlog(server.port, count=3)
        server.stop()
        late = in_the_backlog(server.port, count=5)
        await settled()
        late += in_the_backlog(server.port, count=5)
        may_end.set()
        assert await seen_by([holder]) == [Seen(b"", PeerClose.FIN)]
        assert await seen_by(waiting) == [ANSWERED] * 3
        assert await seen_by(late) == [RESET] * 10
    assert server.statistics().accepted_connections == 4


async def test_without_a_backlog_nobody_is_accepted_any_more() -> None:
    async with stopped_at_last(answer) as server:
        server.stop()
        late = in_the_backlog(server.port)
        assert await seen_by(late) == [RESET] * BACKLOG


async def test_those_whom_another_process_has_taken_are_not_waited_for() -> None:
    """And nobody is taken in their place, though the server still has a connection."""
    begun, may_end = anyio.Event(), anyio.Event()

    async def handler(conn: Connection) -> None:
        begun.set()
        await may_end.wait()
        await answer(conn)

    listener = socket.create_server(("127.0.0.1", 0), backlog=100)
    with socket.socket(fileno=os.dup(listener.fileno())) as other:
        async with stopped_at_last(handler, sockets=[listener]) as server:
            (first,) = in_the_backlog(server.port, count=1)
            await begun.wait()
            peers = in_the_backlog(server.port, count=5)
            server.stop()
            taken = [other.accept()[0] for _ in peers]
            await settled()
            assert listener.fileno() == -1
            late = in_the_backlog(server.port, count=5)
            await settled()
            assert len(server.connections) == 1
            may_end.set()
            assert await seen_by([first]) == [ANSWERED]
        taken += [other.accept()[0] for _ in late]  # none of them is missing
        for sock in (*taken, *(peer.sock for peer in (*peers, *late))):
            sock.close()


async def test_where_the_kernel_does_not_tell_how_many_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("anyio_rst._tcp_info.backlog", lambda listener: None)
    begun, may_end = anyio.Event(), anyio.Event()

    async def handler(conn: Connection) -> None:
        begun.set()
        await may_end.wait()
        await answer(conn)

    async with stopped_at_last(handler) as server:
        (first,) = in_the_backlog(server.port, count=1)
        await begun.wait()
        peers = in_the_backlog(server.port)
        server.stop()
        await settled()
        assert refuses(server.port)
        may_end.set()
        assert await seen_by([first, *peers]) == [ANSWERED] * (BACKLOG + 1)


@contextmanager
def no_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(number) for number in os.listdir("/proc/self/fd"))
    spare = [os.dup(0)]
    while spare[-1] < highest:
        spare.append(os.dup(0))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (spare[-1] + 1, hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in spare:
            os.close(descriptor)


def complaints(caplog: pytest.LogCaptureFixture) -> int:
    return sum("accept: EMFILE" in record.getMessage() for record in caplog.records)


async def test_out_of_descriptors_it_does_not_wait_for_ever(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """There is no connection whose end could make one free."""
    async with stopped_at_last(answer) as server:
        peers = in_the_backlog(server.port, count=5)
        with no_descriptors():
            server.stop()
            assert await seen_by(peers) == [RESET] * 5
    assert complaints(caplog) == 1
    assert caplog.records[-1].levelno == logging.ERROR


async def test_out_of_descriptors_it_waits_for_those_that_become_free(
    caplog: pytest.LogCaptureFixture,
) -> None:
    may_end = anyio.Event()

    async def handler(conn: Connection) -> None:
        await answer(conn)
        await may_end.wait()

    async with stopped_at_last(handler) as server:
        (holder,) = in_the_backlog(server.port, count=1)
        assert await holder.receive(1) == b"A"
        peers = in_the_backlog(server.port, count=2)
        with no_descriptors():
            server.stop()
            while not complaints(caplog):
                await anyio.sleep(0.001)
            may_end.set()  # the holder's becomes free
            assert await seen_by([holder]) == [Seen(b"", PeerClose.FIN)]
            assert await seen_by(peers) == [ANSWERED] * 2


async def test_a_cancellation_cuts_it_short() -> None:
    async def handler(conn: Connection) -> None:
        await answer(conn)
        await anyio.sleep_forever()

    async with anyio.create_task_group() as tg:

        async def serve(*, task_status: Any) -> None:
            await serve_tcp(
                handler, host="127.0.0.1", max_connections=1, task_status=task_status
            )

        server = await tg.start(serve)
        peers = in_the_backlog(server.port, count=3)
        server.stop()
        assert await peers[0].receive(1) == b"A"
        tg.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            assert await seen_by(peers) == [RESET] * 3
    assert server.statistics().endings_by_cause[Cause.CANCELLED] == 1
