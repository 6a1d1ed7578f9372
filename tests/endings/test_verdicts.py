"""Ends that look like something else than they are."""

from __future__ import annotations

import socket
import sys
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import Any

import anyio
import pytest
from anyio.abc import SocketAttribute
from conftest import capturing

from anyio_rst import (
    Cause,
    CloseKind,
    Connection,
    Drain,
    PeerClose,
    connect_tcp,
    connection_scope,
    serve_tcp,
)
from anyio_rst.testing import (
    Capture,
    Direction,
    Segment,
    TCPFlag,
)

from serving import (
    LONG,
    Peer,
    Seen,
    assert_finished,
    assert_reset,
    connection_of,
    error_of,
    fill_buffers,
    foreign_pair,
    serve,
    settled,
)

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup

pytestmark = pytest.mark.anyio

CLOSED = 7  # TCP_CLOSE of linux/tcp_states.h


class Failure(Exception):
    pass


def ended(conn: Connection) -> tuple[CloseKind, Cause]:
    assert conn.ending is not None
    return conn.ending.kind, conn.ending.cause


# Left by hand, with an exception in flight.


async def test_scope_that_is_left_while_an_exception_is_in_flight_resets() -> None:
    stream, peer = await foreign_pair()
    with peer:
        stack = AsyncExitStack()
        conn = await stack.enter_async_context(connection_scope(stream))
        with pytest.raises(Failure) as caught:
            try:
                await conn.send(b"half")
                raise Failure
            finally:
                await stack.aclose()
        assert await peer.read_to_end() == Seen(b"half", PeerClose.RST)
    assert ended(conn) == (CloseKind.RST, Cause.RAISED)
    assert conn.ending is not None
    assert conn.ending.outcome is not None
    with pytest.raises(Failure) as raised:
        conn.ending.outcome.unwrap()
    assert raised.value is caught.value


async def test_client_that_is_left_while_an_exception_is_in_flight_resets() -> None:
    closes: list[PeerClose] = []

    async def read(conn: Connection) -> None:
        async for _ in conn:
            pass

    def report(conn: Connection) -> None:
        assert conn.ending is not None
        closes.append(conn.ending.peer)
        reported.set()

    reported = anyio.Event()
    async with anyio.create_task_group() as tg:
        serve = partial(serve_tcp, read, host="127.0.0.1", on_ending=report)
        server = await tg.start(serve)
        stack = AsyncExitStack()
        conn = await stack.enter_async_context(connect_tcp("127.0.0.1", server.port))
        with suppress(Failure):
            try:
                raise Failure
            finally:
                await stack.aclose()
        await reported.wait()
        server.stop()
    assert closes == [PeerClose.RST]
    assert ended(conn) == (CloseKind.RST, Cause.RAISED)


async def test_block_of_the_connection_left_while_an_exception_is_in_flight_resets(
    kind: str,
) -> None:
    async with connection_of(kind) as (conn, peer):
        stack = AsyncExitStack()
        await stack.enter_async_context(conn)
        with suppress(Failure):
            try:
                raise Failure
            finally:
                await stack.aclose()
    await assert_reset(conn, peer, Cause.RAISED)


async def test_scope_that_begins_and_ends_in_the_handling_of_an_exception_finishes(
    kind: str,
) -> None:
    try:
        raise Failure
    except Failure:
        async with connection_of(kind) as (conn, peer):
            with suppress(ValueError):
                raise ValueError from None
    await assert_finished(conn, peer, Cause.RETURNED)


class Falsy(Exception):
    def __bool__(self) -> bool:
        return False


@pytest.mark.parametrize("how", ["scope", "async with conn", "in flight"])
async def test_exception_that_is_false_resets_as_well(kind: str, how: str) -> None:
    with pytest.raises(Falsy):
        async with connection_of(kind) as (conn, peer):
            stack = AsyncExitStack()
            if how != "scope":
                await stack.enter_async_context(conn)
            if how == "in flight":
                try:
                    raise Falsy
                finally:
                    await stack.aclose()
            async with stack:
                raise Falsy
    await assert_reset(conn, peer, Cause.RAISED)


async def test_exception_that_is_raised_again_in_a_scope_resets(kind: str) -> None:
    with pytest.raises(Failure):
        try:
            raise Failure
        except Failure as exc:
            async with connection_of(kind) as (conn, peer):
                raise exc
    await assert_reset(conn, peer, Cause.RAISED)


async def test_explicit_aclose_in_the_handling_of_an_exception_finishes(
    kind: str,
) -> None:
    async with connection_of(kind, drain=None) as (conn, peer):
        try:
            raise Failure
        except Failure:
            await conn.aclose()
    await assert_finished(conn, peer, Cause.CLOSED)


# Closed in a scope that is cancelled.


async def close_forcefully(conn: Connection) -> None:
    await anyio.aclose_forcefully(conn)


async def close_in_the_end(conn: Connection) -> None:
    with anyio.CancelScope() as scope:
        try:
            scope.cancel()
            await anyio.sleep_forever()
        finally:
            await conn.aclose()


@pytest.mark.parametrize("give_up", [close_forcefully, close_in_the_end])
async def test_aclose_in_a_cancelled_scope_resets(kind: str, give_up: Any) -> None:
    async with connection_of(kind) as (conn, peer):
        await conn.send(b"half")
        await give_up(conn)
        assert conn.ending is not None
    await assert_reset(conn, peer, Cause.CANCELLED, b"half")


async def test_aclose_under_a_shield_finishes(kind: str) -> None:
    async with connection_of(kind, drain=None) as (conn, peer):
        with anyio.CancelScope() as scope:
            scope.cancel()
            with anyio.CancelScope(shield=True):
                await conn.aclose()
    await assert_finished(conn, peer, Cause.CLOSED)


async def test_aclose_in_a_group_of_the_connection_that_is_stopped_finishes(
    kind: str,
) -> None:
    async with connection_of(kind, drain=None) as (conn, peer):
        async with conn.create_task_group() as tg:
            tg.cancel_scope.cancel()
            await conn.aclose()
    await assert_finished(conn, peer, Cause.CLOSED)


async def test_cancelled_aclose_cuts_the_drain_of_another_short(kind: str) -> None:
    async with connection_of(kind, drain=Drain(LONG)) as (conn, peer):
        async with anyio.create_task_group() as tg:
            tg.start_soon(conn.aclose)
            assert (await peer.read_to_end()).close is PeerClose.FIN
            assert conn.ending is None
            await anyio.aclose_forcefully(conn)
            assert ended(conn) == (CloseKind.FIN, Cause.CLOSED)


# Groups.


async def test_stopping_a_group_around_a_nested_scope_is_no_failure(kind: str) -> None:
    async with connection_of(kind) as (conn, peer):
        async with conn.create_task_group() as outer:
            async with connection_scope(conn) as inner:
                async with inner.create_task_group() as tg:
                    tg.start_soon(anyio.sleep_forever)
                    outer.cancel_scope.cancel()
    await assert_finished(conn, peer, Cause.RETURNED)


async def test_groups_of_any_depth_cost_one_connection() -> None:
    def nested(depth: int) -> ExceptionGroup[Exception]:
        group: ExceptionGroup[Exception] = ExceptionGroup("bottom", [Failure()])
        for _ in range(depth):
            group = ExceptionGroup("nested", [group])
        return group

    async def handler(conn: Connection) -> None:
        raise nested(int(await conn.receive()))

    endings: list[tuple[CloseKind, Cause]] = []
    async with anyio.create_task_group() as tg:
        serve = partial(
            serve_tcp,
            handler,
            host="127.0.0.1",
            on_ending=lambda conn: endings.append(ended(conn)),
        )
        server = await tg.start(serve)
        for depth in (b"1", b"5000", b"1"):
            with Peer(server.port) as peer:
                await peer.send(depth)
                assert await peer.read_to_end() == Seen(b"", PeerClose.RST)
        server.stop()
    assert endings == [(CloseKind.RST, Cause.GROUP_FAILED)] * 3
    assert not server.connections


async def test_connection_is_not_made_of_a_socket() -> None:
    with pytest.raises(NotImplementedError, match="needs a scope"):
        await Connection.from_socket(3)


# What was on the wire, and what was not.


def sent_by_us(capture: Capture, flag: TCPFlag) -> list[Segment]:
    return [
        segment
        for segment in capture.having(flag)
        if segment.direction is Direction.FROM_PORT
    ]


async def test_fin_that_a_reset_found_in_the_queue_was_not_sent(kind: str) -> None:
    filled = anyio.Event()

    async def handler(conn: Connection) -> None:
        fill_buffers(conn.extra(SocketAttribute.raw_socket))
        filled.set()

    async with serve(kind, handler) as service:
        with capturing(service.port) as capture:
            with service.connect(buffer=4096) as peer:
                await filled.wait()
                await settled()
                peer.reset()
                ending = await service.ending()
            assert not sent_by_us(capture, TCPFlag.FIN)
    assert (ending.kind, ending.cause) == (CloseKind.RST, Cause.RETURNED)
    assert ending.peer is PeerClose.RST


async def test_fin_of_send_eof_that_our_reset_found_in_the_queue_was_not_sent(
    kind: str,
) -> None:
    async def handler(conn: Connection) -> None:
        fill_buffers(conn.extra(SocketAttribute.raw_socket))
        await conn.send_eof()
        raise Failure

    async with serve(kind, handler) as service:
        with service.connect(buffer=4096) as peer:
            ending = await service.ending()
            assert (await peer.read_to_end()).close is PeerClose.RST
    assert (ending.kind, ending.cause) == (CloseKind.RST, Cause.RAISED)
    assert not ending.fin_sent_before_reset


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("cause", [Cause.RAISED, Cause.ABORTED])
async def test_no_reset_is_reported_where_both_had_finished(
    kind: str, cause: Cause, reads: bool
) -> None:
    over = anyio.Event()

    async def handler(conn: Connection) -> None:
        await conn.send(b"answer")
        await conn.send_eof()
        if reads:
            with pytest.raises(anyio.EndOfStream):
                await conn.receive()
        await over.wait()
        await acknowledged(conn.extra(SocketAttribute.raw_socket))  # else its ACK is late
        if cause is Cause.ABORTED:
            conn.abort()
        else:
            raise Failure

    async with serve(kind, handler) as service:
        with capturing(service.port) as capture:
            with service.connect() as peer:
                peer.send_eof()
                assert await peer.read_to_end() == Seen(b"answer", PeerClose.FIN)
                await acknowledged(peer.sock)
                over.set()
                ending = await service.ending()
            assert not capture.having(TCPFlag.RST)
    assert (ending.kind, ending.cause) == (CloseKind.FIN, cause)
    assert ending.peer is PeerClose.FIN
    assert not ending.fin_sent_before_reset
    if cause is Cause.RAISED:
        assert isinstance(error_of(ending), Failure)


async def acknowledged(sock: socket.socket) -> None:
    """Until both FINs are: what *sock* has left is TIME_WAIT, or nothing."""
    with anyio.fail_after(LONG):
        while sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != CLOSED:
            await anyio.sleep(0.001)
