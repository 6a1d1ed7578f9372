"""A `Connection` as a stream: what test_conformance.py does not ask of it."""

from __future__ import annotations

import array
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel
import anyio.to_thread
import pytest
import trio
import trio.testing
from anyio import wait_all_tasks_blocked
from anyio.abc import SocketAttribute
from anyio.streams.buffered import BufferedByteReceiveStream

from anyio_rst import Cause, CloseKind, Connection, PeerClose, PeerReset, connect_tcp
from anyio_rst.testing import Peer, assert_fin, open_peer

from serving import Peer as PlainPeer
from serving import (
    Seen,
    accepted,
    arrived,
    assert_finished,
    assert_reset,
    connection_of,
    plain_server,
    serve,
    settled,
    value_of,
)

pytestmark = pytest.mark.anyio

# More than the kernel takes before the peer reads.
TOO_MUCH = bytes(8 * 2**20)


async def test_send_of_what_is_not_bytes_like_is_refused(kind: str) -> None:
    items: list[Any] = ["text", 3, None, [b"x"]]
    async with connection_of(kind) as (conn, peer):
        for item in items:
            with pytest.raises(TypeError, match="bytes-like"):
                await conn.send(item)
        await conn.send(b"whole")
    await assert_finished(conn, peer, Cause.RETURNED, b"whole")


async def test_large_data_arrives_whole_both_ways(kind: str) -> None:
    size = 3 * 2**20 + 1
    received = 0

    async def upload(peer: Peer) -> None:
        await peer.send(bytes(size))
        peer.send_eof()

    async with connection_of(kind) as (conn, peer):
        async with anyio.create_task_group() as tg:
            tg.start_soon(conn.send, bytes(size))
            tg.start_soon(upload, peer)
            tg.start_soon(peer.receive_exactly, size)
            async for chunk in conn:
                received += len(chunk)
    await assert_fin(peer, b"")  # not one byte more
    assert received == size


async def assert_lets_others_run(operation: Any) -> None:
    if anyio.get_cancelled_exc_class() is trio.Cancelled:
        with trio.testing.assert_checkpoints():
            await operation
        return
    others = 0

    async def count() -> None:
        nonlocal others
        while True:
            await anyio.lowlevel.checkpoint()
            others += 1

    async with anyio.create_task_group() as tg:
        tg.start_soon(count)
        await anyio.lowlevel.checkpoint()
        others = 0
        await operation
        assert others
        tg.cancel_scope.cancel()


async def expect_closed(operation: Any) -> None:
    with pytest.raises(anyio.ClosedResourceError):
        await operation


ROUNDS_OF_WAITING = 4


async def keep_waiting(conn: Connection, peer: Peer) -> None:
    for _ in range(ROUNDS_OF_WAITING):
        async with anyio.create_task_group() as tg:
            tg.start_soon(conn.receive)
            await wait_all_tasks_blocked()
            await peer.send(b"w")


async def check_that_operations_let_others_run(kind: str, *, waiting: bool) -> None:
    async with connection_of(kind) as (conn, peer):
        if waiting:
            await keep_waiting(conn, peer)
        await peer.send(b"abc")
        peer.send_eof()
        await settled()  # a transport has read it, so that a receive need not wait
        await assert_lets_others_run(conn.receive(1))
        await assert_lets_others_run(conn.send(b"x"))
        await assert_lets_others_run(conn.send(b""))
        await assert_lets_others_run(conn.send_eof())
        await assert_lets_others_run(conn.send_eof())
        await assert_lets_others_run(conn.aclose())
        await assert_lets_others_run(conn.aclose())
        await assert_lets_others_run(expect_closed(conn.receive()))
        await assert_lets_others_run(expect_closed(conn.send(b"")))
        await assert_lets_others_run(expect_closed(conn.send_eof()))


async def test_every_operation_lets_other_tasks_run(kind: str) -> None:
    await check_that_operations_let_others_run(kind, waiting=False)


async def test_every_operation_lets_other_tasks_run_after_others_had_to_wait() -> None:
    # A native connection then sends, and looks for input, in another order.
    await check_that_operations_let_others_run("native", waiting=True)


async def check_that_operations_notice_cancellation(kind: str, *, waiting: bool) -> None:
    async with connection_of(kind) as (conn, peer):
        if waiting:
            await keep_waiting(conn, peer)
        await peer.send(b"abc")
        await settled()  # else uvloop may see it before the cancellation
        operations = [lambda: conn.receive(1), lambda: conn.send(b""), conn.send_eof]
        if kind == "native":  # another stream does not tell that nothing was sent
            operations.append(lambda: conn.send(b"never"))
        for operation in operations:
            with anyio.CancelScope() as scope:
                scope.cancel()
                await operation()
            assert scope.cancelled_caught
        await conn.send(await conn.receive())
    await assert_finished(conn, peer, Cause.RETURNED, b"abc")


async def test_every_operation_notices_cancellation_and_does_nothing(kind: str) -> None:
    await check_that_operations_notice_cancellation(kind, waiting=False)


async def test_every_operation_notices_cancellation_after_others_had_to_wait() -> None:
    await check_that_operations_notice_cancellation("native", waiting=True)


async def test_remote_address_is_known_to_the_end(kind: str) -> None:
    """That is where it goes into a log."""
    async with connection_of(kind) as (conn, peer):
        theirs = peer.socket.getsockname()
        conn.abort()
        assert conn.extra(SocketAttribute.remote_address) == theirs
        assert f":{theirs[1]} (RST, ABORTED)" in repr(conn)
    ending = await assert_reset(conn, peer, Cause.ABORTED)
    assert ending.remote_address == theirs


async def test_repr_tells_the_state(kind: str) -> None:
    async with connection_of(kind) as (conn, peer):
        assert repr(conn).endswith(" (open)>")
        async with anyio.create_task_group() as tg:
            tg.start_soon(conn.aclose)
            await assert_fin(peer)
            assert repr(conn).endswith(" (finishing)>")
            peer.close()
        assert repr(conn).endswith(" (FIN, CLOSED)>")


# detach().


async def test_detach_hands_the_stream_back_open_and_disarmed(kind: str) -> None:
    async def handler(conn: Connection) -> None:
        stream = conn.detach()
        assert conn.ending is not None
        assert conn.ending.kind is CloseKind.DETACHED
        with pytest.raises(anyio.ClosedResourceError):
            await conn.receive()
        with pytest.raises(anyio.ClosedResourceError):
            await conn.send(b"x")
        with pytest.raises(anyio.ClosedResourceError):
            await conn.send_eof()
        with pytest.raises(anyio.ClosedResourceError):
            conn.detach()
        conn.abort()
        await conn.aclose()
        streams.append(stream)
        if kind == "trio":  # trio.serve_tcp closes it when its handler returns
            await stream.send_all(b"still here")
            assert await peer.receive(10) == b"still here"

    streams: list[Any] = []
    async with serve(kind, handler) as service:
        with service.connect() as peer:
            ending = await service.ending()
            value_of(ending)
            if kind != "trio":
                # The scope is over, and the stream works.
                (stream,) = streams
                await stream.send(b"still here")
                assert await peer.receive(10) == b"still here"
                await stream.aclose()
            assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)
    assert ending.unacknowledged is None


async def test_detach_is_refused_while_a_task_is_in_the_connection(kind: str) -> None:
    async with connection_of(kind) as (conn, peer):
        async with anyio.create_task_group() as tg:
            tg.start_soon(conn.receive)
            await wait_all_tasks_blocked()
            with pytest.raises(anyio.BusyResourceError):
                conn.detach()
            assert conn.ending is None
            tg.cancel_scope.cancel()
    await assert_finished(conn, peer, Cause.RETURNED)


async def test_a_buffered_reader_on_a_connection_works(kind: str) -> None:
    async with connection_of(kind) as (conn, peer):
        await peer.send(b"hello\nworld")
        line = await BufferedByteReceiveStream(conn).receive_until(b"\n", 100)
        await conn.send(line.upper())
    await assert_finished(conn, peer, Cause.RETURNED, b"HELLO")


# A peer that has reset.


async def test_early_answer_is_received_after_a_failed_send(kind: str) -> None:
    """As over TLS, where test_tls_endings.py has it."""
    got: list[bytes] = []

    async def upload(conn: Connection) -> None:
        with pytest.raises(PeerReset):
            while True:
                await conn.send(bytes(2**16))
        got.append(await conn.receive())
        with pytest.raises(PeerReset):
            await conn.receive()

    async def refuse(peer: PlainPeer) -> None:
        await peer.receive(1000)
        await peer.send(b"413 Content Too Large")
        await arrived(peer)
        peer.sock.close()

    async with serve(kind, upload) as service:
        await refuse(service.connect())
        served = await service.next()
        ending = await served.ending()
    assert served.raised is None
    assert (ending.kind, ending.peer) == (CloseKind.RST, PeerClose.RST)
    with plain_server() as listener:

        async def connect() -> None:
            async with connect_tcp(*listener.getsockname()) as conn:
                await upload(conn)

        async with anyio.create_task_group() as tg:
            tg.start_soon(connect)
            await refuse(await anyio.to_thread.run_sync(accepted, listener))
    assert got == [b"413 Content Too Large"] * 2


async def test_send_eof_to_a_peer_that_reset_raises_and_sends_nothing() -> None:
    """Judged where the reset cannot have been noticed before."""
    async with open_peer() as (conn, peer):
        peer.reset()
        with pytest.raises(PeerReset):
            await conn.send_eof()
    assert conn.ending is not None
    assert (conn.ending.kind, conn.ending.peer) == (CloseKind.RST, PeerClose.RST)


async def test_send_eof_to_a_peer_that_reset_raises_on_other_streams(kind: str) -> None:
    async with connection_of(kind) as (conn, peer):
        peer.reset()
        with pytest.raises(anyio.BrokenResourceError):
            await conn.send_eof()
    assert conn.ending is not None
    assert conn.ending.kind is CloseKind.RST


async def test_view_of_items_is_sent_and_one_with_gaps_refused_and_tears_nothing(
    kind: str,
) -> None:
    ints = array.array("I", [1, 2])
    async with connection_of(kind) as (conn, peer):
        with pytest.raises(TypeError, match="contiguous"):
            await conn.send(memoryview(b"abcd")[::2])  # type: ignore[arg-type]
        await conn.send(ints)  # type: ignore[arg-type]
        await conn.send(memoryview(ints))  # type: ignore[arg-type]
    await assert_finished(conn, peer, Cause.RETURNED, 2 * ints.tobytes())
