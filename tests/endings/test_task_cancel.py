"""`Task.cancel()` on a handler's task ends that connection, and nothing else.

asyncio lets anybody cancel any task at any time, also before its first step. On Trio, and
by AnyIO, it is scopes that are cancelled, and the twin is that of the task group.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import outcome
import pytest
from conftest import ASYNCIO

from anyio_rst import Cause, CloseKind, Connection, PeerClose, Server, serve_tcp

from securing import server_context, shake_hands
from serving import LONG, Peer, Seen, echo, ending_with, said, settled

pytestmark = pytest.mark.anyio

on_asyncio = pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)


class Failure(Exception):
    pass


class Ended:
    """What `on_ending` has been told."""

    def __init__(self) -> None:
        self.connections: list[Connection] = []
        self._more = anyio.Event()

    def __call__(self, connection: Connection) -> None:
        self.connections.append(connection)
        self._more.set()
        self._more = anyio.Event()

    async def next(self) -> Connection:
        with anyio.fail_after(LONG):
            while not self.connections:
                await self._more.wait()
        return self.connections.pop(0)


whose_group = pytest.mark.parametrize("whose", ["own", "callers"])


@asynccontextmanager
async def serving(
    handler: Callable[[Connection], Awaitable[object]], whose: str, **options: Any
) -> AsyncIterator[tuple[Server, Ended]]:
    """A server whose handlers are in a task group of its own, or of the caller's."""
    ended = Ended()
    async with anyio.create_task_group() as tg, anyio.create_task_group() as handlers:
        if whose == "callers":
            options["task_group"] = handlers
        serve = partial(serve_tcp, handler, host="127.0.0.1", on_ending=ended, **options)
        server = await tg.start(serve)
        yield server, ended
        with anyio.fail_after(LONG):
            while server.connections:
                await anyio.lowlevel.checkpoint()
        totals = server.statistics()
        assert totals.accepted_connections == sum(totals.endings_by_kind.values())
        assert not tg.cancel_scope.cancel_called
        assert not handlers.cancel_scope.cancel_called
        server.stop()


async def echoes(server: Server) -> None:
    """It serves."""
    handlers_to_come.append(echo)
    with Peer(server.port) as peer:
        await peer.send(b"hello")
        assert await peer.receive(5) == b"hello"
        peer.send_eof()
        assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)


# What the next connections are to be handled by.
handlers_to_come: list[Callable[[Connection], Awaitable[object]]] = []


async def dispatch(conn: Connection) -> object:
    return await handlers_to_come.pop(0)(conn)


def own_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task


@contextmanager
def cancelled_at_once() -> Iterator[list[asyncio.Task[Any]]]:
    """The next tasks are cancelled before their first step."""
    loop = asyncio.get_running_loop()
    created: list[asyncio.Task[Any]] = []

    def create(loop: Any, coro: Any, **options: Any) -> Any:
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=loop, **options)
        task.cancel()
        created.append(task)
        return task

    loop.set_task_factory(create)
    try:
        yield created
    finally:
        loop.set_task_factory(None)


@on_asyncio
@whose_group
async def test_cancelled_before_its_first_step(
    whose: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(dispatch, whose) as (server, ended):
        handlers_to_come.append(echo)
        with Peer(server.port) as bystander:
            await bystander.send(b"before")
            assert await bystander.receive(6) == b"before"
            with cancelled_at_once() as created:
                assert await in_a_thread(end_of_another, server.port) is PeerClose.RST
                conn = await ended.next()
            (task,) = created
            assert task.cancelled()
            ending = ending_with(CloseKind.RST, conn, Cause.CANCELLED)
            assert isinstance(ending.outcome, outcome.Error)
            assert conn not in server.connections
            await bystander.send(b"after")
            assert await bystander.receive(5) == b"after"
        await echoes(server)
    assert server.statistics().endings_by_cause[Cause.CANCELLED] == 1
    (record,) = said(caplog)
    assert (record.levelno, record.exc_info) == (logging.ERROR, None)


def end_of_another(port: int) -> PeerClose:
    """How a connection ends that is as short as can be."""
    with socket.socket() as sock:
        sock.settimeout(LONG)
        try:
            sock.connect(("127.0.0.1", port))
            assert sock.recv(1) == b""
        except ConnectionResetError:
            return PeerClose.RST
    return PeerClose.FIN


async def in_a_thread(function: Any, *args: Any) -> Any:
    """Not by AnyIO, which makes tasks for that."""
    return await asyncio.get_running_loop().run_in_executor(None, function, *args)


@on_asyncio
@whose_group
@pytest.mark.parametrize("by", ["another", "itself"])
async def test_cancelled_in_its_body(whose: str, by: str) -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(b"half")
        task = own_task()
        if by == "itself":
            task.cancel()
        else:
            tasks.append(task)
            waiting.set()
        await anyio.sleep_forever()

    tasks: list[asyncio.Task[Any]] = []
    waiting = anyio.Event()
    async with serving(dispatch, whose) as (server, ended):
        handlers_to_come.append(handler)
        with Peer(server.port) as peer:
            if by == "another":
                await waiting.wait()
                await settled()
                tasks.pop().cancel()
            assert await peer.read_to_end() == Seen(b"half", PeerClose.RST)
        conn = await ended.next()
        ending_with(CloseKind.RST, conn, Cause.CANCELLED)
        await echoes(server)


@on_asyncio
@whose_group
@pytest.mark.parametrize("leave", ["return", "raise"])
async def test_cancelled_in_its_last_step(whose: str, leave: str) -> None:
    """The verdict has fallen, and asyncio calls the task cancelled all the same."""

    async def handler(conn: Connection) -> None:
        await conn.send(b"all")
        task = own_task()
        tasks.append(task)
        task.cancel()
        if leave == "raise":
            raise Failure

    tasks: list[asyncio.Task[Any]] = []
    async with serving(dispatch, whose, drain=None) as (server, ended):
        handlers_to_come.append(handler)
        with Peer(server.port) as peer:
            kind = PeerClose.FIN if leave == "return" else PeerClose.RST
            assert await peer.read_to_end() == Seen(b"all", kind)
        conn = await ended.next()
        cause = Cause.RETURNED if leave == "return" else Cause.RAISED
        ending_with(CloseKind(kind.value), conn, cause)
        await settled()
        assert tasks[0].cancelled()
        await echoes(server)


@on_asyncio
@whose_group
async def test_cancelled_in_its_drain(whose: str) -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(b"whole")
        tasks.append(own_task())

    tasks: list[asyncio.Task[Any]] = []
    async with serving(dispatch, whose) as (server, ended):
        handlers_to_come.append(handler)
        with Peer(server.port) as peer:
            assert await peer.read_to_end() == Seen(b"whole", PeerClose.FIN)
            assert len(server.connections) == 1  # it drains
            tasks.pop().cancel()
            conn = await ended.next()
        ending_with(CloseKind.FIN, conn, Cause.RETURNED)
        await echoes(server)


@on_asyncio
@whose_group
async def test_cancelled_in_its_handshake(whose: str) -> None:
    async with serving(echo, whose, ssl_context=server_context()) as (server, ended):
        before = asyncio.all_tasks()
        with Peer(server.port) as peer:
            while not server.connections:
                await anyio.lowlevel.checkpoint()
            await settled()
            (task,) = asyncio.all_tasks() - before
            task.cancel()
            assert await peer.read_to_end() == Seen(b"", PeerClose.RST)
        conn = await ended.next()
        ending_with(CloseKind.RST, conn, Cause.CANCELLED)
        with Peer(server.port) as peer:
            secure = await shake_hands(peer)
            await secure.send(b"hello")
            assert await secure.receive(5) == b"hello"


@whose_group
async def test_cancelled_scope_around_a_task_that_has_not_begun(
    whose: str, anyio_backend: object
) -> None:
    """The twin by AnyIO and Trio, which is the end of all."""

    async def handler(conn: Connection) -> None:
        await anyio.sleep_forever()

    ended = Ended()
    async with anyio.create_task_group() as outer, anyio.create_task_group() as handlers:
        options: Any = {"task_group": handlers} if whose == "callers" else {}
        serve = partial(serve_tcp, handler, host="127.0.0.1", on_ending=ended, **options)
        server = await handlers.start(serve)
        with Peer(server.port) as peer:
            while not server.connections:
                await anyio.lowlevel.checkpoint()
            handlers.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                assert await peer.read_to_end() == Seen(b"", PeerClose.RST)
        outer.cancel_scope.cancel()
    assert not server.connections
    (conn,) = ended.connections
    ending_with(CloseKind.RST, conn, Cause.CANCELLED)
    assert server.statistics().endings_by_cause[Cause.CANCELLED] == 1


@whose_group
async def test_close_in_a_scope_that_the_handler_cancelled_is_a_reset(
    whose: str, anyio_backend: object
) -> None:
    """It is cancelled in the same moment, although its task is not the group's own."""

    async def handler(conn: Connection) -> None:
        await conn.send(b"half")
        scope.cancel()
        await conn.aclose()

    ended = Ended()
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as handlers:
            options: Any = {"task_group": handlers} if whose == "callers" else {}
            serve = partial(
                serve_tcp, handler, host="127.0.0.1", on_ending=ended, **options
            )
            server = await handlers.start(serve)
            with anyio.CancelScope(shield=True), Peer(server.port) as peer:
                assert await peer.read_to_end() == Seen(b"half", PeerClose.RST)
    (conn,) = ended.connections
    ending_with(CloseKind.RST, conn, Cause.CANCELLED)
