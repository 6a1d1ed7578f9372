"""`Connection.is_stale()`: what a pool asks before it uses a connection again."""

from __future__ import annotations

import asyncio
import contextvars
import ssl
import termios
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import anyio
import pytest
import trio
from anyio.streams.buffered import BufferedByteReceiveStream, BufferedByteStream
from conftest import ASYNCIO

from anyio_rst import Connection, ConnectionLost, PeerReset, connection_scope
from anyio_rst.testing import open_peer

from securing import CLEAN, TLSPeer, client_context, each, each_version, talk
from serving import (
    LONG,
    POLLRDHUP,
    Peer,
    accepted,
    arrived,
    block_until,
    connection_of,
    fill_buffers,
    foreign_pair,
    plain_server,
    queued,
    read_ahead,
    receive_all,
    settled,
    stream_and_peer,
    timeout_once_settled,
)

pytestmark = pytest.mark.anyio

FIN = POLLRDHUP
RST = 0


def waiting(conn: Connection) -> int:
    """Bytes that the kernel has for *conn*."""
    return queued(conn._raw_socket.fileno(), termios.FIONREAD)


async def until_stale(conn: Connection) -> None:
    """Asked over and over, as what the peer did is under way."""
    with anyio.fail_after(LONG):
        while not conn.is_stale():
            await anyio.sleep(0.001)


# The peer.


async def test_quiet_connection_is_not_stale_between_two_exchanges(kind: str) -> None:
    async with connection_of(kind) as (conn, peer):
        for _ in range(3):
            assert not conn.is_stale()
            await conn.send(b"request")
            assert await peer.receive_exactly(7) == b"request"
            await peer.send(b"answer")
            assert await conn.receive() == b"answer"
        assert not conn.is_stale()


async def test_peers_fin_makes_it_stale_and_stays_to_be_received(kind: str) -> None:
    async with connection_of(kind) as (conn, peer):
        peer.send_eof()
        await until_stale(conn)
        assert conn.is_stale()
        with pytest.raises(anyio.EndOfStream):
            await conn.receive()
        assert conn.is_stale()
        await conn.send(b"answer")  # the peer's half-close is no end of ours
        assert await peer.receive_exactly(6) == b"answer"


async def test_peers_reset_makes_it_stale_and_stays_to_be_received(kind: str) -> None:
    async with connection_of(kind) as (conn, peer):
        peer.reset()
        await until_stale(conn)
        assert conn.is_stale()
        with pytest.raises(PeerReset):
            await conn.receive()
        assert conn.is_stale()
        with pytest.raises(PeerReset):
            await conn.send(b"request")


async def test_what_nobody_asked_for_makes_it_stale_until_it_is_received(
    kind: str,
) -> None:
    async with connection_of(kind) as (conn, peer):
        await peer.send(b"unasked")
        await until_stale(conn)
        assert conn.is_stale()
        assert waiting(conn) == 7
        assert await conn.receive() == b"unasked"
        assert not conn.is_stale()


async def test_input_before_a_fin_and_before_a_reset_is_still_received(kind: str) -> None:
    for end in ("send_eof", "reset"):
        async with connection_of(kind) as (conn, peer):
            await peer.send(b"unasked")
            getattr(peer, end)()
            await until_stale(conn)
            assert await conn.receive() == b"unasked"
            await until_stale(conn)


async def test_answer_that_was_received_in_part_is_stale(kind: str) -> None:
    async with connection_of(kind) as (conn, peer):
        await peer.send(b"answer and more")
        received = 0
        while received < 6:
            received += len(await conn.receive(6 - received))
        await until_stale(conn)
        assert await conn.receive() == b" and more"


# Where it was taken over from.


@pytest.mark.parametrize("fin", [False, True], ids=["open", "fin"])
async def test_what_a_transport_has_read_ahead_makes_it_stale(
    owner: str, fin: bool
) -> None:
    stream, peer = await stream_and_peer(owner)
    with peer:
        peer.sock.sendall(b"ahead")
        await read_ahead(stream, peer)
        if fin:
            peer.send_eof()
            block_until(stream, FIN)
        async with connection_scope(stream) as conn:
            assert conn.is_stale()
            assert await conn.receive(3) == b"ahe"
            assert conn.is_stale()
            assert await conn.receive() == b"ad"
            assert conn.is_stale() is fin
            conn.abort()


async def test_fin_and_reset_that_the_transport_was_told_of_make_it_stale(
    owner: str,
) -> None:
    for act, end in ((Peer.send_eof, FIN), (Peer.reset, RST)):
        stream, peer = await stream_and_peer(owner)
        with peer:
            act(peer)
            block_until(stream, end)
            await settled()
            async with connection_scope(stream) as conn:
                assert conn.is_stale()
                conn.abort()


async def test_what_is_in_a_buffer_of_the_scope_makes_it_stale() -> None:
    stream, peer = await foreign_pair()
    with peer:
        buffered = BufferedByteStream(stream)
        async with connection_scope(buffered) as conn:
            peer.sock.sendall(b"one\ntwo\n")
            assert await buffered.receive_until(b"\n", 10) == b"one"
            await arrived(peer)
            assert conn.is_stale()
            assert await conn.receive() == b"two\n"
            assert not conn.is_stale()
            async with connection_scope(BufferedByteReceiveStream(conn)) as inner:
                assert not inner.is_stale()
                inner.detach()
                assert inner.is_stale()
            assert not conn.is_stale()
            conn.abort()


async def test_input_of_a_receive_that_was_cancelled_makes_it_stale(kind: str) -> None:
    async with connection_of(kind) as (conn, peer):
        async with timeout_once_settled() as scope:
            await conn.receive()
        assert scope.cancelled_caught
        assert not conn.is_stale()
        await peer.send(b"late")
        await until_stale(conn)
        assert await conn.receive() == b"late"


# Ourselves.


async def test_what_has_ended_here_is_stale(kind: str) -> None:
    for end in ("abort", "detach", "send_eof", "aclose"):
        async with connection_of(kind, drain=None) as (conn, _):
            result = getattr(conn, end)()
            if end in ("send_eof", "aclose"):
                await result
            assert conn.is_stale(), end
            if end == "detach":
                await result.aclose()


async def test_torn_connection_is_stale(kind: str) -> None:
    async with connection_of(kind) as (conn, peer):
        peer.stop_reading()
        fill_buffers(conn._raw_socket)
        async with timeout_once_settled() as scope:
            await conn.send(bytes(2**20))
        assert scope.cancelled_caught
        assert not conn.is_stale()  # it was not begun
        conn.abort()
    async with open_peer(small_buffers=True) as (conn, peer):
        peer.stop_reading()
        async with timeout_once_settled() as scope:
            await conn.send(bytes(2**20))
        assert scope.cancelled_caught
        assert conn.is_stale()


async def test_connection_in_use_is_refused(kind: str) -> None:
    async with connection_of(kind) as (conn, peer):

        async def refused() -> None:
            await settled()
            with pytest.raises(anyio.BusyResourceError):
                conn.is_stale()
            await peer.send(b"answer")

        async with anyio.create_task_group() as tg:
            tg.start_soon(refused)
            assert await conn.receive() == b"answer"
        peer.stop_reading()
        fill_buffers(conn._raw_socket)
        async with anyio.create_task_group() as tg:
            tg.start_soon(conn.send, bytes(2**20))
            await settled()
            with pytest.raises(anyio.BusyResourceError):
                conn.is_stale()
            tg.cancel_scope.cancel()
        conn.abort()


async def test_it_needs_no_turn_of_the_loop_and_can_be_asked_from_any_code() -> None:
    """Blocking code has the last word: nothing here lets the loop run."""
    stream, peer = await foreign_pair()
    with peer:
        async with connection_scope(stream) as conn:
            assert not conn.is_stale()
            peer.send_eof()
            block_until(stream, FIN)
            assert conn.is_stale()
            assert await receive_all(conn) == b""


# TLS.


async def received(conn: Connection, size: int) -> bytes:
    data = b""
    with anyio.fail_after(LONG):
        while len(data) < size:
            data += await conn.receive(size - len(data))
    return data


async def leave(peer: TLSPeer) -> None:
    assert await peer.end() == (b"", CLEAN)
    peer.raw.send_eof()  # else the drain would wait for it


@each(sides=["client"])
@each_version
async def test_session_tickets_are_no_input(
    way: str, side: str, version: ssl.TLSVersion
) -> None:
    sent = anyio.Event()

    async def body(conn: Connection) -> None:
        await sent.wait()
        if way in ("own", "start_tls"):  # others may have been told of them
            assert (waiting(conn) > 0) is (version is ssl.TLSVersion.TLSv1_3)
        for _ in range(2):
            assert not conn.is_stale()
        await conn.send(b"request")
        assert await received(conn, 6) == b"answer"
        assert not conn.is_stale()

    async def script(peer: TLSPeer) -> None:
        await arrived(peer.raw)
        sent.set()
        assert await peer.receive(7) == b"request"
        await peer.send(b"answer")
        await leave(peer)

    await talk(way, side, body, script, version=version)


@each()
@each_version
async def test_unasked_input_over_tls_is_stale_and_all_of_it_is_received(
    way: str, side: str, version: ssl.TLSVersion
) -> None:
    async def body(conn: Connection) -> None:
        assert not conn.is_stale()
        await conn.send(b"?")
        await until_stale(conn)
        assert conn.is_stale()
        assert await received(conn, 7) == b"unasked"
        assert not conn.is_stale()
        await conn.send(b"request")

    async def script(peer: TLSPeer) -> None:
        assert await peer.receive(1) == b"?"
        await peer.send(b"unasked")
        assert await peer.receive(7) == b"request"
        await leave(peer)

    it = await talk(way, side, body, script, version=version)
    assert it.ending.received == 7


@each("own", "trio")
async def test_record_in_parts_is_input_once_it_is_whole(way: str, side: str) -> None:
    halves = [anyio.Event(), anyio.Event()]

    async def body(conn: Connection) -> None:
        for half in halves:
            assert not conn.is_stale()
            await conn.send(b"?")
            await half.wait()
        assert conn.is_stale()
        assert await received(conn, 6) == b"answer"
        assert not conn.is_stale()

    async def script(peer: TLSPeer) -> None:
        record = peer.encrypted(b"answer")
        for half, part in zip(halves, (record[:9], record[9:]), strict=True):
            assert await peer.receive(1) == b"?"
            peer.raw.sock.sendall(part)
            await arrived(peer.raw)
            half.set()
        await leave(peer)

    await talk(way, side, body, script)


ENDS: dict[str, tuple[Callable[[TLSPeer], object], type[Exception]]] = {
    "close_notify": (TLSPeer.say_close_notify, anyio.EndOfStream),
    "FIN": (lambda peer: peer.raw.send_eof(), anyio.BrokenResourceError),
    "RST": (lambda peer: peer.raw.reset(), PeerReset),
    "garbage": (
        lambda peer: peer.raw.sock.sendall(b"\x17\x03\x03\0\x20" + bytes(32)),
        ConnectionLost,
    ),
}


@each()
@pytest.mark.parametrize("end", ENDS)
async def test_end_of_a_session_is_stale_and_stays_to_be_received(
    way: str, side: str, end: str
) -> None:
    act, expected = ENDS[end]
    seen = anyio.Event()

    async def body(conn: Connection) -> None:
        assert not conn.is_stale()
        await conn.send(b"?")
        await until_stale(conn)
        assert conn.is_stale()
        with pytest.raises(expected):
            await conn.receive()
        assert conn.is_stale()
        seen.set()

    async def script(peer: TLSPeer) -> None:
        assert await peer.receive(1) == b"?"
        await arrived(peer.raw)
        act(peer)
        await seen.wait()
        with suppress(OSError):
            peer.raw.send_eof()  # else the drain would wait for it

    await talk(way, side, body, script)


@each("own", "trio")
async def test_it_is_no_checkpoint_over_tls(way: str, side: str) -> None:
    async def body(conn: Connection) -> None:
        with anyio.CancelScope() as scope:
            scope.cancel()
            assert not conn.is_stale()
        assert not scope.cancelled_caught
        await conn.send(b"?")
        with anyio.CancelScope() as scope:
            scope.cancel()
            with anyio.CancelScope(shield=True):
                await until_stale(conn)
            assert conn.is_stale()
        assert await received(conn, 7) == b"unasked"

    async def script(peer: TLSPeer) -> None:
        assert await peer.receive(1) == b"?"
        await peer.send(b"unasked")
        await leave(peer)

    await talk(way, side, body, script)


@each("own", sides=["client"], backends=ASYNCIO)
async def test_it_needs_no_task_on_asyncio(way: str, side: str) -> None:
    async def body(conn: Connection) -> None:
        loop = asyncio.get_running_loop()
        answer = loop.create_future()
        loop.call_soon(
            lambda: answer.set_result(conn.is_stale()), context=contextvars.Context()
        )
        assert await answer is False

    async def script(peer: TLSPeer) -> None:
        await leave(peer)

    await talk(way, side, body, script)


@each("wrapped", "buffered", "trio")
async def test_detach_does_not_lose_the_byte_that_was_looked_at(
    way: str, side: str
) -> None:
    async def body(conn: Connection) -> None:
        await conn.send(b"?")
        await until_stale(conn)
        with pytest.raises(RuntimeError, match="first byte"):
            conn.detach()
        assert conn.ending is None
        assert await received(conn, 1) == b"u"
        stream = conn.detach()
        if way == "trio":
            assert await stream.receive_some() == b"nasked"
            await trio.aclose_forcefully(stream)
        else:
            assert await stream.receive() == b"nasked"
            await anyio.aclose_forcefully(stream)

    async def script(peer: TLSPeer) -> None:
        assert await peer.receive(1) == b"?"
        await peer.send(b"unasked")
        with suppress(OSError, ssl.SSLError):
            await peer.end()

    await talk(way, side, body, script)


async def test_handshake_under_way_is_refused() -> None:
    async with open_peer() as (conn, _):
        async with anyio.create_task_group() as tg:
            tg.start_soon(partial(conn.start_tls, client_context(), hostname="localhost"))
            await settled()
            with pytest.raises(anyio.BusyResourceError):
                conn.is_stale()
            tg.cancel_scope.cancel()
        assert conn.is_stale()


@pytest.mark.parametrize("anyio_backend", [("trio", {})], indirect=True, ids=["trio"])
async def test_before_a_handshake_any_input_is_unasked() -> None:
    """Trio leaves the handshake to the first who sends or receives."""
    with plain_server() as listener:
        stream = await trio.open_tcp_stream(*listener.getsockname())
        with accepted(listener) as peer:
            tls = trio.SSLStream(stream, client_context(), server_hostname="localhost")
            async with connection_scope(tls) as conn:
                assert not conn.is_stale()
                peer.sock.sendall(b"220 smtp.example.org\r\n")
                await until_stale(conn)
                conn.abort()
