"""What an `Ending` counts and says, against what the other side has counted."""

from __future__ import annotations

import json
import ssl
import termios
import time
from functools import partial
from typing import Any

import anyio
import pytest
from anyio.abc import SocketAttribute
from anyio.streams.buffered import BufferedByteReceiveStream

from anyio_rst import (
    Cause,
    CloseKind,
    Connection,
    Ending,
    PeerClose,
    TLSSession,
    connection_scope,
    serve_tcp,
)
from anyio_rst.testing import Faults, assert_fin, assert_rst, open_peer

from securing import (
    CLEAN,
    VERSIONS,
    TLSPeer,
    each_version,
    each_way,
    server_context,
    shake_hands,
    talk,
)
from serving import (
    LONG,
    Peer,
    Seen,
    arrived,
    queued,
    read_ahead,
    receive_all,
    serve,
    stream_and_peer,
    timeout_once_settled,
)

pytestmark = pytest.mark.anyio


class Failure(Exception):
    pass


def ending_of(conn: Connection) -> Ending:
    assert conn.ending is not None
    return conn.ending


def counts(ending: Ending) -> tuple[int, int]:
    return ending.sent, ending.received


# Bytes.


async def test_bytes_of_an_exchange(anyio_backend: Any, kind: str) -> None:
    async def handler(conn: Connection) -> None:
        received = await receive_all(conn, 1000)
        for _ in range(3):
            await conn.send(received)
        await conn.send(b"")

    async with serve(kind, handler) as service:
        with service.connect() as peer:
            await peer.send(bytes(12_345))
            peer.send_eof()
            seen = await peer.read_to_end()
        ending = await service.ending()
    assert seen.close is PeerClose.FIN
    assert counts(ending) == (len(seen.data), 12_345) == (3 * 12_345, 12_345)
    assert ending.tls is None


async def test_what_was_not_received_is_not_counted() -> None:
    async with open_peer() as (conn, peer):
        await peer.send(b"onetwo")
        assert await conn.receive(3) == b"one"
        await conn.send(b"hello")
        peer.send_eof()
    await assert_fin(peer, b"hello")
    assert counts(ending_of(conn)) == (5, 3)
    assert ending_of(conn).discarded == 3


async def test_a_send_that_was_cut_short_counts_what_went(
    anyio_backend: Any, kind: str
) -> None:
    was_cut = anyio.Event()

    async def handler(conn: Connection) -> None:
        await conn.send(b"x" * 10)
        async with timeout_once_settled():
            await conn.send(bytes(20_000_000))
        was_cut.set()
        raw = conn.extra(SocketAttribute.raw_socket)
        while queued(raw.fileno(), termios.TIOCOUTQ):  # all that the kernel took
            await anyio.sleep(0.001)

    async with serve(kind, handler) as service:
        with service.connect(buffer=2**16) as peer:
            await was_cut.wait()
            seen = await peer.read_to_end()
        ending = await service.ending()
    assert (ending.kind, ending.cause) == (CloseKind.RST, Cause.TORN_SEND)
    assert seen.close is PeerClose.RST
    assert 10 < ending.sent < 20_000_010
    assert ending.sent == len(seen.data)


async def test_short_sends_of_the_kernel_add_up() -> None:
    faults = Faults()
    faults.shorten_sends(5, 7)
    async with open_peer(faults=faults) as (conn, peer):
        await conn.send(bytes(1000))
    await assert_fin(peer, bytes(1000))
    assert counts(ending_of(conn)) == (1000, 0)


@each_way
@each_version
async def test_bytes_over_tls_are_those_before_encryption(
    way: str, side: str, version: ssl.TLSVersion
) -> None:
    async def body(conn: Connection) -> None:
        word = b""
        while len(word) < 100_000:
            word += await conn.receive()
        await conn.send(word[:50_000])
        await conn.send(b"bye")

    async def script(peer: TLSPeer) -> None:
        async with anyio.create_task_group() as tg:
            tg.start_soon(peer.send, bytes(100_000))
        assert await peer.end() == (bytes(50_000) + b"bye", CLEAN)

    it = await talk(way, side, body, script, version=version, drain=None)
    assert counts(it.ending) == (50_003, 100_000)
    assert it.ending.tls is not None
    assert it.ending.tls.version == version.name.replace("_", ".")


async def test_start_tls_in_the_middle_adds_both(anyio_backend: Any, kind: str) -> None:
    """The handshake is none of the application's."""

    async def handler(conn: Connection) -> None:
        assert await conn.receive() == b"STARTTLS"
        await conn.send(b"OK")
        await conn.start_tls(server_context())
        assert await conn.receive() == b"secret"
        await conn.send(b"hello")

    async with serve(kind, handler, drain=None) as service:
        with service.connect() as raw:
            await raw.send(b"STARTTLS")
            assert await raw.receive(2) == b"OK"
            peer = await shake_hands(raw)
            cipher, version = peer.tls.cipher(), peer.tls.version()
            await peer.send(b"secret")
            assert await peer.end() == (b"hello", CLEAN)
        ending = await service.ending()
    assert counts(ending) == (2 + 5, 8 + 6)
    assert cipher is not None
    assert ending.tls == (version, cipher[0])


async def test_a_handshake_that_fails_is_no_session_and_no_bytes() -> None:
    endings: list[Ending] = []

    async def handler(conn: Connection) -> None:
        pytest.fail("called")

    async with anyio.create_task_group() as tg:
        server = await tg.start(
            partial(
                serve_tcp,
                handler,
                host="127.0.0.1",
                ssl_context=server_context(),
                on_ending=lambda conn: endings.append(ending_of(conn)),
            )
        )
        with Peer(server.port) as peer:
            await peer.send(b"GET / HTTP/1.0\r\n\r\n")
            assert (await peer.read_to_end()).close is PeerClose.RST
        server.stop()
    (ending,) = endings
    assert ending.tls is None
    assert counts(ending) == (0, 0)


async def test_what_was_read_ahead_counts_when_it_is_received(
    anyio_backend: Any, owner: str
) -> None:
    stream, peer = await stream_and_peer(owner)
    with peer:
        await peer.send(b"onetwosix")
        await read_ahead(stream, peer)
        async with connection_scope(stream, drain=None) as conn:
            assert await conn.receive(3) == b"one"
            assert await conn.receive(3) == b"two"
            await conn.send(b"x")
            assert await conn.receive(3) == b"six"
        assert await peer.read_to_end() == Seen(b"x", PeerClose.FIN)
    assert counts(ending_of(conn)) == (1, 9)


async def test_what_a_wrapper_in_the_body_has_read_counts() -> None:
    """It is the kernel that has given it, and nobody else will get it."""
    async with open_peer() as (conn, peer):
        lines = BufferedByteReceiveStream(conn)
        await peer.send(b"one\ntwo\n")
        assert await lines.receive_until(b"\n", 10) == b"one"
    await assert_fin(peer, b"")
    assert counts(ending_of(conn)) == (0, 8)


async def test_nested_scopes_tell_the_same() -> None:
    async with open_peer(drain=None) as (conn, peer):
        await conn.send(b"one")
        async with connection_scope(conn, drain=None) as inner:
            await inner.send(b"two")
    await assert_fin(peer, b"onetwo")
    assert counts(ending_of(conn)) == counts(ending_of(inner)) == (6, 0)


async def test_a_scope_around_what_was_detached_counts_its_own() -> None:
    async with open_peer(drain=None) as (conn, peer):
        await conn.send(b"one")
        await anyio.sleep(0.05)
        stream = conn.detach()
        await stream.send(b"between")
        before = time.monotonic()
        async with connection_scope(stream, drain=None) as again:
            await again.send(b"three")
        elapsed = time.monotonic() - before
        assert (await peer.read_to_end()).data == b"onebetweenthree"
    assert ending_of(conn).kind is CloseKind.DETACHED
    assert counts(ending_of(conn)) == (3, 0)
    assert counts(ending_of(again)) == (5, 0)
    assert ending_of(again).duration <= elapsed


# Time.


async def test_duration_is_that_of_the_connection(anyio_backend: Any, kind: str) -> None:
    async def handler(conn: Connection) -> None:
        begun.append(time.monotonic())
        await conn.receive()
        left.append(time.monotonic())

    begun: list[float] = []
    left: list[float] = []
    async with serve(kind, handler) as service:
        before = time.monotonic()
        with service.connect() as peer:
            served = await service.next()
            await anyio.sleep(0.05)
            await peer.send(b"x")
            assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)
            await anyio.sleep(0.05)  # it drains
        ending = await served.ending()
        after = time.monotonic()
    assert left[0] - begun[0] >= 0.04
    assert left[0] - begun[0] + 0.04 <= ending.duration <= after - before


async def test_duration_ends_with_the_connection_and_not_with_the_body() -> None:
    async with open_peer() as (conn, peer):
        conn.abort()
        duration = ending_of(conn).duration
        await anyio.sleep(0.05)
    await assert_rst(peer)
    assert 0 < ending_of(conn).duration == duration


# As plain types.


async def test_as_dict_is_json_of_what_happened() -> None:
    async with open_peer() as (conn, peer):
        await peer.send(b"abc")
        await conn.receive()
        await conn.send(b"hello")
    await assert_fin(peer)
    ending = ending_of(conn)
    found = json.loads(json.dumps(ending.as_dict()))
    assert found == {
        "kind": "FIN",
        "cause": "RETURNED",
        "error": None,
        "peer": "FIN",
        "remote_address": ["127.0.0.1", peer.socket.getsockname()[1]]
        if peer.socket.fileno() != -1
        else found["remote_address"],
        "duration": ending.duration,
        "sent": 5,
        "received": 3,
        "discarded": 0,
        "unacknowledged": 0,
        "fin_sent_before_reset": False,
        "tls": None,
    }
    fields = set(Ending.__dataclass_fields__)
    assert set(found) == fields - {"outcome"} | {"error"}


SECRET = "a variable of the handler's"


@pytest.mark.parametrize(
    ("make", "shown"),
    [
        (lambda: Failure("it broke"), ("Failure", "it broke")),
        (lambda: KeyError("name"), ("KeyError", "'name'")),
        (lambda: OSError(5, "I/O"), ("OSError", "[Errno 5] I/O")),
        (lambda: Failure(), ("Failure", "")),
        (lambda: Failure("\udcff\n\0"), ("Failure", "\udcff\n\0")),
    ],
)
async def test_errors_are_told_by_type_and_text(make: Any, shown: Any) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        async with open_peer() as (conn, _):
            secret = SECRET
            raise make() from ValueError(secret)
    told = json.dumps(ending_of(conn).as_dict())
    assert json.loads(told)["error"] == {"type": shown[0], "text": shown[1]}
    assert SECRET not in told
    assert "Traceback" not in told
    assert caught.value.__traceback__ is not None


async def test_what_is_not_known_is_none() -> None:
    async with open_peer() as (conn, peer):
        conn.abort()
        told = ending_of(conn).as_dict()
    assert told["error"] is None  # the body goes on, and may fail yet
    assert (told["kind"], told["cause"]) == ("RST", "ABORTED")
    await assert_rst(peer)


@pytest.mark.parametrize("version", VERSIONS, ids=str)
async def test_the_tls_session_is_told(version: ssl.TLSVersion) -> None:
    ciphers: list[Any] = []

    async def body(conn: Connection) -> None:
        await conn.send(b"hello")

    async def script(peer: TLSPeer) -> None:
        ciphers.append(peer.tls.cipher())
        assert await peer.end() == (b"hello", CLEAN)

    it = await talk("own", "server", body, script, version=version, drain=None)
    assert isinstance(it.ending.tls, TLSSession)
    assert it.ending.tls.cipher == ciphers[0][0]
    told = json.loads(json.dumps(it.ending.as_dict()))["tls"]
    assert told == {"version": it.ending.tls.version, "cipher": ciphers[0][0]}


@each_way
async def test_the_tls_session_is_told_of_a_reset_as_well(way: str, side: str) -> None:
    async def body(conn: Connection) -> None:
        assert await conn.receive() == b"go"
        await conn.send(b"half")
        raise Failure

    async def script(peer: TLSPeer) -> None:
        await peer.send(b"go")
        assert await peer.end() == (b"half", ["RST"])

    it = await talk(way, side, body, script, expecting=Failure)
    assert it.ending.tls is not None
    assert it.ending.tls.version == "TLSv1.3"
    assert counts(it.ending) == (4, 2)


# What users keep with a connection.


async def test_state_is_for_all_who_have_the_connection() -> None:
    kept: list[Any] = []
    over = anyio.Event()

    async def handler(conn: Connection) -> None:
        conn.state.user = "Ada"
        conn.state.requests = 0
        async with connection_scope(BufferedByteReceiveStream(conn)) as inner:
            assert inner.state is conn.state
            inner.state.requests += 1

    def on_ending(conn: Connection) -> None:
        kept.append(vars(conn.state))
        over.set()

    async with anyio.create_task_group() as tg:
        server = await tg.start(
            partial(serve_tcp, handler, host="127.0.0.1", on_ending=on_ending)
        )
        with Peer(server.port) as peer, anyio.fail_after(LONG):
            assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)
            peer.sock.close()
            await over.wait()
        server.stop()
    assert kept == [{"user": "Ada", "requests": 1}]


async def test_connections_have_a_state_of_their_own() -> None:
    async with open_peer() as (one, _), open_peer() as (other, _):
        one.state.user = "Ada"
        assert vars(other.state) == {}
        with pytest.raises(AttributeError):
            other.state.user  # noqa: B018
        one.abort()
        assert one.state.user == "Ada"


async def test_the_remote_address_may_be_set(anyio_backend: Any, kind: str) -> None:
    async def handler(conn: Connection) -> None:
        before = conn.remote_address
        assert before is not None
        assert before[0] == "127.0.0.1"
        for wrong in (None, 3, ("a", 1, 2)):
            with pytest.raises((TypeError, ValueError)):
                conn.remote_address = wrong  # type: ignore[assignment]
        assert conn.remote_address == before
        conn.remote_address = ("2001:db8::7", 1)
        assert repr(conn) == "<Connection with 2001:db8::7:1 (open)>"

    async with serve(kind, handler) as service:
        with service.connect() as peer:
            await arrived(peer)
            assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)
        served = await service.next()
        ending = await served.ending()
    assert served.raised is None
    assert ending.remote_address == ("2001:db8::7", 1)
