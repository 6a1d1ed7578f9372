"""Multipath TCP (RFC 8684): the same endings, to clients with it and without.

Where `mptcpize run` starts a server, or systemd with `SocketProtocol=mptcp`, its
listening sockets are of this kind, whatever their Python objects believe.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import pytest
import trustme
from anyio.abc import SocketAttribute
from test_demo import table

from anyio_rst import (
    Cause,
    CloseKind,
    Connection,
    Drain,
    Ending,
    PeerClose,
    PeerReset,
    Server,
    _sockets,
    _tcp_info,
    connection_scope,
    serve_tcp,
    testing,
)
from anyio_rst.lowlevel import unacknowledged

from serving import (
    LONG,
    Handler,
    Peer,
    Seen,
    accepted,
    arrived,
    fill_buffers,
    receive_all,
    timeout_once_settled,
)

IPPROTO_MPTCP = 262  # socket.IPPROTO_MPTCP, where Python has it
SOL_MPTCP, MPTCP_INFO = 284, 1  # linux/mptcp.h


def unavailable() -> str | None:
    """Why there is no MPTCP, or None."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP):
            return None
    except OSError as exc:  # no such protocol, or net.mptcp.enabled is 0
        return f"this kernel has no MPTCP ({exc})"


WHY_NOT = unavailable()

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
]

HALF = b"half"
# More than the socket buffers of both sides hold.
TOO_MUCH = bytes(32 * 2**20)

CLIENTS = [pytest.param(IPPROTO_MPTCP, id="mptcp"), pytest.param(0, id="tcp")]


class Failure(Exception):
    pass


@contextmanager
def listening(protocol: int = IPPROTO_MPTCP) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, protocol) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(LONG)
        yield listener


def speaks_mptcp(sock: Any) -> bool:
    """Whether it does on the wire: the kernel refuses this of one that fell back."""
    with suppress(OSError):
        return bool(sock.getsockopt(SOL_MPTCP, MPTCP_INFO, 1))
    return False


def raw_of(conn: Connection) -> Any:
    return conn.extra(SocketAttribute.raw_socket)


class Service:
    def __init__(self, server: Server, endings: Any, client: int) -> None:
        self.server = server
        self.port = server.port
        self._endings = endings
        self._client = client

    def connect(self, **options: Any) -> Peer:
        return Peer(self.port, protocol=self._client, **options)

    async def ending(self) -> Ending:
        with anyio.fail_after(LONG):
            ending: Ending = await self._endings.receive()
        return ending


@asynccontextmanager
async def served(handler: Handler, client: int, **options: Any) -> AsyncIterator[Service]:
    """*handler*, on an MPTCP socket that `serve_tcp` was given."""
    send, receive = anyio.create_memory_object_stream[Ending](100)

    async def checked(conn: Connection) -> object:
        assert speaks_mptcp(raw_of(conn)) is bool(client)
        return await handler(conn)

    def on_ending(conn: Connection) -> None:
        assert conn.ending is not None
        send.send_nowait(conn.ending)

    with send, receive, listening() as listener:
        async with anyio.create_task_group() as tg:
            server = await tg.start(
                partial(
                    serve_tcp,
                    checked,
                    sockets=[listener],
                    on_ending=on_ending,
                    **options,
                )
            )
            yield Service(server, receive, client)
            tg.cancel_scope.cancel()


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_a_listening_socket_of_mptcp_is_one_of_tcp() -> None:
    with listening() as listener:
        assert _sockets.is_multipath(listener)
        assert _sockets.is_tcp(listener)
    with listening(0) as listener:
        assert not _sockets.is_multipath(listener)


async def test_return_finishes(client: int) -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(b"all")

    async with served(handler, client) as service:
        for _ in range(3):  # armed one by one, and by inheritance
            with service.connect() as peer:
                assert await peer.read_to_end() == Seen(b"all", PeerClose.FIN)
            ending = await service.ending()
            assert (ending.kind, ending.cause) == (CloseKind.FIN, Cause.RETURNED)
            assert (ending.peer, ending.unacknowledged) == (PeerClose.FIN, 0)
            assert not ending.fin_sent_before_reset


async def test_answer_arrives_at_a_client_still_uploading(client: int) -> None:
    async def handler(conn: Connection) -> None:
        await conn.receive()
        await conn.send(b"enough")

    async with served(handler, client) as service:
        with service.connect() as peer:
            async with anyio.create_task_group() as tg:
                tg.start_soon(peer.send, bytes(2**22))
                assert await peer.read_to_end() == Seen(b"enough", PeerClose.FIN)
        ending = await service.ending()
        assert (ending.kind, ending.peer) == (CloseKind.FIN, PeerClose.FIN)


async def test_exception_resets(client: int) -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(HALF)
        raise Failure

    async with served(handler, client) as service:
        for _ in range(3):
            with service.connect() as peer:
                assert await peer.read_to_end() == Seen(HALF, PeerClose.RST)
            ending = await service.ending()
            assert (ending.kind, ending.cause) == (CloseKind.RST, Cause.RAISED)
            assert not ending.fin_sent_before_reset


async def test_exception_resets_while_somebody_else_has_the_socket(client: int) -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(HALF)
        copies.append(socket.socket(fileno=os.dup(raw_of(conn).fileno())))
        raise Failure

    copies: list[socket.socket] = []
    async with served(handler, client) as service:
        with service.connect() as peer:
            assert await peer.read_to_end() == Seen(HALF, PeerClose.RST)
    for copy in copies:
        copy.close()


async def test_abort_resets_at_once(client: int) -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(HALF)
        conn.abort()
        await anyio.sleep_forever()

    async with served(handler, client) as service:
        with service.connect() as peer:
            assert await peer.read_to_end() == Seen(HALF, PeerClose.RST)


async def test_a_send_that_was_cut_short_resets(client: int) -> None:
    async def handler(conn: Connection) -> None:
        async with timeout_once_settled():
            await conn.send(TOO_MUCH)
        cut.set()

    cut = anyio.Event()
    async with served(handler, client) as service:
        with service.connect() as peer:
            await cut.wait()
            ending = await service.ending()
            seen = await peer.read_to_end()
        assert seen.close is PeerClose.RST
        assert 0 < ending.sent < len(TOO_MUCH)
        assert ending.kind is CloseKind.RST
        assert ending.unacknowledged is not None
        assert 0 < ending.unacknowledged < ending.sent


async def test_a_fin_before_the_reset_is_told(client: int) -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(b"all")
        await conn.send_eof()
        await conn.receive()
        raise Failure

    async with served(handler, client) as service:
        with service.connect() as peer:
            assert await peer.read_to_end() == Seen(b"all", PeerClose.FIN)
            await peer.send(b"go on")
            ending = await service.ending()
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                while True:
                    await peer.send(b"?")
        assert (ending.kind, ending.fin_sent_before_reset) == (CloseKind.RST, True)


async def test_a_fin_behind_a_closed_window_has_not_left(client: int) -> None:
    async def handler(conn: Connection) -> None:
        fill_buffers(raw_of(conn))
        await conn.send_eof()
        raise Failure

    async with served(handler, client) as service:
        with service.connect(buffer=2**17):
            ending = await service.ending()
        assert (ending.kind, ending.fin_sent_before_reset) == (CloseKind.RST, False)


async def test_a_fin_of_somebody_else_is_seen(client: int) -> None:
    async def handler(conn: Connection) -> None:
        with socket.socket(fileno=os.dup(raw_of(conn).fileno())) as other:
            assert not conn.is_stale()
            other.shutdown(socket.SHUT_WR)
            assert conn.is_stale()
        with pytest.raises(anyio.ClosedResourceError):
            await conn.send(b"x")

    async with served(handler, client) as service:
        with service.connect() as peer:
            assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)
        assert (await service.ending()).kind is CloseKind.FIN


async def test_both_fins_leave_nothing_to_reset(client: int) -> None:
    async def handler(conn: Connection) -> None:
        await conn.send_eof()
        assert await receive_all(conn) == b"?"
        raise Failure

    async with served(handler, client) as service:
        with service.connect() as peer:
            await peer.send(b"?")
            peer.send_eof()
            assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)
            ending = await service.ending()
        assert ending.peer is PeerClose.FIN
        assert (ending.kind, ending.cause) == (CloseKind.FIN, Cause.RAISED)


async def test_the_peers_fin_is_seen(client: int) -> None:
    async def handler(conn: Connection) -> None:
        assert await receive_all(conn) == b"?"
        await conn.send(b"!")

    async with served(handler, client) as service:
        with service.connect() as peer:
            await peer.send(b"?")
            peer.send_eof()
            assert await peer.read_to_end() == Seen(b"!", PeerClose.FIN)
        ending = await service.ending()
        assert (ending.kind, ending.peer) == (CloseKind.FIN, PeerClose.FIN)


async def test_the_peers_reset_is_seen(client: int) -> None:
    async def handler(conn: Connection) -> None:
        assert await conn.receive() == b"?"
        await conn.send(b"!")
        with pytest.raises(anyio.BrokenResourceError):
            await conn.receive()

    async with served(handler, client) as service:
        with service.connect() as peer:
            await peer.send(b"?")
            assert await peer.receive(1) == b"!"
            peer.reset()
            ending = await service.ending()
        assert ending.peer is PeerClose.RST


async def test_the_peers_reset_that_came_before_a_receive_is_seen(client: int) -> None:
    async with two_scopes(client) as (one, other):
        one.abort()
        with pytest.raises(PeerReset):
            await other.receive()
        assert other.ending is None
    assert other.ending is not None
    assert other.ending.peer is PeerClose.RST


@asynccontextmanager
async def two_scopes(client: int) -> AsyncIterator[tuple[Connection, Connection]]:
    """Two connections in scopes, joined over an MPTCP listening socket."""
    with listening() as listener:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, client)
        sock.connect(listener.getsockname())
        accepted_one, _ = listener.accept()
    one, other = [
        await anyio.abc.SocketStream.from_socket(end) for end in (accepted_one, sock)
    ]
    async with connection_scope(one) as first, connection_scope(other) as second:
        yield first, second


async def test_server_stops_when_the_backlog_is_served(client: int) -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(b"all")

    with listening() as listener:
        with (
            Peer(listener.getsockname()[1], protocol=client) as one,
            Peer(listener.getsockname()[1], protocol=client) as other,
            anyio.fail_after(LONG),
        ):
            async with anyio.create_task_group() as tg:
                server = await tg.start(partial(serve_tcp, handler, sockets=[listener]))
                server.stop()
                assert await one.read_to_end() == Seen(b"all", PeerClose.FIN)
                assert await other.read_to_end() == Seen(b"all", PeerClose.FIN)


async def test_cancelled_server_resets(client: int) -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(HALF)
        await anyio.sleep_forever()

    with listening() as listener:
        async with anyio.create_task_group() as tg:
            server = await tg.start(partial(serve_tcp, handler, sockets=[listener]))
            with Peer(server.port, protocol=client) as peer:
                assert await peer.receive(len(HALF)) == HALF
                tg.cancel_scope.cancel()
                with anyio.CancelScope(shield=True):
                    assert await peer.read_to_end() == Seen(b"", PeerClose.RST)


async def test_keepalive(client: int) -> None:
    """MPTCP has no TCP_USER_TIMEOUT. A plain connection of the same socket has."""

    async def handler(conn: Connection) -> None:
        raw = raw_of(conn)
        assert raw.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 10
        if not client:
            option = socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT
            assert raw.getsockopt(*option) == 30_000

    async with served(handler, client, keepalive=30) as service:
        for _ in range(3):
            with service.connect() as peer:
                assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)
            assert (await service.ending()).kind is CloseKind.FIN


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.mark.parametrize("fails", [False, True], ids=["return", "raise"])
async def test_tls(client: int, authority: trustme.CA, fails: bool) -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(HALF)
        if fails:
            raise Failure

    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(ours)
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(theirs)

    def read(sock: socket.socket) -> tuple[bytes, bool]:
        with theirs.wrap_socket(
            sock, server_hostname="localhost", suppress_ragged_eofs=False
        ) as secure:
            data = b""
            try:
                while chunk := secure.recv(100):
                    data += chunk
            except OSError:  # ssl.SSLError too
                return data, False
            return data, True

    async with served(handler, client, ssl_context=ours) as service:
        with service.connect() as peer:
            seen = await anyio.to_thread.run_sync(read, peer.sock)
        assert seen == (HALF, not fails)
        ending = await service.ending()
        assert ending.kind is (CloseKind.RST if fails else CloseKind.FIN)


KILLED = """
import sys, anyio, socket
from anyio_rst import serve_tcp

async def handler(conn):
    await conn.send(b"half")
    await anyio.sleep_forever()

class Announcement:
    def started(self, server):
        print(server.port, flush=True)

async def main():
    listener = socket.socket(fileno=int(sys.argv[2]))
    await serve_tcp(handler, sockets=[listener], task_status=Announcement())

loop = sys.argv[1]
anyio.run(
    main,
    backend="trio" if loop == "trio" else "asyncio",
    backend_options={"use_uvloop": True} if loop == "uvloop" else {},
)
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop", "trio"])
def test_a_killed_process_resets(loop: str, client: int) -> None:
    with listening() as listener:
        number = listener.fileno()
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, loop, str(number)],
            stdout=subprocess.PIPE,
            pass_fds=[number],
        )
        port = listener.getsockname()[1]
    assert process.stdout is not None
    peers: list[Peer] = []
    with killed_in_the_end(process, peers):
        assert int(process.stdout.readline()) == port
        for _ in range(4):
            peer = Peer(port, protocol=client)
            peers.append(peer)
            assert peer.sock.recv(100) == HALF


@contextmanager
def killed_in_the_end(process: Any, peers: list[Peer]) -> Iterator[None]:
    """By the block *peers* connect; all of them are reset when *process* is killed."""
    try:
        yield
        process.kill()
        assert process.wait() == -signal.SIGKILL
        for peer in peers:
            with pytest.raises(ConnectionResetError):
                peer.sock.recv(100)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        for peer in peers:
            peer.sock.close()


# Streams over MPTCP sockets, and clients of servers that have only TCP.

PAIRS = [
    pytest.param(IPPROTO_MPTCP, IPPROTO_MPTCP, id="mptcp-mptcp"),
    pytest.param(IPPROTO_MPTCP, 0, id="mptcp-tcp"),
    pytest.param(0, IPPROTO_MPTCP, id="fallen back"),
]


@asynccontextmanager
async def pair(
    theirs: int, ours: int
) -> AsyncIterator[tuple[anyio.abc.SocketStream, Peer]]:
    """A stream of AnyIO's that has connected, and what the listening side accepted."""
    with listening(theirs) as listener:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, ours)
        sock.connect(listener.getsockname())
        with accepted(listener) as peer:
            stream = await anyio.abc.SocketStream.from_socket(sock)
            try:
                yield stream, peer
            finally:
                await stream.aclose()


@pytest.mark.parametrize(("theirs", "ours"), PAIRS)
async def test_scope(theirs: int, ours: int) -> None:
    async with pair(theirs, ours) as (stream, peer):
        async with connection_scope(stream, drain=Drain(timeout=0.01)) as conn:
            await conn.send(b"all")
        assert await peer.read_to_end() == Seen(b"all", PeerClose.FIN)
        assert conn.ending is not None
        assert conn.ending.kind is CloseKind.FIN
        assert conn.ending.unacknowledged == 0
    async with pair(theirs, ours) as (stream, peer):
        with pytest.raises(Failure):
            async with connection_scope(stream) as conn:
                await conn.send(HALF)
                raise Failure
        assert await peer.read_to_end() == Seen(HALF, PeerClose.RST)
        assert conn.ending is not None
        assert conn.ending.kind is CloseKind.RST
    async with pair(theirs, ours) as (stream, peer):
        await peer.send(b"?")
        peer.send_eof()
        async with connection_scope(stream) as conn:
            assert await receive_all(conn) == b"?"
            await conn.send(b"!")
        assert await peer.read_to_end() == Seen(b"!", PeerClose.FIN)
        assert conn.ending is not None
        assert (conn.ending.kind, conn.ending.peer) == (CloseKind.FIN, PeerClose.FIN)


@pytest.mark.parametrize(("theirs", "ours"), PAIRS)
async def test_what_was_not_acknowledged_is_counted_or_none(
    theirs: int, ours: int
) -> None:
    async with pair(theirs, ours) as (stream, peer):
        raw = stream.extra(SocketAttribute.raw_socket)
        # One that fell back counts one too many at first.
        fallen_back = bool(ours) and not speaks_mptcp(raw)
        assert unacknowledged(stream) == (None if fallen_back else 0)
        await stream.send(b"x")
        assert await peer.receive(1) == b"x"
        assert unacknowledged(stream) == 0


@pytest.mark.parametrize(("theirs", "ours"), PAIRS)
async def test_a_fin_that_an_earlier_owner_sent_is_known(theirs: int, ours: int) -> None:
    async with pair(theirs, ours) as (stream, peer):
        await stream.send_eof()
        assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)
        async with connection_scope(stream, drain=None) as conn:
            with pytest.raises(anyio.ClosedResourceError):
                await conn.send(b"x")
        assert conn.ending is not None
        assert conn.ending.kind is CloseKind.FIN


# Ends of the input that are not the peer's FIN: made or read off by somebody else here.


@pytest.mark.parametrize(("theirs", "ours"), PAIRS)
async def test_receiving_shut_down_by_somebody_else_is_no_fin(
    theirs: int, ours: int
) -> None:
    async with pair(theirs, ours) as (stream, peer):
        async with connection_scope(stream) as conn:
            raw_of(conn).shutdown(socket.SHUT_RD)
            with pytest.raises(anyio.ClosedResourceError, match="other code"):
                await conn.receive()
            await conn.send(b"answer")
        assert conn.ending is not None
        assert (conn.ending.kind, conn.ending.peer) == (CloseKind.FIN, PeerClose.NONE)
        assert await peer.read_to_end() == Seen(b"answer", PeerClose.FIN)


@pytest.mark.parametrize(("theirs", "ours"), PAIRS)
@pytest.mark.parametrize("half_closed", [False, True])
async def test_a_fin_is_one_with_receiving_shut_down(
    theirs: int, ours: int, half_closed: bool
) -> None:
    async with pair(theirs, ours) as (stream, peer):
        async with connection_scope(stream) as conn:
            if half_closed:
                await conn.send_eof()
            raw_of(conn).shutdown(socket.SHUT_RD)
            peer.send_eof()
            await arrived(peer)
            with pytest.raises(anyio.EndOfStream):
                await conn.receive()
        assert conn.ending is not None
        assert (conn.ending.kind, conn.ending.peer) == (CloseKind.FIN, PeerClose.FIN)


@pytest.mark.parametrize(("theirs", "ours"), PAIRS)
@pytest.mark.parametrize("half_closed", [False, True])
async def test_a_reset_that_somebody_else_was_told_is_no_fin(
    theirs: int, ours: int, half_closed: bool
) -> None:
    async with pair(theirs, ours) as (stream, peer):
        with pytest.raises(Failure):
            async with connection_scope(stream) as conn:
                await conn.send(b"x")  # which one that has fallen back waits for
                assert await peer.receive(1) == b"x"
                if half_closed:
                    await conn.send_eof()
                    assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)
                peer.reset()
                raw = raw_of(conn)
                with anyio.fail_after(LONG):
                    while not raw.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                        await anyio.sleep(0.001)
                with pytest.raises(anyio.BrokenResourceError):
                    await conn.receive()
                raise Failure
        assert conn.ending is not None
        assert (conn.ending.kind, conn.ending.peer) == (CloseKind.RST, PeerClose.NONE)


@pytest.mark.parametrize(("theirs", "ours"), PAIRS)
@pytest.mark.parametrize("sends", [False, True])
async def test_a_reset_by_somebody_else_is_not_the_peers(
    theirs: int, ours: int, sends: bool
) -> None:
    async with pair(theirs, ours) as (stream, peer):
        async with connection_scope(stream) as conn:
            raw = raw_of(conn)
            assert _sockets.reset(raw)
            with pytest.raises(anyio.BrokenResourceError) as raised:
                await (conn.send(b"x") if sends else conn.receive())
            assert not isinstance(raised.value, PeerReset)
        assert conn.ending is not None
        assert (conn.ending.kind, conn.ending.peer) == (CloseKind.RST, PeerClose.NONE)
        assert await peer.read_to_end() == Seen(b"", PeerClose.RST)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_kernel_that_does_not_tell_is_believed(
    family: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One without INET_MPTCP_DIAG, or a process that may not ask."""
    address = "127.0.0.1" if family == socket.AF_INET else "::1"
    with socket.socket(family, socket.SOCK_STREAM, IPPROTO_MPTCP) as listener:
        listener.bind((address, 0))
        listener.listen()
        with socket.socket(family, socket.SOCK_STREAM, IPPROTO_MPTCP) as sock:
            sock.connect(listener.getsockname())
            sock.shutdown(socket.SHUT_RD)
            false_end = _tcp_info.false_end(sock)
            assert false_end is not None
            assert false_end.errno == errno.ESHUTDOWN
            monkeypatch.setattr(_tcp_info, "_SOCK_DIAG", 99)
            assert _tcp_info.false_end(sock) is None


async def test_epipe_is_the_reset_that_it_is(client: int) -> None:
    """Data, a FIN and an RST, of which nothing was read before the last had come."""
    with listening() as listener:
        plain = Peer(listener.getsockname()[1], protocol=client)
        with accepted(listener) as other:
            await other.send(b"data")
            other.send_eof()
            await arrived(other)
            other.reset()
        with anyio.fail_after(LONG), suppress(OSError):  # ENOTCONN: it has come
            while plain.sock.getpeername():
                await anyio.sleep(0.001)
        peer = testing.Peer(plain.sock)
        seen = await peer.read_to_end()
        peer.close()
    # A reader of TCP is not told of an RST behind a FIN.
    assert seen.data == b"data"
    assert seen.close is (PeerClose.RST if client else PeerClose.FIN)


async def test_a_reset_between_two_questions_is_told(
    client: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has no error, and then no peer, has been reset since."""
    with listening() as listener:
        plain = Peer(listener.getsockname()[1], protocol=client)
        with accepted(listener) as other, plain:
            other.reset()
            with anyio.fail_after(LONG), suppress(OSError):  # ENOTCONN: it has come
                while plain.sock.getpeername():
                    await anyio.sleep(0.001)
            kernels = _sockets.pending_error
            answers = iter([lambda sock: None, kernels])
            monkeypatch.setattr(_tcp_info, "pending_error", lambda s: next(answers)(s))
            loss = _tcp_info.loss(plain.sock)
    assert loss is not None
    assert loss.errno == errno.ECONNRESET


async def test_a_reset_that_a_send_was_told_of_stays_one(client: int) -> None:
    """Also where the next read says ENOTCONN, as of one that has fallen back."""
    with listening(0 if client else IPPROTO_MPTCP) as listener:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP)
        sock.connect(listener.getsockname())
        peer = testing.Peer(sock)
        with accepted(listener) as other:
            other.reset()
        with anyio.fail_after(LONG), pytest.raises(ConnectionResetError):
            while True:
                await peer.send(b"too late")
        seen = await peer.read_to_end()
        peer.close()
    assert (seen.data, seen.close) == (b"", PeerClose.RST)


MPTCPIZE = Path("/usr/bin/mptcpize")

# Where a receive buffer is full the kernel may stop, or lose the RST: docs/platforms.md.
MAY_STALL = {"returns during an upload", "cuts a send short"}


@pytest.mark.skipif(not MPTCPIZE.exists(), reason="there is no mptcpize")
def test_the_demo_under_mptcpize() -> None:
    done = subprocess.run(
        [MPTCPIZE, "run", sys.executable, "-m", "anyio_rst", "demo"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode in (0, 3), done.stdout + done.stderr
    verdicts = {name: cells[-1] for name, cells in table(done.stdout).items()}
    assert set(verdicts) >= MAY_STALL
    told = {verdict for name, verdict in verdicts.items() if name not in MAY_STALL}
    assert told == {"true"}
    assert {verdicts[name] for name in MAY_STALL} <= {"true", "?"}
