"""A `Connection` keeps AnyIO's promises of a byte stream."""

from __future__ import annotations

import array
import socket
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel
import pytest
import trio
import trio.testing
from anyio import wait_all_tasks_blocked
from anyio.abc import SocketAttribute
from anyio.streams.buffered import BufferedByteReceiveStream

from anyio_rst import CloseKind, Connection, PeerClose, PeerReset

from serving import Peer, Seen, serve, value_of

pytestmark = pytest.mark.anyio

# More than the socket buffers of both sides hold, with a small one at the peer.
TOO_MUCH = bytes(8 * 2**20)


async def test_receive_gives_at_most_max_bytes_and_loses_nothing(kind: str) -> None:
    got: list[bytes] = []

    async def handler(conn: Connection) -> None:
        got.extend([await conn.receive(3), await conn.receive(100)])
        with pytest.raises(anyio.EndOfStream):
            await conn.receive()
        with pytest.raises(anyio.EndOfStream):
            await conn.receive()

    async with serve(kind, handler) as service:
        with service.connect() as peer:
            await peer.send(b"abcdef")
            peer.send_eof()
            ending = await service.ending()
    assert got == [b"abc", b"def"]
    assert ending.peer is PeerClose.FIN


async def test_iteration_ends_with_the_peers_fin(kind: str) -> None:
    got: list[bytes] = []

    async def handler(conn: Connection) -> None:
        got.extend([chunk async for chunk in conn])

    async with serve(kind, handler) as service:
        with service.connect() as peer:
            await peer.send(b"abc")
            peer.send_eof()
            await service.ending()
    assert b"".join(got) == b"abc"


@pytest.mark.parametrize("max_bytes", [0, -1])
async def test_receive_of_no_bytes_is_refused(kind: str, max_bytes: int) -> None:
    async def handler(conn: Connection) -> None:
        with pytest.raises(ValueError, match="max_bytes"):
            await conn.receive(max_bytes)

    await expect_fin(kind, handler)


async def expect_fin(kind: str, handler: Any, data: bytes = b"") -> None:
    async with serve(kind, handler) as service:
        with service.connect() as peer:
            assert await peer.read_to_end() == Seen(data, PeerClose.FIN)
        assert (await service.ending()).kind is CloseKind.FIN


@pytest.mark.parametrize(
    "item",
    [b"abcd", bytearray(b"abcd"), memoryview(b"abcd"), memoryview(b"abcd").cast("I")],
    ids=["bytes", "bytearray", "memoryview", "memoryview of ints"],
)
async def test_send_takes_what_is_bytes_like(kind: str, item: Any) -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(item)
        await conn.send(b"")

    await expect_fin(kind, handler, b"abcd")


@pytest.mark.parametrize("item", ["text", 3, None, [b"x"]], ids=repr)
async def test_send_of_what_is_not_bytes_like_is_refused(kind: str, item: Any) -> None:
    async def handler(conn: Connection) -> None:
        with pytest.raises(TypeError, match="bytes-like"):
            await conn.send(item)
        await conn.send(b"whole")

    await expect_fin(kind, handler, b"whole")


async def test_large_data_arrives_whole_both_ways(kind: str) -> None:
    size = 3 * 2**20 + 1
    received = 0

    async def handler(conn: Connection) -> None:
        nonlocal received
        async with anyio.create_task_group() as tg:
            tg.start_soon(conn.send, bytes(size))
            async for chunk in conn:
                received += len(chunk)

    async with serve(kind, handler) as service:
        with service.connect() as peer:
            async with anyio.create_task_group() as tg:

                async def upload() -> None:
                    await peer.send(bytes(size))
                    peer.send_eof()

                tg.start_soon(upload)
                seen = await peer.read_to_end()
    assert (len(seen.data), seen.close) == (size, PeerClose.FIN)
    assert received == size


async def test_second_task_in_one_direction_is_refused(kind: str) -> None:
    async def handler(conn: Connection) -> None:
        async with anyio.create_task_group() as tg:
            tg.start_soon(conn.receive)
            await wait_all_tasks_blocked()
            with pytest.raises(anyio.BusyResourceError, match="reading from"):
                await conn.receive()
            await conn.send(b"the other direction is free")
            tg.cancel_scope.cancel()

    await expect_fin(kind, handler, b"the other direction is free")


async def test_second_sender_is_refused(kind: str) -> None:
    async def send(conn: Connection) -> None:
        with pytest.raises(anyio.ClosedResourceError):
            await conn.send(TOO_MUCH)

    async def handler(conn: Connection) -> None:
        async with anyio.create_task_group() as tg:
            tg.start_soon(send, conn)
            await wait_all_tasks_blocked()
            with pytest.raises(anyio.BusyResourceError, match="writing to"):
                await conn.send(b"x")
            with pytest.raises(anyio.BusyResourceError, match="writing to"):
                await conn.send_eof()
            conn.abort()

    async with serve(kind, handler) as service:
        with service.connect(buffer=4096) as peer:
            await service.ending()
            assert (await peer.read_to_end()).close is PeerClose.RST


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


async def keep_waiting(peer: Peer) -> None:
    for _ in range(ROUNDS_OF_WAITING):
        await anyio.wait_all_tasks_blocked()
        await peer.send(b"w")


async def be_kept_waiting(conn: Connection) -> None:
    for _ in range(ROUNDS_OF_WAITING):
        assert await conn.receive() == b"w"


async def check_that_operations_let_others_run(kind: str, *, waiting: bool) -> None:
    async def handler(conn: Connection) -> None:
        if waiting:
            await be_kept_waiting(conn)
        await ready.wait()
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

    ready = anyio.Event()
    async with serve(kind, handler) as service:
        with service.connect() as peer:
            if waiting:
                await keep_waiting(peer)
            await peer.send(b"abc")
            ready.set()
            peer.send_eof()
            value_of(await service.ending())


async def test_every_operation_lets_other_tasks_run(kind: str) -> None:
    await check_that_operations_let_others_run(kind, waiting=False)


async def test_every_operation_lets_other_tasks_run_after_others_had_to_wait() -> None:
    # A native connection then sends, and looks for input, in another order.
    await check_that_operations_let_others_run("native", waiting=True)


async def check_that_operations_notice_cancellation(kind: str, *, waiting: bool) -> None:
    async def handler(conn: Connection) -> None:
        if waiting:
            await be_kept_waiting(conn)
        await ready.wait()
        operations = [lambda: conn.receive(1), lambda: conn.send(b""), conn.send_eof]
        if kind == "native":  # another stream does not tell that nothing was sent
            operations.append(lambda: conn.send(b"never"))
        for operation in operations:
            with anyio.CancelScope() as scope:
                scope.cancel()
                await operation()
            assert scope.cancelled_caught
        await conn.send(await conn.receive())

    ready = anyio.Event()
    async with serve(kind, handler) as service:
        with service.connect() as peer:
            if waiting:
                await keep_waiting(peer)
            await peer.send(b"abc")
            ready.set()
            assert await peer.read_to_end() == Seen(b"abc", PeerClose.FIN)
        value_of(await service.ending())


async def test_every_operation_notices_cancellation_and_does_nothing(kind: str) -> None:
    await check_that_operations_notice_cancellation(kind, waiting=False)


async def test_every_operation_notices_cancellation_after_others_had_to_wait() -> None:
    await check_that_operations_notice_cancellation("native", waiting=True)


async def test_attributes_are_those_of_the_stream(kind: str) -> None:
    async def handler(conn: Connection) -> None:
        assert conn.extra(SocketAttribute.family) is socket.AF_INET
        address = conn.extra(SocketAttribute.remote_address)
        assert isinstance(address, tuple)
        assert address[0] == "127.0.0.1"
        assert conn.extra(SocketAttribute.remote_port) == address[1]
        assert conn.extra(SocketAttribute.local_address) == ("127.0.0.1", service.port)
        assert conn.extra(SocketAttribute.local_port) == service.port
        raw = conn.extra(SocketAttribute.raw_socket)
        assert raw.getpeername() == address
        await conn.send(str(address[1]).encode())
        conn.abort()
        # Known to the end: that is where it goes into a log.
        assert conn.extra(SocketAttribute.remote_address) == address
        assert f":{address[1]} (RST, ABORTED)" in repr(conn)

    async with serve(kind, handler) as service:
        with service.connect() as peer:
            port = peer.sock.getsockname()[1]
            assert (await peer.read_to_end()).data == str(port).encode()
        ending = await service.ending()
    value_of(ending)
    assert ending.remote_address == ("127.0.0.1", port)


async def test_repr_tells_the_state(kind: str) -> None:
    async def handler(conn: Connection) -> None:
        assert repr(conn).endswith(" (open)>")
        await conn.send(b"x")

    async with serve(kind, handler) as service:
        with service.connect() as peer:
            assert await peer.read_to_end() == Seen(b"x", PeerClose.FIN)
            served = await service.next()
            assert repr(served.connection).endswith(" (finishing)>")
        await served.ending()
        assert repr(served.connection).endswith(" (FIN, RETURNED)>")


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
    async def handler(conn: Connection) -> None:
        async with anyio.create_task_group() as tg:
            tg.start_soon(conn.receive)
            await wait_all_tasks_blocked()
            with pytest.raises(anyio.BusyResourceError):
                conn.detach()
            assert conn.ending is None
            tg.cancel_scope.cancel()

    await expect_fin(kind, handler)


# The block of the connection itself.


async def test_async_with_the_connection_obeys_the_rules(kind: str) -> None:
    """`async with stream:` is what handlers of AnyIO do; there it calls `aclose()`."""

    async def handler(conn: Connection) -> None:
        with pytest.raises(ZeroDivisionError):
            async with conn:
                await conn.send(b"half")
                _ = 1 / 0
        assert conn.ending is not None
        assert conn.ending.kind is CloseKind.RST

    async with serve(kind, handler) as service:
        with service.connect() as peer:
            assert await peer.read_to_end() == Seen(b"half", PeerClose.RST)


async def test_a_buffered_reader_on_a_connection_works(kind: str) -> None:
    async def handler(conn: Connection) -> None:
        line = await BufferedByteReceiveStream(conn).receive_until(b"\n", 100)
        await conn.send(line.upper())

    async with serve(kind, handler) as service:
        with service.connect() as peer:
            await peer.send(b"hello\nworld")
            assert await peer.read_to_end() == Seen(b"HELLO", PeerClose.FIN)


async def test_send_to_a_peer_that_reset_raises_peer_reset_and_is_torn_or_not(
    kind: str,
) -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(b"ready")
        await gone.wait()
        with pytest.raises(PeerReset):
            while True:
                await conn.send(b"x")

    gone = anyio.Event()
    async with serve(kind, handler) as service:
        peer: Peer = service.connect()
        assert await peer.receive(5) == b"ready"
        peer.reset()
        gone.set()
        ending = await service.ending()
    value_of(ending)
    assert ending.kind is CloseKind.RST
    assert ending.peer is PeerClose.RST


async def test_send_eof_to_a_peer_that_reset_raises_and_sends_nothing() -> None:
    """Judged where the reset cannot have been noticed before."""

    async def handler(conn: Connection) -> None:
        await conn.send(b"ready")
        await gone.wait()
        with pytest.raises(PeerReset):
            await conn.send_eof()

    gone = anyio.Event()
    async with serve("native", handler) as service:
        peer = service.connect()
        assert await peer.receive(5) == b"ready"
        peer.reset()
        gone.set()
        ending = await service.ending()
    value_of(ending)
    assert (ending.kind, ending.peer) == (CloseKind.RST, PeerClose.RST)


async def test_send_eof_to_a_peer_that_reset_raises_on_other_streams(kind: str) -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(b"ready")
        await gone.wait()
        with pytest.raises(anyio.BrokenResourceError):
            await conn.send_eof()

    gone = anyio.Event()
    async with serve(kind, handler) as service:
        peer = service.connect()
        assert await peer.receive(5) == b"ready"
        peer.reset()
        gone.set()
        ending = await service.ending()
    value_of(ending)
    assert ending.kind is CloseKind.RST


async def test_view_with_gaps_is_refused_and_tears_nothing(kind: str) -> None:
    async def handler(conn: Connection) -> None:
        with pytest.raises(TypeError, match="contiguous"):
            await conn.send(memoryview(b"abcd")[::2])  # type: ignore[arg-type]
        await conn.send(array.array("I", [1, 2]))  # type: ignore[arg-type]

    await expect_fin(kind, handler, array.array("I", [1, 2]).tobytes())
