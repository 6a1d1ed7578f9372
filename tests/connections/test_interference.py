"""What others do to the socket of a connection: it blocks nobody, and ends as told."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import anyio
import anyio.to_thread
import pytest
from anyio.abc import SocketAttribute

from anyio_rst import (
    Cause,
    CloseKind,
    Connection,
    Drain,
    Ending,
    PeerClose,
    PeerReset,
    _tcp_info,
    connection_scope,
)

from securing import TLSPeer, each, talk
from serving import (
    LONG,
    Peer,
    Seen,
    Service,
    arrived,
    fill_buffers,
    receive_all,
    serve,
    settled,
    soon,
    stream_and_peer,
    while_waiting,
)

pytestmark = pytest.mark.anyio

ENDLESS = Drain(timeout=LONG)
SHORT = Drain(timeout=0.1)

# More than the kernel takes before the peer reads.
TOO_MUCH = bytes(8 * 2**20)

SOL_TCP = socket.IPPROTO_TCP
LINGER_OFF = struct.pack("ii", 0, 0)
LINGER_ON = struct.pack("ii", 1, 5)
LINGER_RESET = struct.pack("ii", 1, 0)

# linux/net_tstamp.h: software time stamps of what is sent and received.
SO_TIMESTAMPING = 37
TIMESTAMPS = 1 << 1 | 1 << 3 | 1 << 4 | 1 << 8


class Failure(Exception):
    pass


def raw_of(conn: Connection) -> socket.socket:
    return conn.extra(SocketAttribute.raw_socket)


def child(code: str, sock: Any) -> str:
    """What *code*, run in a process that has *sock*, prints."""
    program = f"import os, socket; sock = socket.socket(fileno={sock.fileno()}); {code}"
    command = [sys.executable, "-IS", "-c", program]
    run = subprocess.run(
        command, pass_fds=[sock.fileno()], check=True, stdout=subprocess.PIPE, text=True
    )
    return run.stdout.strip()


def linger(sock: Any, value: bytes) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, value)


async def ended_well(service: Service) -> Ending:
    """The end of the next connection, whose handler has raised nothing."""
    served = await service.next()
    ending = await served.ending()
    assert served.raised is None
    return ending


async def ended(connections: list[Connection]) -> None:
    while not connections or connections[0].ending is None:
        await anyio.sleep(0.01)


def until_gone(sock: Any) -> None:
    """The event loop stands still until the peer's RST is here."""
    poll = select.poll()
    poll.register(sock, 0)
    assert poll.poll(LONG * 1000)


def take_error(sock: Any, _: object = None) -> None:
    until_gone(sock)
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNRESET


def take_error_in_a_child(sock: Any, _: object = None) -> None:
    until_gone(sock)
    code = "print(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))"
    assert child(code, sock) == str(errno.ECONNRESET)


@contextmanager
def prompt(seconds: float = 1.0) -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < seconds


@asynccontextmanager
async def heartbeat(longest: float = 1.0) -> AsyncIterator[None]:
    """The event loop is never held up for longer than *longest* seconds."""
    gaps = [0.0]

    async def beat() -> None:
        while True:
            before = time.monotonic()
            await anyio.sleep(0.01)
            gaps.append(time.monotonic() - before)

    async with anyio.create_task_group() as tg:
        tg.start_soon(beat)
        await anyio.sleep(0.02)
        yield
        await anyio.sleep(0.02)
        tg.cancel_scope.cancel()
    assert max(gaps) < longest


@contextmanager
def idle() -> Iterator[None]:
    """The event loop's thread does next to nothing."""
    start, before = time.thread_time(), time.monotonic()
    yield
    assert time.thread_time() - start < 0.4 * (time.monotonic() - before)


# A loss that somebody else was told of. To recv(2) it is an end like that by a FIN.

TAKERS = pytest.mark.parametrize("take", [take_error, take_error_in_a_child])


def assert_no_fin_of_the_peer(conn: Connection, kind: CloseKind) -> None:
    assert conn.ending is not None
    assert conn.ending.kind is kind
    assert conn.ending.peer is not PeerClose.FIN


@TAKERS
@pytest.mark.parametrize("first", ["nothing", "half-close"])
async def test_loss_that_somebody_else_was_told_of_is_no_end(
    kind: str, first: str, take: Callable[..., None]
) -> None:
    async def handler(conn: Connection) -> None:
        def reset() -> None:
            peer.reset()
            take(raw)

        raw = raw_of(conn)
        if first == "half-close":
            await conn.send_eof()
        assert await while_waiting(conn.receive(), peer.sock.sendall, b"half") == b"half"
        async with soon(reset):
            with pytest.raises(anyio.BrokenResourceError):
                await conn.receive()
        await conn.receive()

    async with serve(kind, handler) as service:
        with service.connect() as peer:
            served = await service.next()
            await served.ending()
    assert isinstance(served.raised, anyio.BrokenResourceError)
    assert_no_fin_of_the_peer(served.connection, CloseKind.RST)


@pytest.mark.parametrize("way", ["return", "failure"])
async def test_loss_that_is_never_asked_for_is_no_fin(kind: str, way: str) -> None:
    """Not even behind a FIN of ours."""
    half_closed = anyio.Event()
    gone = anyio.Event()

    async def handler(conn: Connection) -> None:
        await conn.send_eof()
        half_closed.set()
        await gone.wait()
        take_error(raw_of(conn))
        if way == "failure":
            raise Failure

    async with serve(kind, handler, drain=ENDLESS) as service:
        with service.connect() as peer:
            await half_closed.wait()
            assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)
            peer.reset()
            gone.set()
            served = await service.next()
            await served.ending()
    # What left this machine is the FIN of the half-close.
    expected = CloseKind.RST if way == "failure" else CloseKind.FIN
    assert_no_fin_of_the_peer(served.connection, expected)


async def test_loss_in_the_drain_is_no_fin_of_the_peer(kind: str) -> None:
    raw: Any = None

    async def handler(conn: Connection) -> None:
        nonlocal raw
        raw = raw_of(conn)

    async with serve(kind, handler, drain=ENDLESS) as service:
        with service.connect() as peer:
            assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)
            served = await service.next()
            await settled()
            assert served.connection.ending is None
            peer.reset()
            take_error(raw)
            await served.ending()
    assert_no_fin_of_the_peer(served.connection, CloseKind.FIN)


async def test_loss_of_a_fin_that_waits_is_no_fin(kind: str) -> None:
    raw: Any = None

    async def handler(conn: Connection) -> None:
        nonlocal raw
        raw = raw_of(conn)
        fill_buffers(raw)

    async with serve(kind, handler, drain=ENDLESS) as service:
        with service.connect(buffer=4096) as peer:
            served = await service.next()
            await settled()
            assert served.connection.ending is None
            peer.reset()
            take_error(raw)
            await served.ending()
    assert_no_fin_of_the_peer(served.connection, CloseKind.RST)


@each("own", "trio", sides=["server", "client"])
async def test_loss_below_tls_is_no_end(way: str, side: str) -> None:
    async def body(conn: Connection) -> None:
        raw_of(conn)
        ready.set()
        await gone.wait()
        take_error(raw_of(conn))
        await conn.receive()

    async def script(peer: TLSPeer) -> None:
        await ready.wait()
        peer.raw.reset()
        gone.set()

    ready, gone = anyio.Event(), anyio.Event()
    it = await talk(way, side, body, script, expecting=anyio.BrokenResourceError)
    assert isinstance(it.raised, anyio.BrokenResourceError)
    assert "close_notify" not in str(it.raised)
    assert_no_fin_of_the_peer(it.connection, CloseKind.RST)


@pytest.mark.parametrize("first", ["nothing", "half-close"])
async def test_fin_stays_one_whoever_asks_for_errors(kind: str, first: str) -> None:
    async def handler(conn: Connection) -> None:
        if first == "half-close":
            await conn.send_eof()
        await arrived(peer)
        raw = raw_of(conn)
        assert raw.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        assert await receive_all(conn) == b"all"

    async with serve(kind, handler, drain=ENDLESS) as service:
        with service.connect() as peer:
            peer.sock.sendall(b"all")
            peer.send_eof()
            assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)
            served = await service.next()
            ending = await served.ending()
    assert served.raised is None
    assert (ending.kind, ending.peer) == (CloseKind.FIN, PeerClose.FIN)


async def test_kernel_that_cannot_tell_is_believed(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As gVisor, whose TCP_INQ does not count the FIN: no false alarm."""
    monkeypatch.setattr(_tcp_info, "_has_fin", lambda sock: False)
    monkeypatch.setattr(_tcp_info, "_tells_of_fin", lambda: False)

    async def handler(conn: Connection) -> None:
        await conn.send_eof()
        await arrived(peer)
        assert await receive_all(conn) == b"all"

    async with serve(kind, handler) as service:
        with service.connect() as peer:
            peer.sock.sendall(b"all")
            peer.send_eof()
            ending = await service.ending()
    assert (ending.kind, ending.peer) == (CloseKind.FIN, PeerClose.FIN)


# The connection is shut down or reset by somebody else on this side.


async def test_receiving_shut_down_by_somebody_else_is_no_end(kind: str) -> None:
    async def handler(conn: Connection) -> None:
        shut = raw_of(conn).shutdown
        for _ in range(2):
            async with soon(shut, socket.SHUT_RD):
                with pytest.raises(anyio.ClosedResourceError, match="other code"):
                    await conn.receive()
        await conn.send(b"answer")

    async with serve(kind, handler, drain=ENDLESS) as service:
        with service.connect() as peer, prompt():
            assert await peer.read_to_end() == Seen(b"answer", PeerClose.FIN)
            served = await service.next()
            await served.ending()
    assert served.raised is None
    assert_no_fin_of_the_peer(served.connection, CloseKind.FIN)


async def test_end_after_receiving_was_shut_down_is_one(kind: str) -> None:
    async def handler(conn: Connection) -> None:
        raw_of(conn).shutdown(socket.SHUT_RD)
        peer.sock.sendall(b"still there")
        peer.send_eof()
        await arrived(peer)
        assert await receive_all(conn) == b"still there"

    async with serve(kind, handler) as service:
        with service.connect() as peer:
            ending = await ended_well(service)
    assert ending.peer is PeerClose.FIN


@pytest.mark.parametrize("how", [socket.SHUT_WR, socket.SHUT_RDWR], ids=["WR", "RDWR"])
async def test_fin_by_somebody_else_is_in_the_ending(kind: str, how: int) -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(b"half")
        raw_of(conn).shutdown(how)
        with pytest.raises(anyio.ClosedResourceError, match="other code has half-closed"):
            await conn.send(b"never")
        await has_read.wait()
        raise Failure

    has_read = anyio.Event()
    async with serve(kind, handler) as service:
        with service.connect() as peer:
            assert await peer.read_to_end() == Seen(b"half", PeerClose.FIN)
            has_read.set()
            served = await service.next()
            ending = await served.ending()
            with pytest.raises(ConnectionError):
                for _ in range(2):
                    peer.sock.sendall(b"x")
                    until_gone(peer.sock)
    assert isinstance(served.raised, Failure)
    assert (ending.kind, ending.peer) == (CloseKind.RST, PeerClose.NONE)
    assert ending.fin_sent_before_reset


@pytest.mark.parametrize("drain", [Drain(), None], ids=["drain", "no drain"])
async def test_fin_by_somebody_else_and_then_the_peers_are_a_clean_end(
    kind: str, drain: Drain | None
) -> None:
    async def handler(conn: Connection) -> None:
        raw_of(conn).shutdown(socket.SHUT_WR)
        seen.append(await peer.read_to_end())
        peer.send_eof()
        await arrived(peer)

    seen: list[Seen] = []
    async with serve(kind, handler, drain=drain) as service:
        with service.connect() as peer:
            ending = await ended_well(service)
    assert seen == [Seen(b"", PeerClose.FIN)]
    assert (ending.kind, ending.cause) == (CloseKind.FIN, Cause.RETURNED)
    assert ending.peer in (PeerClose.FIN, PeerClose.NONE if drain is None else None)


def dissolve(sock: socket.socket) -> None:
    unspecified = struct.pack("H14x", socket.AF_UNSPEC)
    assert ctypes.CDLL(None).connect(sock.fileno(), unspecified, len(unspecified)) == 0


@pytest.mark.parametrize("told", ["receive", "send", "nobody"])
async def test_reset_by_somebody_else_is_not_the_peers(kind: str, told: str) -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(b"half")
        raw = raw_of(conn)
        if told == "receive":
            async with soon(dissolve, raw):
                with pytest.raises(anyio.BrokenResourceError) as raised:
                    await conn.receive()
            assert not isinstance(raised.value, PeerReset)
        else:
            dissolve(raw)
            if told == "send":
                with pytest.raises(anyio.BrokenResourceError) as raised:
                    await conn.send(b"x")
                assert not isinstance(raised.value, PeerReset)

    async with serve(kind, handler) as service:
        with service.connect() as peer:
            assert await peer.read_to_end() == Seen(b"half", PeerClose.RST)
            served = await service.next()
            ending = await served.ending()
    assert served.raised is None
    assert (ending.kind, ending.peer) == (CloseKind.RST, PeerClose.NONE)


# SO_LINGER.


@pytest.mark.parametrize("value", [LINGER_OFF, LINGER_ON], ids=["off", "on"])
@pytest.mark.parametrize("way", ["failure", "abort", "torn"])
async def test_linger_option_of_others_does_not_make_a_reset_a_fin(
    kind: str, way: str, value: bytes
) -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(b"half")
        linger(raw_of(conn), value)
        if way == "failure":
            raise Failure
        if way == "abort":
            conn.abort()
        else:
            with anyio.move_on_after(0.05):
                await conn.send(TOO_MUCH)

    async with serve(kind, handler) as service:
        with service.connect(buffer=4096) as peer:
            served = await service.next()
            with prompt():
                ending = await served.ending()
            assert (await peer.read_to_end()).close is PeerClose.RST
    assert ending.kind is CloseKind.RST


@each("own", "start_tls", "trio", sides=["server"])
async def test_linger_option_of_others_makes_no_fin_without_a_close_notify(
    way: str, side: str
) -> None:
    async def body(conn: Connection) -> None:
        connections.append(conn)
        fill_buffers(raw_of(conn))
        linger(raw_of(conn), LINGER_OFF)

    async def script(peer: TLSPeer) -> None:
        await ended(connections)
        seen.append(await peer.raw.read_to_end())

    connections: list[Connection] = []
    seen: list[Seen] = []
    it = await talk(way, side, body, script, buffer=4096, drain=SHORT)
    assert seen[0].close.value == it.ending.kind.value
    if it.ending.kind is CloseKind.RST:
        assert it.ending.cause is Cause.TORN_SEND


@pytest.mark.parametrize("value", [LINGER_RESET, LINGER_ON], ids=["reset", "on"])
async def test_linger_option_in_the_drain_neither_resets_nor_blocks(
    kind: str, value: bytes
) -> None:
    async def handler(conn: Connection) -> None:
        held.append((conn, raw_of(conn), fill_buffers(raw_of(conn))))

    held: list[tuple[Connection, socket.socket, int]] = []
    async with serve(kind, handler, drain=Drain(timeout=0.2)) as service:
        with service.connect(buffer=4096) as peer:
            served = await service.next()
            with anyio.fail_after(LONG):
                while "(open)" in repr(served.connection):
                    await anyio.sleep(0)
            ((conn, raw, size),) = held
            assert conn.ending is None
            async with heartbeat():
                linger(raw, value)
                ending = await served.ending()
            assert await peer.read_to_end() == Seen(bytes(size), PeerClose.FIN)
    assert ending.kind is CloseKind.FIN
    assert ending.unacknowledged


# Blocking.


def make_blocking(sock: Any) -> None:
    os.set_blocking(sock.fileno(), True)


def make_blocking_in_a_child(sock: Any) -> None:
    child("os.set_blocking(sock.fileno(), True)", sock)


def give_a_timeout(sock: Any) -> None:
    sock.settimeout(3)


def set_the_default(sock: Any) -> None:
    socket.setdefaulttimeout(3)


def limit_in_the_kernel(sock: Any) -> None:
    make_blocking(sock)
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", 3, 0))


BLOCKERS = pytest.mark.parametrize(
    "interfere",
    [
        make_blocking,
        make_blocking_in_a_child,
        give_a_timeout,
        set_the_default,
        limit_in_the_kernel,
    ],
)


@pytest.fixture
def default_timeout() -> Iterator[None]:
    yield
    socket.setdefaulttimeout(None)


async def check_that_nothing_blocks(conn: Connection) -> None:
    async with heartbeat():
        with anyio.move_on_after(0.05) as scope:
            await conn.receive()
        assert scope.cancelled_caught
        with anyio.move_on_after(0.05) as scope:
            await conn.send(TOO_MUCH)
        assert scope.cancelled_caught


@BLOCKERS
@pytest.mark.usefixtures("default_timeout")
async def test_mode_of_the_socket_changed_by_others_blocks_nobody(
    kind: str, interfere: Callable[[Any], None]
) -> None:
    async def handler(conn: Connection) -> None:
        interfere(raw_of(conn))
        await check_that_nothing_blocks(conn)

    async with serve(kind, handler) as service:
        with service.connect(buffer=4096) as peer:
            ending = await ended_well(service)
            assert (await peer.read_to_end()).close is PeerClose.RST
    assert ending.cause is Cause.TORN_SEND


@BLOCKERS
@pytest.mark.usefixtures("default_timeout")
async def test_mode_of_the_stream_that_was_taken_over_blocks_nobody(
    owner: str, interfere: Callable[[Any], None]
) -> None:
    stream, peer = await stream_and_peer(owner, buffer=4096)
    with peer:
        async with connection_scope(stream) as conn:
            shown = stream.socket if owner == "trio" else raw_of(stream)
            # Some objects that show a socket refuse a time-out.
            with suppress(AttributeError, TypeError, ValueError):
                interfere(shown)
            await check_that_nothing_blocks(conn)
        assert (await peer.read_to_end()).close is PeerClose.RST


@BLOCKERS
@pytest.mark.usefixtures("default_timeout")
async def test_mode_of_the_socket_does_not_block_the_drain(
    kind: str, interfere: Callable[[Any], None]
) -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(b"answer")
        interfere(raw_of(conn))

    async with serve(kind, handler, drain=Drain(timeout=LONG)) as service:
        with service.connect() as peer:
            async with heartbeat():
                assert await peer.read_to_end() == Seen(b"answer", PeerClose.FIN)
                peer.sock.sendall(b"unread")
                peer.send_eof()
                ending = await service.ending()
    assert (ending.kind, ending.discarded) == (CloseKind.FIN, len(b"unread"))


@BLOCKERS
@each("own", "wrapped", "trio", sides=["server"])
@pytest.mark.usefixtures("default_timeout")
async def test_mode_of_the_socket_does_not_block_tls(
    way: str, side: str, interfere: Callable[[Any], None]
) -> None:
    """The close_notify finds no room, unless the kernel of the peer makes some."""

    async def body(conn: Connection) -> None:
        connections.append(conn)
        async with heartbeat():
            interfere(raw_of(conn))
            with anyio.move_on_after(0.05) as scope:
                await conn.receive()
            assert scope.cancelled_caught
        fill_buffers(raw_of(conn))

    async def script(peer: TLSPeer) -> None:
        async with heartbeat():
            await ended(connections)
        seen.append(await peer.raw.read_to_end())

    connections: list[Connection] = []
    seen: list[Seen] = []
    it = await talk(way, side, body, script, buffer=4096, drain=SHORT)
    assert seen[0].close.value == it.ending.kind.value
    if it.ending.kind is CloseKind.RST:
        assert it.ending.cause is Cause.TORN_SEND


# Waiting: no time is spent on it.


def urgent(raw: socket.socket, peer: Peer) -> None:
    peer.sock.send(b"!", socket.MSG_OOB)


def low_water_mark(raw: socket.socket, peer: Peer) -> None:
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 100)


def blocking(raw: socket.socket, peer: Peer) -> None:
    limit_in_the_kernel(raw)


def timestamps(raw: socket.socket, peer: Peer) -> None:
    raw.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPING, TIMESTAMPS)
    raw.send(b"reported to the error queue")


def tiny_buffers(raw: socket.socket, peer: Peer) -> None:
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        raw.setsockopt(socket.SOL_SOCKET, option, 1)


def cork(raw: socket.socket, peer: Peer) -> None:
    raw.setsockopt(SOL_TCP, socket.TCP_CORK, 1)
    raw.setsockopt(SOL_TCP, socket.TCP_NODELAY, 0)


OPTIONS = pytest.mark.parametrize(
    "interfere", [urgent, low_water_mark, blocking, timestamps, tiny_buffers, cork]
)


@OPTIONS
async def test_socket_options_cost_no_time_while_receive_waits(
    kind: str, interfere: Callable[[Any, Peer], None]
) -> None:
    async def handler(conn: Connection) -> None:
        interfere(raw_of(conn), peer)
        await arrived(peer)
        async with anyio.create_task_group() as tg:
            tg.start_soon(wait_idle, conn)
            await anyio.sleep(0.05)
            with idle():
                await anyio.sleep(0.15)
            peer.sock.sendall(bytes(100))
            peer.send_eof()

    async def wait_idle(conn: Connection) -> None:
        received.append(await receive_all(conn))

    received: list[bytes] = []
    async with serve(kind, handler, drain=ENDLESS) as service:
        with service.connect() as peer:
            ending = await ended_well(service)
            assert (await peer.read_to_end()).close is PeerClose.FIN
    assert received == [bytes(100)]
    assert (ending.kind, ending.peer) == (CloseKind.FIN, PeerClose.FIN)


@OPTIONS
async def test_socket_options_cost_no_time_while_send_and_drain_wait(
    kind: str, interfere: Callable[[Any, Peer], None]
) -> None:
    async def handler(conn: Connection) -> None:
        interfere(raw_of(conn), peer)
        sent = fill_buffers(raw_of(conn))
        async with anyio.create_task_group() as tg:
            tg.start_soon(conn.send, b"last")
            await anyio.sleep(0.05)
            with idle():
                await anyio.sleep(0.15)
            filled.append(sent)

    filled: list[int] = []
    async with serve(kind, handler, drain=ENDLESS) as service:
        with service.connect(buffer=4096) as peer:
            with anyio.fail_after(LONG):
                while not filled:
                    await anyio.sleep(0.01)
            assert (await peer.read_to_end()).data.endswith(b"last")
            served = await service.next()
            await anyio.sleep(0.05)
            with idle():
                await anyio.sleep(0.15)
            assert served.connection.ending is None
            peer.send_eof()
            ending = await served.ending()
    assert served.raised is None
    assert (ending.kind, ending.peer) == (CloseKind.FIN, PeerClose.FIN)


@OPTIONS
async def test_socket_options_hide_no_reset(
    kind: str, interfere: Callable[[Any, Peer], None]
) -> None:
    async def handler(conn: Connection) -> None:
        interfere(raw_of(conn), peer)
        await arrived(peer)
        async with soon(peer.reset):
            with pytest.raises(PeerReset):
                await conn.receive()

    async with serve(kind, handler) as service:
        with service.connect() as peer:
            ending = await ended_well(service)
    assert (ending.kind, ending.peer) == (CloseKind.RST, PeerClose.RST)


@OPTIONS
async def test_socket_options_do_not_touch_our_reset(
    kind: str, interfere: Callable[[Any, Peer], None]
) -> None:
    async def handler(conn: Connection) -> None:
        interfere(raw_of(conn), peer)
        raise Failure

    async with serve(kind, handler) as service:
        with service.connect() as peer:
            assert (await peer.read_to_end()).close is PeerClose.RST
            ending = await service.ending()
    assert (ending.kind, ending.cause) == (CloseKind.RST, Cause.RAISED)


async def test_corked_answer_is_sent_with_the_fin(kind: str) -> None:
    async def handler(conn: Connection) -> None:
        cork(raw_of(conn), peer)
        await conn.send(b"answer")

    async with serve(kind, handler, drain=ENDLESS) as service:
        with service.connect() as peer:
            with prompt(0.15):  # not after the 200 ms of tcp(7)
                assert await peer.read_to_end() == Seen(b"answer", PeerClose.FIN)
            peer.send_eof()
            await service.ending()


@pytest.mark.parametrize("inline", [False, True])
async def test_urgent_mark_is_no_end(kind: str, inline: bool) -> None:
    async def handler(conn: Connection) -> None:
        raw_of(conn).setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, inline)
        has_set.set()
        assert await receive_all(conn) == (b"ab!cd" if inline else b"abcd")

    has_set = anyio.Event()
    async with serve(kind, handler, drain=ENDLESS) as service:
        with service.connect() as peer:
            await has_set.wait()
            peer.sock.sendall(b"ab")
            peer.sock.send(b"!", socket.MSG_OOB)
            peer.sock.sendall(b"cd")
            peer.send_eof()
            assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)
            ending = await ended_well(service)
    assert (ending.kind, ending.peer) == (CloseKind.FIN, PeerClose.FIN)


async def test_low_water_mark_does_not_keep_back_an_end(kind: str) -> None:
    async def handler(conn: Connection) -> None:
        low_water_mark(raw_of(conn), peer)
        has_set.set()
        assert await receive_all(conn) == b"less"

    has_set = anyio.Event()
    async with serve(kind, handler) as service:
        with service.connect() as peer:
            await has_set.wait()
            peer.sock.sendall(b"less")
            await arrived(peer)
            peer.send_eof()
            assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)
            await ended_well(service)
