"""`anyio_rst.testing`, judged by plain sockets and by the segments on the wire."""

from __future__ import annotations

import os
import re
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import FrozenInstanceError
from typing import Any

import anyio
import anyio.to_thread
import pytest
from anyio import wait_all_tasks_blocked
from anyio.abc import SocketAttribute
from conftest import capturing

import anyio_rst.testing
from anyio_rst import Cause, CloseKind, Connection, Drain, Ending, PeerClose, PeerReset
from anyio_rst.testing import (
    Direction,
    Faults,
    Peer,
    Seen,
    TCPFlag,
    assert_fin,
    assert_rst,
    connect_peer,
    open_pair,
    open_peer,
)

from serving import LONG

pytestmark = pytest.mark.anyio

# More than small buffers hold, and less than those that a socket has as a rule.
ANSWER = bytes(range(250)) * 800


class Failure(Exception):
    pass


@contextmanager
def listening(host: str = "127.0.0.1") -> Iterator[tuple[socket.socket, int]]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listener:
        listener.settimeout(LONG)
        yield listener, listener.getsockname()[1]


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def port_of(connection: Connection) -> int:
    port: int = connection.extra(SocketAttribute.raw_socket).getsockname()[1]
    return port


def ending_of(connection: Connection) -> Ending:
    assert connection.ending is not None
    return connection.ending


# open_pair()


class Stop(Exception):
    pass


@pytest.mark.parametrize("cause", [Cause.RETURNED, Cause.FINISH_ON])
async def test_both_ends_of_a_pair_finish_at_the_same_time(cause: Cause) -> None:
    stop = Stop()
    raised: list[Stop] = []
    start = anyio.current_time()
    with ExitStack() as after:
        try:
            async with open_pair(finish_on=(Stop, KeyError)) as pair:
                capture = after.enter_context(capturing(port_of(pair[1])))
                await pair[0].send(b"ping")
                assert await pair[1].receive() == b"ping"
                await pair[1].send(b"pong")
                assert await pair[0].receive() == b"pong"
                await pair[0].send(b"never read")
                await pair[1].send(b"nor this")
                if cause is Cause.FINISH_ON:
                    raise stop
        except Stop as exc:
            raised.append(exc)
    assert raised == ([stop] if cause is Cause.FINISH_ON else [])
    assert {s.direction for s in capture.having(TCPFlag.FIN)} == set(Direction)
    assert not capture.having(TCPFlag.RST)
    # Had one waited for the FIN of the other, which had yet to end, that were 5 s.
    assert anyio.current_time() - start < 4
    for connection, discarded in zip(pair, (8, 10), strict=True):
        ending = ending_of(connection)
        assert (ending.kind, ending.cause) == (CloseKind.FIN, cause)
        assert ending.peer is PeerClose.FIN
        assert ending.discarded == discarded


async def test_exception_resets_both_ends_of_a_pair() -> None:
    failure = Failure()
    with ExitStack() as after:
        with pytest.raises(Failure) as raised:
            async with open_pair() as pair:
                capture = after.enter_context(capturing(port_of(pair[1])))
                raise failure
    assert raised.value is failure
    assert capture.having(TCPFlag.RST)
    assert not capture.having(TCPFlag.FIN)
    for connection in pair:
        ending = ending_of(connection)
        assert (ending.kind, ending.cause) == (CloseKind.RST, Cause.RAISED)


async def test_cancellation_resets_both_ends_of_a_pair() -> None:
    with anyio.CancelScope() as scope:
        async with open_pair() as pair:
            scope.cancel()
            await pair[0].receive()
    for connection in pair:
        ending = ending_of(connection)
        assert (ending.kind, ending.cause) == (CloseKind.RST, Cause.CANCELLED)


async def test_cancelled_before_its_block_leaves_nothing_open() -> None:
    with anyio.CancelScope() as scope:
        scope.cancel()
        async with open_pair():
            pytest.fail("entered")
    with anyio.CancelScope() as scope:
        scope.cancel()
        async with open_peer():
            pytest.fail("entered")
    assert scope.cancelled_caught


async def test_ends_of_a_pair_may_end_in_the_block() -> None:
    async with open_pair() as (one, other):
        one.abort()
        with pytest.raises(PeerReset):
            await other.receive()
    assert ending_of(one).cause is Cause.ABORTED
    assert ending_of(other).peer is PeerClose.RST


async def test_drain_limits_are_those_given() -> None:
    start = anyio.current_time()
    async with open_peer(drain=Drain(timeout=0.1)) as (_, peer):
        peer.stop_reading()
    assert 0.09 <= anyio.current_time() - start < 4
    with pytest.raises(TypeError):
        open_pair(drain=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError):
        open_peer(drain=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1"])
async def test_host_is_the_address_of_both_ends(host: str) -> None:
    async with open_pair(host=host) as pair:
        with capturing(port_of(pair[0])) as capture:
            await pair[1].send(b"ping")
            assert await pair[0].receive() == b"ping"
    assert [s.length for s in capture.segments if s.length] == [4]
    assert pair[1].extra(SocketAttribute.remote_address)[0] == host
    faults = Faults()
    faults.shorten_sends(1, 2)
    async with open_peer(host=host, faults=faults, small_buffers=True) as (conn, peer):
        assert peer.socket.getpeername()[0] == host
        await conn.send(b"ping")
    await assert_fin(peer, b"ping")


@pytest.mark.parametrize(
    "host",
    ["localhost", "", "192.0.2.1", "0.0.0.0", "::", b"\x7f\0\0\1", 2130706433, None],
)
@pytest.mark.parametrize("opened", [open_pair, open_peer])
def test_host_that_is_no_loopback_address_is_refused(
    opened: Callable[..., object], host: Any
) -> None:
    told = re.escape(f"such as 127.0.0.1 or ::1, not {host!r}")
    with pytest.raises(ValueError, match=told):
        opened(host=host)


@pytest.mark.parametrize("opened", [open_pair, open_peer])
async def test_exception_that_is_not_in_finish_on_resets(opened: Any) -> None:
    with pytest.raises(Failure):
        async with opened(finish_on=Stop) as (connection, other):
            raise Failure
    assert ending_of(connection).cause is Cause.RAISED
    if isinstance(other, Peer):
        await assert_rst(other)
    else:
        assert ending_of(other).cause is Cause.RAISED
    with pytest.raises(TypeError, match="finish_on takes exception types"):
        opened(finish_on=5)


async def test_exception_of_finish_on_is_fin_to_the_peer() -> None:
    start = anyio.current_time()
    stop = Stop()
    with pytest.raises(Stop) as raised:
        async with open_peer(finish_on=Stop) as (connection, peer):
            await peer.send(b"never read")
            await connection.send(ANSWER)
            raise stop
    assert raised.value is stop
    await assert_fin(peer, ANSWER)
    # Had the peer not read to the end meanwhile, that were 5 s.
    assert anyio.current_time() - start < 4
    ending = ending_of(connection)
    assert (ending.kind, ending.cause) == (CloseKind.FIN, Cause.FINISH_ON)
    assert (ending.peer, ending.discarded) == (PeerClose.FIN, 10)


async def test_exception_of_finish_on_behind_a_torn_send_resets() -> None:
    with pytest.raises(Stop):
        async with open_peer(finish_on=Stop, small_buffers=True) as (connection, peer):
            async with anyio.create_task_group() as tg:
                tg.start_soon(connection.send, ANSWER)
                await wait_all_tasks_blocked()
                tg.cancel_scope.cancel()
            raise Stop
    await assert_rst(peer)
    assert ending_of(connection).cause is Cause.TORN_SEND


async def test_one_after_the_other_on_the_same_descriptors() -> None:
    for _ in range(100):
        async with open_pair() as (client, server):
            async with anyio.create_task_group() as tg:
                tg.start_soon(client.send, b"ping")
                with anyio.fail_after(LONG):
                    assert await server.receive() == b"ping"
        async with open_peer() as (connection, peer):
            async with anyio.create_task_group() as tg:
                tg.start_soon(connection.send, b"ping")
                assert await peer.receive_exactly(4) == b"ping"


# Peer


async def test_peer_sees_a_fin() -> None:
    with listening() as (listener, port):
        async with connect_peer(port) as peer:
            sock, _ = listener.accept()
            sock.sendall(b"all of it")
            sock.close()
            seen = await peer.read_to_end()
            assert seen == Seen(b"all of it", PeerClose.FIN)
            assert 0 <= seen.elapsed < LONG
            assert await peer.read_to_end() is seen


async def test_peer_sees_an_rst_and_what_came_before_it() -> None:
    with listening() as (listener, port):
        async with connect_peer(port) as peer:
            sock, _ = listener.accept()
            sock.sendall(b"half")
            reset(sock)
            seen = await peer.read_to_end()
            assert seen == Seen(b"half", PeerClose.RST)
            assert await peer.read_to_end() is seen


async def test_peer_sees_neither_in_time() -> None:
    with listening() as (listener, port):
        async with connect_peer(port) as peer:
            sock, _ = listener.accept()
            with sock:
                sock.sendall(b"more ")
                seen = await peer.read_to_end(timeout=0.1)
                assert seen == Seen(b"more ", PeerClose.NONE)
                assert 0.09 <= seen.elapsed < LONG
                sock.sendall(b"to come")
                assert await peer.receive_exactly(2) == b"to"
            assert await peer.read_to_end() == Seen(b" come", PeerClose.FIN)


async def test_flood_does_not_keep_a_peer_from_timing_out() -> None:
    def flood(sock: socket.socket) -> None:
        with sock:
            try:
                while True:
                    sock.sendall(ANSWER)
            except OSError:
                pass

    with listening() as (listener, port):
        async with anyio.create_task_group() as tg:
            async with connect_peer(port) as peer:
                sock, _ = listener.accept()
                tg.start_soon(anyio.to_thread.run_sync, flood, sock)
                seen = await peer.read_to_end(timeout=0.2)
                assert seen.close is PeerClose.NONE
                assert seen.data
                assert seen.elapsed < LONG
                peer.reset()


async def test_rst_that_a_send_was_told_of_is_no_fin() -> None:
    with listening() as (listener, port):
        async with connect_peer(port) as peer:
            sock, _ = listener.accept()
            reset(sock)
            with pytest.raises(ConnectionResetError):
                await peer.send(b"too late")
            with pytest.raises(BrokenPipeError):
                await peer.send(b"again")
            assert await peer.read_to_end() == Seen(b"", PeerClose.RST)


async def test_peer_sends_more_than_fits_and_half_closes() -> None:
    def read(sock: socket.socket) -> bytes:
        data = b""
        while chunk := sock.recv(2**20):
            data += chunk
        sock.sendall(b"got it")
        sock.close()
        return data

    answer = ANSWER * 40
    got: list[bytes] = []
    with listening() as (listener, port):
        async with connect_peer(port) as peer:
            sock, _ = listener.accept()

            async def read_in_thread() -> None:
                got.append(await anyio.to_thread.run_sync(read, sock))

            async with anyio.create_task_group() as tg:
                tg.start_soon(read_in_thread)
                await peer.send(answer)
                peer.send_eof()
                assert await peer.read_to_end() == Seen(b"got it", PeerClose.FIN)
    assert got == [answer]


async def test_peer_resets_and_closes() -> None:
    with listening() as (listener, port):
        async with connect_peer(port) as peer:
            with listener.accept()[0] as sock:
                peer.reset()
                peer.reset()
                with pytest.raises(ConnectionResetError):
                    sock.recv(1)
        async with connect_peer(port) as peer:
            with listener.accept()[0] as sock:
                peer.close()
                peer.close()
                assert sock.recv(1) == b""
        async with connect_peer(port):
            sock, _ = listener.accept()
        with sock:
            assert sock.recv(1) == b""


async def test_closed_peer_says_so() -> None:
    with listening() as (_, port):
        async with connect_peer(port) as peer:
            peer.close()
            with pytest.raises(anyio.ClosedResourceError):
                await peer.read_to_end()
            with pytest.raises(anyio.ClosedResourceError):
                await peer.send(b"x")
            with pytest.raises(anyio.ClosedResourceError):
                peer.send_eof()


async def test_closing_a_peer_wakes_who_waits_in_it() -> None:
    async def read() -> None:
        with pytest.raises(anyio.ClosedResourceError):
            await peer.read_to_end()
        woken.append("reader")

    async def send() -> None:
        with pytest.raises(anyio.ClosedResourceError):
            await peer.send(ANSWER * 100)
        woken.append("sender")

    woken: list[str] = []
    with listening() as (listener, port):
        async with connect_peer(port) as peer:
            with listener.accept()[0], anyio.fail_after(LONG):
                async with anyio.create_task_group() as tg:
                    tg.start_soon(read)
                    tg.start_soon(send)
                    await wait_all_tasks_blocked()
                    with pytest.raises(anyio.BusyResourceError):
                        await peer.send(b"x")
                    peer.close()
    assert sorted(woken) == ["reader", "sender"]


async def test_two_readers_of_a_peer_see_the_same() -> None:
    async def read() -> None:
        seen.append(await peer.read_to_end())

    seen: list[Seen] = []
    with listening() as (listener, port):
        async with connect_peer(port) as peer:
            sock, _ = listener.accept()
            async with anyio.create_task_group() as tg:
                tg.start_soon(read)
                tg.start_soon(read)
                await wait_all_tasks_blocked()
                sock.sendall(b"once")
                sock.close()
    assert seen == [Seen(b"once", PeerClose.FIN)] * 2


async def test_stopped_peer_closes_its_window() -> None:
    async def read() -> None:
        seen.append(await peer.read_to_end())

    seen: list[Seen] = []
    with listening() as (listener, port):
        async with connect_peer(port, receive_buffer=1) as peer:
            with listener.accept()[0] as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
                sock.setblocking(False)
                async with anyio.create_task_group() as tg:
                    tg.start_soon(read)
                    await wait_all_tasks_blocked()
                    peer.stop_reading()
                assert seen == [Seen(b"", PeerClose.NONE)]
                sent = 0
                with pytest.raises(BlockingIOError):
                    while True:
                        sent += sock.send(bytes(1000))
                assert sent < 20_000
            # It may read again.
            assert await peer.read_to_end() == Seen(bytes(sent), PeerClose.FIN)


async def test_receive_exactly_tells_what_came_instead() -> None:
    with listening() as (listener, port):
        async with connect_peer(port) as peer:
            sock, _ = listener.accept()
            sock.sendall(b"half")
            with pytest.raises(AssertionError, match="no more in time after 4 bytes"):
                await peer.receive_exactly(8, timeout=0.1)
            sock.close()
            told = re.escape("expected 8 bytes; got FIN after 4 bytes, b'half'")
            with pytest.raises(AssertionError, match=told):
                await peer.receive_exactly(8)
            assert await peer.receive_exactly(3) == b"hal"
            await assert_fin(peer, b"f")


async def test_peer_of_one_s_own_socket() -> None:
    with listening() as (listener, port):
        with socket.create_connection(("127.0.0.1", port)) as sock:
            peer = Peer(sock)
            listener.accept()[0].close()
            await assert_fin(peer, b"")
            assert peer.socket is sock


async def test_peer_over_ipv6() -> None:
    with listening("::1") as (listener, port):
        async with connect_peer(port, host="::1") as peer:
            listener.accept()[0].close()
            await assert_fin(peer, b"")


async def test_peer_that_nobody_listens_to() -> None:
    with listening() as (_, port):
        pass
    with pytest.raises(ConnectionRefusedError):
        async with connect_peer(port):
            pytest.fail("connected")


# open_peer()


async def test_return_is_fin_to_the_peer() -> None:
    async with open_peer() as (connection, peer):
        await peer.send(b"ping")
        assert await connection.receive() == b"ping"
        await connection.send(ANSWER)
    assert await peer.read_to_end() == Seen(ANSWER, PeerClose.FIN)
    ending = ending_of(connection)
    assert (ending.kind, ending.cause) == (CloseKind.FIN, Cause.RETURNED)
    assert ending.peer is PeerClose.FIN


async def test_exception_is_rst_to_the_peer() -> None:
    failure = Failure()
    with pytest.raises(Failure) as raised:
        async with open_peer() as (connection, peer):
            await connection.send(b"half")
            raise failure
    assert raised.value is failure
    assert await peer.read_to_end() == Seen(b"half", PeerClose.RST)
    assert ending_of(connection).cause is Cause.RAISED


async def test_cancellation_is_rst_to_the_peer() -> None:
    with anyio.CancelScope() as scope:
        async with open_peer() as (connection, peer):
            scope.cancel()
            await connection.receive()
    assert await peer.read_to_end() == Seen(b"", PeerClose.RST)
    assert ending_of(connection).cause is Cause.CANCELLED


async def test_cancelled_while_it_ends_has_its_fin_all_the_same() -> None:
    with anyio.CancelScope() as scope:
        async with open_peer() as (connection, peer):
            await connection.send(b"all of it")
            scope.cancel()
    assert await peer.read_to_end() == Seen(b"all of it", PeerClose.FIN)
    assert ending_of(connection).cause is Cause.RETURNED


async def test_peer_that_reads_in_the_block() -> None:
    async with open_peer() as (connection, peer):
        async with anyio.create_task_group() as tg:
            tg.start_soon(peer.read_to_end)
            await connection.send(ANSWER * 100)
            await connection.send_eof()
        await assert_fin(peer, ANSWER * 100)
    await assert_fin(peer, ANSWER * 100)


async def test_peer_that_reads_across_the_end_of_the_block() -> None:
    async with anyio.create_task_group() as tg:
        async with open_peer() as (connection, peer):
            tg.start_soon(peer.read_to_end)
            await connection.send(ANSWER * 100)
    await assert_fin(peer, ANSWER * 100)


async def test_peer_that_reads_across_a_failure_of_the_block() -> None:
    with anyio.fail_after(LONG):
        async with anyio.create_task_group() as tg:
            with pytest.raises(Failure):
                async with open_peer() as (connection, peer):
                    tg.start_soon(peer.read_to_end)
                    await connection.send(b"half")
                    await wait_all_tasks_blocked()
                    raise Failure
    assert await assert_rst(peer) == Seen(b"half", PeerClose.RST)


async def test_peer_that_stopped_reading_has_it_all_later() -> None:
    async with open_peer(drain=Drain(timeout=0.1)) as (connection, peer):
        peer.stop_reading()
        await connection.send(ANSWER)
    await assert_fin(peer, ANSWER)
    assert ending_of(connection).peer is PeerClose.NONE


async def test_peer_that_closes_or_resets_in_the_block() -> None:
    async with open_peer() as (connection, peer):
        peer.close()
        with pytest.raises(anyio.EndOfStream):
            await connection.receive()
    with pytest.raises(anyio.ClosedResourceError):
        await peer.read_to_end()
    async with open_peer() as (connection, peer):
        peer.reset()
        with pytest.raises(PeerReset):
            await connection.receive()


async def test_detached_connection_is_left_alone() -> None:
    async with open_peer() as (connection, peer):
        stream = connection.detach()
        await stream.send(b"mine")
        assert await peer.receive_exactly(4) == b"mine"
    await stream.aclose()
    with pytest.raises(anyio.ClosedResourceError):
        await peer.read_to_end()


# Faults


async def test_short_sends_take_so_many_bytes_each() -> None:
    faults = Faults()
    async with open_peer(faults=faults) as (connection, peer):
        with capturing(port_of(connection)) as capture:
            faults.shorten_sends(3, 2)
            await connection.send(b"0123456789")
            assert await peer.receive_exactly(10) == b"0123456789"
    lengths = [s.length for s in capture.segments if s.direction is Direction.FROM_PORT]
    assert lengths == [2, 2, 2, 4]


async def test_peer_resets_after_so_many_bytes() -> None:
    faults = Faults()
    with pytest.raises(PeerReset):
        async with open_peer(faults=faults) as (connection, _):
            with capturing(port_of(connection)) as capture:
                await connection.send(b"greeting")
                faults.reset_after(7)
                await connection.send(b"0123456789")
    segments = [s for s in capture.segments if s.direction is Direction.FROM_PORT]
    assert [s.length for s in segments] == [8, 7]
    (rst,) = capture.having(TCPFlag.RST)
    assert rst.direction is Direction.TO_PORT
    assert ending_of(connection).peer is PeerClose.RST


async def test_peer_resets_between_two_sends() -> None:
    faults = Faults()
    async with open_peer(faults=faults) as (connection, _):
        faults.reset_after(8)
        await connection.send(b"greeting")
        with pytest.raises(PeerReset):
            await connection.send(b"more")


async def test_peer_has_reset_from_the_start() -> None:
    faults = Faults()
    faults.reset_after(0)
    async with open_peer(faults=faults) as (connection, _):
        with pytest.raises(PeerReset):
            await connection.receive()


async def test_closed_window_makes_a_send_wait() -> None:
    async with open_peer(small_buffers=True) as (connection, peer):
        async with anyio.create_task_group() as tg:
            tg.start_soon(connection.send, ANSWER)
            await wait_all_tasks_blocked()
            tg.cancel_scope.cancel()
    seen = await assert_rst(peer)
    assert len(seen.data) < 20_000
    assert ending_of(connection).cause is Cause.TORN_SEND


async def test_window_that_opens_again_lets_a_send_go_on() -> None:
    answer = ANSWER[:30_000]
    async with open_peer(small_buffers=True) as (connection, peer):
        async with anyio.create_task_group() as tg:
            tg.start_soon(connection.send, answer)
            await wait_all_tasks_blocked()
            assert await peer.receive_exactly(len(answer)) == answer
    await assert_fin(peer, b"")


async def test_faults_refuse_what_makes_no_sense() -> None:
    faults = Faults()
    for count, size in ((-1, 1), (1, 0)):
        with pytest.raises(ValueError, match="cannot shorten"):
            faults.shorten_sends(count, size)
    with pytest.raises(ValueError, match="cannot reset"):
        faults.reset_after(-1)
    async with open_peer(faults=faults):
        with pytest.raises(RuntimeError, match="another connection"):
            async with open_peer(faults=faults):
                pytest.fail("entered")


# assert_fin() and assert_rst()


@pytest.mark.parametrize(
    ("sent", "how", "data", "told"),
    [
        (b"", "reset", None, "expected FIN; got RST after 0 bytes"),
        (
            b"half",
            "reset",
            b"half of it",
            (
                "expected FIN after 10 bytes, b'half of it'; "
                "got RST after 4 bytes, b'half'; different from offset 4 on"
            ),
        ),
        (
            b"." * 1000 + b"end",
            "close",
            b"",
            (
                "expected FIN after 0 bytes; got FIN after 1,003 bytes, "
                f"the last of them b'{'.' * 37}end'; different from offset 0 on"
            ),
        ),
        (
            b"x",
            "nothing",
            None,
            "expected FIN; got neither FIN nor RST within 0.1 s, and 1 byte, b'x'",
        ),
    ],
)
async def test_assert_fin_tells_what_came(
    sent: bytes, how: str, data: bytes | None, told: str
) -> None:
    with listening() as (listener, port):
        async with connect_peer(port) as peer:
            with listener.accept()[0] as sock:
                sock.sendall(sent)
                if how == "reset":
                    reset(sock)
                elif how == "close":
                    sock.close()
                with pytest.raises(AssertionError) as raised:
                    await assert_fin(peer, data, timeout=0.1)
    assert str(raised.value) == told


async def test_assert_rst_tells_what_came() -> None:
    with listening() as (listener, port):
        async with connect_peer(port) as peer:
            with listener.accept()[0] as sock:
                with pytest.raises(AssertionError, match="got neither FIN nor RST"):
                    await assert_rst(peer, timeout=0.1)
                sock.sendall(b"all")
            with pytest.raises(AssertionError) as raised:
                await assert_rst(peer)
    assert str(raised.value) == "expected RST; got FIN after 3 bytes, b'all'"


async def test_assertions_return_what_was_seen() -> None:
    async with open_peer() as (connection, peer):
        await connection.send(b"all")
    assert await assert_fin(peer) == Seen(b"all", PeerClose.FIN)
    async with open_peer() as (connection, peer):
        await connection.send(b"half")
        connection.abort()
    assert await assert_rst(peer) == Seen(b"half", PeerClose.RST)


# capture_segments()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_capture_has_each_segment_once(host: str) -> None:
    with listening(host) as (listener, port), capturing(port) as capture:
        with socket.create_connection((host, port)) as client:
            other_port = client.getsockname()[1]
            sock, _ = listener.accept()
            with sock:
                sock.sendall(b"hello")
                client.recv(5)
            assert client.recv(1) == b""
    syn, syn_ack = capture.having(TCPFlag.SYN)
    assert (syn.direction, syn.flags) == (Direction.TO_PORT, TCPFlag.SYN)
    assert syn_ack.direction is Direction.FROM_PORT
    assert syn_ack.flags == TCPFlag.SYN | TCPFlag.ACK
    (data,) = (s for s in capture.segments if s.length)
    assert (data.direction, data.length) == (Direction.FROM_PORT, 5)
    assert data.sequence == (syn_ack.sequence + 1) % 2**32
    ours, theirs = capture.having(TCPFlag.FIN)
    assert (ours.direction, theirs.direction) == tuple(Direction)
    assert ours.sequence == (data.sequence + 5) % 2**32
    assert not capture.having(TCPFlag.RST)
    assert {s.other_port for s in capture.segments} == {other_port}


async def test_capture_sees_a_reset_while_it_runs() -> None:
    with listening() as (listener, port), capturing(port) as capture:
        with socket.create_connection(("127.0.0.1", port)):
            reset(listener.accept()[0])
            (rst,) = capture.having(TCPFlag.RST)
    assert rst.direction is Direction.FROM_PORT
    with pytest.raises(FrozenInstanceError):
        rst.length = 1  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]


async def test_capture_keeps_to_its_port() -> None:
    with listening() as (_, port), listening() as (_, other), capturing(port) as capture:
        socket.create_connection(("127.0.0.1", other)).close()
    assert capture.segments == ()


async def test_capture_that_lost_segments_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("anyio_rst.testing._capture.BUFFER", 1)
    with pytest.raises(RuntimeError, match="segments were lost"):
        with listening() as (_, port), capturing(port) as capture:
            for _ in range(10):
                socket.create_connection(("127.0.0.1", port)).close()
    with pytest.raises(RuntimeError, match="segments were lost"):
        capture.having(TCPFlag.SYN)


@pytest.mark.skipif(os.geteuid() != 0, reason="nobody else can give up CAP_NET_RAW")
def test_capture_without_the_right_to_it_says_so() -> None:
    program = (
        "import os\n"
        "from anyio_rst.testing import CaptureUnavailable, capture_segments\n"
        "os.setuid(65534)\n"
        "try:\n"
        "    with capture_segments(80): pass\n"
        "except CaptureUnavailable as exc: print(exc)\n"
    )
    told = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert told == "capturing segments needs CAP_NET_RAW\n"


def test_public_names_are_shown_as_users_import_them() -> None:
    for name in anyio_rst.testing.__all__:
        assert getattr(anyio_rst.testing, name).__module__ == "anyio_rst.testing"
