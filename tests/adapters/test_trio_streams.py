"""Programs written for Trio's streams end truthfully, judged by plain peers."""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio
import pytest
import trio
import trio.testing
from anyio.streams.tls import TLSStream

from anyio_rst import (
    Cause,
    CloseKind,
    Connection,
    Drain,
    Ending,
    PeerClose,
    PeerReset,
    connect_tcp,
    connection_scope,
    serve_tcp,
    trio_streams,
)
from anyio_rst.testing import Peer as KitPeer
from anyio_rst.trio_streams import TrioStream, TrioTLSStream, as_trio_stream

from securing import CLEAN, PROTOCOL, TLSPeer, client_context, server_context, shake_hands
from serving import (
    LONG,
    Peer,
    Seen,
    accepted,
    fill_buffers,
    plain_server,
    settled,
    stream_and_peer,
    timeout_once_settled,
)

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.parametrize("anyio_backend", ["trio"], indirect=True),
]

TOO_MUCH = 2**24


class Failure(Exception):
    pass


# A stream that passes for Trio's.


async def pair() -> tuple[TrioStream, TrioStream]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
    return await scoped_here(client), await scoped_here(server)


async def scoped_here(sock: socket.socket) -> TrioStream:
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
    scope = connection_scope(stream, drain=Drain(timeout=0.05))
    return as_trio_stream(await scope.__aenter__())


async def clogged_pair() -> tuple[TrioStream, TrioStream]:
    both = await pair()
    while sum(fill_buffers(one.socket) for one in both):
        pass  # each may have made room for the other
    return both


async def test_stream_passes_the_conformance_kit_of_trio() -> None:
    with trio.fail_after(LONG):
        await trio.testing.check_half_closeable_stream(pair, clogged_pair)


async def tls_pair() -> tuple[TrioTLSStream, TrioTLSStream]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
    both = []
    for sock, context in ((client, client_context()), (server, server_context())):
        tls = trio.SSLStream(
            trio.SocketStream(trio.socket.from_stdlib_socket(sock)),
            context,
            server_hostname="localhost" if sock is client else None,
            server_side=sock is server,
        )
        scope = connection_scope(tls, drain=Drain(timeout=0.05))
        both.append(TrioTLSStream(await scope.__aenter__()))
    async with trio.open_nursery() as nursery:
        for one in both:
            nursery.start_soon(one.do_handshake)
    return both[0], both[1]


async def test_tls_stream_passes_the_conformance_kit_of_trio() -> None:
    with trio.fail_after(LONG):
        await trio.testing.check_two_way_stream(tls_pair, None)


async def test_tls_waits_for_room() -> None:
    ours, other = await tls_pair()
    while fill_buffers(ours.transport_stream.socket):
        pass
    below = other.transport_stream.socket

    async def read_below() -> None:
        await settled()
        woke_early = waiting.cancel_scope.cancel_called
        assert not woke_early
        with pytest.raises(trio.BusyResourceError):
            await ours.send_all(b"x")
        while True:
            await below.recv(65536)  # and spoil the session

    with trio.fail_after(LONG):
        async with trio.open_nursery() as waiting:
            waiting.start_soon(read_below)
            await ours.wait_send_all_might_not_block()
            waiting.cancel_scope.cancel()
    for one in (ours, other):
        await trio.aclose_forcefully(one)
    with pytest.raises(trio.ClosedResourceError):
        await ours.wait_send_all_might_not_block()


# Handlers of trio.serve_tcp() and trio.serve_ssl_over_tcp().

Handler = Callable[[Any], Awaitable[object]]


class Service:
    """A running server of Trio's own, and what became of its one connection."""

    def __init__(self) -> None:
        self.port = 0
        self.secure = False
        self.stream: Any = None
        self.raised: BaseException | None = None
        self.over = trio.Event()
        self.handlers = trio.CancelScope()

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Peer | TLSPeer]:
        with Peer(self.port) as peer:
            if not self.secure:
                yield peer
                return
            secure = await shake_hands(peer)
            yield secure

    async def ending(self) -> Ending:
        await self.over.wait()
        ending = self.stream._conn.ending
        assert isinstance(ending, Ending)
        return ending


@asynccontextmanager
async def serving(
    handler: Handler, *, secure: bool = False, **options: Any
) -> AsyncIterator[Service]:
    service = Service()
    service.secure = secure

    async def unmodified(stream: Any) -> None:
        service.stream = stream
        if secure:
            await stream.do_handshake()
        await handler(stream)

    serve_one = trio_streams.scoped(unmodified, **options)

    async def caught(stream: Any) -> None:
        try:
            with service.handlers:
                await serve_one(stream)
        except Exception as exc:
            service.raised = exc
        service.over.set()

    with trio.fail_after(LONG):
        async with trio.open_nursery() as nursery:
            serve: Any = trio.serve_tcp
            arguments: list[Any] = [caught, 0]
            if secure:
                serve = trio.serve_ssl_over_tcp
                arguments.append(server_context())
            listeners = await nursery.start(partial(serve, *arguments, host="127.0.0.1"))
            listener = listeners[0].transport_listener if secure else listeners[0]
            service.port = listener.socket.getsockname()[1]
            yield service
            nursery.cancel_scope.cancel()


def below(peer: Peer | TLSPeer) -> Peer:
    return peer if isinstance(peer, Peer) else peer.raw


async def end_seen(peer: Peer | TLSPeer) -> tuple[bytes, str]:
    """What a peer received, and what ended it; a FIN over TLS has its close_notify."""
    if isinstance(peer, Peer):
        seen = await peer.read_to_end()
        return seen.data, seen.close.value
    data, end = await peer.end()
    assert end in (CLEAN, ["RST"])
    return data, end[-1]


def assert_ended(ending: Ending, kind: CloseKind, cause: Cause) -> None:
    assert (ending.kind, ending.cause) == (kind, cause)


either = pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])


@either
async def test_handler_that_raises_resets(secure: bool) -> None:
    async def handler(stream: Any) -> None:
        await stream.send_all(b"half")
        assert await stream.receive_some(1) == b"!"  # the peer has it
        raise Failure

    async with serving(handler, secure=secure) as service:
        async with service.connect() as peer:
            assert await peer.receive(4) == b"half"
            await peer.send(b"!")
            assert await end_seen(peer) == (b"", "RST")
        assert_ended(await service.ending(), CloseKind.RST, Cause.RAISED)
        assert isinstance(service.raised, Failure)


@either
async def test_handler_that_returns_finishes(secure: bool) -> None:
    async def handler(stream: Any) -> None:
        assert await stream.receive_some(1) == b"u"
        await stream.send_all(b"answer")

    async with serving(handler, secure=secure) as service:
        async with service.connect() as peer:
            await peer.send(b"u" * 100_000)  # of which the handler reads one byte
            assert await end_seen(peer) == (b"answer", "FIN")
            below(peer).send_eof()
            ending = await service.ending()
        assert_ended(ending, CloseKind.FIN, Cause.RETURNED)
        assert ending.discarded > 0


@either
async def test_cancelled_handler_resets(secure: bool) -> None:
    async def handler(stream: Any) -> None:
        await stream.send_all(b"half")
        await stream.receive_some()

    async with serving(handler, secure=secure) as service:
        async with service.connect() as peer:
            assert await peer.receive(4) == b"half"
            service.handlers.cancel()
            assert await end_seen(peer) == (b"", "RST")
        assert_ended(await service.ending(), CloseKind.RST, Cause.CANCELLED)


@either
async def test_torn_send_resets(secure: bool) -> None:
    torn = trio.Event()

    async def handler(stream: Any) -> None:
        async with timeout_once_settled() as timeout:
            await stream.send_all(bytes(TOO_MUCH))
        assert timeout.cancelled_caught
        with pytest.raises(trio.BrokenResourceError) as excinfo:
            await stream.send_all(b"more")
        assert isinstance(excinfo.value.__cause__, anyio.BrokenResourceError)
        torn.set()

    async with serving(handler, secure=secure) as service:
        async with service.connect() as peer:
            await torn.wait()
            data, end = await end_seen(peer)
            assert len(data) < TOO_MUCH
            assert end == "RST"
        assert_ended(await service.ending(), CloseKind.RST, Cause.TORN_SEND)


@either
async def test_aclose_finishes_at_once(secure: bool) -> None:
    async def handler(stream: Any) -> None:
        await stream.send_all(b"all")
        await stream.aclose()
        await trio.sleep_forever()

    async with serving(handler, secure=secure) as service:
        async with service.connect() as peer:
            assert await end_seen(peer) == (b"all", "FIN")
        service.handlers.cancel()
        assert_ended(await service.ending(), CloseKind.FIN, Cause.CLOSED)


@either
async def test_aclose_in_finally_resets_for_a_handler_that_raises(secure: bool) -> None:
    closed = trio.Event()
    checked = trio.Event()

    async def receive(stream: Any) -> None:
        with pytest.raises(trio.ClosedResourceError):
            await stream.receive_some()

    async def handler(stream: Any) -> None:
        await stream.send_all(b"half")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive, stream)
            await settled()
            try:
                raise Failure
            finally:
                await stream.aclose()
                closed.set()
                await checked.wait()

    async with serving(handler, secure=secure) as service:
        async with service.connect() as peer:
            await closed.wait()
            for call in (
                service.stream.receive_some,
                partial(service.stream.send_all, b"x"),
                service.stream.wait_send_all_might_not_block,
            ):
                with pytest.raises(trio.ClosedResourceError):
                    await call()
            assert await peer.receive(4) == b"half"
            checked.set()
            assert await end_seen(peer) == (b"", "RST")
        assert_ended(await service.ending(), CloseKind.RST, Cause.GROUP_FAILED)


@either
async def test_aclose_after_a_failure_that_is_answered_finishes(secure: bool) -> None:
    async def handler(stream: Any) -> None:
        try:
            raise Failure
        except Failure:
            await stream.send_all(b"bad request")
            await stream.aclose()

    async with serving(handler, secure=secure) as service:
        async with service.connect() as peer:
            assert await end_seen(peer) == (b"bad request", "FIN")
            below(peer).sock.close()
            assert_ended(await service.ending(), CloseKind.FIN, Cause.RETURNED)


@either
async def test_block_of_the_stream_ends_the_connection(secure: bool) -> None:
    async def handler(stream: Any) -> None:
        try:
            async with stream:
                await stream.send_all(b"half")
                assert await stream.receive_some(1) == b"!"
                raise Failure
        except Failure:
            await trio.sleep_forever()

    async with serving(handler, secure=secure) as service:
        async with service.connect() as peer:
            assert await peer.receive(4) == b"half"
            await peer.send(b"!")
            assert await end_seen(peer) == (b"", "RST")
        service.handlers.cancel()
        assert_ended(await service.ending(), CloseKind.RST, Cause.RAISED)


@either
async def test_block_of_the_stream_that_is_done_finishes(secure: bool) -> None:
    async def handler(stream: Any) -> None:
        async with stream:
            await stream.send_all(b"all")
        await trio.sleep_forever()

    async with serving(handler, secure=secure) as service:
        async with service.connect() as peer:
            assert await end_seen(peer) == (b"all", "FIN")
        service.handlers.cancel()
        assert_ended(await service.ending(), CloseKind.FIN, Cause.RETURNED)


@either
@pytest.mark.parametrize("handling", [False, True])
async def test_forceful_close_resets(secure: bool, handling: bool) -> None:
    async def handler(stream: Any) -> None:
        await stream.send_all(b"half")
        assert await stream.receive_some(1) == b"!"
        if handling:
            try:
                raise Failure
            except Failure:
                await trio.aclose_forcefully(stream)
        else:
            await trio.aclose_forcefully(stream)
        await trio.sleep_forever()

    async with serving(handler, secure=secure) as service:
        async with service.connect() as peer:
            assert await peer.receive(4) == b"half"
            await peer.send(b"!")
            assert await end_seen(peer) == (b"", "RST")
        service.handlers.cancel()
        assert_ended(await service.ending(), CloseKind.RST, Cause.CANCELLED)


@either
@pytest.mark.parametrize("shield", [False, True])
async def test_aclose_of_a_cancelled_handler(secure: bool, shield: bool) -> None:
    async def handler(stream: Any) -> None:
        await stream.send_all(b"half")
        try:
            await stream.receive_some()
        finally:
            with trio.CancelScope(shield=shield):
                await stream.aclose()

    async with serving(handler, secure=secure) as service:
        async with service.connect() as peer:
            assert await peer.receive(4) == b"half"
            service.handlers.cancel()
            assert await end_seen(peer) == (b"", "FIN" if shield else "RST")
            below(peer).sock.close()
            ending = await service.ending()
        if shield:
            assert_ended(ending, CloseKind.FIN, Cause.CLOSED)
        else:
            assert_ended(ending, CloseKind.RST, Cause.CANCELLED)


@either
async def test_errors_are_those_of_trio(secure: bool) -> None:
    seen: list[BaseException] = []

    async def refused(operation: Callable[[], Awaitable[object]]) -> None:
        try:
            await operation()
        except Exception as exc:
            seen.append(exc)

    async def handler(stream: Any) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(refused, stream.receive_some)
            await settled()
            await refused(stream.receive_some)
            await stream.send_all(b"now")
        await refused(stream.receive_some)
        await stream.aclose()
        await refused(stream.receive_some)
        await stream.aclose()

    async with serving(handler, secure=secure) as service:
        async with service.connect() as peer:
            assert await peer.receive(3) == b"now"
            below(peer).reset()
            await service.over.wait()
    assert service.raised is None
    busy, reset, again, closed = seen
    assert isinstance(busy, trio.BusyResourceError)
    assert isinstance(busy.__cause__, anyio.BusyResourceError)
    for exc in (reset, again):
        assert isinstance(exc, trio.BrokenResourceError)
        assert isinstance(exc.__cause__, PeerReset)
    assert isinstance(closed, trio.ClosedResourceError)
    assert isinstance(closed.__cause__, anyio.ClosedResourceError)


async def test_peers_fin_is_the_empty_chunk() -> None:
    async def handler(stream: TrioStream) -> None:
        assert [chunk async for chunk in stream] == [b"question"]
        assert await stream.receive_some() == b""
        await stream.send_all(b"answer")
        await stream.send_eof()
        await stream.send_eof()
        with pytest.raises(trio.ClosedResourceError):
            await stream.send_all(b"x")

    async with serving(handler) as service:
        async with service.connect() as peer:
            assert isinstance(peer, Peer)
            await peer.send(b"question")
            peer.send_eof()
            assert await peer.read_to_end() == Seen(b"answer", PeerClose.FIN)
        assert_ended(await service.ending(), CloseKind.FIN, Cause.RETURNED)
        assert service.raised is None


async def test_socket_can_be_asked() -> None:
    nodelay = socket.IPPROTO_TCP, socket.TCP_NODELAY
    asked: list[Any] = []

    async def handler(stream: TrioStream) -> None:
        stream.setsockopt(*nodelay, value=0)
        assert stream.getsockopt(*nodelay) == 0
        assert stream.getsockopt(*nodelay, 4) == bytes(4)
        asked.append(stream.socket.getpeername())
        stream.socket.close()
        await stream.send_all(b"answer")

    async with serving(handler) as service:
        async with service.connect() as peer:
            assert isinstance(peer, Peer)
            address = peer.sock.getsockname()
            assert await peer.read_to_end() == Seen(b"answer", PeerClose.FIN)
        await service.over.wait()
    assert service.raised is None
    assert asked == [address]
    with pytest.raises(OSError, match="Bad file descriptor"):
        service.stream.getsockopt(*nodelay)


async def test_tls_session_can_be_asked() -> None:
    asked: list[Any] = []

    async def handler(stream: TrioTLSStream) -> None:
        await stream.do_handshake()
        asked.extend(
            [
                stream.selected_alpn_protocol(),
                stream.version(),
                stream.server_side,
                stream.getpeercert(),
                stream.transport_stream.socket.getpeername(),
            ]
        )
        with pytest.raises(AttributeError, match="unwrap"):
            _ = stream.unwrap
        assert not hasattr(stream, "send_eof")
        await stream.send_all(b"answer")

    async with serving(handler, secure=True) as service:
        async with service.connect() as peer:
            assert isinstance(peer, TLSPeer)
            address = peer.raw.sock.getsockname()
            assert await end_seen(peer) == (b"answer", "FIN")
        ending = await service.ending()
    assert ending.tls is not None
    assert service.raised is None
    assert asked == [PROTOCOL, "TLSv1.3", True, None, address]


async def test_session_of_anyios_can_be_asked_too() -> None:
    stream, peer = await stream_and_peer()
    asked: list[Any] = []

    async def handler(stream: TrioTLSStream) -> None:
        await stream.do_handshake()
        asked.append((stream.version(), stream.server_side))

    async def serve_one() -> None:
        tls = await TLSStream.wrap(stream, ssl_context=server_context())
        await trio_streams.scoped(handler)(tls)

    with peer, trio.fail_after(LONG):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_one)
            secure = await shake_hands(peer)
            assert await secure.end() == (b"", CLEAN)
            peer.sock.close()
    assert asked == [("TLSv1.3", True)]


async def test_handshake_that_fails_is_a_broken_resource() -> None:
    raised: list[BaseException] = []

    async def handler(stream: TrioTLSStream) -> None:
        with pytest.raises(trio.NeedHandshakeError):
            stream.version()
        try:
            await stream.do_handshake()
        except trio.BrokenResourceError as exc:
            raised.append(exc)
            raise

    async def caught(stream: Any) -> None:
        with pytest.raises(trio.BrokenResourceError):
            await trio_streams.scoped(handler)(stream)

    stream, peer = await stream_and_peer("trio")
    tls = trio.SSLStream(stream, server_context(), server_side=True)
    with peer, trio.fail_after(LONG):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(caught, tls)
            await peer.send(b"GET / HTTP/1.0\r\n\r\n")
            assert (await peer.read_to_end()).close is PeerClose.RST
    cause = raised[0].__cause__
    assert isinstance(cause, anyio.BrokenResourceError)
    assert isinstance(cause.__cause__, ssl.SSLError)


async def test_options_are_those_of_a_scope() -> None:
    async def handler(stream: TrioStream) -> None:
        await stream.send_all(b"all")
        raise Failure

    async with serving(handler, finish_on=Failure, drain=None) as service:
        async with service.connect() as peer:
            assert await end_seen(peer) == (b"all", "FIN")
        assert_ended(await service.ending(), CloseKind.FIN, Cause.FINISH_ON)
        assert isinstance(service.raised, Failure)


# Connections of one's own.


async def test_connections_of_our_own_server_and_client() -> None:
    async def handler(conn: Connection) -> None:
        stream = as_trio_stream(conn)
        async for chunk in stream:
            await stream.send_all(chunk.upper())

    with trio.fail_after(LONG):
        async with anyio.create_task_group() as tg:
            server = await tg.start(partial(serve_tcp, handler, host="127.0.0.1"))
            async with connect_tcp("127.0.0.1", server.port) as conn:
                stream = as_trio_stream(conn)
                await stream.send_all(b"question")
                assert await stream.receive_some() == b"QUESTION"
                await stream.send_eof()
                assert await stream.receive_some() == b""
            tg.cancel_scope.cancel()
    assert conn.ending is not None
    assert conn.ending.kind is CloseKind.FIN


async def test_half_close_is_not_there_over_tls() -> None:
    with plain_server() as listener, trio.fail_after(LONG):
        port = listener.getsockname()[1]

        async def ours() -> None:
            async with connect_tcp(
                "127.0.0.1", port, ssl_context=client_context(), tls_hostname="localhost"
            ) as conn:
                stream = as_trio_stream(conn)
                with pytest.raises(NotImplementedError):
                    await stream.send_eof()
                await stream.send_all(b"question")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ours)
            raw = await trio.to_thread.run_sync(accepted, listener)
            with raw:
                peer = await shake_hands(raw, server_side=True)
                assert await peer.end() == (b"question", CLEAN)


# trio-websocket, whose streams are Trio's or ours.


@pytest.fixture
def websocket() -> Any:
    return pytest.importorskip("trio_websocket")


@asynccontextmanager
async def serving_websocket(
    websocket: Any, talk: Handler, *, secure: bool
) -> AsyncIterator[Service]:
    async def handler(stream: Any) -> None:
        async with trio.open_nursery() as nursery:
            request = await websocket.wrap_server_stream(nursery, stream)
            async with await request.accept() as ws:
                await talk(ws)

    async with serving(handler, secure=secure) as service:
        yield service


@asynccontextmanager
async def websocket_client(
    websocket: Any, port: int, *, secure: bool
) -> AsyncIterator[tuple[Any, Connection]]:
    tls: dict[str, Any] = {}
    if secure:
        tls = {"ssl_context": client_context(), "tls_hostname": "localhost"}
    async with connect_tcp("127.0.0.1", port, **tls) as conn:
        async with trio.open_nursery() as nursery:
            ws = await websocket.wrap_client_stream(
                nursery, as_trio_stream(conn), "localhost", "/"
            )
            yield ws, conn


@either
async def test_websocket_that_is_done_finishes_on_both_sides(
    websocket: Any, secure: bool
) -> None:
    async def talk(ws: Any) -> None:
        for _ in range(3):
            await ws.send_message((await ws.get_message()).upper())

    async with serving_websocket(websocket, talk, secure=secure) as service:
        async with websocket_client(websocket, service.port, secure=secure) as (ws, conn):
            for message in ("a" * 200_000, "b", "c"):
                await ws.send_message(message)
                assert await ws.get_message() == message.upper()
            with pytest.raises(websocket.ConnectionClosed):
                await ws.get_message()
            assert ws.closed.code == 1000
        ending = await service.ending()
    assert service.raised is None
    assert conn.ending is not None
    for one in (ending, conn.ending):
        assert one.kind is CloseKind.FIN
        assert one.peer is PeerClose.FIN


@either
async def test_websocket_that_is_cancelled_resets(websocket: Any, secure: bool) -> None:
    async def talk(ws: Any) -> None:
        await ws.send_message("half")
        await ws.get_message()

    async with serving_websocket(websocket, talk, secure=secure) as service:
        async with websocket_client(websocket, service.port, secure=secure) as (ws, conn):
            assert await ws.get_message() == "half"
            service.handlers.cancel()
            with pytest.raises(websocket.ConnectionClosed):
                await ws.get_message()
            assert ws.closed.code == 1006  # abnormal: RFC 6455, 7.4.1
        assert_ended(await service.ending(), CloseKind.RST, Cause.CANCELLED)
    assert conn.ending is not None
    assert conn.ending.peer is PeerClose.RST


@pytest.mark.parametrize("given", [None, b"", KitPeer])
async def test_only_a_connection_is_taken(given: Any) -> None:
    with pytest.raises(TypeError, match="takes a Connection"):
        as_trio_stream(given)


async def test_only_an_async_function_is_taken() -> None:
    def handler(stream: TrioStream) -> None: ...

    with pytest.raises(TypeError, match=r"trio_streams.scoped\(\) takes an async"):
        trio_streams.scoped(handler)  # type: ignore[arg-type]


async def test_trio_is_imported_by_its_users_alone() -> None:
    program = "import sys, anyio_rst; assert 'trio' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=LONG)
