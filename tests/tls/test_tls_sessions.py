"""Sessions at work: both directions at once, what they tell, and who has them next."""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio
import anyio.to_thread
import pytest
import trio
from anyio.streams.tls import TLSAttribute, TLSStream

from anyio_rst import Cause, CloseKind, Connection, Drain, connection_scope

from securing import (
    CLEAN,
    PROTOCOL,
    TLSPeer,
    client_context,
    each,
    each_version,
    each_way,
    secured,
    server_context,
    session,
    shake_hands,
    talk,
)
from serving import LONG, Handler, accepted, plain_server, serve, settled

pytestmark = pytest.mark.anyio

BIG = 5 * 10**6

# The ways to have a session that is the user's own before and after.
each_own_session = each("wrapped", "buffered", "trio")


# What they tell.


@each_way
@each_version
async def test_attributes_are_those_of_the_session(
    way: str, side: str, version: ssl.TLSVersion
) -> None:
    async def body(conn: Connection) -> None:
        assert conn.extra(TLSAttribute.tls_version) == version.name.replace("_", ".")
        assert conn.extra(TLSAttribute.alpn_protocol) == PROTOCOL
        assert conn.extra(TLSAttribute.server_side) is (side == "server")
        assert len(conn.extra(TLSAttribute.cipher)) == 3
        certificate = conn.extra(TLSAttribute.peer_certificate_binary)
        assert (certificate is None) is (side == "server")
        remote = conn.extra(anyio.abc.SocketAttribute.remote_address)
        assert remote[0] == "127.0.0.1"

    async def script(peer: TLSPeer) -> None:
        assert await peer.end() == (b"", CLEAN)
        peer.raw.send_eof()

    await talk(way, side, body, script, version=version)


# Both directions at once.


@each("own", "start_tls", "wrapped", "trio", sides=["client"])
@each_version
@pytest.mark.parametrize("buffer", [0, 2**15], ids=["", "small buffers"])
async def test_both_directions_at_once_do_not_wait_for_each_other(
    way: str, side: str, version: ssl.TLSVersion, buffer: int
) -> None:
    """Between two ends of our own, each of which sends all before it is done."""
    data = bytes(range(251)) * (BIG // 251)
    whole: list[str] = []

    async def exchange(conn: Connection, who: str) -> None:
        if buffer:
            sock = conn.extra(anyio.abc.SocketAttribute.raw_socket)
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                sock.setsockopt(socket.SOL_SOCKET, option, buffer)

        async def receive() -> None:
            received = bytearray()
            while len(received) < len(data):
                received += await conn.receive()
            assert received == data
            whole.append(who)

        async with conn.create_task_group() as tg:
            tg.start_soon(receive)
            await conn.send(data)

    async def handler(conn: Connection) -> None:
        await exchange(conn, "server")
        with pytest.raises(anyio.EndOfStream):
            await conn.receive()

    # The other end comes by its session in the same way as far as that can be.
    options: dict[str, Any] = {}
    if way == "own":
        options = {"ssl_context": server_context(version)}
    async with serve_one(way, handler, version, **options) as port:
        async with secured(way, side, port, version) as conn:
            await exchange(conn, "client")
    assert sorted(whole) == ["client", "server"]
    assert conn.ending is not None
    assert (conn.ending.kind, conn.ending.cause) == (CloseKind.FIN, Cause.RETURNED)


@asynccontextmanager
async def serve_one(
    way: str, handler: Handler, version: ssl.TLSVersion, **options: Any
) -> AsyncIterator[int]:
    """A server's end, by serve_tcp(), start_tls(), a TLSStream or a trio.SSLStream."""
    context = server_context(version)

    async def run(conn: Connection) -> None:
        if way == "start_tls":
            await conn.start_tls(context)
        if way not in ("wrapped", "trio"):
            await handler(conn)
            return
        stream = conn.detach()
        tls: Any
        if way == "trio":
            tls = trio.SSLStream(stream, context, server_side=True)
        else:
            tls = await TLSStream.wrap(stream, ssl_context=context)
        async with connection_scope(tls) as inner:
            await handler(inner)

    kind = {"wrapped": "foreign", "trio": "trio"}.get(way, "native")
    async with serve(kind, run, **options) as service:
        yield service.port
        served = await service.next()
        await served.ending()
        assert served.raised is None


@each_way
@each_version
async def test_many_small_messages_in_both_directions(
    way: str, side: str, version: ssl.TLSVersion
) -> None:
    """A send and a receive of two tasks meet at each step of theirs."""
    count = 300
    message = b"x" * 100

    async def body(conn: Connection) -> None:
        async def send() -> None:
            for _ in range(count):
                await conn.send(message)

        async with conn.create_task_group() as tg:
            tg.start_soon(send)
            left = count * len(message)
            while left:
                left -= len(await conn.receive())

    async def script(peer: TLSPeer) -> None:
        for _ in range(count):
            await peer.raw.send(peer.encrypted(message))
        assert await peer.end() == (count * message, CLEAN)
        peer.raw.send_eof()

    ending = (await talk(way, side, body, script, version=version)).ending
    assert (ending.kind, ending.cause) == (CloseKind.FIN, Cause.RETURNED)


# Sessions that go on after the scope.


@asynccontextmanager
async def session_and_peer(way: str, side: str) -> AsyncIterator[tuple[Any, TLSPeer]]:
    """A session of the user's own, and the peer at its other end."""
    server = side == "server"
    options: dict[str, Any] = {
        "ssl_context": server_context() if server else client_context(),
        "server_side": server,
        "hostname": None if server else "localhost",
        "standard_compatible": True,
    }

    async def ours(port: int) -> None:
        given.append(await session(way, port, options))

    given: list[Any] = []
    with plain_server() as listener, anyio.fail_after(LONG):
        async with anyio.create_task_group() as tg:
            tg.start_soon(ours, listener.getsockname()[1])
            with await anyio.to_thread.run_sync(accepted, listener) as raw:
                peer = await shake_hands(raw, server_side=not server)
                await settled()
                yield given[0], peer


async def finish(peer: TLSPeer) -> None:
    assert await peer.end() == (b"again", CLEAN)
    peer.raw.send_eof()


@each_own_session
async def test_detach_gives_back_a_session_that_goes_on(way: str, side: str) -> None:
    async with session_and_peer(way, side) as (stream, peer):
        tls = stream.receive_stream if way == "buffered" else stream
        below = tls.transport_stream
        await peer.send(b"before, and after")
        async with connection_scope(stream) as conn:
            assert await conn.receive(7) == b"before,"
            await conn.send(b"inside")
            assert conn.detach() is stream
        assert conn.ending is not None
        assert conn.ending.kind is CloseKind.DETACHED
        assert tls.transport_stream is below
        assert await peer.receive(6) == b"inside"
        receive = stream.receive_some if way == "trio" else stream.receive
        send = stream.send_all if way == "trio" else stream.send
        assert await receive(100) == b" and after"
        await peer.send(b"news")
        assert await receive(100) == b"news"
        await send(b"outside")
        assert await peer.receive(7) == b"outside"
        # And once more, in another scope.
        async with anyio.create_task_group() as tg:
            async with connection_scope(stream, drain=Drain(LONG)) as conn:
                await conn.send(b"again")
                tg.start_soon(finish, peer)
        assert conn.ending is not None
        assert conn.ending.kind is CloseKind.FIN


@each("own", "start_tls")
async def test_detach_gives_the_session_that_was_started(way: str, side: str) -> None:
    done = anyio.Event()

    async def body(conn: Connection) -> None:
        assert await conn.receive() == b"one"
        stream = conn.detach()
        assert isinstance(stream, TLSStream)
        await stream.send(b"two")
        assert await stream.receive() == b"three"
        async with connection_scope(stream, drain=Drain(LONG)) as again:
            await again.send(b"four")
        assert again.ending is not None
        assert again.ending.kind is CloseKind.FIN
        done.set()

    async def script(peer: TLSPeer) -> None:
        await peer.send(b"one")
        assert await peer.receive(3) == b"two"
        await peer.send(b"three")
        assert await peer.end() == (b"four", CLEAN)
        peer.raw.send_eof()
        await done.wait()

    ending = (await talk(way, side, body, script)).ending
    assert ending.kind is CloseKind.DETACHED


# Sessions that were broken before the scope.


@each_own_session
@pytest.mark.parametrize("how", ["record", "send"])
async def test_session_that_is_broken_already_is_reset(
    way: str, side: str, how: str
) -> None:
    """Not ended with a FIN alone, which some take for a clean end."""

    async def ours(stream: Any) -> None:
        async with connection_scope(stream, drain=Drain(LONG)) as conn:
            pass
        assert conn.ending is not None
        kinds.append(conn.ending.kind)

    kinds: list[CloseKind] = []
    async with session_and_peer(way, side) as (stream, peer):
        if how == "record":
            await peer.raw.send(b"this is not what TLS looks like")
            receive = stream.receive_some if way == "trio" else stream.receive
            with pytest.raises((ssl.SSLError, trio.BrokenResourceError)):
                await receive()
        else:
            send = stream.send_all if way == "trio" else stream.send
            with anyio.CancelScope() as scope:
                scope.cancel()
                await send(bytes(2**20))
        async with anyio.create_task_group() as tg:
            tg.start_soon(ours, stream)
            data, end = await peer.end()
            with suppress(OSError):  # after a reset
                peer.raw.send_eof()
    if way == "trio" and how == "send":  # Trio noticed before it had begun
        assert (data, end, kinds) == (b"", CLEAN, [CloseKind.FIN])
    else:
        assert (data, end[-1], kinds) == (b"", "RST", [CloseKind.RST])


@each("start_tls", "wrapped", "buffered", "trio")
async def test_send_on_a_session_that_ended_without_close_notify_is_a_loss(
    way: str, side: str
) -> None:
    """OpenSSL goes on with none that has met the end of its input."""

    async def body(conn: Connection) -> None:
        await conn.send(b"answer")
        with pytest.raises(anyio.EndOfStream):
            await conn.receive()
        for _ in range(2):
            with pytest.raises(anyio.BrokenResourceError):
                await conn.send(b"more")

    async def script(peer: TLSPeer) -> None:
        assert await peer.receive(6) == b"answer"
        peer.raw.send_eof()
        data, _ = await peer.end()
        assert data == b""

    await talk(way, side, body, script, standard_compatible=False)


@each_own_session
async def test_session_over_a_closed_stream_is_refused(way: str, side: str) -> None:
    async with session_and_peer(way, side) as (stream, _):
        tls = stream.receive_stream if way == "buffered" else stream
        await tls.transport_stream.aclose()
        await settled()  # uvloop's transport shows no socket any more
        with pytest.raises(anyio.ClosedResourceError, match="closed already"):
            async with connection_scope(stream):
                pytest.fail("it could be entered")
