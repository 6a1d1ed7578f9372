"""A server or a connection for a test, and the peer that judges it.

What does not need a server uses `connection_of()`, which is the library's own kit on each
kind of stream. The rules themselves, and the kit, are judged by a plain blocking socket.
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import select
import socket
import struct
import termios
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio
import anyio.abc
import anyio.lowlevel
import anyio.to_thread
import outcome
import trio
from anyio.abc import SocketAttribute
from anyio.lowlevel import checkpoint
from anyio.streams.buffered import BufferedByteStream

from anyio_rst import (
    Cause,
    CloseKind,
    Connection,
    Ending,
    PeerClose,
    _sockets,
    connection_scope,
    serve_tcp,
    testing,
)

if TYPE_CHECKING:
    import pytest  # which is much, and no child process needs it

# For what must happen in a test that passes: only a failure ever waits this long.
LONG = 20.0

# Over MPTCP an RST behind a smaller one that is full is lost: docs/platforms.md.
LEAST_MPTCP_BUFFER = 2**17

SIOCOUTQNSD = 0x894B  # not sent yet: linux/sockios.h

POLLRDHUP: int = getattr(select, "POLLRDHUP", 0x2000)  # poll(2); PyPy has no name for it

Handler = Callable[[Connection], Awaitable[object]]


@dataclass
class Seen:
    """What a plain blocking socket saw of a connection, from its start to its end."""

    data: bytes
    close: PeerClose


class Peer:
    """A plain blocking TCP socket. Its calls run in a thread, so they may block."""

    def __init__(
        self, port: int, *, host: str = "127.0.0.1", buffer: int = 0, protocol: int = 0
    ) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.sock = socket.socket(family, socket.SOCK_STREAM, protocol)
        if buffer and _sockets.is_multipath(self.sock):
            buffer = max(buffer, LEAST_MPTCP_BUFFER)
        if buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.sock.settimeout(LONG)
        # A connection to a listening socket needs nobody to accept it.
        self.sock.connect((host, port))

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.sock.close()

    async def send(self, data: bytes) -> None:
        await anyio.to_thread.run_sync(self.sock.sendall, data)

    def send_eof(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    async def receive(self, size: int) -> bytes:
        """Exactly *size* bytes."""

        def read() -> bytes:
            data = bytearray()
            while len(data) < size:
                chunk = self.sock.recv(size - len(data))
                assert chunk, f"FIN after {data!r}"
                data += chunk
            return bytes(data)

        return await anyio.to_thread.run_sync(read)

    async def read_to_end(self, *, timeout: float = LONG) -> Seen:
        def read() -> Seen:
            self.sock.settimeout(timeout)
            data = bytearray()
            try:
                while chunk := self.sock.recv(65536):
                    data += chunk
            except (ConnectionResetError, BrokenPipeError):  # MPTCP, behind a FIN
                return Seen(bytes(data), PeerClose.RST)
            except TimeoutError:
                return Seen(bytes(data), PeerClose.NONE)
            return Seen(bytes(data), PeerClose.FIN)

        return await anyio.to_thread.run_sync(read)


@dataclass
class Served:
    """One connection of the server, from its handler's side."""

    connection: Connection
    raised: BaseException | None = None

    def __post_init__(self) -> None:
        self.over = anyio.Event()

    async def ending(self) -> Ending:
        with anyio.fail_after(LONG):
            await self.over.wait()
        assert self.connection.ending is not None
        return self.connection.ending


class Service:
    """A running server of one of the kinds."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._send, self._receive = anyio.create_memory_object_stream[Served](1000)

    async def next(self) -> Served:
        """The next connection that was accepted."""
        with anyio.fail_after(LONG):
            return await self._receive.receive()

    async def ending(self) -> Ending:
        """How the next connection ended."""
        return await (await self.next()).ending()

    def connect(self, **options: Any) -> Peer:
        return Peer(self.port, **options)

    def close(self) -> None:
        self._send.close()
        self._receive.close()


@asynccontextmanager
async def serve(kind: str, handler: Handler, **options: Any) -> AsyncIterator[Service]:
    """Serve *handler* on loopback.

    *kind* says on what its connections run: "native" (`serve_tcp`), "foreign" (AnyIO's
    own stream in a `connection_scope`), "buffered" (a buffered stream around that one)
    or "trio" (a `trio.SocketStream`). *options* are those of `connection_scope`.
    """
    overs: dict[Connection, anyio.Event] = {}
    service = Service(0)

    async def observed(connection: Connection) -> object:
        served = Served(connection)
        overs[connection] = served.over
        service._send.send_nowait(served)
        try:
            return await handler(connection)
        except BaseException as exc:
            served.raised = exc
            raise

    async def in_scope(stream: Any) -> None:
        if kind == "buffered":
            stream = BufferedByteStream(stream)
        connection = None
        try:
            async with connection_scope(stream, **options) as connection:
                await observed(connection)
        except anyio.get_cancelled_exc_class():
            raise
        except BaseException:  # recorded; the server goes on
            pass
        finally:
            if connection is not None:
                overs[connection].set()

    try:
        async with AsyncExitStack() as stack:
            if kind not in ("native", "trio"):
                # Entered before the task group, so that it is closed after that.
                listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
                await stack.enter_async_context(listener)
            tg = await stack.enter_async_context(anyio.create_task_group())
            if kind == "native":

                def on_ending(connection: Connection) -> None:
                    if connection in overs:  # its handler was called
                        overs[connection].set()

                async def serve_native(*, task_status: Any) -> None:
                    await serve_tcp(
                        observed,
                        host="127.0.0.1",
                        on_ending=on_ending,
                        task_status=task_status,
                        **options,
                    )

                service.port = (await tg.start(serve_native)).port
                yield service
            elif kind == "trio":
                async with trio.open_nursery() as nursery:
                    listeners: Any = await nursery.start(
                        lambda task_status: trio.serve_tcp(
                            in_scope, 0, host="127.0.0.1", task_status=task_status
                        )
                    )
                    service.port = listeners[0].socket.getsockname()[1]
                    yield service
                    nursery.cancel_scope.cancel()
            else:
                service.port = listener.extra(anyio.abc.SocketAttribute.local_port)
                tg.start_soon(listener.serve, in_scope)
                yield service
            tg.cancel_scope.cancel()
    finally:
        service.close()


@asynccontextmanager
async def connection_of(
    kind: str, **options: Any
) -> AsyncIterator[tuple[Connection, testing.Peer]]:
    """`open_peer()`, which has native connections, for each *kind* of `serve()`.

    *options* are those that both it and `connection_scope` take.
    """
    if kind == "native":
        with anyio.fail_after(LONG):
            async with testing.open_peer(**options) as both:
                yield both
        return
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer = testing.Peer(socket.create_connection(listener.getsockname()))
        sock, _ = listener.accept()
    stream: Any
    if kind == "trio":
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
    else:
        stream = await anyio.abc.SocketStream.from_socket(sock)
        if kind == "buffered":
            stream = BufferedByteStream(stream)
    try:
        with anyio.fail_after(LONG):
            async with AsyncExitStack() as stack:
                scope = connection_scope(stream, **options)
                yield await stack.enter_async_context(scope), peer
                # The peer does what a client does while the connection drains.
                async with anyio.create_task_group() as tg:
                    tg.start_soon(stack.pop_all().aclose)
                    await peer._leave()
    finally:
        peer._leave_now()


async def assert_finished(
    conn: Connection, peer: testing.Peer, cause: Cause, data: bytes | None = None
) -> Ending:
    """FIN, for the peer and in the `Ending`."""
    await testing.assert_fin(peer, data)
    return ending_with(CloseKind.FIN, conn, cause)


async def assert_reset(
    conn: Connection, peer: testing.Peer, cause: Cause, data: bytes | None = None
) -> Ending:
    """RST, for the peer and in the `Ending`."""
    seen = await testing.assert_rst(peer)
    assert data in (None, seen.data)
    return ending_with(CloseKind.RST, conn, cause)


def ending_with(kind: CloseKind, conn: Connection, cause: Cause) -> Ending:
    assert conn.ending is not None
    assert (conn.ending.kind, conn.ending.cause) == (kind, cause)
    return conn.ending


async def has_ended(conn: Connection) -> Ending:
    """For a script of a test, which has no part in the connection."""
    with anyio.fail_after(LONG):
        while conn.ending is None:
            await anyio.sleep(0.001)
    return conn.ending


async def settled() -> None:
    """Until every other task waits."""
    for _ in range(10):
        # On asyncio AnyIO looks once, and then every 100 ms.
        await anyio.lowlevel.checkpoint()
    await anyio.wait_all_tasks_blocked()


def queued(descriptor: int, request: int) -> int:
    """What is in a socket's buffers: TIOCINQ, TIOCOUTQ of tcp(7)."""
    size: int = struct.unpack("i", fcntl.ioctl(descriptor, request, b"\0" * 4))[0]
    return size


def tells_of_queues() -> bool:
    """Whether the kernel has TIOCOUTQ for TCP. gVisor has not."""
    with socket.socket() as sock:
        try:
            queued(sock.fileno(), termios.TIOCOUTQ)
        except OSError:
            return False
    return True


# What the kernel at hand can do. gVisor, as of `nox -s sandbox`, can do neither.
TELLS_OF_QUEUES = tells_of_queues()
DISSOLVES = _sockets.can_dissolve()

# Seconds, for what cannot be seen to happen without TIOCOUTQ.
BLIND = 0.1


def told(count: int) -> int | None:
    """What `Ending.unacknowledged` is if the kernel has *count* bytes in its queue."""
    return count if TELLS_OF_QUEUES else None


def block_until_arrived(sock: socket.socket) -> None:
    """The event loop stands still until all that *sock* has sent is acknowledged."""
    if not TELLS_OF_QUEUES:
        time.sleep(BLIND)
        return
    while queued(sock.fileno(), termios.TIOCOUTQ):
        pass


async def arrived(peer: Peer) -> None:
    """Wait until all that *peer* has sent is at the other side: acknowledged."""
    if not TELLS_OF_QUEUES:
        await anyio.sleep(BLIND)
        return
    with anyio.fail_after(LONG):
        while queued(peer.sock.fileno(), termios.TIOCOUTQ):
            await anyio.sleep(0.001)


def fill_buffers(raw: Any) -> int:
    """Close the window of the connection, and fill the send buffer behind it.

    Returns:
      How many bytes that took.
    """
    # What asyncio and uvloop show of their sockets cannot send.
    with socket.socket(fileno=os.dup(raw.fileno())) as sock:
        # Set by hand, it does not grow by itself: tcp(7), tcp_wmem.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)
        sock.setblocking(False)
        filled = 0
        in_flight = True  # something that makes room again when it arrives
        while True:
            try:
                filled += sock.send(bytes(2**16))
            except BlockingIOError:
                if not in_flight:
                    return filled
                if not TELLS_OF_QUEUES or _sockets.is_multipath(sock):
                    in_flight = bool(select.select([], [sock], [], BLIND)[1])
                    continue
                unsent = queued(sock.fileno(), SIOCOUTQNSD)
                in_flight = queued(sock.fileno(), termios.TIOCOUTQ) != unsent


@asynccontextmanager
async def timeout_once_settled() -> AsyncIterator[anyio.CancelScope]:
    """A timeout that passes when what is under it waits for the peer."""

    async def pass_() -> None:
        await settled()
        scope.deadline = -math.inf

    async with anyio.create_task_group() as tg:
        tg.start_soon(pass_)
        with anyio.CancelScope() as scope:
            yield scope


async def foreign_pair() -> tuple[anyio.abc.SocketStream, Peer]:
    """AnyIO's own stream, and the plain socket at its other end."""
    return await stream_and_peer("anyio")


async def echo(conn: Connection) -> None:
    async for chunk in conn:
        await conn.send(chunk)


def value_of(ending: Ending) -> object:
    assert isinstance(ending.outcome, outcome.Value)
    return ending.outcome.value


def said(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What the library has logged, but for where a server listens."""
    return [
        record
        for record in caplog.records
        if record.name == "anyio_rst" and not record.msg.startswith("listening on ")
    ]


def error_of(ending: Ending) -> BaseException:
    assert isinstance(ending.outcome, outcome.Error)
    return ending.outcome.error


# Streams to take a socket over from, and the moment at which.


async def stream_and_peer(owner: str = "anyio", **options: Any) -> tuple[Any, Peer]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer = Peer(listener.getsockname()[1], **options)
        sock, _ = listener.accept()
    if owner == "trio":
        return trio.SocketStream(trio.socket.from_stdlib_socket(sock)), peer
    stream = await anyio.abc.SocketStream.from_socket(sock)
    return BufferedByteStream(stream) if owner == "buffered" else stream, peer


def has_transport() -> bool:
    return anyio.get_cancelled_exc_class() is not trio.Cancelled


def descriptor(stream: Any) -> int:
    if isinstance(stream, trio.SocketStream):
        return stream.socket.fileno()
    number: int = stream.extra(SocketAttribute.raw_socket).fileno()
    return number


async def turns(count: int) -> None:
    for _ in range(count):
        await checkpoint()


async def read_ahead(stream: Any, peer: Peer) -> None:
    """Until the transport, if there is one, has read all that *peer* has sent."""
    await arrived(peer)
    with anyio.fail_after(LONG):
        while has_transport() and queued(descriptor(stream), termios.FIONREAD):
            await checkpoint()


def block_until(stream: Any, event: int) -> None:
    """The event loop stands still until *event* of poll(2) has come; 0 is a reset."""
    poll = select.poll()
    poll.register(descriptor(stream), event)
    assert poll.poll(LONG * 1000)


async def receive_all(conn: Connection, size: int = 65536) -> bytes:
    chunks = []
    with anyio.fail_after(LONG), suppress(anyio.EndOfStream):
        while True:
            chunks.append(await conn.receive(size))
            assert 1 <= len(chunks[-1]) <= size
    return b"".join(chunks)


@asynccontextmanager
async def soon(act: Callable[..., object], *args: Any) -> AsyncIterator[None]:
    """Once what is under it waits, *act* is called."""

    async def later() -> None:
        await turns(10)
        act(*args)

    async with anyio.create_task_group() as tg:
        tg.start_soon(later)
        with anyio.fail_after(LONG):
            yield


async def while_waiting(operation: Any, act: Callable[..., object], *args: Any) -> Any:
    """The result of *operation*; once that waits, *act* is called."""
    async with soon(act, *args):
        return await operation


@contextmanager
def plain_server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(LONG)
        yield listener


def accepted(listener: socket.socket) -> Peer:
    """The peer of a client, which has connected to *listener*."""
    peer = Peer.__new__(Peer)
    peer.sock, _ = listener.accept()
    peer.sock.settimeout(LONG)
    return peer
