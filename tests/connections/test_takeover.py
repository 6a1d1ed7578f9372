"""A scope takes a socket over from AnyIO's or Trio's stream, and may give it back.

Nothing that the stream knew is lost: what it has read, what it has not sent, and how it
lost the connection.
"""

from __future__ import annotations

import os
import warnings
from contextlib import suppress
from typing import Any

import anyio
import anyio.abc
import pytest
import trio
from anyio.abc import SocketAttribute
from anyio.lowlevel import checkpoint
from conftest import ASYNCIO, collect

from anyio_rst import (
    Cause,
    CloseKind,
    Connection,
    PeerClose,
    PeerReset,
    connection_scope,
    scoped,
)

from serving import (
    LONG,
    POLLRDHUP,
    Peer,
    Seen,
    block_until,
    ending_with,
    has_transport,
    read_ahead,
    receive_all,
    settled,
    stream_and_peer,
    timeout_once_settled,
    turns,
    while_waiting,
)

pytestmark = pytest.mark.anyio

ON_ASYNCIO = pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)

# More than the kernel takes before the peer reads.
TOO_MUCH = bytes(8 * 2**20)


class Failure(Exception):
    pass


# What the transport has read.


@pytest.mark.parametrize("size", [1, 3, 65536])
async def test_what_was_read_ahead_comes_first_once(owner: str, size: int) -> None:
    stream, peer = await stream_and_peer(owner)
    with peer:
        for word in (b"one ", b"two ", b"three "):
            peer.sock.sendall(word)
            await read_ahead(stream, peer)
        async with connection_scope(stream) as conn:
            peer.sock.sendall(b"four ")
            got = await conn.receive(size)
            peer.sock.sendall(b"five")
            peer.send_eof()
            assert got + await receive_all(conn, size) == b"one two three four five"
        assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)


async def test_much_that_was_read_ahead_arrives_whole(owner: str) -> None:
    data = os.urandom(2**20)
    stream, peer = await stream_and_peer(owner)
    with peer:
        async with anyio.create_task_group() as tg:
            tg.start_soon(peer.send, data)
            if has_transport():
                await settled()
                await read_ahead(stream, peer)
            async with connection_scope(stream) as conn:
                got = bytearray()
                while len(got) < len(data):
                    got += await conn.receive()
                peer.send_eof()
            assert got == data


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10])
async def test_fin_behind_what_was_read_ahead_comes_after_it(
    owner: str, count: int
) -> None:
    stream, peer = await stream_and_peer(owner)
    with peer:
        peer.sock.sendall(b"all")
        peer.send_eof()
        block_until(stream, POLLRDHUP)
        await turns(count)
        async with connection_scope(stream) as conn:
            assert await conn.receive() == b"all"
            for _ in range(2):
                with pytest.raises(anyio.EndOfStream):
                    await conn.receive()
            await conn.send(b"answer")
        assert await peer.read_to_end() == Seen(b"answer", PeerClose.FIN)
    assert ending_with(CloseKind.FIN, conn, Cause.RETURNED).peer is PeerClose.FIN


async def test_what_was_read_ahead_and_not_received_is_discarded(owner: str) -> None:
    stream, peer = await stream_and_peer(owner)
    with peer:
        peer.sock.sendall(b"ahead")
        await read_ahead(stream, peer)
        async with connection_scope(stream) as conn:
            peer.sock.sendall(b"later")
            peer.send_eof()
        assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)
    assert ending_with(CloseKind.FIN, conn, Cause.RETURNED).discarded == 10


# Giving it back.


async def check_that_it_works(stream: Any, peer: Peer) -> None:
    """In both directions, and that its clean end is a FIN."""
    on_trio = isinstance(stream, trio.SocketStream)
    receive = stream.receive_some if on_trio else stream.receive
    peer.sock.sendall(b"there")
    with anyio.fail_after(LONG):
        assert await receive() == b"there"
        await (stream.send_all if on_trio else stream.send)(b"back")
        await stream.aclose()
    assert await peer.read_to_end(timeout=3) == Seen(b"back", PeerClose.FIN)


async def test_detach_gives_back_the_very_stream(owner: str) -> None:
    stream, peer = await stream_and_peer(owner)
    with peer:
        peer.sock.sendall(b"ahead")
        await read_ahead(stream, peer)
        for word in (b"ahead", b"again"):  # a detached stream can be scoped again
            async with connection_scope(stream) as conn:
                assert await conn.receive() == word
                got = await while_waiting(conn.receive(), peer.sock.sendall, b"x")
                assert got == b"x"
                assert conn.detach() is stream
                with pytest.raises(anyio.ClosedResourceError):
                    await conn.receive()
                with pytest.raises(anyio.ClosedResourceError):
                    await conn.send(b"never")
            ending_with(CloseKind.DETACHED, conn, Cause.DETACHED)
            peer.sock.sendall(b"again")
        async with connection_scope(stream) as conn:
            assert await conn.receive() == b"again"
            conn.detach()
        await check_that_it_works(stream, peer)


async def test_raw_socket_of_a_connection_ends_with_detach(owner: str) -> None:
    """A copy that stayed open would keep the connection open, too."""
    stream, peer = await stream_and_peer(owner)
    with peer:
        async with connection_scope(stream) as conn:
            raw = conn.extra(SocketAttribute.raw_socket)
            conn.detach()
        try:
            await check_that_it_works(stream, peer)
            assert raw.fileno() == -1
        finally:
            raw.close()


async def test_detach_gives_back_what_was_not_received_too(owner: str) -> None:
    stream, peer = await stream_and_peer(owner)
    with peer:
        peer.sock.sendall(b"not received")
        await read_ahead(stream, peer)
        for _ in range(2):
            async with connection_scope(stream) as conn:
                stream = conn.detach()
        assert isinstance(stream, (anyio.abc.ByteStream, trio.SocketStream))
        if isinstance(stream, trio.SocketStream):
            receive: Any = stream.receive_some
        else:
            receive = stream.receive
        assert await receive(4) == b"not "
        assert await receive(100) == b"received"
        await check_that_it_works(stream, peer)


@ON_ASYNCIO
async def test_two_scopes_on_what_detach_has_made_are_refused() -> None:
    stream, peer = await stream_and_peer()
    with peer:
        peer.sock.sendall(b"x")
        await read_ahead(stream, peer)
        async with connection_scope(stream) as conn:
            stream = conn.detach()
        async with connection_scope(stream) as conn:
            with pytest.raises(RuntimeError, match="in another connection_scope"):
                async with connection_scope(stream):
                    pass
            peer.send_eof()
            assert await receive_all(conn) == b"x"
        assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)


# What was done with the stream before.


async def test_send_that_was_cut_short_before_the_scope_is_torn() -> None:
    stream, peer = await stream_and_peer(buffer=4096)
    with peer:
        async with timeout_once_settled() as scope:
            await stream.send(TOO_MUCH)
        assert scope.cancelled_caught
        async with connection_scope(stream, drain=None) as conn:
            if has_transport():
                with pytest.raises(anyio.BrokenResourceError, match="cut short"):
                    await conn.send(b"x")
                with pytest.raises(anyio.BrokenResourceError, match="cut short"):
                    await conn.send_eof()
        if has_transport():
            assert (await peer.read_to_end()).close is PeerClose.RST
            ending_with(CloseKind.RST, conn, Cause.TORN_SEND)
        else:
            # Trio keeps nothing, and what it once told its user nobody can know.
            assert (await peer.read_to_end()).close is PeerClose.FIN
            ending_with(CloseKind.FIN, conn, Cause.RETURNED)


@pytest.mark.parametrize("fails", [False, True], ids=["returns", "fails"])
async def test_stream_that_was_half_closed_before_the_scope(fails: bool) -> None:
    stream, peer = await stream_and_peer()
    with peer:
        peer.sock.sendall(b"question")
        await read_ahead(stream, peer)
        await stream.send(b"answer")
        await stream.send_eof()
        with suppress(Failure):
            async with connection_scope(stream) as conn:
                assert await conn.receive() == b"question"
                with pytest.raises(anyio.ClosedResourceError):
                    await conn.send(b"more")
                await conn.send_eof()
                if fails:
                    raise Failure
                peer.send_eof()
        assert await peer.read_to_end() == Seen(b"answer", PeerClose.FIN)
    if fails:
        ending = ending_with(CloseKind.RST, conn, Cause.RAISED)
        assert ending.fin_sent_before_reset
    else:
        ending = ending_with(CloseKind.FIN, conn, Cause.RETURNED)
        assert ending.peer is PeerClose.FIN


# A peer that has reset.


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10])
@pytest.mark.parametrize("first", ["receive", "send", "send_eof", "return"])
async def test_reset_before_the_scope_is_told_in_it(
    owner: str, first: str, count: int
) -> None:
    """Whether the transport has not seen it, has not told of it, or is closed by it."""
    stream, peer = await stream_and_peer(owner)
    peer.sock.sendall(b"before")
    await read_ahead(stream, peer)
    peer.reset()
    block_until(stream, 0)
    await turns(count)
    async with connection_scope(stream) as conn:
        if first == "send":
            with pytest.raises(PeerReset) as caught:
                await conn.send(b"x")
            assert isinstance(caught.value.__cause__, OSError)
        elif first == "send_eof":
            with pytest.raises(PeerReset):
                await conn.send_eof()
        if first != "return":
            assert await conn.receive() == b"before"
            for _ in range(2):
                with pytest.raises(PeerReset) as caught:
                    await conn.receive()
            assert isinstance(caught.value.__cause__, OSError)
    assert ending_with(CloseKind.RST, conn, Cause.RETURNED).peer is PeerClose.RST


async def test_reset_that_the_transport_has_closed_itself_for_is_told_in_the_scope(
    owner: str,
) -> None:
    stream, peer = await stream_and_peer(owner)
    peer.reset()
    block_until(stream, 0)
    await settled()
    with pytest.raises(PeerReset):
        async with connection_scope(stream) as conn:
            await conn.receive()
    assert ending_with(CloseKind.RST, conn, Cause.RAISED).peer is PeerClose.RST


async def test_listener_survives_many_clients_that_reset_at_once() -> None:
    async def handler(conn: Connection) -> None:
        connections.append(conn)
        with suppress(anyio.BrokenResourceError):
            await conn.send(await conn.receive())
        if len(connections) == 20:
            over.set()

    connections: list[Connection] = []
    over = anyio.Event()
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
        port = listener.extra(SocketAttribute.local_port)
        async with anyio.create_task_group() as tg:
            tg.start_soon(listener.serve, scoped(handler))
            await settled()
            for client in [Peer(port) for _ in range(20)]:
                client.reset()
            with anyio.fail_after(LONG):
                await over.wait()
            with Peer(port) as peer:
                peer.sock.sendall(b"honest")
                assert await peer.read_to_end() == Seen(b"honest", PeerClose.FIN)
            tg.cancel_scope.cancel()
    for conn in connections[:20]:
        assert conn.ending is not None
        assert conn.ending.peer is PeerClose.RST


# Who else has the stream.


@pytest.mark.parametrize("order", ["made later", "made before"])
async def test_second_scope_on_a_stream_is_refused(owner: str, order: str) -> None:
    stream, peer = await stream_and_peer(owner)
    raw = stream.receive_stream if owner == "buffered" else stream
    with peer:
        second = connection_scope(raw) if order == "made before" else None
        async with connection_scope(stream) as conn:
            name = "SocketStream is in another connection_scope"
            with pytest.raises(RuntimeError, match=name):
                async with second or connection_scope(raw):
                    pass
            peer.sock.sendall(b"ping")
            assert await conn.receive() == b"ping"
            await conn.send(b"pong")
            peer.send_eof()
        with pytest.raises(anyio.ClosedResourceError):
            async with connection_scope(raw):
                pass
        assert await peer.read_to_end() == Seen(b"pong", PeerClose.FIN)
    ending_with(CloseKind.FIN, conn, Cause.RETURNED)


@ON_ASYNCIO
async def test_stream_that_a_task_receives_from_is_busy_and_stays_so() -> None:
    async def receive() -> None:
        received.append(await stream.receive())

    received: list[bytes] = []
    stream, peer = await stream_and_peer()
    with peer:
        async with anyio.create_task_group() as tg:
            tg.start_soon(receive)
            await turns(5)
            with pytest.raises(anyio.BusyResourceError):
                async with connection_scope(stream):
                    pass
            peer.sock.sendall(b"for its owner")
        assert received == [b"for its owner"]
        await check_that_it_works(stream, peer)


@ON_ASYNCIO
async def test_stream_that_a_task_sends_on_is_busy_and_stays_so() -> None:
    stream, peer = await stream_and_peer(buffer=4096)
    with peer:
        peer.sock.sendall(b"for its owner")
        await read_ahead(stream, peer)
        async with anyio.create_task_group() as tg:
            tg.start_soon(stream.send, TOO_MUCH)
            await turns(5)
            with pytest.raises(anyio.BusyResourceError):
                async with connection_scope(stream):
                    pass
            await peer.receive(len(TOO_MUCH))
        with anyio.fail_after(1):
            assert await stream.receive() == b"for its owner"
        await check_that_it_works(stream, peer)


@pytest.mark.parametrize("fails", [False, True], ids=["returns", "fails"])
async def test_stream_that_is_closed_behind_the_scope(owner: str, fails: bool) -> None:
    stream, peer = await stream_and_peer(owner)
    with peer:
        raw = stream.receive_stream if owner == "buffered" else stream
        with suppress(Failure), anyio.fail_after(LONG):
            async with connection_scope(stream) as conn:
                await raw.aclose()
                with suppress(anyio.ClosedResourceError):
                    await conn.send(b"x")
                with suppress(OSError):  # it has been reset
                    peer.send_eof()
                if fails:
                    raise Failure
        seen = await peer.read_to_end()
    assert conn.ending is not None
    assert conn.ending.kind.value == seen.close.value
    assert not fails or seen.close is PeerClose.RST


@pytest.mark.parametrize("fails", [False, True], ids=["returns", "fails"])
@pytest.mark.parametrize("sends", [False, True], ids=["", "sends"])
async def test_stream_that_is_half_closed_behind_the_scope(
    owner: str, sends: bool, fails: bool
) -> None:
    async def leave() -> None:
        assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)
        peer.send_eof()

    stream, peer = await stream_and_peer(owner)
    raw = stream.receive_stream if owner == "buffered" else stream
    with peer:
        async with anyio.create_task_group() as tg:
            with suppress(Failure):
                async with connection_scope(stream) as conn:
                    await raw.send_eof()
                    await turns(5)  # uvloop does it later
                    if sends:
                        with pytest.raises(anyio.ClosedResourceError):
                            await conn.send(b"x")
                    if fails:
                        raise Failure
                    tg.start_soon(leave)
        assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)
    if fails:
        ending = ending_with(CloseKind.RST, conn, Cause.RAISED)
        assert ending.fin_sent_before_reset
        assert ending.peer is PeerClose.NONE
    else:
        ending = ending_with(CloseKind.FIN, conn, Cause.RETURNED)
        assert ending.peer is PeerClose.FIN


# Forgotten.


async def forget(owner: str) -> Peer:
    stream, peer = await stream_and_peer(owner)
    conn = await connection_scope(stream).__aenter__()
    got = await while_waiting(conn.receive(), peer.sock.sendall, b"x")
    assert got == b"x"
    return peer


async def test_forgotten_connection_resets_and_leaves_no_reader(owner: str) -> None:
    for _ in range(3):  # the next one gets the same descriptors
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            with await forget(owner) as peer:
                collect()
                assert await peer.read_to_end() == Seen(b"", PeerClose.RST)
    stream, peer = await stream_and_peer(owner)
    with peer:
        async with connection_scope(stream) as conn:
            peer.send_eof()
            assert await receive_all(conn) == b""
        assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)


# Cancelled.


async def test_scope_in_a_cancelled_scope_is_entered_and_reset(owner: str) -> None:
    stream, peer = await stream_and_peer(owner)
    with peer:
        peer.sock.sendall(b"ahead")
        await read_ahead(stream, peer)
        with anyio.CancelScope() as scope:
            scope.cancel()
            async with connection_scope(stream) as conn:
                entered = True
                await checkpoint()
                entered = False
        assert entered
        assert scope.cancelled_caught
        assert await peer.read_to_end() == Seen(b"", PeerClose.RST)
    ending_with(CloseKind.RST, conn, Cause.CANCELLED)
