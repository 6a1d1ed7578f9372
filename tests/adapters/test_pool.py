"""examples/pool.py, docs/pools.md, and connections that no block owns."""

from __future__ import annotations

import asyncio
import gc
import socket
import termios
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Any

import anyio
import anyio.abc
import anyio.to_thread
import outcome
import pytest
from anyio.lowlevel import checkpoint
from conftest import REFCOUNTS, collect

from anyio_rst import (
    Cause,
    CloseKind,
    Connection,
    PeerClose,
    PeerReset,
    connect_tcp,
    connection_scope,
    lowlevel,
)

import line_protocol
import pool
from pool import Pool
from securing import client_context, shake_hands
from serving import (
    LONG,
    Peer,
    Seen,
    accepted,
    ending_with,
    has_transport,
    plain_server,
    queued,
    serve,
    settled,
)
from start_stop import Client

pytestmark = pytest.mark.anyio


class Asked:
    """A call of the pool's, under way in a task of its own."""

    def __init__(
        self, tg: anyio.abc.TaskGroup, call: Callable[..., Awaitable[Any]]
    ) -> None:
        self.scope = anyio.CancelScope()
        self._call = call
        self._over = anyio.Event()
        self._outcome: Any = None
        tg.start_soon(self._run)

    async def _run(self) -> None:
        with self.scope:
            self._outcome = await outcome.acapture(self._call)
            self._over.set()

    async def result(self) -> Any:
        with anyio.fail_after(LONG):
            await self._over.wait()
        return self._outcome.unwrap()  # which forgets it


class Server:
    """Plain blocking sockets."""

    def __init__(self, listener: socket.socket) -> None:
        self.port: int = listener.getsockname()[1]
        self._listener = listener
        self.pool = Pool("127.0.0.1", self.port)

    async def accept(self, *lines: bytes) -> Peer:
        """The next connection, on which each of *lines* is to be asked next."""
        peer = await anyio.to_thread.run_sync(accepted, self._listener)
        peer.sock.sendall(b"+OK ready\r\n")
        for line in lines:
            await self.hear(peer, line)
        return peer

    async def hear(self, peer: Peer, line: bytes) -> None:
        assert await peer.receive(len(line) + 2) == line + b"\r\n"

    def has_connections(self) -> bool:
        """Whether one waits to be accepted."""
        self._listener.settimeout(0)
        try:
            self._listener.accept()[0].close()
        except BlockingIOError:
            return False
        finally:
            self._listener.settimeout(LONG)
        return True


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[Server, anyio.abc.TaskGroup]]:
    with plain_server() as listener:
        server = Server(listener)
        with anyio.fail_after(LONG):
            async with anyio.create_task_group() as tg:
                yield server, tg
            await server.pool.aclose()


async def idle_connection(server: Server, tg: anyio.abc.TaskGroup) -> Peer:
    asked = Asked(tg, partial(server.pool.ask, b"first"))
    peer = await server.accept(b"first")
    peer.sock.sendall(b"+first\r\n")
    assert await asked.result() == b"+first"
    return peer


# The example.


async def test_pool_uses_its_connections_again_and_finishes_them() -> None:
    async with serve("native", line_protocol.serve_lines) as service:
        async with Pool("127.0.0.1", service.port) as it:
            for _ in range(3):
                assert await it.ask(b"EXPLAIN EPIPE") == b"+OK Broken pipe"
            answers = []

            async def ask() -> None:
                answers.append(await it.ask(b"EXPLAIN EPIPE"))

            async with anyio.create_task_group() as tg:
                for _ in range(50):
                    tg.start_soon(ask)
            assert answers == [b"+OK Broken pipe"] * 50
        endings = [await service.ending() for _ in range(pool.MAX_CONNECTIONS)]
        assert service._receive.statistics().current_buffer_used == 0
    for ending in endings:
        assert (ending.kind, ending.peer) == (CloseKind.FIN, PeerClose.FIN)


LEAVING: dict[str, tuple[Callable[[Peer], object], PeerClose | None]] = {
    "FIN": (Peer.send_eof, PeerClose.FIN),
    "RST": (Peer.reset, None),
    "unasked": (lambda peer: peer.sock.sendall(b"-BYE\r\n"), PeerClose.FIN),
}


@pytest.mark.parametrize("how", LEAVING)
async def test_stale_connection_is_not_used_for_what_is_to_be_asked_once(
    how: str,
) -> None:
    act, seen = LEAVING[how]
    async with serving() as (server, tg):
        first = await idle_connection(server, tg)
        act(first)
        while not server.pool._idle[0][1].is_stale():
            await anyio.sleep(0.001)
        asked = Asked(tg, partial(server.pool.ask, b"second"))
        with await server.accept(b"second") as second:
            second.sock.sendall(b"+second\r\n")
            assert await asked.result() == b"+second"
            if seen is not None:
                assert await first.read_to_end() == Seen(b"", seen)
            first.sock.close()
            await server.pool.aclose()
            assert await second.read_to_end() == Seen(b"", PeerClose.FIN)


@pytest.mark.parametrize("how", ["timeout", "cancelled"])
async def test_answer_to_a_request_that_was_given_up_is_nobody_elses(how: str) -> None:
    async with serving() as (server, tg):
        peer = await idle_connection(server, tg)
        asked = Asked(
            tg, partial(server.pool.ask, b"slow", timeout=0.2 if how == "timeout" else 9)
        )
        await server.hear(peer, b"slow")
        if how == "timeout":
            with pytest.raises(TimeoutError):
                await asked.result()
        else:
            asked.scope.cancel()
        assert await peer.read_to_end() == Seen(b"", PeerClose.RST)
        peer.sock.close()
        asked = Asked(tg, partial(server.pool.ask, b"next"))
        with await server.accept(b"next") as peer:
            peer.sock.sendall(b"+next\r\n")
            assert await asked.result() == b"+next"
            await server.pool.aclose()


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        pytest.param(Peer.reset, PeerReset, id="RST"),
        pytest.param(Peer.send_eof, anyio.IncompleteRead, id="FIN"),
    ],
)
async def test_what_may_have_been_done_is_asked_again_only_if_that_does_no_harm(
    act: Callable[[Peer], None], expected: type[Exception]
) -> None:
    async with serving() as (server, tg):
        asked = Asked(tg, partial(server.pool.ask, b"pay"))
        with await server.accept(b"pay") as peer:
            act(peer)
            with pytest.raises(expected):
                await asked.result()
        assert not server.has_connections()
        asked = Asked(tg, partial(server.pool.ask, b"get", idempotent=True))
        for _ in range(pool.TRIES - 1):
            with await server.accept(b"get") as peer:
                act(peer)
                if act is Peer.send_eof:
                    assert await peer.read_to_end() == Seen(b"", PeerClose.RST)
        with await server.accept(b"get") as peer:
            peer.sock.sendall(b"+got\r\n")
            assert await asked.result() == b"+got"
            await server.pool.aclose()
        server.pool = Pool("127.0.0.1", server.port)
        asked = Asked(tg, partial(server.pool.ask, b"get", idempotent=True))
        for _ in range(pool.TRIES):
            with await server.accept(b"get") as peer:
                act(peer)
        with pytest.raises(expected):
            await asked.result()
        assert not server.has_connections()


async def test_server_that_is_not_there_was_not_asked() -> None:
    with plain_server() as listener:
        it = Pool("127.0.0.1", listener.getsockname()[1])
    for _ in range(pool.MAX_CONNECTIONS + 1):  # it gives its places back
        with pytest.raises(OSError, match="connect"):
            await it.ask(b"line", idempotent=True)


async def test_more_than_an_answer_resets() -> None:
    async with serving() as (server, tg):
        asked = Asked(tg, partial(server.pool.ask, b"line"))
        with await server.accept(b"line") as peer:
            peer.sock.sendall(b"+one\r\n+two\r\n")
            with pytest.raises(ValueError, match="more than an answer"):
                await asked.result()
            assert await peer.read_to_end() == Seen(b"", PeerClose.RST)


async def test_what_is_idle_for_long_ends_with_fin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool, "MAX_IDLE", 0.0)
    async with serving() as (server, tg):
        with await idle_connection(server, tg) as first:
            asked = Asked(tg, partial(server.pool.ask, b"second"))
            assert await first.read_to_end() == Seen(b"", PeerClose.FIN)
        with await server.accept(b"second") as second:
            second.sock.sendall(b"+second\r\n")
            assert await asked.result() == b"+second"
            await server.pool.aclose()


async def test_closing_lets_a_request_have_its_answer_and_refuses_others() -> None:
    async with serving() as (server, tg):
        asked = Asked(tg, partial(server.pool.ask, b"last"))
        with await server.accept(b"last") as peer:
            await server.pool.aclose()
            with pytest.raises(anyio.ClosedResourceError):
                await server.pool.ask(b"line")
            peer.sock.sendall(b"+last\r\n")
            assert await asked.result() == b"+last"
            assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)


# What a failure says of the request.


async def unacknowledged(
    act: Callable[[Connection, Peer], Awaitable[None]],
) -> int | None:
    """What the `Ending` has of a request of 7 bytes, which fails after *act*."""
    with plain_server() as listener, suppress(ZeroDivisionError, PeerReset):
        async with connect_tcp(*listener.getsockname()) as conn:
            with accepted(listener) as peer:
                # Acknowledged with the answer or a little later, as between programs that
                # have answered each other before: tcp(7).
                peer.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)
                peer.sock.sendall(b"+OK ready\r\n")
                await conn.receive()
                await conn.send(b"request")
                await act(conn, peer)
                await conn.receive()
    assert conn.ending is not None
    assert conn.ending.sent == 7
    return conn.ending.unacknowledged


async def test_request_that_was_read_may_be_unacknowledged() -> None:
    async def read_and_reset(conn: Connection, peer: Peer) -> None:
        assert await peer.receive(7) == b"request"
        peer.reset()

    # On a machine that is busy an acknowledgement may be in time.
    found = [await unacknowledged(read_and_reset) for _ in range(20)]
    assert 7 in found
    assert set(found) <= {0, 7}


async def test_request_that_was_never_read_is_acknowledged() -> None:
    async def fail(conn: Connection, peer: Peer) -> None:
        with anyio.fail_after(LONG):
            while lowlevel.unacknowledged(conn):
                await anyio.sleep(0.001)
        assert queued(peer.sock.fileno(), termios.FIONREAD) == 7
        raise ZeroDivisionError

    assert await unacknowledged(fail) == 0


# A connection that no block owns.


@pytest.mark.parametrize("failing", ["start", "stop", "given up", "neither"])
async def test_object_with_start_and_stop_ends_as_they_do(failing: str) -> None:
    client = Client()
    with plain_server() as listener:
        async with anyio.create_task_group() as tg:
            address = listener.getsockname()
            starting = Asked(tg, partial(client.start, *address))
            with await anyio.to_thread.run_sync(accepted, listener) as peer:
                greeting = b"-ERR full" if failing == "start" else b"+OK ready"
                peer.sock.sendall(greeting)
                if failing == "start":
                    with pytest.raises(ConnectionRefusedError):
                        await starting.result()
                    cause = Cause.RAISED
                else:
                    await starting.result()
                    assert not client._conn.is_stale()
                if failing == "stop":
                    with anyio.CancelScope() as scope:
                        scope.cancel()
                        await client.stop()
                    cause = Cause.CANCELLED
                elif failing == "given up":
                    client.give_up()
                    cause = Cause.ABORTED
                elif failing == "neither":
                    peer.send_eof()
                    await client.stop()
                    cause = Cause.CLOSED
                fin = failing == "neither"
                seen = Seen(b"", PeerClose.FIN if fin else PeerClose.RST)
                assert await peer.read_to_end() == seen
    await client.stop()  # after the end it does nothing
    ending_with(CloseKind.FIN if fin else CloseKind.RST, client._conn, cause)


async def test_connection_that_was_awaited_ends_with_a_block_as_well() -> None:
    with plain_server() as listener:
        for fails in (False, True):
            conn = await connect_tcp(*listener.getsockname(), drain=None)
            with accepted(listener) as peer:
                with suppress(KeyError):
                    async with conn:
                        if fails:
                            raise KeyError
                close = PeerClose.RST if fails else PeerClose.FIN
                assert await peer.read_to_end() == Seen(b"", close)


async def test_it_is_awaited_or_entered_once() -> None:
    with plain_server() as listener:
        connecting = connect_tcp(*listener.getsockname())
        conn = await connecting
        with pytest.raises(RuntimeError, match="only be entered once"):
            await connecting
        with accepted(listener) as peer:
            conn.abort()
            assert await peer.read_to_end() == Seen(b"", PeerClose.RST)


@pytest.mark.parametrize("how", ["returns", "detaches", "fails", "cancelled"])
async def test_scope_of_a_request_decides_whether_the_connection_goes_on(
    how: str,
) -> None:
    with plain_server() as listener:
        conn = await connect_tcp(*listener.getsockname(), drain=None)
        with accepted(listener) as peer:
            with anyio.CancelScope() as cancelled, suppress(KeyError):
                async with connection_scope(conn, drain=None) as request:
                    await request.send(b"?")
                    if how == "fails":
                        raise KeyError
                    if how == "detaches":
                        request.detach()
                    elif how == "cancelled":
                        cancelled.cancel()
                        await checkpoint()
            if how == "detaches":
                assert request.is_stale()
                assert not conn.is_stale()
                assert conn.ending is None
                await conn.send(b"!")
                await conn.aclose()
                assert await peer.read_to_end() == Seen(b"?!", PeerClose.FIN)
                return
            assert conn.is_stale()
            with pytest.raises(anyio.ClosedResourceError):
                connection_scope(conn)
            close = PeerClose.FIN if how == "returns" else PeerClose.RST
            assert await peer.read_to_end() == Seen(b"?", close)


async def test_request_in_a_group_of_its_connection_is_stopped_and_not_reset() -> None:
    with plain_server() as listener:
        conn = await connect_tcp(*listener.getsockname(), drain=None)
        with accepted(listener) as peer:

            async def request() -> None:
                async with connection_scope(conn) as request:
                    await request.send(b"?")
                    await request.receive()

            async with conn.create_task_group() as tg:
                tg.start_soon(request)
                await settled()
                tg.cancel_scope.cancel()
            assert not conn.is_stale()
            await conn.aclose()
            assert await peer.read_to_end() == Seen(b"?", PeerClose.FIN)


# Forgotten.


@pytest.fixture
def no_collector() -> Iterator[None]:
    collect()
    gc.disable()
    yield
    gc.enable()


async def connected(how: str, port: int) -> Any:
    """What a program keeps, and forgets."""
    if how == "stack":
        stack = AsyncExitStack()
        await stack.enter_async_context(connect_tcp("127.0.0.1", port))
        return stack
    if how == "scope":
        stream = await anyio.connect_tcp("127.0.0.1", port)
        return await connection_scope(stream).__aenter__()
    context = client_context() if how == "TLS" else None
    hostname = "localhost" if how == "TLS" else None
    conn = await connect_tcp(
        "127.0.0.1", port, ssl_context=context, tls_hostname=hostname
    )
    async with connection_scope(conn) as request:
        await request.send(b"?")
        assert await request.receive() == b"!"
        request.detach()
    return conn


def has_cycles() -> bool:
    """Whether the loop is asyncio's own, whose transports refer to themselves."""
    if not has_transport():
        return False
    return isinstance(asyncio.get_running_loop(), asyncio.SelectorEventLoop)


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("in_a_cycle", [False, True], ids=["alone", "cycle"])
@pytest.mark.parametrize("how", ["awaited", "TLS", "stack", "scope"])
async def test_forgotten_connection_is_reset_and_never_finished(
    how: str, in_a_cycle: bool
) -> None:
    with plain_server() as listener, warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        async with anyio.create_task_group() as tg:
            connecting = Asked(tg, partial(connected, how, listener.getsockname()[1]))
            peer = await anyio.to_thread.run_sync(accepted, listener)
            if how in ("awaited", "TLS"):
                both: Any = peer
                if how == "TLS":
                    both = await shake_hands(peer, server_side=True)
                assert await both.receive(1) == b"?"
                await both.send(b"!")
            with peer:
                kept = [await connecting.result()]
                if in_a_cycle:
                    kept.append(kept)
                del kept, connecting
                await settled()
                if in_a_cycle or has_cycles() or not REFCOUNTS:
                    quiet = await peer.read_to_end(timeout=0.2)
                    assert quiet == Seen(b"", PeerClose.NONE)
                    collect()
                    await settled()
                assert await peer.read_to_end() == Seen(b"", PeerClose.RST)
