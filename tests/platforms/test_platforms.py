"""What other kernels do, as far as that can be had on this one: `nox -s sandbox`."""

from __future__ import annotations

import asyncio
import errno
import importlib.util
import socket
import struct
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from types import ModuleType
from typing import Any

import anyio
import anyio.abc
import pytest
from conftest import ASYNCIO

from anyio_rst import (
    Cause,
    CloseKind,
    Connection,
    Ending,
    PeerClose,
    _sockets,
    _tcp_info,
    asyncio_streams,
    connect_tcp,
    connection_scope,
    lowlevel,
    serve_tcp,
)

from serving import DISSOLVES, LONG, Peer, Seen, foreign_pair, serve

pytestmark = pytest.mark.anyio


class Failure(Exception):
    pass


@pytest.fixture
def no_dissolving(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that says no: only closing the armed socket resets."""
    monkeypatch.setattr(_sockets, "_connect", lambda *arguments: -1)


@pytest.fixture
def no_inheriting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accepted sockets as a kernel gives them that passes on nothing."""

    class Listener(socket.socket):
        def accept(self) -> tuple[socket.socket, Any]:
            sock, address = super().accept()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes(8))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 0)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)
            return sock, address

    monkeypatch.setattr(socket, "socket", Listener)


@pytest.mark.usefixtures("no_dissolving")
@pytest.mark.parametrize("how", ["failure", "abort", "return"])
async def test_closing_the_armed_socket_resets_as_well(kind: str, how: str) -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(b"data")
        if how == "failure":
            raise Failure
        if how == "abort":
            conn.abort()

    async with serve(kind, handler) as service:
        with service.connect() as peer:
            seen = await peer.read_to_end()
        ending = await service.ending()
    if how == "return":
        assert seen == Seen(b"data", PeerClose.FIN)
        assert (ending.kind, ending.cause) == (CloseKind.FIN, Cause.RETURNED)
    else:
        assert seen == Seen(b"data", PeerClose.RST)
        assert ending.kind is CloseKind.RST


@pytest.mark.usefixtures("no_dissolving")
@pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)
async def test_windows_default_loop_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its transports shut down before they close."""
    loop_class = type(asyncio.get_running_loop())
    monkeypatch.setattr(asyncio, "ProactorEventLoop", loop_class, raising=False)
    stream, peer = await foreign_pair()
    with peer:
        with pytest.raises(RuntimeError, match="ProactorEventLoop sends a FIN"):
            connection_scope(stream)
        await stream.aclose()
        assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        with pytest.raises(RuntimeError, match="sends a FIN before it closes"):
            async with connect_tcp("127.0.0.1", listener.getsockname()[1]):
                pytest.fail("it could be entered")
        with pytest.raises(BlockingIOError):
            listener.accept()


def options_of(sock: socket.socket) -> tuple[bytes, bool, bool]:
    """SO_LINGER, TCP_NODELAY and SO_KEEPALIVE."""
    return (
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8),
        bool(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)),
        bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)),
    )


async def prepared(keepalive: float | None) -> None:
    """Each of several connections, one after the other, and then several at once."""
    found: list[tuple[bytes, bool, bool]] = []

    async def handler(conn: Connection) -> None:
        found.append(options_of(conn.extra(anyio.abc.SocketAttribute.raw_socket)))
        await conn.send(b"!")
        await conn.receive()

    async with (
        serve_on_loopback(handler, keepalive=keepalive) as port,
        AsyncExitStack() as s,
    ):
        for _ in range(3):
            peer = s.enter_context(Peer(port))
            assert await peer.receive(1) == b"!"
        peers = [s.enter_context(Peer(port)) for _ in range(3)]
        for peer in peers:
            assert await peer.receive(1) == b"!"
    assert found == [(_sockets._LINGER_RESET, True, keepalive is not None)] * 6


@asynccontextmanager
async def serve_on_loopback(handler: Any, keepalive: float | None) -> AsyncIterator[int]:
    async with anyio.create_task_group() as tg:
        server = await tg.start(
            partial(serve_tcp, handler, host="127.0.0.1", keepalive=keepalive)
        )
        yield server.port
        tg.cancel_scope.cancel()


@pytest.mark.parametrize("keepalive", [None, 30.0])
async def test_every_accepted_socket_is_prepared(
    anyio_backend: Any, keepalive: float | None
) -> None:
    await prepared(keepalive)


@pytest.mark.usefixtures("no_inheriting")
@pytest.mark.parametrize("keepalive", [None, 30.0])
async def test_every_accepted_socket_is_prepared_where_nothing_is_inherited(
    anyio_backend: Any, keepalive: float | None
) -> None:
    await prepared(keepalive)


@pytest.mark.skipif(not DISSOLVES, reason="this kernel passes on nothing")
async def test_kernel_is_asked_once_whether_it_passes_options_on(
    anyio_backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    prepared_by_themselves: list[socket.socket] = []
    has_inherited = _sockets.has_inherited
    prepare_accepted = _sockets.prepare_accepted

    def ask(accepted: socket.socket, listener: socket.socket) -> bool:
        asked.append(has_inherited(accepted, listener))
        return asked[-1]

    def prepare(sock: socket.socket, keepalive: float | None = None) -> None:
        prepared_by_themselves.append(sock)
        prepare_accepted(sock, keepalive)

    monkeypatch.setattr(_sockets, "has_inherited", ask)
    monkeypatch.setattr(_sockets, "prepare_accepted", prepare)
    await prepared(None)
    assert asked == [True]
    # The listening socket, and the one that may have connected before that was.
    assert len(prepared_by_themselves) == 2


# Where nothing is dissolved, the close resets: in the call that resets.


def reads_a_reset_at_once(peer: Peer) -> bool:
    """Without a turn of the event loop."""
    peer.sock.settimeout(LONG)
    with pytest.raises(ConnectionResetError):
        while peer.sock.recv(65536):
            pass
    return True


@pytest.mark.usefixtures("no_dissolving")
@pytest.mark.parametrize("asked_for_socket", [False, True])
async def test_close_resets_in_the_same_call(kind: str, asked_for_socket: bool) -> None:
    seen: list[bool] = []

    async def handler(conn: Connection) -> None:
        await conn.receive()
        if asked_for_socket:
            conn.extra(anyio.abc.SocketAttribute.raw_socket)
        conn.abort()
        seen.append(reads_a_reset_at_once(peer))

    async with serve(kind, handler) as service:
        with service.connect() as peer:
            await peer.send(b"?")
            ending = await service.ending()
    assert seen == [True]
    assert (ending.kind, ending.cause) == (CloseKind.RST, Cause.ABORTED)


@pytest.mark.usefixtures("no_dissolving")
@pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)
async def test_close_of_asyncios_streams_resets_in_the_same_call(
    anyio_backend: Any,
) -> None:
    peer = None

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"half")
        writer.transport.abort()
        assert peer is not None
        seen.append(reads_a_reset_at_once(peer))

    seen: list[bool] = []
    endings: list[Ending] = []
    handler = asyncio_streams.scoped(talk, on_ending=endings.append)
    server = await asyncio.start_server(handler, "127.0.0.1", 0)
    async with server:
        with Peer(server.sockets[0].getsockname()[1]) as peer:
            await peer.send(b"?")
            with anyio.fail_after(LONG):
                while not seen:
                    await anyio.sleep(0)
    assert endings[0].kind is CloseKind.RST


@pytest.mark.usefixtures("no_dissolving")
async def test_copy_of_the_descriptor_holds_the_reset_up(kind: str) -> None:
    copies: list[socket.socket] = []

    async def handler(conn: Connection) -> None:
        await conn.send(b"half")
        copies.append(conn.extra(anyio.abc.SocketAttribute.raw_socket).dup())
        raise Failure

    async with serve(kind, handler) as service:
        with service.connect() as peer:
            assert await peer.receive(4) == b"half"
            ending = await service.ending()
            assert ending.kind is CloseKind.RST
            assert await peer.read_to_end(timeout=0.1) == Seen(b"", PeerClose.NONE)
            copies.pop().close()
            assert await peer.read_to_end() == Seen(b"", PeerClose.RST)


@pytest.mark.usefixtures("no_dissolving")
@pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)
async def test_transport_that_has_something_to_send_resets_as_well(
    anyio_backend: Any,
) -> None:
    """A turn later on uvloop, which goes on waiting to send until then."""
    stream, peer = await foreign_pair()
    with peer:
        with anyio.move_on_after(0.05):
            await stream.send(bytes(2**25))
        with pytest.raises(Failure):
            async with connection_scope(stream) as conn:
                raise Failure
        await anyio.sleep(0.01)
        assert (await peer.read_to_end()).close is PeerClose.RST
    assert conn.ending is not None
    assert conn.ending.kind is CloseKind.RST


@pytest.mark.usefixtures("no_dissolving")
def test_lowlevel_resets_what_is_shut_down_before_it_is_closed() -> None:
    """As socketserver does with a socket that blocks; twice is as good as once."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with Peer(listener.getsockname()[1]) as peer:
            sock, _ = listener.accept()
            with sock:
                sock.sendall(b"half")
                lowlevel.reset(sock)
                lowlevel.reset(sock)
                with pytest.raises(OSError, match="Socket operation on non-socket"):
                    sock.shutdown(socket.SHUT_WR)
            assert anyio.run(peer.read_to_end) == Seen(b"half", PeerClose.RST)


# What macOS and FreeBSD do, as their sources have it: docs/platforms.md.

OVER = {6, 7, 9, 11}  # of linux/tcp_states.h, when both directions are shut
SO_NP_EXTENSIONS = 0x1083


class SocketOfMacOS(socket.socket):
    """One that was accepted: shut in both directions, it has no options any more."""

    was_accepted = False
    takes_options = False

    def accept(self) -> tuple[socket.socket, Any]:
        sock, address = super().accept()
        assert isinstance(sock, SocketOfMacOS)
        sock.was_accepted = True
        return sock, None if sock.is_over() else address

    def is_over(self) -> bool:
        if not self.was_accepted:
            return False
        return self.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] in OVER

    def setsockopt(self, level: int, option: int, *value: Any) -> None:
        if self.is_over() and not self.takes_options:
            raise OSError(errno.EINVAL, "Invalid argument")
        if (level, option) == (socket.SOL_SOCKET, SO_NP_EXTENSIONS):
            self.takes_options = True
            return
        super().setsockopt(level, option, *value)

    def getsockopt(self, level: int, option: int, *size: Any) -> Any:
        if (level, option) == (socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise OSError(errno.ENOPROTOOPT, "Protocol not available")
        return super().getsockopt(level, option, *size)


@pytest.fixture
def as_on_macos(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    flags_and_mask = struct.pack("II", 1, 1)
    monkeypatch.setattr(_sockets, "_AFTER_SHUTDOWN", (SO_NP_EXTENSIONS, flags_and_mask))
    monkeypatch.setattr(_sockets, "_connect", lambda *arguments: -1)
    monkeypatch.setattr(socket, "socket", SocketOfMacOS)
    yield
    monkeypatch.undo()
    _tcp_info._tells_of_fin.cache_clear()  # which asked this kernel


@asynccontextmanager
async def serve_on(listener: socket.socket, handler: Any) -> AsyncIterator[list[Ending]]:
    endings: list[Ending] = []

    def keep(conn: Connection) -> None:
        assert conn.ending is not None
        endings.append(conn.ending)

    async with anyio.create_task_group() as tg:
        await tg.start(partial(serve_tcp, handler, sockets=[listener], on_ending=keep))
        yield endings
        tg.cancel_scope.cancel()


@pytest.mark.usefixtures("as_on_macos")
async def test_client_that_has_reset_before_accept_does_not_end_the_server(
    anyio_backend: Any,
) -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(await conn.receive())

    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    with Peer(port) as gone:
        gone.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _sockets._LINGER_RESET)
    async with serve_on(listener, handler) as endings:
        with Peer(port) as peer:
            await peer.send(b"?")
            assert await peer.read_to_end() == Seen(b"?", PeerClose.FIN)
        with anyio.fail_after(LONG):
            while len(endings) < 2:
                await anyio.sleep(0)
    assert [(e.kind, e.peer) for e in endings] == [
        (CloseKind.RST, PeerClose.RST),
        (CloseKind.FIN, PeerClose.FIN),
    ]
    assert endings[0].remote_address is None


@pytest.mark.usefixtures("as_on_macos")
async def test_answer_behind_both_fins_is_not_reset(anyio_backend: Any) -> None:
    """It is disarmed although both directions are shut by then."""
    answer = bytes(2**17)

    async def handler(conn: Connection) -> None:
        assert [part async for part in conn] == []
        await conn.send(answer)
        await conn.send_eof()

    listener = socket.create_server(("127.0.0.1", 0))
    async with serve_on(listener, handler) as endings:
        with Peer(listener.getsockname()[1], buffer=4096) as peer:
            peer.send_eof()
            with anyio.fail_after(LONG):
                while not endings:
                    await anyio.sleep(0)
            assert await peer.read_to_end() == Seen(answer, PeerClose.FIN)
    assert (endings[0].kind, endings[0].cause) == (CloseKind.FIN, Cause.RETURNED)


@pytest.mark.usefixtures("as_on_macos")
async def test_listening_socket_is_taken_where_the_kernel_does_not_tell(
    anyio_backend: Any,
) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    with pytest.raises(OSError, match="Protocol not available"):
        listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    async with serve_on(listener, Connection.send_eof) as endings:
        with Peer(listener.getsockname()[1]) as peer:
            assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)
    assert endings[0].kind is CloseKind.FIN


async def test_epipe_that_hides_why_is_asked_for_it(anyio_backend: Any) -> None:
    """As the BSDs say to a send, whatever has ended the connection."""

    class Accepted(socket.socket):
        def send(self, *arguments: Any) -> int:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

        def getsockopt(self, level: int, option: int, *size: Any) -> Any:
            if (level, option) == (socket.SOL_SOCKET, socket.SO_ERROR):
                return errno.ETIMEDOUT
            return super().getsockopt(level, option, *size)

    class Listener(socket.socket):
        def accept(self) -> tuple[socket.socket, Any]:
            sock, address = super().accept()
            kind = sock.family, sock.type, sock.proto
            return Accepted(*kind, fileno=sock.detach()), address

    async def handler(conn: Connection) -> None:
        await conn.receive()
        with pytest.raises(anyio.BrokenResourceError, match="timed out"):
            await conn.send(b"?")

    listener = Listener()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    async with serve_on(listener, handler) as endings:
        with socket.create_connection(listener.getsockname()) as peer:
            peer.sendall(b"!")
            with anyio.fail_after(LONG):
                while not endings:
                    await anyio.sleep(0)
    assert endings[0].peer is PeerClose.LOST


def elsewhere() -> ModuleType:
    """`_tcp_info` as it is on a platform without Linux's TCP_INFO."""
    spec = importlib.util.spec_from_file_location(
        "anyio_rst._elsewhere", _tcp_info.__file__
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "platform", "freebsd14")
        spec.loader.exec_module(module)
    return module


def test_our_own_fin_is_known_without_tcp_info() -> None:
    fin_is_out = elsewhere().fin_is_out
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with socket.create_connection(listener.getsockname()) as peer:
            sock, _ = listener.accept()
            with sock:
                assert not fin_is_out(sock)
                sock.shutdown(socket.SHUT_WR)
                assert fin_is_out(sock)
                assert not fin_is_out(peer)
                assert peer.recv(1) == b""
                peer.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, _sockets._LINGER_RESET
                )
                peer.close()
                with pytest.raises(ConnectionResetError):
                    sock.recv(1)
                assert not fin_is_out(sock)
