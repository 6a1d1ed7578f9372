"""Networks that lose or hold what an ending needs, or take very little of it at a time.

Two machines with a cable between them, see cutting.py. The peers judge, over there.
"""

from __future__ import annotations

import fcntl
import socket
import struct
import termios
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from anyio.abc import SocketAttribute
from conftest import BACKENDS
from cutting import (
    OUR_ADDRESS,
    Cable,
    cable,
    carry,
    in_a_thread_that_ends,
    link,
    on_machine,
)

from anyio_rst import (
    Cause,
    CloseKind,
    Connection,
    Drain,
    Ending,
    PeerClose,
    Server,
    connection_scope,
    serve_tcp,
)

from serving import LONG, Handler, Peer, Seen, queued, timeout_once_settled

# PyPy has no name for it: linux/socket.h.
MSG_FASTOPEN: int = getattr(socket, "MSG_FASTOPEN", 0x20000000)

# The least that an IPv4 host has to take (RFC 791, 3.2).
SMALLEST_MTU = 576

# Seconds for what is not to come.
SHORT = 0.2

FIN, SYN, RST = 0x01, 0x02, 0x04

# Of net.ipv4.tcp_fastopen (ip-sysctl): client, server; data without a cookie, for each;
# on all listening sockets.
FAST_OPEN = 0x1 | 0x2 | 0x4 | 0x200 | 0x400

IFA_F_TENTATIVE = 0x40  # not to be used yet: RFC 4862, linux/if_addr.h

ESTABLISHED, SYN_RECEIVED = 1, 3  # linux/tcp_states.h


class Failure(Exception):
    pass


@pytest.fixture
def between(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cable]:
    if (missing := link.available()) is not None:
        pytest.skip(f"there are no two machines: {missing}")
    monkeypatch.setattr(anyio.to_thread, "run_sync", in_a_thread_that_ends)
    with cable() as two_machines:
        yield two_machines


@pytest.fixture(params=BACKENDS)
def run_there(request: pytest.FixtureRequest, between: Cable) -> Any:
    """Run a function on our machine, with each event loop."""
    name, options = request.param
    run = partial(anyio.run, backend=name, backend_options=options)
    return partial(on_machine, between.ours, run)


class Service:
    def __init__(self, port: int, endings: Any) -> None:
        self.port = port
        self._endings = endings

    async def ending(self) -> Ending:
        with anyio.fail_after(LONG):
            ending: Ending = await self._endings.receive()
        return ending


@asynccontextmanager
async def serve(
    handler: Handler, *, host: str = OUR_ADDRESS, kind: str = "served", **options: Any
) -> AsyncIterator[Service]:
    """By `serve_tcp`, or in a scope around AnyIO's own stream."""
    send, receive = anyio.create_memory_object_stream[Ending](10)

    def ended(conn: Connection) -> None:
        assert conn.ending is not None
        send.send_nowait(conn.ending)

    async def in_scope(stream: Any) -> None:
        try:
            async with connection_scope(stream, **options) as conn:
                await handler(conn)
        except Failure:
            pass
        ended(conn)

    with send, receive:
        async with AsyncExitStack() as stack:
            if kind == "scope":
                # Entered before the task group, so that it is closed after that.
                listener = await anyio.create_tcp_listener(local_host=host)
                await stack.enter_async_context(listener)
            tg = await stack.enter_async_context(anyio.create_task_group())
            if kind == "scope":
                tg.start_soon(listener.serve, in_scope)
                port: int = listener.extra(SocketAttribute.local_port)
                yield Service(port, receive)
            else:
                server: Server = await tg.start(
                    partial(serve_tcp, handler, host=host, on_ending=ended, **options)
                )
                yield Service(server.port, receive)
            tg.cancel_scope.cancel()


def flags_of(packet: bytes) -> int:
    """Those of the TCP segment in an IPv4 packet."""
    return packet[4 * (packet[0] & 15) + 13]


def lose(between: Cable, is_lost: Callable[[bytes, bool], bool]) -> None:
    """It is asked of every packet, and whether that is the peers'."""

    def carry_others(packet: bytes, sender: int, receiver: int) -> None:
        if not is_lost(packet, sender == between.peers_end):
            carry(packet, sender, receiver)

    between.carry = carry_others


def set_mtu(size: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16si20x", link.NAME, size)
        fcntl.ioctl(sock, link.SIOCSIFMTU, request)


@pytest.fixture(params=["served", "scope"])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


# Small segments, and the smallest buffers.


@pytest.fixture
def narrow(between: Cable) -> Cable:
    for machine in (between.ours, between.theirs):
        on_machine(machine, set_mtu, SMALLEST_MTU)
    return between


ANSWER = bytes(range(256)) * 200


def make_small(conn: Connection) -> None:
    raw: Any = conn.extra(SocketAttribute.raw_socket)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)


@pytest.mark.parametrize("fails", [False, True], ids=["return", "raise"])
def test_an_answer_in_small_pieces(
    narrow: Cable, run_there: Any, kind: str, fails: bool
) -> None:
    async def handler(conn: Connection) -> None:
        make_small(conn)
        await conn.send(ANSWER)
        if fails:
            raw: Any = conn.extra(SocketAttribute.raw_socket)
            while queued(raw.fileno(), termios.TIOCOUTQ):
                await anyio.sleep(0.001)
            raise Failure

    async def main() -> None:
        async with serve(handler, kind=kind) as service:
            with narrow.connect(service.port, buffer=1) as peer:
                seen = await peer.read_to_end()
                assert seen.data == ANSWER
                assert seen.close is (PeerClose.RST if fails else PeerClose.FIN)
            ending = await service.ending()
        assert ending.kind is (CloseKind.RST if fails else CloseKind.FIN)
        assert ending.unacknowledged == 0

    run_there(main)


def test_an_answer_that_was_cut_short_in_small_pieces(
    narrow: Cable, run_there: Any, kind: str
) -> None:
    async def handler(conn: Connection) -> None:
        make_small(conn)
        async with timeout_once_settled():
            await conn.send(ANSWER)

    async def main() -> None:
        async with serve(handler, kind=kind) as service:
            with narrow.connect(service.port, buffer=1) as peer:
                ending = await service.ending()
                seen = await peer.read_to_end()
        assert seen.close is PeerClose.RST
        assert ANSWER.startswith(seen.data)
        assert (ending.kind, ending.cause) == (CloseKind.RST, Cause.TORN_SEND)
        assert ending.unacknowledged is not None
        assert ending.sent - ending.unacknowledged <= len(seen.data)

    run_there(main)


def test_an_answer_to_an_upload_in_small_pieces(
    narrow: Cable, run_there: Any, kind: str
) -> None:
    async def handler(conn: Connection) -> None:
        make_small(conn)
        await conn.receive()
        await conn.send(b"enough")

    async def main() -> None:
        async with serve(handler, kind=kind) as service:
            with narrow.connect(service.port, buffer=1) as peer:
                async with anyio.create_task_group() as tg:
                    tg.start_soon(peer.send, ANSWER)
                    assert await peer.read_to_end() == Seen(b"enough", PeerClose.FIN)
            ending = await service.ending()
        assert (ending.kind, ending.peer) == (CloseKind.FIN, PeerClose.FIN)

    run_there(main)


# A link that loses every RST.


def test_a_lost_reset_is_told_again_when_the_peer_sends(
    between: Cable, run_there: Any, kind: str
) -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(b"half")
        await conn.receive()
        raise Failure

    async def main() -> None:
        lose(between, lambda packet, is_theirs: bool(flags_of(packet) & RST))
        async with serve(handler, kind=kind) as service:
            with between.connect(service.port) as peer:
                assert await peer.receive(4) == b"half"
                await peer.send(b"?")
                assert (await service.ending()).kind is CloseKind.RST
                # Nothing but the peer's own patience tells it.
                seen = await peer.read_to_end(timeout=SHORT)
                assert seen == Seen(b"", PeerClose.NONE)
                between.carry = carry
                await peer.send(b"?")
                assert await peer.read_to_end() == Seen(b"", PeerClose.RST)

    run_there(main)


def test_a_clean_end_needs_no_reset(between: Cable, run_there: Any, kind: str) -> None:
    async def handler(conn: Connection) -> None:
        await conn.receive()
        await conn.send(b"all")

    async def main() -> None:
        lose(between, lambda packet, is_theirs: bool(flags_of(packet) & RST))
        async with serve(handler, kind=kind) as service:
            with between.connect(service.port) as peer:
                async with anyio.create_task_group() as tg:
                    tg.start_soon(peer.send, bytes(2**20))
                    assert await peer.read_to_end() == Seen(b"all", PeerClose.FIN)
            assert (await service.ending()).kind is CloseKind.FIN

    run_there(main)


# IPv6, and addresses that need the name of an interface: RFC 4007.


def link_local() -> str | None:
    """That of this machine's end of the cable: proc_pid_net(5).

    With the number of the interface, since the threads that uvloop resolves names in
    are on neither machine.
    """
    table = Path("/proc/thread-self/net/if_inet6")
    deadline = time.monotonic() + LONG
    while table.exists() and time.monotonic() < deadline:
        for line in table.read_text().splitlines():
            address, number, _, scope, flags, name = line.split()
            is_tentative = int(flags, 16) & IFA_F_TENTATIVE
            if scope == "20" and name == link.NAME.decode() and not is_tentative:
                packed = bytes.fromhex(address)
                return f"{socket.inet_ntop(socket.AF_INET6, packed)}%{int(number, 16)}"
        time.sleep(0.001)
    return None


@pytest.mark.parametrize("fails", [False, True], ids=["return", "raise"])
def test_link_local_addresses(
    between: Cable, run_there: Any, kind: str, fails: bool
) -> None:
    ours = on_machine(between.ours, link_local)
    theirs = on_machine(between.theirs, link_local)
    if ours is None or theirs is None:
        pytest.skip("there is no IPv6")

    async def handler(conn: Connection) -> None:
        assert await conn.receive() == b"?"
        await conn.send(b"half")
        if fails:
            raise Failure

    async def main() -> None:
        async with serve(handler, host=ours, kind=kind) as service:
            with socket_there(between, ours, service.port) as peer:
                await peer.send(b"?")
                close = PeerClose.RST if fails else PeerClose.FIN
                assert await peer.read_to_end() == Seen(b"half", close)
            ending = await service.ending()
        assert ending.kind is (CloseKind.RST if fails else CloseKind.FIN)
        assert ending.remote_address is not None
        # With the number of the interface on our machine.
        own_interface = ours.partition("%")[2]
        assert ending.remote_address[0] == f"{theirs.partition('%')[0]}%{own_interface}"

    run_there(main)


def socket_there(between: Cable, address: str, port: int) -> Peer:
    def connect() -> Peer:
        name = link.NAME.decode()
        scope = socket.if_nametoindex(name)
        peer = Peer.__new__(Peer)
        peer.sock = socket.socket(socket.AF_INET6)
        peer.sock.settimeout(LONG)
        peer.sock.connect((address.partition("%")[0], port, 0, scope))
        return peer

    return on_machine(between.theirs, connect)


# TCP Fast Open (RFC 7413): the handler has the request before the handshake is over.


def set_fast_open() -> None:
    Path("/proc/sys/net/ipv4/tcp_fastopen").write_text(str(FAST_OPEN))


@pytest.fixture
def held(between: Cable) -> Cable:
    """Nothing that the peers send after their SYN arrives."""
    try:
        for machine in (between.ours, between.theirs):
            on_machine(machine, set_fast_open)
    except OSError as exc:
        pytest.skip(f"no TCP Fast Open: {exc}")
    lose(between, lambda packet, is_theirs: is_theirs and not flags_of(packet) & SYN)
    return between


def open_fast(between: Cable, port: int) -> Peer:
    def connect() -> Peer:
        peer = Peer.__new__(Peer)
        peer.sock = socket.socket()
        peer.sock.settimeout(LONG)
        peer.sock.sendto(b"?", MSG_FASTOPEN, (OUR_ADDRESS, port))
        return peer

    return on_machine(between.theirs, connect)


def state_of(conn: Connection) -> int:
    raw: Any = conn.extra(SocketAttribute.raw_socket)
    state: int = raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    return state


Body = Callable[[Connection], Awaitable[None]]


async def in_the_handshake(between: Cable, kind: str, body: Body) -> tuple[Seen, Ending]:
    """What a peer saw, and the `Ending`, of *body* before the handshake was over."""

    async def handler(conn: Connection) -> None:
        assert await conn.receive() == b"?"
        assert state_of(conn) == SYN_RECEIVED
        await body(conn)

    async with serve(handler, kind=kind, drain=Drain(timeout=SHORT)) as service:
        with open_fast(between, service.port) as peer:
            seen = await peer.read_to_end()
            return seen, await service.ending()


def test_a_reset_in_the_handshake(held: Cable, run_there: Any, kind: str) -> None:
    async def body(conn: Connection) -> None:
        await conn.send(b"half")
        raise Failure

    async def main() -> None:
        seen, ending = await in_the_handshake(held, kind, body)
        assert seen == Seen(b"half", PeerClose.RST)
        assert (ending.kind, ending.cause) == (CloseKind.RST, Cause.RAISED)
        assert not ending.fin_sent_before_reset
        assert ending.unacknowledged is None  # the kernel says 0

    run_there(main)


def test_a_fin_waits_for_the_handshake(held: Cable, run_there: Any, kind: str) -> None:
    async def body(conn: Connection) -> None:
        await conn.send(b"all")
        await conn.send_eof()
        assert state_of(conn) == SYN_RECEIVED
        raise Failure

    async def main() -> None:
        seen, ending = await in_the_handshake(held, kind, body)
        assert seen == Seen(b"all", PeerClose.RST)
        assert (ending.kind, ending.cause) == (CloseKind.RST, Cause.RAISED)
        assert not ending.fin_sent_before_reset

    run_there(main)


def test_a_return_in_the_handshake(held: Cable, run_there: Any, kind: str) -> None:
    async def body(conn: Connection) -> None:
        await conn.send(b"all")

    async def main() -> None:
        seen, ending = await in_the_handshake(held, kind, body)
        assert seen == Seen(b"all", PeerClose.FIN)
        assert (ending.kind, ending.cause) == (CloseKind.FIN, Cause.RETURNED)
        assert ending.unacknowledged is None

    run_there(main)


def test_a_fin_after_the_handshake_has_left(
    held: Cable, run_there: Any, kind: str
) -> None:
    async def body(conn: Connection) -> None:
        await conn.send(b"all")
        await conn.send_eof()
        held.carry = carry
        with anyio.fail_after(LONG):
            while state_of(conn) in (SYN_RECEIVED, ESTABLISHED):
                await anyio.sleep(0.001)
        raise Failure

    async def main() -> None:
        seen, ending = await in_the_handshake(held, kind, body)
        assert seen == Seen(b"all", PeerClose.FIN)
        assert (ending.kind, ending.fin_sent_before_reset) == (CloseKind.RST, True)

    run_there(main)
