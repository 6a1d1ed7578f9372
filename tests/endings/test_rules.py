"""The five rules, on every loop and every kind of stream, judged by a plain socket."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

import anyio
import pytest
from anyio import wait_all_tasks_blocked

from anyio_rst import (
    Cause,
    CloseKind,
    Connection,
    Drain,
    Ending,
    PeerClose,
    PeerReset,
    connection_scope,
)

from serving import (
    LONG,
    Handler,
    Peer,
    Seen,
    Service,
    error_of,
    fill_buffers,
    serve,
    timeout_once_settled,
    told,
    value_of,
)

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup

pytestmark = pytest.mark.anyio

# More than the socket buffers of both sides hold, with a small one at the peer.
TOO_MUCH = bytes(8 * 2**20)


class Failure(Exception):
    pass


class Stop(Exception):
    pass


async def judge(
    kind: str, handler: Handler, *, peer_closes: bool = False, **options: Any
) -> tuple[Seen, Ending]:
    """What a peer that only reads saw of *handler*, and what the `Ending` says."""
    async with serve(kind, handler, **options) as service:
        with service.connect() as peer:
            if peer_closes:
                peer.send_eof()
            seen = await peer.read_to_end()
        return seen, await service.ending()


def assert_fin(seen: Seen, ending: Ending, data: bytes, cause: Cause) -> None:
    assert seen == Seen(data, PeerClose.FIN)
    assert (ending.kind, ending.cause) == (CloseKind.FIN, cause)
    assert not ending.fin_sent_before_reset


def assert_rst(seen: Seen, ending: Ending, data: bytes, cause: Cause) -> None:
    assert seen == Seen(data, PeerClose.RST)
    assert (ending.kind, ending.cause) == (CloseKind.RST, cause)
    assert not ending.fin_sent_before_reset


# Rule 1: the verdict falls the instant the body ends.


async def test_return_finishes(kind: str) -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(b"all of it")

    seen, ending = await judge(kind, handler)
    assert_fin(seen, ending, b"all of it", Cause.RETURNED)
    assert value_of(ending) is None
    assert ending.remote_address is not None
    assert ending.remote_address[0] == "127.0.0.1"


@pytest.mark.parametrize(
    "exc",
    [
        Failure(),
        KeyboardInterrupt(),
        SystemExit(3),
        GeneratorExit(),
        BaseException(),
        anyio.EndOfStream(),
        OSError(),
    ],
    ids=lambda exc: type(exc).__name__,
)
async def test_exception_resets(kind: str, exc: BaseException) -> None:
    caught: list[BaseException] = []

    async def handler(conn: Connection) -> None:
        # An inner scope, so that no server has to survive what leaves this one.
        try:
            async with conn:
                await conn.send(b"half")
                raise exc
        except BaseException as raised:
            caught.append(raised)

    seen, ending = await judge(kind, handler)
    assert_rst(seen, ending, b"half", Cause.RAISED)
    assert caught == [exc]


async def test_exception_leaves_the_scope_unchanged(kind: str) -> None:
    failure = Failure()

    async def handler(conn: Connection) -> None:
        raise failure

    async with serve(kind, handler) as service:
        with service.connect() as peer:
            assert await peer.read_to_end() == Seen(b"", PeerClose.RST)
        served = await service.next()
        assert error_of(await served.ending()) is failure
        assert served.raised is failure


async def test_exception_group_resets(kind: str) -> None:
    async def fail() -> None:
        raise Failure

    async def handler(conn: Connection) -> None:
        await conn.send(b"half")
        async with anyio.create_task_group() as tg:
            tg.start_soon(fail)

    seen, ending = await judge(kind, handler)
    assert_rst(seen, ending, b"half", Cause.GROUP_FAILED)
    error = error_of(ending)
    assert isinstance(error, ExceptionGroup)
    assert isinstance(error.exceptions[0], Failure)


async def test_swallowed_exception_finishes(kind: str) -> None:
    async def handler(conn: Connection) -> None:
        try:
            raise Failure
        except Failure:
            await conn.send(b"sorry")

    assert_fin(*await judge(kind, handler), b"sorry", Cause.RETURNED)


@pytest.mark.parametrize("blocked_in", ["sleep", "receive", "send"])
async def test_cancellation_from_outside_resets(kind: str, blocked_in: str) -> None:
    async def handler(conn: Connection) -> None:
        with anyio.CancelScope() as scope:
            scopes.append(scope)
            async with conn:
                await conn.send(b"half")
                if blocked_in == "sleep":
                    await anyio.sleep_forever()
                elif blocked_in == "receive":
                    await conn.receive()
                else:
                    await conn.send(TOO_MUCH)

    scopes: list[anyio.CancelScope] = []
    async with serve(kind, handler) as service:
        with service.connect(buffer=4096) as peer:
            assert await peer.receive(4) == b"half"
            await wait_all_tasks_blocked()
            scopes[0].cancel()
            seen = await peer.read_to_end()
        ending = await service.ending()
    assert seen.close is PeerClose.RST
    assert len(seen.data) < len(TOO_MUCH)
    assert (ending.kind, ending.cause) == (CloseKind.RST, Cause.CANCELLED)


async def test_wait_that_was_given_up_last_is_no_failure(kind: str) -> None:
    """Though where tasks are written in Python they show it until the next wait."""

    async def handler(conn: Connection) -> None:
        async with connection_scope(conn) as inner:
            await inner.send(b"done")
            with anyio.move_on_after(0.01):
                await inner.receive()

    async with serve(kind, handler) as service:
        with service.connect() as peer:
            assert await peer.read_to_end() == Seen(b"done", PeerClose.FIN)


async def test_cancellation_of_the_server_resets(kind: str) -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(b"half")
        await anyio.sleep_forever()

    async with serve(kind, handler) as service:
        peer = service.connect()
        assert await peer.receive(4) == b"half"
        served = await service.next()
    with peer:
        assert await peer.read_to_end() == Seen(b"", PeerClose.RST)
    ending = await served.ending()
    assert (ending.kind, ending.cause) == (CloseKind.RST, Cause.CANCELLED)


async def test_reset_comes_after_a_shielded_clean_up_inside_the_body(kind: str) -> None:
    cleaned_up = anyio.Event()

    async def handler(conn: Connection) -> None:
        with anyio.CancelScope() as scope:
            async with conn:
                try:
                    scope.cancel()
                    await anyio.sleep_forever()
                finally:
                    with anyio.CancelScope(shield=True):
                        await conn.send(b"bye")
                        cleaned_up.set()

    seen, ending = await judge(kind, handler)
    assert cleaned_up.is_set()
    assert_rst(seen, ending, b"bye", Cause.CANCELLED)


async def test_cancellation_that_the_body_never_noticed_finishes(kind: str) -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(b"all of it")
        with anyio.CancelScope() as scope:
            async with conn:
                scope.cancel()

    async with serve(kind, handler) as service:
        with service.connect() as peer:
            ending = await service.ending()
            seen = await peer.read_to_end()
    assert_fin(seen, ending, b"all of it", Cause.RETURNED)
    assert ending.peer is PeerClose.NONE  # nobody waited for it


async def test_cancellation_cuts_the_drain_short_and_no_more(kind: str) -> None:
    scopes: list[anyio.CancelScope] = []
    drained: list[bool] = []

    async def handler(conn: Connection) -> None:
        with anyio.CancelScope() as scope:
            scopes.append(scope)
            async with conn:
                await conn.send(b"all of it")
            drained.append(True)

    async with serve(kind, handler, drain=Drain(timeout=LONG)) as service:
        with service.connect() as peer:
            assert await peer.read_to_end() == Seen(b"all of it", PeerClose.FIN)
            await wait_all_tasks_blocked()
            scopes[0].cancel()
            ending = await service.ending()
    assert (ending.kind, ending.cause) == (CloseKind.FIN, Cause.RETURNED)
    assert ending.peer is PeerClose.NONE
    assert not drained


# Explicit endings.


async def test_abort_resets_at_once_and_only_once(kind: str) -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(b"half")
        conn.abort()
        first = conn.ending
        assert first is not None
        assert first.outcome is None
        conn.abort()
        assert conn.ending is first
        await conn.aclose()
        assert conn.ending is first
        with pytest.raises(anyio.ClosedResourceError):
            await conn.send(b"more")
        with pytest.raises(anyio.ClosedResourceError):
            await conn.receive()

    seen, ending = await judge(kind, handler)
    assert_rst(seen, ending, b"half", Cause.ABORTED)
    assert value_of(ending) is None


async def test_abort_is_seen_while_the_body_goes_on(kind: str) -> None:
    resume = anyio.Event()

    async def handler(conn: Connection) -> None:
        conn.abort()
        await resume.wait()

    async with serve(kind, handler) as service:
        with service.connect() as peer:
            assert await peer.read_to_end() == Seen(b"", PeerClose.RST)
            resume.set()
        assert (await service.ending()).cause is Cause.ABORTED


@pytest.mark.parametrize("ended_by", ["abort", "aclose"])
async def test_ending_wakes_the_tasks_in_the_connection(kind: str, ended_by: str) -> None:
    woken: list[str] = []

    async def receive(conn: Connection) -> None:
        with pytest.raises(anyio.ClosedResourceError):
            await conn.receive()
        woken.append("receive")

    async def send(conn: Connection) -> None:
        with pytest.raises(anyio.ClosedResourceError):
            await conn.send(TOO_MUCH)
        woken.append("send")

    async def handler(conn: Connection) -> None:
        async with anyio.create_task_group() as tg:
            tg.start_soon(receive, conn)
            tg.start_soon(send, conn)
            await wait_all_tasks_blocked()
            if ended_by == "abort":
                conn.abort()
            else:
                await conn.aclose()

    async with serve(kind, handler, drain=Drain(timeout=LONG)) as service:
        with service.connect(buffer=4096) as peer:
            served = await service.next()
            await served.ending()
            seen = await peer.read_to_end()
    assert sorted(woken) == ["receive", "send"]
    assert seen.close is PeerClose.RST  # for aclose(): the send was torn


async def test_aclose_then_exception_finishes(kind: str) -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(b"all of it")
        await conn.aclose()
        raise Failure

    seen, ending = await judge(kind, handler, peer_closes=True)
    assert_fin(seen, ending, b"all of it", Cause.CLOSED)
    assert isinstance(error_of(ending), Failure)


async def test_aclose_wakes_a_receiver_and_drains(kind: str) -> None:
    async def receive(conn: Connection) -> None:
        with pytest.raises(anyio.ClosedResourceError):
            await conn.receive()

    async def handler(conn: Connection) -> None:
        async with anyio.create_task_group() as tg:
            tg.start_soon(receive, conn)
            await wait_all_tasks_blocked()
            await conn.aclose()

    async with serve(kind, handler, drain=Drain(timeout=LONG)) as service:
        with service.connect() as peer:
            assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)
            await peer.send(b"too late")
        ending = await service.ending()
    assert (ending.kind, ending.cause) == (CloseKind.FIN, Cause.CLOSED)
    assert ending.peer is not PeerClose.NONE


@pytest.mark.parametrize("fails", [False, True], ids=["returns", "fails"])
async def test_body_ends_during_the_aclose_of_another_task(
    kind: str, fails: bool
) -> None:
    async def handler(conn: Connection) -> None:
        with suppress(ExceptionGroup):
            async with anyio.create_task_group() as tg:
                async with connection_scope(conn, drain=Drain(timeout=LONG)) as inner:
                    tg.start_soon(inner.aclose)
                    await wait_all_tasks_blocked()
                    assert inner.ending is None
                    left_body.set()
                    if fails:
                        raise Failure
                assert inner.ending is not None

    left_body = anyio.Event()
    async with serve(kind, handler) as service:
        with service.connect() as peer:
            assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)
            served = await service.next()
            await left_body.wait()
            if not fails:
                await wait_all_tasks_blocked()
                assert served.connection.ending is None  # the body waits for the drain
                peer.send_eof()
            ending = await served.ending()
    assert (ending.kind, ending.cause) == (CloseKind.FIN, Cause.CLOSED)
    assert ending.peer is (PeerClose.NONE if fails else PeerClose.FIN)


async def test_abort_during_the_drain_ends_the_drain(kind: str) -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(b"all of it")

    async with serve(kind, handler, drain=Drain(timeout=LONG)) as service:
        with service.connect() as peer:
            assert await peer.read_to_end() == Seen(b"all of it", PeerClose.FIN)
            served = await service.next()
            await wait_all_tasks_blocked()
            served.connection.abort()
            ending = await served.ending()
    assert (ending.kind, ending.cause) == (CloseKind.FIN, Cause.RETURNED)


# finish_on.


@pytest.mark.parametrize(
    ("exc", "cause"),
    [
        (Stop(), Cause.FINISH_ON),
        (Failure(), Cause.RAISED),
        (ExceptionGroup("", [Stop(), ExceptionGroup("", [Stop()])]), Cause.FINISH_ON),
        (ExceptionGroup("", [Stop(), Failure()]), Cause.GROUP_FAILED),
    ],
    ids=["match", "other", "group of matches", "mixed group"],
)
async def test_finish_on(kind: str, exc: Exception, cause: Cause) -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(b"data")
        raise exc

    async with serve(kind, handler, finish_on=(Stop,)) as service:
        with service.connect() as peer:
            seen = await peer.read_to_end()
        served = await service.next()
        ending = await served.ending()
    finished = cause is Cause.FINISH_ON
    assert seen == Seen(b"data", PeerClose.FIN if finished else PeerClose.RST)
    assert (ending.kind is CloseKind.FIN, ending.cause) == (finished, cause)
    assert served.raised is exc
    assert error_of(ending) is exc


# Rule 4: nothing torn passes for whole.


async def test_timeout_that_cuts_a_receive_finishes(kind: str) -> None:
    async def handler(conn: Connection) -> None:
        async with timeout_once_settled():
            await conn.receive()
        await conn.send(b"too slow")

    assert_fin(*await judge(kind, handler), b"too slow", Cause.RETURNED)


@pytest.mark.parametrize("how", ["return", "aclose", "finish_on"])
async def test_send_cut_by_a_timeout_resets(kind: str, how: str) -> None:
    async def handler(conn: Connection) -> None:
        async with timeout_once_settled() as scope:
            await conn.send(TOO_MUCH)
        assert scope.cancelled_caught
        with pytest.raises(anyio.BrokenResourceError, match="cut short"):
            await conn.send(b"x")
        with pytest.raises(anyio.BrokenResourceError, match="cut short"):
            await conn.send_eof()
        if how == "aclose":
            await conn.aclose()
        elif how == "finish_on":
            raise Stop

    async with serve(kind, handler, finish_on=Stop) as service:
        with service.connect(buffer=4096) as peer:
            ending = await service.ending()
            seen = await peer.read_to_end()
    assert seen.close is PeerClose.RST
    assert len(seen.data) < len(TOO_MUCH)
    assert (ending.kind, ending.cause) == (CloseKind.RST, Cause.TORN_SEND)


async def test_send_cancelled_before_its_first_byte_tears_nothing() -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(b"whole")
        with anyio.CancelScope() as scope:
            scope.cancel()
            await conn.send(b"never")
        assert scope.cancelled_caught

    assert_fin(*await judge("native", handler), b"whole", Cause.RETURNED)


async def test_send_in_another_task_at_exit_resets(kind: str) -> None:
    async def send(conn: Connection) -> None:
        with pytest.raises(anyio.ClosedResourceError):
            await conn.send(TOO_MUCH)

    async def handler(conn: Connection) -> None:
        async with anyio.create_task_group() as tg:
            async with conn:
                tg.start_soon(send, conn)
                await wait_all_tasks_blocked()

    async with serve(kind, handler) as service:
        with service.connect(buffer=4096) as peer:
            ending = await service.ending()
            seen = await peer.read_to_end()
    assert seen.close is PeerClose.RST
    assert len(seen.data) < len(TOO_MUCH)
    assert (ending.kind, ending.cause) == (CloseKind.RST, Cause.TORN_SEND)


async def test_send_that_waits_for_its_first_byte_at_exit_tears_nothing() -> None:
    """The buffers are as full as they can be: the send waits."""

    async def send(conn: Connection) -> None:
        with pytest.raises(anyio.ClosedResourceError):
            await conn.send(b"never")

    async def handler(conn: Connection) -> None:
        sock = conn.extra(anyio.abc.SocketAttribute.raw_socket)
        sent.append(fill_buffers(sock))
        async with anyio.create_task_group() as tg:
            async with conn:
                tg.start_soon(send, conn)
                await wait_all_tasks_blocked()
                left_body.set()

    sent: list[int] = []
    left_body = anyio.Event()
    async with serve("native", handler, drain=Drain(timeout=LONG)) as service:
        with service.connect(buffer=4096) as peer:
            await left_body.wait()
            seen = await peer.read_to_end()
    assert (len(seen.data), seen.close) == (sum(sent), PeerClose.FIN)


# Half-close.


async def test_half_close_then_return_finishes(kind: str) -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(b"answer")
        await conn.send_eof()
        await conn.send_eof()  # idempotent
        assert await conn.receive() == b"thanks"
        with pytest.raises(anyio.ClosedResourceError):
            await conn.send(b"more")

    async with serve(kind, handler) as service:
        with service.connect() as peer:
            assert await peer.read_to_end() == Seen(b"answer", PeerClose.FIN)
            await peer.send(b"thanks")
            peer.send_eof()
            ending = await service.ending()
    assert (ending.kind, ending.cause) == (CloseKind.FIN, Cause.RETURNED)
    assert ending.peer is PeerClose.FIN
    assert ending.unacknowledged == told(0)


async def test_half_close_then_failure_says_that_the_fin_went_first(kind: str) -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(b"answer")
        await conn.send_eof()
        await conn.receive()
        raise Failure

    async with serve(kind, handler) as service:
        with service.connect() as peer:
            # A peer that only reads sees a clean end, and ...
            assert await peer.read_to_end() == Seen(b"answer", PeerClose.FIN)
            await peer.send(b"more")
            ending = await service.ending()
            # ... only one that goes on to send learns of the reset.
            with pytest.raises((ConnectionResetError, BrokenPipeError)):
                while True:
                    await peer.send(b"even more")
    assert (ending.kind, ending.cause) == (CloseKind.RST, Cause.RAISED)
    assert ending.fin_sent_before_reset


# What the peer did.


async def test_peer_fin_is_reported(kind: str) -> None:
    async def handler(conn: Connection) -> None:
        async for _ in conn:
            pass

    seen, ending = await judge(kind, handler, peer_closes=True)
    assert_fin(seen, ending, b"", Cause.RETURNED)
    assert ending.peer is PeerClose.FIN


async def peer_resets(service: Service) -> None:
    peer = service.connect()
    assert await peer.receive(5) == b"ready"
    peer.reset()


async def test_peer_reset_raises_peer_reset(kind: str) -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(b"ready")
        with pytest.raises(PeerReset, match="reset"):
            await conn.receive()
        # The kernel tells once; the connection goes on telling.
        with pytest.raises(PeerReset):
            await conn.receive()
        with pytest.raises(PeerReset):
            await conn.send(b"x")
        with pytest.raises(PeerReset):
            await conn.receive()
        raise Failure

    async with serve(kind, handler) as service:
        await peer_resets(service)
        ending = await service.ending()
    assert isinstance(error_of(ending), Failure)
    assert (ending.kind, ending.cause) == (CloseKind.RST, Cause.RAISED)
    assert ending.peer is PeerClose.RST


async def test_no_fin_is_claimed_on_a_connection_that_the_peer_had_reset(
    kind: str,
) -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(b"ready")
        with pytest.raises(anyio.BrokenResourceError):
            await conn.receive()

    async with serve(kind, handler) as service:
        await peer_resets(service)
        ending = await service.ending()
    assert (ending.kind, ending.cause) == (CloseKind.RST, Cause.RETURNED)
    assert ending.peer is PeerClose.RST


async def test_data_before_the_peers_reset_is_still_received(kind: str) -> None:
    got: list[bytes] = []
    go = anyio.Event()

    async def handler(conn: Connection) -> None:
        await go.wait()
        with pytest.raises(PeerReset):
            async for chunk in conn:
                got.append(chunk)

    async with serve(kind, handler) as service:
        peer: Peer = service.connect()
        served = await service.next()
        await peer.send(b"last words")
        peer.reset()
        go.set()
        await served.ending()
    assert b"".join(got) == b"last words"
