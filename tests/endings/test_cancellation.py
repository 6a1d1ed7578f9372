"""A cancellation at any point of a conversation, one point after the other.

Whatever it interrupts, the peer and the `Ending` agree on what was said.
"""

from __future__ import annotations

import logging
import socket
import sys
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any

import anyio
import anyio.abc
import pytest

from anyio_rst import (
    Cause,
    CloseKind,
    Connection,
    Drain,
    Ending,
    PeerClose,
    connection_scope,
    serve_tcp,
)

from securing import CLEAN, TLSPeer, server_context, shake_hands
from serving import LONG, Peer, foreign_pair, said, serve, settled

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup

pytestmark = pytest.mark.anyio

REQUEST = b"well?"
UNREAD = b"a close that left this unread would be a reset"
ANSWER = bytes(range(256)) * 64
THANKS = b"thanks"

# More than the kernel takes before the peer reads.
LONG_ANSWER = bytes(8 * 2**20)


class Clock:
    """Counts the points at which a cancellation can arrive, and cancels at one of them.

    A task meets a cancellation where it suspends. So there are two points for each
    suspension: when it begins, and when it is over, with whatever was waited for.
    """

    def __init__(self, point: int) -> None:
        self.scope = anyio.CancelScope()
        self._left = point

    @property
    def reached(self) -> bool:
        return self._left < 0

    def tick(self) -> None:
        if self._left == 0:
            self.scope.cancel()
        self._left -= 1

    async def watch(self, func: Callable[..., Any], *args: Any) -> None:
        await _watched(func(*args), self.tick)


@types.coroutine
def _watched(
    coro: Coroutine[Any, Any, object], tick: Callable[[], None]
) -> Generator[Any, Any, None]:
    """Drive *coro* as an event loop does, step by step, whichever loop it is."""
    step: Callable[[], Any] = partial(coro.send, None)
    while True:
        tick()
        try:
            waits_for = step()
        except StopIteration:
            return
        tick()
        try:
            value = yield waits_for
        except BaseException as exc:
            step = partial(coro.throw, exc)
        else:
            step = partial(coro.send, value)


class Watched:
    """What `serve_tcp` needs of a task group: one that watches what it starts."""

    def __init__(self, tasks: anyio.abc.TaskGroup, run: Callable[..., Any]) -> None:
        self._tasks = tasks
        self._run = run

    def start_soon(self, func: Callable[..., Any], *args: Any) -> None:
        self._tasks.start_soon(self._run, func, *args)


class Witness:
    """A plain blocking peer, with TLS over it or without, and what it saw."""

    def __init__(self, plain: Peer) -> None:
        self._plain = plain
        self._peer: Peer | TLSPeer = plain
        self.data = b""
        self.fin = False
        self.reset = False

    async def shake_hands(self) -> None:
        await settled()
        if self.look():
            return
        try:
            self._peer = await shake_hands(self._plain)
        except ConnectionError:  # a FIN instead would be none
            self.reset = True

    def look(self) -> bool:
        """Whether an RST has arrived. No other call tells of one behind a FIN."""
        if self._plain.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.reset = True
        return self.reset

    async def say(self, data: bytes) -> None:
        await settled()
        if not self.look():
            try:
                await self._peer.send(data)
            except (BrokenPipeError, ConnectionResetError):
                self.reset = True  # MPTCP's arrives a moment later

    async def listen(self) -> None:
        """Read to the end."""
        if self.reset:
            return
        await settled()
        if isinstance(self._peer, TLSPeer):
            self.data, end = await self._peer.end()
            assert end in (CLEAN, ["RST"])
            self.fin = end == CLEAN
            self.reset = not self.fin
        else:
            seen = await self._peer.read_to_end()
            self.data, self.fin = seen.data, seen.close is PeerClose.FIN
            self.reset = seen.close is PeerClose.RST

    async def finish(self) -> None:
        await settled()
        if not self.look():
            self._plain.send_eof()


@dataclass
class Run:
    """One conversation, cancelled at one point."""

    point: int
    cancelled: bool
    returned: bool
    """Whether its body did."""
    ending: Ending
    witness: Witness


Body = Callable[[Connection, Clock], Awaitable[None]]
Script = Callable[[Witness], Awaitable[None]]


async def converse(
    way: str, body: Body, script: Script, point: int, *, cut_inside: bool = False
) -> Run:
    """Let *body* talk with a peer that keeps to *script*.

    *way*: the connection is that of `serve_tcp` ("native"), the same with TLS ("tls"),
    or AnyIO's own stream in a `connection_scope` ("foreign"). All that is done for it
    is cancelled at *point*; if *cut_inside*, only what *body* puts into `clock.scope`.
    """
    clock = Clock(point)
    tasks_before = running_tasks()
    returned = False
    failures: list[BaseException] = []
    connections: list[Connection] = []
    over = anyio.Event()

    async def handler(conn: Connection) -> None:
        nonlocal returned
        try:
            await body(conn, clock)
        except anyio.get_cancelled_exc_class():
            raise
        except BaseException as exc:
            failures.append(exc)
            raise
        returned = True

    async def in_scope(stream: anyio.abc.SocketStream) -> None:
        async with connection_scope(stream, drain=Drain(LONG)) as conn:
            connections.append(conn)
            await handler(conn)

    async def run(func: Callable[..., Any], *args: Any) -> None:
        with nullcontext() if cut_inside else clock.scope:
            await clock.watch(func, *args)
        over.set()

    async with anyio.create_task_group() as tg:
        if way == "foreign":
            stream, peer = await foreign_pair()
            tg.start_soon(run, in_scope, stream)
        else:
            watched: Any = Watched(tg, run)
            server = await tg.start(
                partial(
                    serve_tcp,
                    handler,
                    host="127.0.0.1",
                    drain=Drain(LONG),
                    ssl_context=server_context() if way == "tls" else None,
                    task_group=watched,
                    on_ending=connections.append,
                )
            )
            peer = Peer(server.port)
        with peer, anyio.fail_after(LONG):
            witness = Witness(peer)
            if way == "tls":
                await witness.shake_hands()
            await script(witness)
            await over.wait()
            witness.look()
        tg.cancel_scope.cancel()

    assert running_tasks() == tasks_before
    assert not failures, point  # nothing leaves the body but the cancellation
    (connection,) = connections
    assert connection.ending is not None
    return Run(point, clock.reached, returned, connection.ending, witness)


def running_tasks() -> set[int]:
    return {task.id for task in anyio.get_running_tasks()}


async def at_each_point(
    way: str, body: Body, script: Script, check: Callable[[Run], None], **options: bool
) -> None:
    """Cancel at the first point, the second, ..., until it is over before that."""
    kinds = set()
    for point in count():
        run = await converse(way, body, script, point, **options)
        check(run)
        kinds.add(run.ending.kind)
        if not run.cancelled:
            break
    assert run.returned
    assert kinds == {CloseKind.FIN, CloseKind.RST}


def assert_agreement(run: Run) -> None:
    """The peer has seen what the `Ending` says."""
    assert run.witness.reset is (run.ending.kind is CloseKind.RST), run
    assert run.ending.fin_sent_before_reset is (run.witness.fin and run.witness.reset)


def whole_or_reset(answer: bytes, run: Run) -> None:
    assert_agreement(run)
    # The verdict falls when the body ends: what is cancelled after that is the drain.
    if run.returned:
        expected = (CloseKind.FIN, Cause.RETURNED)
    else:
        expected = (CloseKind.RST, Cause.CANCELLED)
    assert (run.ending.kind, run.ending.cause) == expected, run
    if run.witness.fin:
        assert len(run.witness.data) == len(answer), run
    assert answer.startswith(run.witness.data)


# What the peer does.


async def ask_and_listen(witness: Witness) -> None:
    await witness.say(REQUEST + UNREAD)
    await witness.listen()
    await witness.finish()  # the drain has had to wait


async def listen_and_thank(witness: Witness) -> None:
    await witness.say(REQUEST)
    await witness.listen()
    await witness.say(THANKS)
    await witness.finish()


# What the body does.


async def answer(conn: Connection, clock: Clock) -> None:
    assert await conn.receive(len(REQUEST)) == REQUEST
    await conn.send(ANSWER)


async def answer_at_length(conn: Connection, clock: Clock) -> None:
    assert await conn.receive(len(REQUEST)) == REQUEST
    await conn.send(LONG_ANSWER)


async def answer_and_be_thanked(conn: Connection, clock: Clock) -> None:
    await answer(conn, clock)
    await conn.send_eof()
    assert await conn.receive() == THANKS


async def answer_in_a_task_group(conn: Connection, clock: Clock) -> None:
    async with conn.create_task_group() as helpers:
        helpers.start_soon(clock.watch, anyio.sleep_forever)
        assert await conn.receive(len(REQUEST)) == REQUEST
        async with conn.create_task_group() as answers:
            answers.start_soon(clock.watch, conn.send, ANSWER)
        helpers.cancel_scope.cancel()


async def answer_and_close(conn: Connection, clock: Clock) -> None:
    await answer(conn, clock)
    await conn.aclose()


WAYS = ["native", "tls", "foreign"]
TCP = ["native", "foreign"]


@pytest.mark.parametrize("way", WAYS)
async def test_request_and_answer(way: str) -> None:
    check = partial(whole_or_reset, ANSWER)
    await at_each_point(way, answer, ask_and_listen, check)


@pytest.mark.parametrize("way", WAYS)
async def test_answer_that_has_to_wait_for_the_peer(way: str) -> None:
    check = partial(whole_or_reset, LONG_ANSWER)
    await at_each_point(way, answer_at_length, ask_and_listen, check)


@pytest.mark.parametrize("way", WAYS)
async def test_answer_by_a_child_of_a_task_group(way: str) -> None:
    def check(run: Run) -> None:
        # A child may meet the cancellation, and reset, while the body can still return.
        returned = run.returned and run.ending.cause is not Cause.CANCELLED
        whole_or_reset(ANSWER, replace(run, returned=returned))

    await at_each_point(way, answer_in_a_task_group, ask_and_listen, check)


@pytest.mark.parametrize("way", TCP)
async def test_half_close_and_a_last_word_of_the_peer(way: str) -> None:
    check = partial(whole_or_reset, ANSWER)
    await at_each_point(way, answer_and_be_thanked, listen_and_thank, check)


@pytest.mark.parametrize("way", WAYS)
async def test_aclose_in_the_body(way: str) -> None:
    def check(run: Run) -> None:
        assert_agreement(run)
        # Cancelled in aclose(), the body has not returned, but the verdict had fallen.
        if run.witness.fin:
            assert run.witness.data == ANSWER
            assert run.ending.cause is Cause.CLOSED
        else:
            assert ANSWER.startswith(run.witness.data)
            assert run.ending.cause is Cause.CANCELLED
            assert not run.returned

    await at_each_point(way, answer_and_close, ask_and_listen, check)


@pytest.mark.parametrize("way", WAYS)
async def test_send_that_is_cut_short_inside_the_body(way: str) -> None:
    async def body(conn: Connection, clock: Clock) -> None:
        assert await conn.receive(len(REQUEST)) == REQUEST
        with clock.scope:
            await conn.send(LONG_ANSWER)

    def check(run: Run) -> None:
        assert_agreement(run)
        assert run.returned
        if run.witness.fin:
            # All or nothing: there is no clean end in the middle of a send.
            assert len(run.witness.data) in (0, len(LONG_ANSWER)), run
            assert run.ending.cause is Cause.RETURNED
        else:
            assert run.ending.cause is Cause.TORN_SEND

    await at_each_point(way, body, ask_and_listen, check, cut_inside=True)


# A task that a reset wakes may be cancelled as well.


async def test_failure_of_a_task_group_is_all_that_leaves_it(kind: str) -> None:
    class Failure(Exception):
        pass

    async def fail() -> None:
        await settled()
        raise Failure

    async def handler(conn: Connection) -> None:
        async with conn.create_task_group() as tg:
            tg.start_soon(fail)
            tg.start_soon(conn.send, LONG_ANSWER)
            await conn.receive()

    async with serve(kind, handler) as service:
        with service.connect() as peer:
            served = await service.next()
            await served.ending()
            assert (await peer.read_to_end()).close is PeerClose.RST
    assert isinstance(served.raised, ExceptionGroup)
    assert [type(exc) for exc in served.raised.exceptions] == [Failure]


async def test_reset_by_the_peer_while_both_directions_wait_is_everyday_life(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def handler(conn: Connection) -> None:
        async with conn.create_task_group() as tg:
            tg.start_soon(conn.send, LONG_ANSWER)
            await conn.receive()

    caplog.set_level(logging.INFO, "anyio_rst")
    async with serve("native", handler) as service:
        peer = service.connect()
        await settled()
        peer.reset()
        ending = await service.ending()
    assert ending.peer is PeerClose.RST
    assert [record.levelname for record in said(caplog)] == ["INFO"]
