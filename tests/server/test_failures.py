"""Handlers that failed: what the operator reads, and what is left of them."""

from __future__ import annotations

import gc
import logging
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import anyio
import pytest
from anyio.streams.buffered import BufferedByteStream
from conftest import REFCOUNTS, collect

from anyio_rst import Connection, Ending, Server, connection_scope, serve_tcp

from securing import TLSPeer, server_context, shake_hands
from serving import LONG, Handler, Peer, arrived, echo, error_of

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup

pytestmark = pytest.mark.anyio


class Failure(Exception):
    pass


class Serving:
    """A server, and the endings that it has reported."""

    def __init__(self, server: Server, endings: list[Ending]) -> None:
        self.server = server
        self.endings = endings

    async def wait_for(self, count: int) -> None:
        with anyio.fail_after(LONG):
            while len(self.endings) < count:
                await anyio.sleep(0.001)

    def connect(self) -> Peer:
        return Peer(self.server.port)

    async def connect_securely(self) -> TLSPeer:
        return await shake_hands(self.connect())


@asynccontextmanager
async def serving(handler: Handler, **options: Any) -> AsyncIterator[Serving]:
    endings: list[Ending] = []

    def report(connection: Connection) -> None:
        assert connection.ending is not None
        endings.append(connection.ending)

    async with anyio.create_task_group() as tg:
        serve = partial(serve_tcp, handler, host="127.0.0.1", on_ending=report, **options)
        yield Serving(await tg.start(serve), endings)
        tg.cancel_scope.cancel()


@pytest.fixture
def records(caplog: pytest.LogCaptureFixture) -> Callable[[], list[tuple[str, str]]]:
    caplog.set_level(logging.DEBUG, "anyio_rst")
    return lambda: [
        (record.levelname, record.getMessage())
        for record in caplog.records
        if record.name == "anyio_rst" and "listening" not in record.msg
    ]


Records = Callable[[], list[tuple[str, str]]]


# What was ordered is no failure.


@pytest.mark.parametrize("order", ["aclose", "abort", "aclose_forcefully"])
@pytest.mark.parametrize("waits", [True, False])
async def test_end_that_was_ordered_from_outside_is_no_failure(
    order: str, waits: bool, records: Records
) -> None:
    started = anyio.Event()
    over = anyio.Event()

    async def handler(conn: Connection) -> None:
        started.set()
        if not waits:
            await over.wait()
        await conn.receive()

    async with serving(handler) as service:
        with service.connect() as peer:
            await started.wait()
            (conn,) = service.server.connections
            if order == "abort":
                conn.abort()
            elif order == "aclose":
                peer.send_eof()
                await conn.aclose()
            else:
                await anyio.aclose_forcefully(conn)
            over.set()
            await service.wait_for(1)
    assert isinstance(error_of(service.endings[0]), anyio.ClosedResourceError)
    assert [level for level, _ in records()] == ["DEBUG"]


async def test_use_of_a_connection_that_nobody_ended_is_a_failure(
    records: Records,
) -> None:
    async def handler(conn: Connection) -> None:
        raise anyio.ClosedResourceError

    async with serving(handler) as service:
        with service.connect():
            await service.wait_for(1)
    assert [level for level, _ in records()] == ["ERROR"]


@pytest.mark.parametrize("before", ["nothing", "aclose", "abort", "torn"])
async def test_finish_on_is_never_above_debug(before: str, records: Records) -> None:
    async def handler(conn: Connection) -> None:
        if before == "aclose":
            await conn.aclose()
        elif before == "abort":
            conn.abort()
        elif before == "torn":
            with anyio.move_on_after(0.01):
                while True:
                    await conn.send(bytes(2**20))
        raise ExceptionGroup("all of it", [Failure()])

    async with serving(handler, finish_on=Failure, drain=None) as service:
        with service.connect():
            await service.wait_for(1)
    assert [level for level, _ in records()] == ["DEBUG"]


# Health checks.


async def receives(conn: Connection) -> None:
    await conn.receive()


async def reads_exactly(conn: Connection) -> None:
    await BufferedByteStream(conn).receive_exactly(4)


async def greets(conn: Connection) -> None:
    await conn.send(b"220 ready")
    await conn.receive()


@pytest.mark.parametrize("handler", [receives, reads_exactly, greets])
async def test_who_connects_and_leaves_is_no_failure(
    handler: Handler, records: Records
) -> None:
    async with serving(handler) as service:
        with service.connect() as peer:
            peer.send_eof()
            await service.wait_for(1)
    assert [level for level, _ in records()] == ["DEBUG"]


@pytest.mark.parametrize("handler", [receives, reads_exactly])
async def test_who_connects_and_resets_is_no_failure(
    handler: Handler, records: Records
) -> None:
    async with serving(handler) as service:
        service.connect().reset()
        await service.wait_for(1)
    assert [level for level, _ in records()] == ["DEBUG"]


async def test_who_leaves_after_the_tls_handshake_is_no_failure(records: Records) -> None:
    async with serving(receives, ssl_context=server_context()) as service:
        peer = await service.connect_securely()
        peer.say_close_notify()
        peer.raw.sock.close()
        await service.wait_for(1)
    assert [level for level, _ in records()] == ["DEBUG"]


async def test_who_leaves_in_the_middle_of_a_request_is_a_failure(
    records: Records,
) -> None:
    async with serving(reads_exactly) as service:
        with service.connect() as peer:
            await peer.send(b"GE")
            peer.send_eof()
            await service.wait_for(1)
    assert [level for level, _ in records()] == ["ERROR"]


# What any client can provoke.


async def reset_after_a_word(service: Serving) -> None:
    with service.connect() as peer:
        await peer.send(b"word")
        assert await peer.receive(4) == b"word"
        peer.reset()


async def handshake_with_garbage(service: Serving) -> None:
    with service.connect() as peer:
        await peer.send(b"GET / HTTP/1.0\r\n\r\n" * 10)
        await arrived(peer)


@pytest.mark.parametrize(
    ("provoke", "tls"), [(reset_after_a_word, False), (handshake_with_garbage, True)]
)
async def test_clients_cannot_flood_the_log(
    provoke: Callable[[Serving], Awaitable[None]],
    tls: bool,
    records: Records,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr("anyio_rst._failures.monotonic", lambda: now)
    options = {"ssl_context": server_context()} if tls else {}
    async with serving(echo, **options) as service:
        for count in (1, 2, 3):
            await provoke(service)
            await service.wait_for(count)
        now += 1.0
        await provoke(service)
        await service.wait_for(4)
        await provoke(service)
        await service.wait_for(5)
        service.server.stop()
    levels = [level for level, _ in records()]
    messages = [message for _, message in records()]
    assert levels == ["INFO", "DEBUG", "DEBUG", "INFO", "DEBUG", "INFO"]
    assert "more" not in messages[0]
    assert messages[3].endswith("(and 2 more like this since the last record)")
    assert re.match(r"1 more failed \w+ since", messages[5])


# What is left.


class Buffer:
    """A variable of a handler's."""


async def raises(conn: Connection) -> None:
    try:
        raise KeyError
    except KeyError as exc:
        raise Failure from exc


async def is_reset(conn: Connection) -> None:
    while True:
        await conn.receive()


async def fails_in_a_group(conn: Connection) -> None:
    async with conn.create_task_group() as tg:
        tg.start_soon(raises, conn)
        await anyio.sleep_forever()


async def fails_in_a_nested_scope(conn: Connection) -> None:
    async with connection_scope(BufferedByteStream(conn)):
        raise Failure


async def times_out(conn: Connection) -> None:
    with anyio.fail_after(0):
        await conn.receive()


async def waits(conn: Connection) -> None:
    await anyio.sleep_forever()


@pytest.fixture
def no_collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # What pytest keeps of the log has tracebacks.
    monkeypatch.setattr(logging.getLogger("anyio_rst"), "disabled", True)
    collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.skipif(not REFCOUNTS, reason="without it nothing is freed on this Python")
@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize(
    "handler",
    [raises, is_reset, fails_in_a_group, fails_in_a_nested_scope, times_out, waits],
)
@pytest.mark.parametrize("tls", [False, True])
async def test_nothing_of_a_handler_that_failed_waits_for_the_garbage_collector(
    handler: Handler, tls: bool
) -> None:
    alive: WeakSet[Buffer] = WeakSet()

    count = 5
    options = {"ssl_context": server_context()} if tls else {}
    entered = 0

    async def observed(conn: Connection) -> None:
        nonlocal entered
        entered += 1
        buffer = Buffer()
        alive.add(buffer)
        await handler(conn)
        del buffer

    async with serving(observed, **options) as service:
        for made in range(1, count + 1):
            peer = (await service.connect_securely()).raw if tls else service.connect()
            with anyio.fail_after(LONG):
                while entered < made:
                    await anyio.sleep(0.001)
            if handler is is_reset:
                peer.reset()
            if handler is not waits:
                await service.wait_for(made)
            peer.sock.close()
    # Of a handler that is cancelled with the server there is a task until then.
    await anyio.wait_all_tasks_blocked()
    assert len(service.endings) == count
    assert not alive


async def test_ending_that_is_kept_has_no_frames() -> None:
    async def handler(conn: Connection) -> None:
        try:
            raise KeyError
        except KeyError as exc:
            raise ExceptionGroup("both", [Failure()]) from exc

    tracebacks = []

    def report(connection: Connection) -> None:
        assert connection.ending is not None
        tracebacks.append(error_of(connection.ending).__traceback__)
        service.endings.append(connection.ending)

    async with serving(handler) as service:
        service.server._on_ending = report
        with service.connect():
            await service.wait_for(1)
    error = error_of(service.endings[0])
    assert isinstance(error, ExceptionGroup)
    assert tracebacks[0] is not None  # for whoever is told of it
    assert error.__traceback__ is None
    assert error.__cause__ is not None
    assert error.__cause__.__traceback__ is None
    assert error.exceptions[0].__traceback__ is None


async def test_exceptions_that_are_let_out_keep_their_tracebacks() -> None:
    async def handler(conn: Connection) -> None:
        raise Failure

    with pytest.raises(ExceptionGroup) as caught:
        async with serving(handler, propagate_errors=True) as service:
            with service.connect():
                await anyio.sleep(LONG)
    exc: BaseException = caught.value
    while isinstance(exc, ExceptionGroup):
        (exc,) = exc.exceptions
    names = []
    traceback = exc.__traceback__
    while traceback is not None:
        names.append(traceback.tb_frame.f_code.co_name)
        traceback = traceback.tb_next
    assert names[-1] == "handler"
