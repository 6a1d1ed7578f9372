"""What a connection does while it waits: it misses nothing, and blocks nobody."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import anyio
import pytest
import trio
from anyio.abc import SocketAttribute
from conftest import ASYNCIO, BACKENDS, OWNERS

from anyio_rst import (
    CloseKind,
    Connection,
    Drain,
    PeerClose,
    PeerReset,
    connect_tcp,
    connection_scope,
)

from serving import (
    LONG,
    Peer,
    Seen,
    block_until,
    fill_buffers,
    receive_all,
    serve,
    settled,
    stream_and_peer,
    turns,
    while_waiting,
)

pytestmark = pytest.mark.anyio

ON_ASYNCIO = pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)

# More than the kernel takes before the peer reads.
TOO_MUCH = bytes(8 * 2**20)


async def cancelled_by_a_scope(receive: Any, act: Callable[[], None], count: int) -> None:
    async with anyio.create_task_group() as tg:
        tg.start_soon(receive)
        await turns(5)
        act()
        await turns(count)
        tg.cancel_scope.cancel()


async def cancelled_by_asyncio(receive: Any, act: Callable[[], None], count: int) -> None:
    """AnyIO cancels no task that is about to run; asyncio's own cancellation does."""
    task = asyncio.create_task(receive())
    await turns(5)
    act()
    await turns(count)
    task.cancel()
    await asyncio.wait([task])


async def check_that_what_a_cancelled_receive_was_given_is_kept(
    stream: Any, peer: Peer, run: Callable[..., Awaitable[None]]
) -> None:
    async def receive() -> None:
        received.append(await conn.receive(7))

    def send() -> None:
        peer.sock.sendall(b"%04d" % number)
        block_until(stream, select.POLLIN)

    received: list[bytes] = []
    sent = b""
    with peer:
        async with connection_scope(stream) as conn:
            for number in range(200):
                await run(receive, send, number % 5)
                sent += b"%04d" % number
                with anyio.fail_after(LONG):
                    while sum(map(len, received)) < len(sent):
                        await receive()
                assert b"".join(received) == sent
            peer.send_eof()
            assert await receive_all(conn) == b""


async def test_what_a_cancelled_receive_was_given_is_kept(owner: str) -> None:
    stream, peer = await stream_and_peer(owner)
    await check_that_what_a_cancelled_receive_was_given_is_kept(
        stream, peer, cancelled_by_a_scope
    )


@ON_ASYNCIO
async def test_what_a_receive_was_given_that_asyncio_cancelled_is_kept() -> None:
    stream, peer = await stream_and_peer()
    await check_that_what_a_cancelled_receive_was_given_is_kept(
        stream, peer, cancelled_by_asyncio
    )


@pytest.mark.parametrize("count", range(21))
async def test_reset_right_behind_the_last_message_is_noticed(count: int) -> None:
    """Also where they come in one event to a reader that has stayed registered."""

    def send_and_reset() -> None:
        peer.sock.sendall(b"last")
        block_until(stream, select.POLLIN)
        peer.reset()

    stream, peer = await stream_and_peer()
    async with connection_scope(stream) as conn:
        for _ in range(count):
            got = await while_waiting(conn.receive(), peer.sock.sendall, b"message")
            assert got == b"message"
        assert await while_waiting(conn.receive(), send_and_reset) == b"last"
        for _ in range(2):
            with anyio.fail_after(LONG), pytest.raises(PeerReset):
                await conn.receive()
    assert conn.ending is not None
    assert conn.ending.peer is PeerClose.RST


async def test_helper_may_wait_for_the_raw_socket_as_well(kind: str) -> None:
    async def wait_readable(raw: socket.socket) -> None:
        await anyio.wait_readable(raw)

    async def handler(conn: Connection) -> None:
        raw = conn.extra(SocketAttribute.raw_socket)
        for word in (b"one", b"two"):
            async with anyio.create_task_group() as tg:
                tg.start_soon(wait_readable, raw)
                got = await while_waiting(conn.receive(), peer.sock.sendall, word)
                assert got == word
        await conn.send(b"both")

    async with serve(kind, handler) as service:
        with service.connect() as peer:
            served = await service.next()
            assert await peer.read_to_end() == Seen(b"both", PeerClose.FIN)
    assert served.raised is None


# A helper that outlives its handler, and waits for the socket. Who closes a descriptor
# tells those who wait for it: its number is soon that of another connection.


class Failure(Exception):
    pass


async def leave(conn: Connection, way: str) -> None:
    if way == "failure":
        raise Failure
    if way == "abort":
        conn.abort()
    elif way == "aclose":
        await conn.aclose()
    elif way == "detach":
        await conn.detach().aclose()
    elif way == "cancellation":
        await anyio.sleep_forever()


WAYS = ["return", "failure", "abort", "aclose", "detach", "cancellation"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wait", [anyio.wait_readable, anyio.wait_writable])
async def test_helper_that_outlives_its_handler_is_told(
    kind: str, wait: Callable[..., Awaitable[None]], way: str
) -> None:
    async def helper(raw: socket.socket) -> None:
        with anyio.fail_after(LONG):
            if wait is anyio.wait_writable and way in ("return", "aclose"):
                await wait(raw)  # our FIN has woken it: whatever is sent would fail
            else:
                with pytest.raises(anyio.ClosedResourceError):
                    await wait(raw)
        told.append(raw.fileno())

    async def handler(conn: Connection) -> None:
        raw = conn.extra(SocketAttribute.raw_socket)
        if wait is anyio.wait_writable:
            fill_buffers(raw)
        helpers.start_soon(helper, raw)
        await settled()
        waits.set()
        await leave(conn, way)

    told: list[int] = []
    waits = anyio.Event()
    with anyio.fail_after(LONG):
        async with anyio.create_task_group() as helpers:
            # The peer does nothing: what ends the drain is the time.
            server = serve(kind, handler, drain=Drain(timeout=0.05))
            async with AsyncExitStack() as stack:
                service = await stack.enter_async_context(server)
                with service.connect(buffer=4096):
                    served = await service.next()
                    await waits.wait()
                    if way == "cancellation":
                        await stack.aclose()
                    await served.ending()
    assert len(told) == 1


@pytest.mark.parametrize("owner", OWNERS)
@pytest.mark.parametrize("anyio_backend", BACKENDS[2:], indirect=True)
@pytest.mark.parametrize("way", ["return", "failure", "abort", "aclose"])
async def test_who_waits_for_the_stream_that_was_taken_over_is_told(
    owner: str, way: str
) -> None:
    """On Trio, where the descriptor is the same."""

    async def helper(sock: Any) -> None:
        with anyio.fail_after(LONG), pytest.raises(anyio.ClosedResourceError):
            await anyio.wait_readable(sock)
        told.append(sock)

    async def trios_helper(sock: Any) -> None:
        with anyio.fail_after(LONG), pytest.raises(trio.ClosedResourceError):
            await trio.lowlevel.wait_readable(sock)
        told.append(sock)

    told: list[Any] = []
    stream, peer = await stream_and_peer(owner)
    with peer, anyio.fail_after(LONG):
        async with anyio.create_task_group() as helpers:
            with suppress(Failure):
                async with connection_scope(stream, drain=Drain(timeout=0)) as conn:
                    if owner == "trio":
                        helpers.start_soon(trios_helper, stream.socket)
                    else:
                        raw = stream.extra(SocketAttribute.raw_socket)
                        helpers.start_soon(helper, raw)
                    await settled()
                    await leave(conn, way)
    assert len(told) == 1


async def test_who_was_told_does_not_disturb_who_has_the_number_next(kind: str) -> None:
    """AnyIO's waits on asyncio take back a turn later what they have registered."""

    async def helper(raw: socket.socket) -> None:
        with pytest.raises(anyio.ClosedResourceError):
            await anyio.wait_readable(raw)

    async def handler(conn: Connection) -> None:
        connections.append(conn)
        if len(connections) == 1:
            helpers.start_soon(helper, conn.extra(SocketAttribute.raw_socket))
            await settled()
            waits.set()
            await anyio.sleep_forever()
        first = connections[0]
        number = first.extra(SocketAttribute.raw_socket).fileno()
        first.abort()
        taken = [os.dup(peer.sock.fileno())]
        while taken[-1] < number:
            taken.append(os.dup(peer.sock.fileno()))
        os.close(taken.pop())  # that number, if it is free, or the next one
        try:
            raw = conn.extra(SocketAttribute.raw_socket)
            await while_waiting(anyio.wait_readable(raw), peer.sock.sendall, b"x")
        finally:
            for descriptor in taken:
                os.close(descriptor)
        assert await conn.receive() == b"x"

    connections: list[Connection] = []
    waits = anyio.Event()
    async with anyio.create_task_group() as helpers:
        async with serve(kind, handler) as service:
            with service.connect():
                await service.next()
                await waits.wait()
                with service.connect() as peer:
                    served = await service.next()
                    assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)
                await served.ending()
    assert served.raised is None


@ON_ASYNCIO
async def test_callback_for_the_raw_socket_ends_with_it() -> None:
    """Left registered, it would keep the next with that number from being noticed."""
    loop = asyncio.get_running_loop()
    stream, peer = await stream_and_peer()
    with peer:
        async with connection_scope(stream) as conn:
            number = conn.extra(SocketAttribute.raw_socket).fileno()
            loop.add_reader(number, lambda: None)
            loop.add_writer(number, lambda: None)
            conn.abort()
            assert not loop.remove_reader(number)
            assert not loop.remove_writer(number)


# Blocking.


@contextmanager
def no_standstill(peer: Peer) -> Iterator[None]:
    """A loop that stands still is freed by a reset, and that is seen."""
    rescue = threading.Timer(4, peer.reset)
    rescue.start()
    try:
        yield
        assert not rescue.finished.is_set()
    finally:
        rescue.cancel()
        rescue.join()


async def check_that_it_does_not_block(conn: Connection, peer: Peer) -> None:
    raw = conn.extra(SocketAttribute.raw_socket)
    socket.setdefaulttimeout(None)  # of those that the test makes
    with raw.dup() as copy:
        os.set_blocking(copy.fileno(), True)
        with no_standstill(peer):
            for wait in (conn.receive, partial(conn.send, TOO_MUCH)):
                async with anyio.create_task_group() as tg:
                    tg.start_soon(wait)
                    await turns(100)
                    tg.cancel_scope.cancel()
                fill_buffers(copy)


@pytest.fixture
def default_timeout() -> Iterator[None]:
    socket.setdefaulttimeout(5)
    yield
    socket.setdefaulttimeout(None)


@pytest.mark.usefixtures("default_timeout")
async def test_a_default_timeout_or_a_blocking_copy_blocks_nothing(kind: str) -> None:
    async def handler(conn: Connection) -> None:
        await check_that_it_does_not_block(conn, peer)
        conn.abort()

    async with serve(kind, handler) as service:
        with service.connect(buffer=4096) as peer:
            served = await service.next()
            assert (await served.ending()).kind is CloseKind.RST
    assert served.raised is None


@pytest.mark.usefixtures("default_timeout")
async def test_a_default_timeout_or_a_blocking_copy_blocks_no_client() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with connect_tcp(*listener.getsockname()) as conn:
            with Peer.__new__(Peer) as peer:
                peer.sock, _ = listener.accept()
                await check_that_it_does_not_block(conn, peer)
            conn.abort()
