"""`serve_tcp` and its `Server`."""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import pickle
import resource
import socket
import ssl
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from types import FrameType
from typing import Any

import anyio
import anyio.abc
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import pytest
import trio
from anyio import wait_all_tasks_blocked
from conftest import ASYNCIO, on_one_loop

from anyio_rst import (
    Cause,
    CloseKind,
    Connection,
    Drain,
    PeerClose,
    PeerReset,
    Server,
    ServerStatistics,
    connect_tcp,
    serve_tcp,
)

from serving import LONG, Peer, Seen, echo, said

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup, ExceptionGroup

pytestmark = pytest.mark.anyio


class Failure(Exception):
    pass


@asynccontextmanager
async def serving(handler: Any, **options: Any) -> AsyncIterator[Server]:
    async with anyio.create_task_group() as tg:
        options.setdefault("host", "127.0.0.1")
        yield await tg.start(partial(serve_tcp, handler, **options))
        tg.cancel_scope.cancel()


async def fail(conn: Connection) -> None:
    raise Failure


async def wait_until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(LONG):
        while not condition():
            await anyio.lowlevel.checkpoint()


def refuses(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED


async def ask(port: int, word: bytes = b"hello") -> bytes:
    with Peer(port) as peer:
        await peer.send(word)
        peer.send_eof()
        seen = await peer.read_to_end()
    assert seen.close is PeerClose.FIN
    return seen.data


# Where it listens.


async def test_server_knows_its_port_and_addresses() -> None:
    async with serving(echo) as server:
        assert server.addresses == (("127.0.0.1", server.port),)
        assert await ask(server.port) == b"hello"


async def test_no_host_serves_ipv4_and_ipv6_on_one_port() -> None:
    async with serving(echo, host=None) as server:
        assert {port for _, port in server.addresses} == {server.port}
        for host in ("127.0.0.1", "::1"):
            with Peer(server.port, host=host) as peer:
                peer.send_eof()
                assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)


async def test_port_that_is_in_use_is_named_and_nothing_stays_bound() -> None:
    async with serving(echo) as server:
        message = f"cannot listen on 127.0.0.1, port {server.port}: "
        with pytest.raises(OSError, match=message) as caught:
            await serve_tcp(echo, server.port, host="127.0.0.1")
        assert caught.value.errno == errno.EADDRINUSE


async def test_port_is_free_again_afterwards() -> None:
    async with serving(echo) as server:
        assert await ask(server.port) == b"hello"
    async with serving(echo, port=server.port) as again:
        assert again.port == server.port


@on_one_loop
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"port": -1}, ValueError, "port must be from 0 to 65535, not -1"),
        ({"port": 65536}, ValueError, "port must be from 0 to 65535, not 65536"),
        ({"port": "80"}, TypeError, "port must be an int, not '80'"),
        ({"port": None}, TypeError, "port must be an int, not None"),
        ({"port": True}, TypeError, "port must be an int, not True"),
        ({"backlog": 0}, ValueError, "backlog must be >= 1, not 0"),
        ({"backlog": 1.5}, TypeError, "backlog must be an int, not 1.5"),
        ({"max_connections": 0}, ValueError, "max_connections must be >= 1, not 0"),
        ({"max_connections": -1}, ValueError, "max_connections must be >= 1, not -1"),
        (
            {"max_connections": True},
            TypeError,
            "max_connections must be an int, not True",
        ),
        ({"max_connections": 1.5}, TypeError, "max_connections must be an int, not 1.5"),
        ({"reuse_port": 1}, TypeError, "reuse_port must be True or False, not 1"),
        ({"task_group": 3}, TypeError, "task_group must be a .* nursery, not 3"),
        ({"on_ending": 3}, TypeError, "on_ending takes a function that is not async: 3"),
        ({"on_ending": fail}, TypeError, "on_ending takes a function that is not async"),
    ],
)
async def test_bad_options_are_refused(
    options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        await serve_tcp(echo, **options)


async def test_runs_without_task_status() -> None:
    async with anyio.create_task_group() as tg:
        tg.start_soon(serve_tcp, echo)
        await wait_all_tasks_blocked()
        tg.cancel_scope.cancel()


# Handlers that fail.


async def test_failing_handler_touches_nobody_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def handler(conn: Connection) -> None:
        word = await conn.receive()
        if word == b"fail":
            raise Failure("on purpose")
        await conn.send(word)
        await echo(conn)

    async with serving(handler) as server:
        with Peer(server.port) as other:
            await other.send(b"before")
            assert await other.receive(6) == b"before"
            with Peer(server.port) as peer:
                await peer.send(b"fail")
                assert await peer.read_to_end() == Seen(b"", PeerClose.RST)
            await other.send(b"after")
            assert await other.receive(5) == b"after"
            other.send_eof()
            assert await other.read_to_end() == Seen(b"", PeerClose.FIN)
        assert await ask(server.port) == b"hello"
    (record,) = said(caplog)
    assert (record.name, record.levelno) == ("anyio_rst", logging.ERROR)
    assert "a handler failed: <Connection with 127.0.0.1:" in record.message
    assert "(RST, RAISED)" in record.message
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], Failure)


async def test_peer_that_went_away_is_one_line_at_info(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "anyio_rst")

    async def in_a_group(conn: Connection) -> None:
        async with anyio.create_task_group() as tg:
            tg.start_soon(echo, conn)

    for handler in (echo, in_a_group):
        caplog.clear()
        ended = anyio.Event()
        async with serving(handler, on_ending=lambda _, e=ended: e.set()) as server:
            peer = Peer(server.port)
            await peer.send(b"hello")
            assert await peer.receive(5) == b"hello"
            peer.reset()
            await ended.wait()
        (record,) = said(caplog)
        assert record.levelno == logging.INFO
        assert record.exc_info is None
        assert record.message.startswith("the peer went away: <Connection with ")


async def test_propagate_errors_lets_them_out() -> None:
    peers: list[Peer] = []
    with pytest.raises(ExceptionGroup) as caught:
        async with serving(fail, propagate_errors=True) as server:
            peers.append(Peer(server.port))
            await anyio.sleep_forever()
    with peers[0] as peer:
        assert await peer.read_to_end() == Seen(b"", PeerClose.RST)
    exc: Any = caught.value
    while isinstance(exc, BaseExceptionGroup):
        (exc,) = exc.exceptions
    assert isinstance(exc, Failure)


@pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)
async def test_handler_that_only_says_that_it_was_cancelled_ends_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Anybody can raise CancelledError, and AnyIO takes it for a real one."""

    async def handler(conn: Connection) -> None:
        if await conn.receive() == b"fail":
            raise anyio.get_cancelled_exc_class()
        await conn.send(b"hello")

    async with serving(handler) as server:
        with Peer(server.port) as peer:
            await peer.send(b"fail")
            assert await peer.read_to_end() == Seen(b"", PeerClose.RST)
        assert await ask(server.port) == b"hello"
    (record,) = said(caplog)
    assert "cancelled from inside" in record.message


async def test_handler_that_returns_no_coroutine_is_logged_as_the_mistake_it_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with serving(lambda conn: None) as server:
        with Peer(server.port) as peer:
            assert await peer.read_to_end() == Seen(b"", PeerClose.RST)
    (record,) = said(caplog)
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], TypeError)


# on_ending.


async def test_on_ending_is_called_with_each_connection_once_it_has_ended() -> None:
    endings: list[tuple[CloseKind, Cause]] = []

    def on_ending(conn: Connection) -> None:
        assert conn.ending is not None
        endings.append((conn.ending.kind, conn.ending.cause))
        assert conn not in server.connections

    async def handler(conn: Connection) -> None:
        if await conn.receive() == b"detach":
            await conn.detach().aclose()

    async with serving(handler, on_ending=on_ending) as server:
        for word, close in (
            (b"x", PeerClose.FIN),
            (b"detach", PeerClose.FIN),
        ):
            with Peer(server.port) as peer:
                await peer.send(word)
                peer.send_eof()
                assert (await peer.read_to_end()).close is close
            await wait_until(lambda: not server.connections)
    assert endings == [
        (CloseKind.FIN, Cause.RETURNED),
        (CloseKind.DETACHED, Cause.DETACHED),
    ]


async def test_failing_on_ending_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def on_ending(conn: Connection) -> None:
        raise Failure

    async with serving(echo, on_ending=on_ending) as server:
        assert await ask(server.port) == b"hello"
        assert await ask(server.port) == b"hello"
        await wait_until(lambda: not server.connections)
    assert [record.levelname for record in said(caplog)] == ["ERROR", "ERROR"]
    assert "on_ending failed" in said(caplog)[0].message


# Stopping.


async def test_connections_are_those_that_are_open() -> None:
    async with serving(echo) as server:
        assert server.connections == frozenset()
        with Peer(server.port) as peer:
            await peer.send(b"x")
            assert await peer.receive(1) == b"x"
            (conn,) = server.connections
            assert conn.ending is None
            peer.send_eof()
            await wait_until(lambda: not server.connections)


async def test_stop_lets_running_handlers_finish() -> None:
    async with anyio.create_task_group() as tg:
        returned = anyio.Event()

        async def serve(*, task_status: Any) -> None:
            await serve_tcp(echo, host="127.0.0.1", task_status=task_status)
            returned.set()

        server = await tg.start(serve)
        with Peer(server.port) as peer:
            await peer.send(b"before")
            assert await peer.receive(6) == b"before"
            server.stop()
            server.stop()
            await wait_until(lambda: refuses(server.port))
            assert not returned.is_set()
            await peer.send(b"after")
            assert await peer.receive(5) == b"after"
            peer.send_eof()
            assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)
        with anyio.fail_after(LONG):
            await returned.wait()


async def test_stop_of_an_idle_server_returns() -> None:
    async with anyio.create_task_group() as tg:
        server = await tg.start(partial(serve_tcp, echo))
        server.stop()


async def test_cancelling_resets_every_connection_at_once() -> None:
    """Also those whose handlers are in a clean-up that is shielded."""
    may_end = anyio.Event()

    async def handler(conn: Connection) -> None:
        await conn.send(b"ready")
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await may_end.wait()

    async with anyio.create_task_group() as tg:
        server = await tg.start(partial(serve_tcp, handler, host="127.0.0.1"))
        peers = [Peer(server.port) for _ in range(5)]
        for peer in peers:
            assert await peer.receive(5) == b"ready"
        tg.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            for peer in peers:
                with peer:
                    assert await peer.read_to_end() == Seen(b"", PeerClose.RST)
            may_end.set()


async def test_cancelling_cuts_a_drain_short_and_leaves_it_a_fin() -> None:
    endings: list[Any] = []

    async def handler(conn: Connection) -> None:
        await conn.send(b"all of it")

    options: Any = {
        "drain": Drain(LONG),
        "on_ending": lambda conn: endings.append(conn.ending),
    }
    async with serving(handler, **options) as server:
        peer = Peer(server.port)
        assert await peer.read_to_end() == Seen(b"all of it", PeerClose.FIN)
        await wait_all_tasks_blocked()
        assert not endings
    peer.sock.close()
    (ending,) = endings
    assert (ending.kind, ending.cause) == (CloseKind.FIN, Cause.RETURNED)


# Whose tasks.


async def test_handlers_run_in_the_task_group_of_the_caller() -> None:
    peers: list[Peer] = []
    async with anyio.create_task_group() as handlers:
        async with anyio.create_task_group() as tg:
            server = await tg.start(
                partial(serve_tcp, echo, host="127.0.0.1", task_group=handlers)
            )
            peer = Peer(server.port)
            peers.append(peer)
            await peer.send(b"before")
            assert await peer.receive(6) == b"before"
            tg.cancel_scope.cancel()
        # The server is gone, and its handlers are not.
        await peer.send(b"after")
        assert await peer.receive(5) == b"after"
        handlers.cancel_scope.cancel()
    with peers[0] as peer:
        assert await peer.read_to_end() == Seen(b"", PeerClose.RST)


async def test_stop_waits_for_handlers_in_the_task_group_of_the_caller() -> None:
    async with anyio.create_task_group() as handlers:
        async with anyio.create_task_group() as tg:
            server = await tg.start(
                partial(serve_tcp, echo, host="127.0.0.1", task_group=handlers)
            )
            with Peer(server.port) as peer:
                await peer.send(b"x")
                assert await peer.receive(1) == b"x"
                server.stop()
                await wait_all_tasks_blocked()
                peer.send_eof()
                assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)


def test_trio_nurseries_will_do() -> None:
    async def main() -> None:
        async with trio.open_nursery() as handlers, trio.open_nursery() as nursery:
            server: Any = await nursery.start(
                partial(serve_tcp, echo, host="127.0.0.1", task_group=handlers)
            )
            assert await ask(server.port) == b"hello"
            server.stop()

    trio.run(main)


# How many at once.


def numbered(count: int, port: int) -> list[Peer]:
    """Peers in the order in which they connected; each has sent its number."""
    peers = [Peer(port) for _ in range(count)]
    for number, peer in enumerate(peers):
        peer.sock.sendall(bytes([number]))
    return peers


@pytest.mark.parametrize("limit", [1, 3])
async def test_at_the_limit_the_others_wait_in_order(limit: int) -> None:
    started: list[int] = []

    async def handler(conn: Connection) -> None:
        started.extend(await conn.receive(1))
        assert len(server.connections) <= limit
        await echo(conn)

    async with serving(handler, max_connections=limit) as server:
        peers = numbered(8, server.port)
        for number, peer in enumerate(peers):
            expected = range(min(number + limit, len(peers)))
            await wait_until(partial(lambda n: len(started) == n, len(expected)))
            await wait_all_tasks_blocked()
            assert sorted(started) == list(expected)
            assert len(server.connections) == len(expected) - number
            with peer:
                peer.send_eof()
                assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)


async def test_the_limit_counts_connections_that_drain() -> None:
    started: list[int] = []

    async def handler(conn: Connection) -> None:
        started.extend(await conn.receive(1))

    drain = Drain(timeout=LONG)
    async with serving(handler, max_connections=1, drain=drain) as server:
        first, second = numbered(2, server.port)
        with second:
            with first:
                assert await first.read_to_end() == Seen(b"", PeerClose.FIN)
                await wait_all_tasks_blocked()
                assert started == [0]
            assert await second.read_to_end() == Seen(b"", PeerClose.FIN)
            assert started == [0, 1]


async def test_at_the_limit_the_listening_sockets_take_turns() -> None:
    started: list[int] = []

    async def handler(conn: Connection) -> None:
        started.append(conn.extra(anyio.abc.SocketAttribute.local_port))
        await echo(conn)

    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    crowded, quiet = (sock.getsockname()[1] for sock in sockets)
    async with serving(handler, host=None, sockets=sockets, max_connections=1) as server:
        assert server.addresses == (("127.0.0.1", crowded), ("127.0.0.1", quiet))
        crowd = [Peer(crowded)]
        await wait_until(lambda: len(started) == 1)
        crowd += [Peer(crowded) for _ in range(8)]
        with Peer(quiet) as lonely:
            await wait_all_tasks_blocked()
            lonely.send_eof()
            for number, peer in enumerate(crowd, 2):
                with peer:
                    peer.send_eof()
                    assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)
                if number == 4:
                    break
            assert await lonely.read_to_end() == Seen(b"", PeerClose.FIN)
        for peer in crowd:
            peer.sock.close()
    assert quiet in started[:4]


# Sockets that are there already.


async def test_sockets_are_served_and_closed_at_the_end() -> None:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    port = sockets[0].getsockname()[1]
    async with serving(echo, host=None, port=port, sockets=sockets[:1]) as server:
        assert (server.port, await ask(port)) == (port, b"hello")
    async with serving(fail, host=None, sockets=sockets[1:]) as server:
        with Peer(server.port) as peer:
            assert await peer.read_to_end() == Seen(b"", PeerClose.RST)
    assert [sock.fileno() for sock in sockets] == [-1, -1]


def a_tcp_listener() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


def a_udp_socket() -> socket.socket:
    sock = socket.socket(type=socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    return sock


def a_unix_listener() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(b"\0anyio_rst-test")
    sock.listen()
    return sock


def a_unix_listener_passed_for_tcp() -> socket.socket:
    descriptor = a_unix_listener().detach()
    return socket.socket(socket.AF_INET, socket.SOCK_STREAM, fileno=descriptor)


def a_socket_that_does_not_listen() -> socket.socket:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    return sock


def a_closed_listener() -> socket.socket:
    sock = a_tcp_listener()
    sock.close()
    return sock


def a_listener_closed_by_number() -> socket.socket:
    sock = a_tcp_listener()
    os.close(sock.fileno())
    return sock


def a_tls_listener() -> socket.socket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    return context.wrap_socket(a_tcp_listener(), server_side=True)


@on_one_loop
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (a_udp_socket, TypeError, "is not a TCP socket: it is AF_INET, SOCK_DGRAM"),
        (a_unix_listener, TypeError, "is not a TCP socket: it is AF_UNIX, SOCK_STREAM"),
        (a_unix_listener_passed_for_tcp, TypeError, "is not a TCP socket: it is AF_UNIX"),
        (a_socket_that_does_not_listen, ValueError, "is not listening"),
        (a_closed_listener, ValueError, "is closed"),
        (a_listener_closed_by_number, ValueError, "is not an open socket: .*Bad file"),
        (a_tls_listener, TypeError, "is an SSLSocket: pass a plain socket"),
        (lambda: 3, TypeError, r"must be a socket, not 3; .* socket.socket\(fileno=3\)"),
        (lambda: "3", TypeError, "must be a socket.socket, not '3'"),
    ],
)
async def test_what_does_not_listen_for_tcp_is_refused_and_nothing_is_changed(
    make: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with a_tcp_listener() as good:
        bad = make()
        socket.setdefaulttimeout(LONG)  # for whatever is made of a descriptor
        try:
            with pytest.raises(error, match=rf"sockets\[1\] {message}"):
                await serve_tcp(echo, sockets=[good, bad])
        finally:
            socket.setdefaulttimeout(None)
        assert good.getblocking()
        assert os.get_blocking(good.fileno())
        assert good.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == bytes(8)
        if isinstance(bad, socket.socket):
            with suppress(OSError):
                bad.close()


@on_one_loop
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sockets": []}, ValueError, "sockets is empty"),
        ({"sockets": ()}, ValueError, "sockets is empty"),
        ({"sockets": 3}, TypeError, "sockets must be a list or tuple of sockets, not 3"),
        ({"host": "127.0.0.1"}, ValueError, "host, backlog and reuse_port cannot"),
        ({"backlog": 10}, ValueError, "host, backlog and reuse_port cannot"),
        ({"reuse_port": True}, ValueError, "host, backlog and reuse_port cannot"),
        ({"port": 1}, ValueError, r"port is 1, but sockets\[0\] listens on "),
    ],
)
async def test_options_that_do_not_go_with_sockets_are_refused(
    options: Any, error: type[Exception], message: str
) -> None:
    with a_tcp_listener() as listener:
        with pytest.raises(error, match=message):
            await serve_tcp(echo, **{"sockets": [listener], **options})
        assert listener.getblocking()


@on_one_loop
async def test_sockets_that_are_one_are_refused() -> None:
    with a_tcp_listener() as listener:
        with pytest.raises(ValueError, match=r"sockets\[1\] is the same as sockets\[0\]"):
            await serve_tcp(echo, sockets=[listener, listener])


@pytest.mark.parametrize(("taken", "free"), [("::1", "127.0.0.1"), ("0.0.0.0", "::1")])
async def test_address_in_use_leaves_nothing_bound(taken: str, free: str) -> None:
    """IPv4 and IPv6 or neither."""
    family = socket.AF_INET6 if ":" in taken else socket.AF_INET
    with socket.create_server((taken, 0), family=family) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on port {port}: ") as caught:
            await serve_tcp(echo, port)
        assert caught.value.errno == errno.EADDRINUSE
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((free, port))


# Statistics.


async def test_statistics_tell_what_became_of_the_connections() -> None:
    async def handler(conn: Connection) -> None:
        word = await conn.receive()
        if word == b"fail":
            raise Failure
        if word == b"abort":
            conn.abort()
        if word == b"detach":
            await conn.detach().aclose()
        if word == b"stay":
            await conn.send(word)
            await conn.receive()

    async with serving(handler, finish_on=Failure) as server:
        before = server.statistics()
        for word in (b"return", b"return", b"fail", b"abort", b"detach"):
            with Peer(server.port) as peer:
                await peer.send(word)
                await peer.read_to_end()
            await wait_until(lambda: not server.connections)
        with Peer(server.port) as peer:
            await peer.send(b"stay")
            assert await peer.receive(4) == b"stay"
            statistics = server.statistics()
    none = dict.fromkeys(CloseKind, 0), dict.fromkeys(Cause, 0)
    assert before == ServerStatistics(0, 0, *none)
    assert (statistics.open_connections, statistics.accepted_connections) == (1, 6)
    assert statistics.endings_by_kind == {
        CloseKind.FIN: 3,
        CloseKind.RST: 1,
        CloseKind.DETACHED: 1,
    }
    assert statistics.endings_by_cause == {
        **none[1],
        Cause.RETURNED: 2,
        Cause.FINISH_ON: 1,
        Cause.ABORTED: 1,
        Cause.DETACHED: 1,
    }
    after = server.statistics()
    assert (after.open_connections, after.accepted_connections) == (0, 6)
    assert after.endings_by_cause[Cause.CANCELLED] == 1


async def test_statistics_may_be_asked_for_by_another_thread() -> None:
    """An exporter's; connections end, each for another cause, between any two lines."""

    async def handler(conn: Connection) -> None:
        word = await conn.receive()
        if word == b"finish":
            raise Failure
        if word == b"close":
            await conn.aclose()
        if word == b"abort":
            conn.abort()
        if word == b"raise":
            raise EOFError

    async def end_one() -> None:
        if words:
            with Peer(server.port) as peer:
                await peer.send(words.pop())
                await peer.read_to_end()
            await wait_until(lambda: not server.connections)

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_name == "statistics" and event == "line":
            anyio.from_thread.run(end_one)
        return trace

    def ask_slowly() -> int:
        tracing = sys.gettrace()
        sys.settrace(trace)
        try:
            return sum(server.statistics().endings_by_cause.values())
        finally:
            sys.settrace(tracing)

    words = [b"raise", b"abort", b"close", b"finish", b"return"]
    async with serving(handler, finish_on=Failure) as server:
        await end_one()
        assert await anyio.to_thread.run_sync(ask_slowly) in range(1, 6)
        assert not words


async def test_statistics_are_a_snapshot_to_keep_and_to_send() -> None:
    async with serving(echo) as server:
        statistics: Any = server.statistics()
        with pytest.raises(dataclasses.FrozenInstanceError):
            statistics.open_connections = 1
        with pytest.raises(TypeError):
            statistics.endings_by_kind[CloseKind.FIN] = 1
        assert pickle.loads(pickle.dumps(statistics)) == statistics
        assert dataclasses.asdict(statistics)["open_connections"] == 0
        assert await ask(server.port) == b"hello"
        assert statistics.accepted_connections == 0


# Handlers that misbehave.


async def test_handler_that_spins_loses_nobody() -> None:
    spinning, enough = threading.Event(), threading.Event()

    async def handler(conn: Connection) -> None:
        word = await conn.receive()
        if word == b"spin":
            spinning.set()
            end = time.monotonic() + LONG
            while not enough.is_set() and time.monotonic() < end:
                pass
        await conn.send(word)

    def connect_meanwhile() -> list[Peer]:
        spinner.sock.sendall(b"spin")
        spinning.wait(LONG)
        peers = [Peer(server.port) for _ in range(20)]
        for peer in peers:
            peer.sock.sendall(b"word")
        enough.set()
        return peers

    async with serving(handler) as server:
        with Peer(server.port) as spinner:
            for peer in await anyio.to_thread.run_sync(connect_meanwhile):
                with peer:
                    assert await peer.read_to_end() == Seen(b"word", PeerClose.FIN)
            assert await spinner.read_to_end() == Seen(b"spin", PeerClose.FIN)


async def swallow(conn: Connection) -> None:
    await conn.send(b"ready")
    try:
        await anyio.sleep_forever()
    except anyio.get_cancelled_exc_class():
        pass


@asynccontextmanager
async def cancellable(handler: Any) -> AsyncIterator[tuple[Server, Any, anyio.Event]]:
    """A server, its cancel scope, and an event for the return of `serve_tcp`."""
    scope, returned = anyio.CancelScope(), anyio.Event()

    async def serve(*, task_status: Any) -> None:
        with scope:
            await serve_tcp(handler, host="127.0.0.1", task_status=task_status)
        returned.set()

    async with anyio.create_task_group() as tg:
        yield await tg.start(serve), scope, returned
        with anyio.fail_after(LONG):
            await returned.wait()


async def test_swallowing_a_cancellation_does_not_keep_the_connection_open() -> None:
    peer_knows = anyio.Event()
    raised: list[Exception] = []

    async def handler(conn: Connection) -> None:
        await swallow(conn)
        with anyio.CancelScope(shield=True):
            await peer_knows.wait()
            try:
                await conn.send(b"more")
            except anyio.ClosedResourceError as exc:
                raised.append(exc)

    async with cancellable(handler) as (server, scope, returned):
        with Peer(server.port) as peer:
            assert await peer.receive(5) == b"ready"
            scope.cancel()
            assert await peer.read_to_end() == Seen(b"", PeerClose.RST)
        assert not returned.is_set()
        peer_knows.set()
    assert len(raised) == 1
    assert server.statistics().endings_by_cause[Cause.CANCELLED] == 1


async def test_swallowing_a_cancellation_and_returning_at_once_is_a_return() -> None:
    async with cancellable(swallow) as (server, scope, _):
        with Peer(server.port) as peer:
            assert await peer.receive(5) == b"ready"
            scope.cancel()
            assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)
    assert server.statistics().endings_by_cause[Cause.RETURNED] == 1


async def test_swallowing_the_cancellation_of_a_callers_group_resets_nothing() -> None:
    async def handler(conn: Connection) -> None:
        await swallow(conn)
        with anyio.CancelScope(shield=True):
            await echo(conn)

    async with anyio.create_task_group() as tg, anyio.create_task_group() as handlers:
        server = await tg.start(
            partial(serve_tcp, handler, host="127.0.0.1", task_group=handlers)
        )
        with Peer(server.port) as peer:
            assert await peer.receive(5) == b"ready"
            with anyio.CancelScope(shield=True):
                handlers.cancel_scope.cancel()
                await peer.send(b"still")
                assert await peer.receive(5) == b"still"
                peer.send_eof()
                assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)
            server.stop()


async def test_task_left_behind_finds_the_connection_closed() -> None:
    raised: list[Exception] = []

    async def left_behind(conn: Connection) -> None:
        for use in (conn.receive(), conn.send(b"more"), conn.receive()):
            with pytest.raises(anyio.ClosedResourceError) as caught:
                await use
            raised.append(caught.value)

    async def handler(conn: Connection) -> None:
        others.start_soon(left_behind, conn)
        await wait_all_tasks_blocked()

    async with anyio.create_task_group() as others:
        async with serving(handler) as server:
            with Peer(server.port) as peer:
                assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)
            await wait_until(lambda: len(raised) == 3)


async def test_task_left_behind_in_the_middle_of_a_send_costs_the_fin() -> None:
    raised: list[Exception] = []

    async def left_behind(conn: Connection) -> None:
        with pytest.raises(anyio.ClosedResourceError) as caught:
            await conn.send(bytes(50_000_000))
        raised.append(caught.value)

    async def handler(conn: Connection) -> None:
        others.start_soon(left_behind, conn)
        await conn.receive()

    async with anyio.create_task_group() as others:
        async with serving(handler) as server:
            with Peer(server.port) as peer:
                assert await peer.receive(1) == b"\0"
                await peer.send(b"return")
                assert (await peer.read_to_end()).close is PeerClose.RST
            await wait_until(lambda: len(raised) == 1)
    assert server.statistics().endings_by_cause[Cause.TORN_SEND] == 1


# Out of descriptors.


async def test_running_out_of_descriptors_drops_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def records() -> list[logging.LogRecord]:
        return said(caplog)

    async with serving(echo) as server:
        with Peer(server.port) as first:
            await first.send(b"x")
            assert await first.receive(1) == b"x"
            second = Peer(server.port)  # its own descriptor is had before the limit
            await wait_until(lambda: len(server.connections) == 2)
            third = socket.socket()
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            highest = max(int(fd) for fd in os.listdir("/proc/self/fd"))
            spare = [os.dup(0)]
            while spare[-1] < highest:
                spare.append(os.dup(0))
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (spare[-1] + 1, hard))
                third.connect(("127.0.0.1", server.port))
                await wait_until(lambda: bool(records()))
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                for descriptor in spare:
                    os.close(descriptor)
            with second, third:
                await wait_until(lambda: len(server.connections) == 3)
    assert "accept: EMFILE (Too many open files)" in records()[0].message
    assert records()[0].levelno == logging.ERROR


# The client's side.


async def test_connect_tcp_finishes() -> None:
    got: list[bytes] = []
    causes: list[Any] = []

    async def handler(conn: Connection) -> None:
        got.extend([chunk async for chunk in conn])

    def on_ending(conn: Connection) -> None:
        causes.append(conn.ending and (conn.ending.cause, conn.ending.peer))

    async with serving(handler, on_ending=on_ending) as server:
        async with connect_tcp("127.0.0.1", server.port) as conn:
            await conn.send(b"all of it")
        assert conn.ending is not None
        assert (conn.ending.kind, conn.ending.peer) == (CloseKind.FIN, PeerClose.FIN)
        assert conn.ending.remote_address == ("127.0.0.1", server.port)
        await wait_until(lambda: bool(causes))
    assert b"".join(got) == b"all of it"
    assert causes == [(Cause.RETURNED, PeerClose.FIN)]


async def test_connect_tcp_resets() -> None:
    raised: list[BaseException] = []
    reset = anyio.Event()

    async def handler(conn: Connection) -> None:
        try:
            await echo(conn)
        except PeerReset as exc:
            raised.append(exc)
        reset.set()

    async with serving(handler) as server:
        with pytest.raises(Failure):
            async with connect_tcp("127.0.0.1", server.port) as conn:
                await conn.send(b"half")
                await conn.receive()
                raise Failure
        with anyio.fail_after(LONG):
            await reset.wait()
    assert len(raised) == 1


async def test_connect_tcp_that_is_refused_raises() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(OSError, match="connect"):
        async with connect_tcp("127.0.0.1", port):
            pytest.fail("there is nobody")


@on_one_loop
@pytest.mark.parametrize("options", [{"finish_on": 3}, {"drain": 3}])
async def test_connect_tcp_refuses_bad_options_before_it_connects(options: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        with pytest.raises(TypeError):
            async with connect_tcp("127.0.0.1", listener.getsockname()[1], **options):
                pytest.fail("it connected")
        with pytest.raises(BlockingIOError):
            listener.accept()
