"""What `connection_scope` and `scoped` take, refuse, and do when they are nested."""

from __future__ import annotations

import functools
import os
import socket
import sys
import types
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel
import pytest
import trio
from anyio.streams.buffered import BufferedByteStream
from anyio.streams.stapled import StapledByteStream
from conftest import ASYNCIO, on_one_loop

from anyio_rst import (
    Cause,
    CloseKind,
    Connection,
    Drain,
    PeerClose,
    connect_tcp,
    connection_scope,
    scoped,
    serve_tcp,
)

from serving import (
    LONG,
    Peer,
    Seen,
    assert_finished,
    assert_reset,
    connection_of,
    foreign_pair,
    serve,
)

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup

pytestmark = pytest.mark.anyio


class Failure(Exception):
    pass


# Bad input.


@on_one_loop
@pytest.mark.parametrize("stream", [None, 3, "stream", object, socket.socket], ids=repr)
async def test_what_is_no_stream_is_refused(stream: Any) -> None:
    with pytest.raises(TypeError, match="takes a byte stream over TCP"):
        connection_scope(stream)


@on_one_loop
async def test_a_plain_socket_is_refused() -> None:
    with socket.socket() as sock, pytest.raises(TypeError, match="not socket"):
        connection_scope(sock)  # type: ignore[arg-type]


@on_one_loop
async def test_in_memory_stream_is_refused() -> None:
    send, receive = anyio.create_memory_object_stream[bytes](1)
    stream = StapledByteStream(send, receive)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"no SocketAttribute\.raw_socket"):
        connection_scope(stream)
    await stream.aclose()


async def test_pipe_is_refused(tmp_path: Any) -> None:
    async with await anyio.open_process(["cat"]) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stream = StapledByteStream(process.stdin, process.stdout)
        with pytest.raises(TypeError, match=r"no SocketAttribute\.raw_socket"):
            connection_scope(stream)
        # It is untouched.
        await stream.send(b"x")
        assert await stream.receive() == b"x"
        await process.stdin.aclose()
        await process.wait()


@on_one_loop
async def test_file_stream_is_refused() -> None:
    async with await anyio.open_file(os.devnull, "rb") as file:
        with pytest.raises(TypeError, match="takes a byte stream over TCP"):
            connection_scope(file)  # type: ignore[arg-type]


async def test_unix_stream_is_refused_and_untouched() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        stream = await anyio.abc.UNIXSocketStream.from_socket(ours)
        with pytest.raises(TypeError, match="AF_UNIX, and only TCP"):
            connection_scope(stream)
        await stream.send(b"x")
        assert theirs.recv(1) == b"x"
        await stream.aclose()
        assert theirs.recv(1) == b""


async def test_udp_socket_is_refused() -> None:
    async with await anyio.create_udp_socket(local_host="127.0.0.1") as udp:
        with pytest.raises(TypeError, match="takes a byte stream over TCP"):
            connection_scope(udp)  # type: ignore[arg-type]


async def test_listener_is_refused() -> None:
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
        with pytest.raises(TypeError, match="takes a byte stream over TCP"):
            connection_scope(listener)  # type: ignore[arg-type]


async def test_closed_stream_is_refused() -> None:
    stream, peer = await foreign_pair()
    with peer:
        await stream.aclose()
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(anyio.ClosedResourceError, match="closed already"):
            connection_scope(stream)


async def test_stream_that_is_closed_before_the_scope_is_entered_is_refused() -> None:
    stream, peer = await foreign_pair()
    with peer:
        scope = connection_scope(stream)
        await stream.aclose()
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(anyio.ClosedResourceError):
            await scope.__aenter__()


@on_one_loop
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"finish_on": "Failure"}, "finish_on takes exception types, not 'F'"),
        ({"finish_on": (Failure, 3)}, "finish_on takes exception types, not 3"),
        ({"finish_on": Failure()}, "finish_on takes exception types, not Failure"),
        ({"drain": 5}, "drain must be a Drain or None, not 5"),
        ({"drain": True}, "drain must be a Drain or None, not True"),
    ],
)
async def test_bad_options_are_refused_and_the_stream_untouched(
    options: Any, message: str
) -> None:
    async def handler(conn: Connection) -> None:
        pass

    stream, peer = await foreign_pair()
    with peer:
        with pytest.raises(TypeError, match=message):
            connection_scope(stream, **options)
        with pytest.raises(TypeError, match=message):
            scoped(handler, **options)
        with pytest.raises(TypeError, match=message):
            await serve_tcp(handler, **options)
        # Still the caller's, and not armed.
        await stream.aclose()
        assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)


async def test_scope_can_be_entered_once() -> None:
    stream, peer = await foreign_pair()
    with peer:
        scope = connection_scope(stream)
        async with scope:
            with pytest.raises(RuntimeError, match="only be entered once"):
                await scope.__aenter__()
            peer.send_eof()
        assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)


# Handlers.


def plain_function(conn: Connection) -> None: ...


async def async_function(conn: Connection) -> None: ...


class AsyncCallable:
    async def __call__(self, conn: Connection) -> None: ...


@on_one_loop
@pytest.mark.parametrize(
    ("handler", "message"),
    [
        (None, "not None"),
        ("handler", "not 'handler'"),
        (plain_function, "plain_function.* is not async"),
        (functools.partial(plain_function), "plain_function.* is not async"),
        (AsyncCallable, "is not async"),
        (print, "is not async"),
    ],
)
async def test_handler_that_is_not_async_is_refused(handler: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        scoped(handler)
    with pytest.raises(TypeError, match=message):
        await serve_tcp(handler)


@on_one_loop
async def test_handler_that_was_called_by_mistake_is_refused() -> None:
    called: Any = async_function(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="without calling it"):
        await serve_tcp(called)


@pytest.mark.parametrize(
    "handler",
    [
        async_function,
        AsyncCallable(),
        functools.partial(async_function),
        lambda conn: async_function(conn),
    ],
    ids=["function", "object", "partial", "lambda"],
)
async def test_what_returns_a_coroutine_is_a_handler(handler: Any) -> None:
    stream, peer = await foreign_pair()
    with peer:
        peer.send_eof()
        await scoped(handler)(stream)
        assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)


# scoped().


async def test_scoped_serves_any_listener() -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(await conn.receive())

    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
        async with anyio.create_task_group() as tg:
            tg.start_soon(listener.serve, scoped(handler))
            port = listener.extra(anyio.abc.SocketAttribute.local_port)
            with Peer(port) as peer:
                await peer.send(b"echo")
                assert await peer.read_to_end() == Seen(b"echo", PeerClose.FIN)
            tg.cancel_scope.cancel()


@pytest.mark.parametrize("finish_on", [(), Failure], ids=["plain", "finish_on"])
async def test_scoped_lets_the_exception_out_and_tells_the_peer(finish_on: Any) -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(b"half")
        raise Failure

    stream, peer = await foreign_pair()
    with peer:
        peer.send_eof()
        with pytest.raises(Failure):
            await scoped(handler, finish_on=finish_on)(stream)
        close = PeerClose.FIN if finish_on else PeerClose.RST
        assert await peer.read_to_end() == Seen(b"half", close)


# Scopes within scopes.


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "wrapped"])
@pytest.mark.parametrize("fails", [False, True], ids=["returns", "fails"])
async def test_ending_of_the_inner_scope_stands(
    kind: str, wrapped: bool, fails: bool
) -> None:
    async with connection_of(kind) as (conn, peer):
        stream: Any = BufferedByteStream(conn) if wrapped else conn
        await peer.send(b"ping")
        if not fails:
            peer.send_eof()
        with suppress(Failure):
            async with connection_scope(stream, drain=Drain(LONG)) as inner:
                assert inner is not conn
                assert await inner.receive() == b"ping"
                await inner.send(b"pong")
                if fails:
                    raise Failure
        assert inner.ending is not None
        assert conn.ending is not None
        assert conn.ending.cause is inner.ending.cause
        assert conn.ending.kind is inner.ending.kind
        with pytest.raises(anyio.ClosedResourceError):
            await conn.send(b"more")
        with pytest.raises(anyio.ClosedResourceError):
            connection_scope(conn)
    if fails:
        await assert_reset(conn, peer, Cause.RAISED, b"pong")
    else:
        ending = await assert_finished(conn, peer, Cause.RETURNED, b"pong")
        assert ending.peer is PeerClose.FIN


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "wrapped"])
async def test_detaching_the_inner_scope_leaves_the_outer_one_in_charge(
    kind: str, wrapped: bool
) -> None:
    with pytest.raises(Failure):
        async with connection_of(kind) as (conn, peer):
            stream: Any = BufferedByteStream(conn) if wrapped else conn
            async with connection_scope(stream) as inner:
                assert inner.detach() is stream
            assert inner.ending is not None
            assert inner.ending.kind is CloseKind.DETACHED
            assert conn.ending is None
            await conn.send(b"still open")
            raise Failure
    await assert_reset(conn, peer, Cause.RAISED, b"still open")


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "wrapped"])
async def test_abort_of_the_outer_connection_ends_the_inner_one(
    kind: str, wrapped: bool
) -> None:
    async with connection_of(kind) as (conn, peer):
        stream: Any = BufferedByteStream(conn) if wrapped else conn
        async with connection_scope(stream) as inner:
            conn.abort()
            with pytest.raises(anyio.ClosedResourceError):
                await inner.send(b"more")
        assert inner.ending is not None
        assert inner.ending.kind is CloseKind.RST
    await assert_reset(conn, peer, Cause.ABORTED, b"")


# Programs that use Trio alone.


def test_trio_program_without_anyio_of_its_own() -> None:
    async def fail() -> None:
        raise Failure

    async def handler(stream: trio.SocketStream) -> None:
        with suppress(Failure, ExceptionGroup, trio.TooSlowError):
            async with connection_scope(stream) as conn:
                word = await conn.receive()
                await conn.send(word)
                if word == b"fail":
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(fail)
                elif word == b"late":
                    with trio.fail_after(0.01):
                        await trio.sleep_forever()
        endings.append(conn.ending)

    def client(port: int, word: bytes) -> tuple[bytes, str]:
        with socket.create_connection(("127.0.0.1", port), timeout=LONG) as sock:
            sock.sendall(word)
            got = b""
            try:
                while chunk := sock.recv(100):
                    got += chunk
            except ConnectionResetError:
                return got, "RST"
            return got, "FIN"

    async def main() -> list[tuple[bytes, str]]:
        async with trio.open_nursery() as nursery:
            listeners: Any = await nursery.start(
                functools.partial(trio.serve_tcp, handler, 0, host="127.0.0.1")
            )
            port = listeners[0].socket.getsockname()[1]
            seen = [
                await trio.to_thread.run_sync(client, port, word)
                for word in (b"fine", b"fail", b"late")
            ]
            nursery.cancel_scope.cancel()
        return seen

    endings: list[Any] = []
    assert trio.run(main) == [(b"fine", "FIN"), (b"fail", "RST"), (b"late", "RST")]
    assert [ending.cause for ending in endings] == [
        Cause.RETURNED,
        Cause.GROUP_FAILED,
        Cause.RAISED,
    ]


@pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)
async def test_scope_while_another_thread_imports_trio(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "trio", types.ModuleType("trio"))
    async with serve("native", Connection.aclose) as service:
        async with connect_tcp("127.0.0.1", service.port) as conn:
            with pytest.raises(anyio.EndOfStream):
                await conn.receive()


# Coroutines that are closed.


@pytest.mark.parametrize("finish_on", [(), BaseException], ids=["plain", "finish_on"])
async def test_coroutine_that_is_closed_resets(kind: str, finish_on: Any) -> None:
    """As when it is forgotten: nothing can be awaited then, and so nothing finished."""

    @types.coroutine
    def suspend() -> Any:
        yield

    async def forgotten(conn: Connection) -> None:
        async with connection_scope(conn, finish_on=finish_on):
            await suspend()

    async with connection_of(kind) as (conn, peer):
        await conn.send(b"half")
        coroutine = forgotten(conn)
        coroutine.send(None)
        coroutine.close()
    await assert_reset(conn, peer, Cause.RAISED, b"half")


async def test_async_generator_that_is_closed_resets(kind: str) -> None:
    async def chunks(conn: Connection) -> AsyncGenerator[bytes, None]:
        async with connection_scope(conn):
            while True:
                yield await conn.receive()

    async with connection_of(kind) as (conn, peer):
        await conn.send(b"half")
        await peer.send(b"x")
        generator = chunks(conn)
        assert await generator.__anext__() == b"x"
        await generator.aclose()
    await assert_reset(conn, peer, Cause.RAISED, b"half")


async def test_abort_and_a_new_connection_on_the_same_descriptor_disturb_nobody(
    kind: str,
) -> None:
    """On asyncio, AnyIO forgets a waiter by the number of its descriptor."""

    async def receive(conn: Connection) -> None:
        with pytest.raises(anyio.ClosedResourceError):
            await conn.receive()

    async def end_late(conn: Connection) -> None:
        # Our FIN comes before the peer's, so that there is something to wait for.
        with pytest.raises(anyio.EndOfStream):
            await conn.receive()
        await anyio.wait_all_tasks_blocked()

    async with serve("native", end_late) as echo, connection_of(kind) as (conn, peer):
        async with anyio.create_task_group() as tg:
            tg.start_soon(receive, conn)
            await anyio.wait_all_tasks_blocked()
            async with connect_tcp("127.0.0.1", echo.port, drain=Drain(LONG)) as other:
                conn.abort()
        await assert_reset(conn, peer, Cause.ABORTED)
    assert other.ending is not None
    assert other.ending.peer is PeerClose.FIN
