"""A `Connection` is the stream that AnyIO's documentation describes, and Trio's."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import (
    asynccontextmanager,
    contextmanager,
)
from functools import partial
from typing import Any, TypeAlias, TypeVar

import anyio
import anyio.abc
import anyio.lowlevel
import anyio.to_thread
import pytest
import trio
import trio.testing
from anyio import (
    BrokenResourceError,
    BusyResourceError,
    ClosedResourceError,
    EndOfStream,
    TypedAttributeLookupError,
)
from anyio.abc import SocketAttribute
from anyio.streams.file import FileStreamAttribute
from test_connection import assert_lets_others_run

from anyio_rst import CloseKind, Connection, Drain, PeerClose
from anyio_rst._native import NativeStream
from anyio_rst._sockets import prepare_accepted

from securing import CLEAN, TLSPeer, each_way_of_a_server, talk
from serving import LONG, Peer, Seen, fill_buffers, serve, settled

pytestmark = pytest.mark.anyio

T = TypeVar("T")

# What the drain does is not the subject here.
NO_WAIT = Drain(timeout=0)

# More than the kernel takes before the peer reads.
TOO_MUCH = bytes(range(256)) * 2**15


# AnyIO's promises. A check is named by what it holds.


class SecureClient:
    """A :class:`TLSPeer` with the methods of a :class:`Peer`."""

    def __init__(self, peer: TLSPeer) -> None:
        self._peer = peer
        self.send = peer.send
        self.receive = peer.receive
        self.send_eof = peer.say_close_notify
        self.reset = peer.raw.reset

    async def read_to_end(self) -> Seen:
        data, end = await self._peer.end()
        assert end in (CLEAN, ["RST"])
        return Seen(data, PeerClose.FIN if end == CLEAN else PeerClose.RST)


Client: TypeAlias = Peer | SecureClient
Check: TypeAlias = Callable[[Connection, Client], Awaitable[None]]


class Pending:
    """A call in a task of its own, and what became of it."""

    def __init__(self, call: Callable[[], Awaitable[object]]) -> None:
        self._call = call
        self.result: object = None

    async def run(self) -> None:
        try:
            self.result = await self._call()
        except Exception as exc:
            self.result = exc


@asynccontextmanager
async def pending(call: Callable[[], Awaitable[object]]) -> AsyncIterator[Pending]:
    """*call* waits while the block runs, and is awaited after it."""
    waiting = Pending(call)
    async with anyio.create_task_group() as tg:
        tg.start_soon(waiting.run)
        await settled()
        assert waiting.result is None
        yield waiting


async def receives_at_most_max_bytes(conn: Connection, peer: Client) -> None:
    await peer.send(b"abcdef")
    assert [await conn.receive(size) for size in (1, 2, 100)] == [b"a", b"bc", b"def"]


async def refuses_to_receive_less_than_one_byte(conn: Connection, peer: Client) -> None:
    await peer.send(b"x")
    for max_bytes in (0, -1):
        with pytest.raises(ValueError, match="max_bytes"):
            await conn.receive(max_bytes)
    assert await conn.receive(1) == b"x"


async def receive_waits_for_data(conn: Connection, peer: Client) -> None:
    async with pending(conn.receive) as received:
        await peer.send(b"x")
    assert received.result == b"x"


async def cancelled_receive_loses_nothing(conn: Connection, peer: Client) -> None:
    async with anyio.create_task_group() as tg:
        tg.start_soon(conn.receive)
        await settled()
        tg.cancel_scope.cancel()
    received = b""
    await peer.send(b"abcdef")
    while len(received) < 6:
        with anyio.CancelScope() as scope:
            scope.cancel()
            received += await conn.receive(1)  # or not, if what is there may come first
        if len(received) < 6:
            received += await conn.receive(1)
    assert received == b"abcdef"


async def end_of_stream_is_told_each_time(conn: Connection, peer: Client) -> None:
    await peer.send(b"last")
    peer.send_eof()
    assert await conn.receive() == b"last"
    for _ in range(3):
        with pytest.raises(EndOfStream):
            await conn.receive()
    await conn.send(b"the other direction is open")
    assert await peer.receive(27) == b"the other direction is open"


async def iteration_is_chunks_up_to_the_end(conn: Connection, peer: Client) -> None:
    data = TOO_MUCH[:1_000_003]
    chunks: list[bytes] = []

    async def iterate() -> None:
        chunks.extend([chunk async for chunk in conn])

    async with anyio.create_task_group() as tg:
        tg.start_soon(iterate)
        await peer.send(data)
        peer.send_eof()
    assert b"".join(chunks) == data
    assert all(0 < len(chunk) <= 65536 for chunk in chunks)
    assert [chunk async for chunk in conn] == []


async def send_waits_until_all_is_on_its_way(conn: Connection, peer: Client) -> None:
    async with pending(partial(conn.send, TOO_MUCH)) as sent:
        received = await peer.receive(len(TOO_MUCH))
    assert received == TOO_MUCH
    assert sent.result is None


async def sends_keep_their_order(conn: Connection, peer: Client) -> None:
    items: list[Any] = [b"abc", b"", bytearray(b"de"), memoryview(b"f")]
    for item in items:
        await conn.send(item)
    assert await peer.receive(6) == b"abcdef"


async def empty_send_is_nothing(conn: Connection, peer: Client) -> None:
    await conn.send(b"")
    await conn.aclose()
    assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)


async def directions_are_independent(conn: Connection, peer: Client) -> None:
    async with pending(conn.receive) as received:
        await conn.send(b"x")
        assert await peer.receive(1) == b"x"
        await peer.send(b"y")
    assert received.result == b"y"
    async with pending(partial(conn.send, TOO_MUCH)):
        await peer.send(b"z")
        assert await conn.receive() == b"z"
        await peer.receive(len(TOO_MUCH))


async def second_receiver_is_refused_and_the_first_unharmed(
    conn: Connection, peer: Client
) -> None:
    async with pending(conn.receive) as received:
        with pytest.raises(BusyResourceError, match="reading from"):
            await conn.receive()
        await peer.send(b"x")
    assert received.result == b"x"
    await peer.send(b"y")
    assert await conn.receive() == b"y"


async def second_sender_is_refused_and_the_first_unharmed(
    conn: Connection, peer: Client
) -> None:
    async with pending(partial(conn.send, TOO_MUCH)) as sent:
        for item in (b"x", b""):
            with pytest.raises(BusyResourceError, match="writing to"):
                await conn.send(item)
        assert await peer.receive(len(TOO_MUCH)) == TOO_MUCH
    assert sent.result is None
    await conn.send(b"y")
    assert await peer.receive(1) == b"y"


async def peer_that_reset_is_a_broken_resource_from_then_on(
    conn: Connection, peer: Client
) -> None:
    async with pending(conn.receive) as received:
        peer.reset()
    assert isinstance(received.result, BrokenResourceError)
    for operation in (conn.receive, partial(conn.send, b"x")) * 2:
        with pytest.raises(BrokenResourceError):
            await operation()


async def closed_is_closed_for_everything(conn: Connection, peer: Client) -> None:
    await peer.send(b"unread")
    await conn.aclose()
    for _ in range(2):
        for operation in (
            conn.receive,
            partial(conn.receive, 1),
            partial(conn.send, b"x"),
            partial(conn.send, b""),
            conn.send_eof,
        ):
            with pytest.raises(ClosedResourceError):
                await operation()
    with pytest.raises(ClosedResourceError):
        async for _ in conn:
            pass


async def closing_wakes_the_receiver(conn: Connection, peer: Client) -> None:
    async with pending(conn.receive) as received:
        await conn.aclose()
    assert isinstance(received.result, ClosedResourceError)
    assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)


async def closing_wakes_the_sender(conn: Connection, peer: Client) -> None:
    async with pending(partial(conn.send, TOO_MUCH)) as sent:
        await conn.aclose()
    assert isinstance(sent.result, ClosedResourceError)
    assert (await peer.read_to_end()).close is PeerClose.RST  # the send was torn


async def closing_again_does_nothing(conn: Connection, peer: Client) -> None:
    await conn.send(b"all of it")
    async with anyio.create_task_group() as tg:
        tg.start_soon(conn.aclose)
        tg.start_soon(conn.aclose)
    ending = conn.ending
    await conn.aclose()
    assert conn.ending is ending
    assert await peer.read_to_end() == Seen(b"all of it", PeerClose.FIN)


async def cancelled_close_closes(conn: Connection, peer: Client) -> None:
    await conn.send(b"all of it")
    with anyio.CancelScope() as scope:
        scope.cancel()
        await conn.aclose()
    assert scope.cancelled_caught
    assert conn.ending is not None
    with pytest.raises(ClosedResourceError):
        await conn.receive()
    # The idiom for giving up is no success.
    assert await peer.read_to_end() == Seen(b"all of it", PeerClose.RST)


async def forceful_close_closes(conn: Connection, peer: Client) -> None:
    await anyio.aclose_forcefully(conn)
    assert conn.ending is not None
    assert conn.ending.kind is CloseKind.RST
    assert await peer.read_to_end() == Seen(b"", PeerClose.RST)


async def context_manager_is_the_stream_and_closes(
    conn: Connection, peer: Client
) -> None:
    async with conn as entered:
        assert entered is conn
        await conn.send(b"x")
    with pytest.raises(ClosedResourceError):
        await conn.send(b"y")
    assert await peer.read_to_end() == Seen(b"x", PeerClose.FIN)


async def is_a_socket_stream_with_its_attributes(conn: Connection, peer: Client) -> None:
    assert isinstance(conn, anyio.abc.SocketStream)
    raw = conn.extra(SocketAttribute.raw_socket)
    assert raw.fileno() >= 0
    assert conn.extra(SocketAttribute.family) is socket.AF_INET
    assert conn.extra(SocketAttribute.local_address) == raw.getsockname()
    assert conn.extra(SocketAttribute.local_port) == raw.getsockname()[1]
    assert conn.extra(SocketAttribute.remote_address) == raw.getpeername()
    assert conn.extra(SocketAttribute.remote_port) == raw.getpeername()[1]
    with pytest.raises(TypedAttributeLookupError):
        conn.extra(FileStreamAttribute.path)
    assert conn.extra(FileStreamAttribute.path, None) is None


async def every_operation_lets_other_tasks_run(conn: Connection, peer: Client) -> None:
    await peer.send(b"abc")
    peer.send_eof()
    for _ in b"abc":
        await assert_lets_others_run(conn.receive(1))
    for _ in range(2):
        await assert_lets_others_run(expect(EndOfStream, conn.receive()))
    await assert_lets_others_run(conn.send(b"x"))
    await assert_lets_others_run(conn.send(b""))
    for _ in range(2):
        await assert_lets_others_run(conn.aclose())
        await assert_lets_others_run(expect(ClosedResourceError, conn.receive()))
        await assert_lets_others_run(expect(ClosedResourceError, conn.send(b"x")))
        await assert_lets_others_run(expect(ClosedResourceError, conn.send_eof()))


async def expect(exc: type[Exception], operation: Awaitable[object]) -> None:
    with pytest.raises(exc):
        await operation


async def send_eof_ends_one_direction(conn: Connection, peer: Client) -> None:
    await conn.send(b"last")
    for _ in range(2):
        await conn.send_eof()
    assert await peer.read_to_end() == Seen(b"last", PeerClose.FIN)
    for item in (b"x", b""):
        with pytest.raises(ClosedResourceError):
            await conn.send(item)
    async with pending(conn.receive) as received:
        await peer.send(b"x")
    assert received.result == b"x"


async def send_eof_is_refused_during_a_send(conn: Connection, peer: Client) -> None:
    async with pending(partial(conn.send, TOO_MUCH)):
        with pytest.raises(BusyResourceError, match="writing to"):
            await conn.send_eof()
        await peer.receive(len(TOO_MUCH))
    await conn.send(b"x")
    assert await peer.receive(1) == b"x"


async def has_no_half_close(conn: Connection, peer: Client) -> None:
    for _ in range(2):
        with pytest.raises(NotImplementedError):
            await conn.send_eof()
    await conn.send(b"still open")
    assert await peer.receive(10) == b"still open"


# What AnyIO's documentation says, and what holds a `Connection` to it.
PROMISES: dict[str, Check] = {
    "receive: at most max_bytes": receives_at_most_max_bytes,
    "receive: ValueError if max_bytes is less than 1": (
        refuses_to_receive_less_than_one_byte
    ),
    "receive: waits": receive_waits_for_data,
    "receive: cancelled, it loses nothing": cancelled_receive_loses_nothing,
    "EndOfStream: closed from the other end": end_of_stream_is_told_each_time,
    "iterating: byte strings of no more than 65536 bytes": (
        iteration_is_chunks_up_to_the_end
    ),
    "send: all the given bytes": send_waits_until_all_is_on_its_way,
    "send: in order": sends_keep_their_order,
    "send: of no bytes": empty_send_is_nothing,
    "a bidirectional byte stream": directions_are_independent,
    "BusyResourceError: two tasks receive": (
        second_receiver_is_refused_and_the_first_unharmed
    ),
    "BusyResourceError: two tasks send": second_sender_is_refused_and_the_first_unharmed,
    "BrokenResourceError: unusable due to external causes": (
        peer_that_reset_is_a_broken_resource_from_then_on
    ),
    "ClosedResourceError: explicitly closed": closed_is_closed_for_everything,
    "ClosedResourceError: closed during receive": closing_wakes_the_receiver,
    "ClosedResourceError: closed during send": closing_wakes_the_sender,
    "aclose: idempotent": closing_again_does_nothing,
    "aclose: cancelled, it closes all the same": cancelled_close_closes,
    "aclose_forcefully": forceful_close_closes,
    "async context manager: returns itself, closes": (
        context_manager_is_the_stream_and_closes
    ),
    "SocketStream: all relevant attributes": is_a_socket_stream_with_its_attributes,
    "checkpoints": every_operation_lets_other_tasks_run,
}
PROMISES_OF_TCP: dict[str, Check] = {
    **PROMISES,
    "send_eof: idempotent, no further data": send_eof_ends_one_direction,
    "BusyResourceError: send_eof during send": send_eof_is_refused_during_a_send,
}
PROMISES_OF_TLS: dict[str, Check] = {
    **PROMISES,
    "send_eof: NotImplementedError": has_no_half_close,
}


class Held:
    """A body that does nothing, so that a check has its connection."""

    def __init__(self) -> None:
        self._connections: list[Connection] = []
        self._begun, self.over = anyio.Event(), anyio.Event()

    async def body(self, conn: Connection) -> None:
        self._connections.append(conn)
        self._begun.set()
        await self.over.wait()

    async def check(self, promise: Check, peer: Client) -> None:
        with anyio.fail_after(LONG):
            await self._begun.wait()
            (conn,) = self._connections
            await promise(conn, peer)
        self.over.set()


@pytest.mark.parametrize("promise", PROMISES_OF_TCP)
async def test_tcp(kind: str, promise: str) -> None:
    held = Held()
    async with serve(kind, held.body, drain=NO_WAIT) as service:
        with service.connect() as peer:
            await held.check(PROMISES_OF_TCP[promise], peer)
        await service.ending()


@each_way_of_a_server
@pytest.mark.parametrize("promise", PROMISES_OF_TLS)
async def test_tls(way: str, side: str, promise: str) -> None:
    async def script(peer: TLSPeer) -> None:
        await held.check(PROMISES_OF_TLS[promise], SecureClient(peer))

    held = Held()
    await talk(way, side, held.body, script, drain=NO_WAIT)


# Trio's kit.


class TrioConnection(trio.abc.HalfCloseableStream):
    """A `Connection` with the names of Trio."""

    def __init__(self, conn: Connection) -> None:
        self._conn = conn
        self._sock = conn.extra(SocketAttribute.raw_socket)
        self._waiting = False
        self._senders = 0

    async def send_all(self, data: Any) -> None:
        with self._beside_no_waiter():
            await _translated(self._conn.send(data))

    async def send_eof(self) -> None:
        with self._beside_no_waiter():
            await _translated(self._conn.send_eof())

    @contextmanager
    def _beside_no_waiter(self) -> Iterator[None]:
        # AnyIO has no wait_send_all_might_not_block(), so the connection knows nothing
        # of it. Of two sends it judges by itself.
        if self._waiting:
            raise trio.BusyResourceError
        self._senders += 1
        try:
            yield
        finally:
            self._senders -= 1

    async def wait_send_all_might_not_block(self) -> None:
        if self._waiting or self._senders:
            raise trio.BusyResourceError
        self._waiting = True
        try:
            await anyio.lowlevel.checkpoint()
            if self._conn.ending is not None:
                raise trio.ClosedResourceError
            await _translated(anyio.wait_writable(self._sock))
        finally:
            self._waiting = False

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if max_bytes is None:
            max_bytes = 65536
        elif not isinstance(max_bytes, int):
            raise TypeError  # which AnyIO leaves to the type checker
        try:
            return await _translated(self._conn.receive(max_bytes))
        except EndOfStream:
            return b""

    async def aclose(self) -> None:
        if self._waiting:
            anyio.notify_closing(self._sock)
        await self._conn.aclose()


async def _translated(operation: Awaitable[T]) -> T:
    try:
        return await operation
    except ClosedResourceError as exc:
        raise trio.ClosedResourceError from exc
    except BrokenResourceError as exc:
        raise trio.BrokenResourceError from exc
    except BusyResourceError as exc:
        raise trio.BusyResourceError from exc


async def native_pair() -> tuple[TrioConnection, TrioConnection]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
    return on_trio(client), on_trio(server)


def on_trio(sock: socket.socket) -> TrioConnection:
    """As `serve_tcp` makes it of what it has accepted."""
    sock.setblocking(False)
    prepare_accepted(sock)
    stream = NativeStream(sock, sock.getpeername())
    return TrioConnection(Connection(stream, finish_on=(), drain=Drain(timeout=0.05)))


async def clogged_pair() -> tuple[TrioConnection, TrioConnection]:
    pair = await native_pair()
    while sum(fill_buffers(one._sock) for one in pair):
        pass  # each may have made room for the other
    return pair


def test_native_connection_passes_the_conformance_kit_of_trio() -> None:
    trio.run(trio.testing.check_half_closeable_stream, native_pair, clogged_pair)
