"""How a session ends, however TLS came about: the peer's ends, and what breaks it."""

from __future__ import annotations

import logging
import ssl

import anyio
import pytest
from anyio.abc import SocketAttribute

from anyio_rst import Cause, CloseKind, Connection, Drain, PeerClose, PeerReset, _sockets

from securing import CLEAN, TLSPeer, each, each_version, each_way, talk
from serving import (
    DISSOLVES,
    LONG,
    arrived,
    fill_buffers,
    said,
    settled,
    timeout_once_settled,
)

pytestmark = pytest.mark.anyio

BIG = 4 * 2**20

GARBAGE = b"GET / HTTP/1.0\r\n\r\n" * 10
BAD_RECORD = b"\x17\x03\x03\x00\x40" + bytes(64)


async def receive_until(error: type[Exception], conn: Connection) -> Exception:
    with pytest.raises(error) as caught:
        while True:
            await conn.receive()
    return caught.value


async def send_until(error: type[Exception], conn: Connection, size: int) -> Exception:
    with pytest.raises(error) as caught:
        while True:
            await conn.send(bytes(size))
    return caught.value


# The peer's end.


@each_way
@each_version
async def test_reset_by_the_peer_is_told_to_who_receives(
    way: str, side: str, version: ssl.TLSVersion
) -> None:
    async def body(conn: Connection) -> None:
        await conn.send(b"ready")
        for _ in range(2):
            exc = await receive_until(PeerReset, conn)
            assert isinstance(exc.__cause__, ConnectionResetError)
        with pytest.raises(PeerReset) as caught:
            await conn.send(b"more")
        assert isinstance(caught.value.__cause__, OSError)

    async def script(peer: TLSPeer) -> None:
        assert await peer.receive(5) == b"ready"
        peer.raw.reset()

    ending = (await talk(way, side, body, script, version=version)).ending
    assert (ending.kind, ending.peer) == (CloseKind.RST, PeerClose.RST)


@each_way
@pytest.mark.parametrize("size", [1000, BIG], ids=["again and again", "blocked"])
async def test_reset_by_the_peer_is_told_to_who_sends(
    way: str, side: str, size: int
) -> None:
    async def body(conn: Connection) -> None:
        await conn.send(b"ready")
        exc = await send_until(PeerReset, conn, size)
        assert isinstance(exc.__cause__, OSError)
        for _ in range(2):
            exc = await send_until(PeerReset, conn, 1)
            assert isinstance(exc.__cause__, OSError)

    async def script(peer: TLSPeer) -> None:
        assert await peer.receive(5) == b"ready"
        if size == BIG:
            await settled()
        peer.raw.reset()

    ending = (await talk(way, side, body, script)).ending
    assert (ending.kind, ending.peer) == (CloseKind.RST, PeerClose.RST)


@each_way
@each_version
async def test_fin_without_a_close_notify_is_a_loss(
    way: str, side: str, version: ssl.TLSVersion
) -> None:
    async def body(conn: Connection) -> None:
        await conn.send(b"ready")
        for _ in range(2):
            exc = await receive_until(anyio.BrokenResourceError, conn)
            assert not isinstance(exc, PeerReset)
            assert isinstance(exc.__cause__, ssl.SSLError)
        await send_until(anyio.BrokenResourceError, conn, 1)

    async def script(peer: TLSPeer) -> None:
        assert await peer.receive(5) == b"ready"
        peer.raw.send_eof()
        assert await peer.end() == (b"", ["RST"])

    ending = (await talk(way, side, body, script, version=version)).ending
    assert (ending.kind, ending.peer) == (CloseKind.RST, PeerClose.FIN)


@each_way
@each_version
async def test_close_notify_is_the_end_of_the_stream(
    way: str, side: str, version: ssl.TLSVersion
) -> None:
    async def body(conn: Connection) -> None:
        await conn.send(b"ready")
        for _ in range(2):
            await receive_until(anyio.EndOfStream, conn)
        await conn.send(b"answer")

    async def script(peer: TLSPeer) -> None:
        assert await peer.receive(5) == b"ready"
        peer.say_close_notify()
        peer.raw.send_eof()
        assert await peer.end() == (b"answer", CLEAN)

    ending = (await talk(way, side, body, script, version=version)).ending
    assert (ending.kind, ending.peer) == (CloseKind.FIN, PeerClose.FIN)


@pytest.mark.skipif(not DISSOLVES, reason="gVisor has no MSG_MORE, for one segment")
@each_way
async def test_fin_behind_a_close_notify_is_seen_where_the_body_fails(
    way: str, side: str
) -> None:
    async def body(conn: Connection) -> None:
        await conn.send(b"ready")
        while True:
            await conn.receive()

    async def script(peer: TLSPeer) -> None:
        assert await peer.receive(5) == b"ready"
        with pytest.raises(ssl.SSLWantReadError):
            peer.tls.unwrap()
        # One segment has both, as ours has.
        peer.raw.sock.send(peer.outgoing.read(), _sockets.MSG_MORE)
        peer.raw.send_eof()

    talked = await talk(way, side, body, script, expecting=anyio.EndOfStream)
    assert isinstance(talked.raised, anyio.EndOfStream)
    ending = talked.ending
    assert (ending.kind, ending.peer) == (CloseKind.RST, PeerClose.FIN)


@each("own", sides=["server"])
@pytest.mark.parametrize(
    ("says", "levels"),
    [("close_notify", []), ("FIN", [logging.INFO]), ("RST", [logging.INFO])],
)
async def test_peer_that_goes_away_without_a_word_is_one_line_at_info(
    way: str, side: str, says: str, levels: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    async def body(conn: Connection) -> None:
        await conn.send(b"ready")
        await conn.receive()

    async def script(peer: TLSPeer) -> None:
        assert await peer.receive(5) == b"ready"
        if says == "close_notify":
            peer.say_close_notify()
        elif says == "FIN":
            peer.raw.send_eof()
        else:
            peer.raw.reset()

    caplog.set_level(logging.INFO, "anyio_rst")
    lost = (anyio.BrokenResourceError, anyio.EndOfStream)
    assert (await talk(way, side, body, script, expecting=lost)).raised is not None
    assert [record.levelno for record in said(caplog)] == levels


# Sessions that break.


@each_way
@each_version
@pytest.mark.parametrize("wrong", [GARBAGE, BAD_RECORD], ids=["garbage", "bad record"])
async def test_broken_session_is_a_loss_and_the_peer_is_told_why(
    way: str,
    side: str,
    version: ssl.TLSVersion,
    wrong: bytes,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def body(conn: Connection) -> None:
        assert await conn.receive() == b"fine"
        for _ in range(2):
            exc = await receive_until(anyio.BrokenResourceError, conn)
            assert not isinstance(exc, PeerReset)
            assert isinstance(exc.__cause__, ssl.SSLError)
        exc = await send_until(anyio.BrokenResourceError, conn, 1)
        assert isinstance(exc.__cause__, ssl.SSLError)
        raise exc

    async def script(peer: TLSPeer) -> None:
        await peer.send(b"fine")
        await settled()
        await peer.raw.send(wrong)
        data, (*alerts, last) = await peer.end()
        assert (data, last) == (b"", "RST")
        if way == "trio":  # which keeps it to itself
            assert alerts == []
        else:
            (alert,) = alerts
            assert "ALERT" in alert

    caplog.set_level(logging.DEBUG, "anyio_rst")
    lost = anyio.BrokenResourceError
    ending = (await talk(way, side, body, script, version=version, expecting=lost)).ending
    assert (ending.kind, ending.cause) == (CloseKind.RST, Cause.RAISED)
    if way == "own" and side == "server":
        (record,) = said(caplog)
        assert (record.levelno, record.exc_info) == (logging.INFO, None)
        assert "the TLS session is broken" in record.message


@each_way
@each_version
async def test_session_that_is_broken_cannot_end_cleanly(
    way: str, side: str, version: ssl.TLSVersion
) -> None:
    async def body(conn: Connection) -> None:
        assert await conn.receive() == b"fine"
        await receive_until(anyio.BrokenResourceError, conn)

    async def script(peer: TLSPeer) -> None:
        await peer.send(b"fine")
        await peer.raw.send(BAD_RECORD)
        _, end = await peer.end()
        assert end[-1] == "RST"

    ending = (await talk(way, side, body, script, version=version)).ending
    assert (ending.kind, ending.cause) == (CloseKind.RST, Cause.TORN_SEND)


@each_way
@each_version
async def test_bad_record_that_nobody_has_come_to_never_makes_a_fin_of_its_own(
    way: str, side: str, version: ssl.TLSVersion
) -> None:
    """A FIN without a close_notify is what some take for a clean end."""

    async def body(conn: Connection) -> None:
        assert await conn.receive() == b"fine"
        await conn.send(b"answer")

    async def script(peer: TLSPeer) -> None:
        await peer.raw.send(peer.encrypted(b"fine") + BAD_RECORD)
        data, end = await peer.end()
        assert data == b"answer"
        assert end == CLEAN or end[-1] == "RST", end

    await talk(way, side, body, script, version=version)


# Sends that fail, and what had arrived before.


@each_way
@each_version
async def test_answer_that_came_before_the_reset_can_be_received_after_a_failed_send(
    way: str, side: str, version: ssl.TLSVersion
) -> None:
    """The refusal of an upload: RFC 9110, 15.5.14."""

    async def body(conn: Connection) -> None:
        await send_until(PeerReset, conn, 2**16)
        assert await conn.receive() == b"413 Content Too Large"
        await receive_until(PeerReset, conn)

    async def script(peer: TLSPeer) -> None:
        await peer.receive(1000)
        await peer.send(b"413 Content Too Large")
        await arrived(peer.raw)
        peer.raw.sock.close()  # with unread input: RST

    ending = (await talk(way, side, body, script, version=version)).ending
    assert (ending.kind, ending.peer) == (CloseKind.RST, PeerClose.RST)


@each_way
@each_version
async def test_send_cancelled_before_its_first_byte_tears_nothing(
    way: str, side: str, version: ssl.TLSVersion
) -> None:
    filled = 0
    cancelled = anyio.Event()

    async def body(conn: Connection) -> None:
        nonlocal filled
        # Whatever the session sends for itself comes before.
        await conn.send(b"ready")
        assert await conn.receive() == b"ready"
        filled = fill_buffers(conn.extra(SocketAttribute.raw_socket))
        for _ in range(3):
            async with timeout_once_settled() as scope:
                await conn.send(b"never")
            assert scope.cancelled_caught
        cancelled.set()
        await conn.send(b"answer")

    async def script(peer: TLSPeer) -> None:
        assert await peer.receive(5) == b"ready"
        await peer.send(b"ready")
        await cancelled.wait()
        # What filled the buffers is no TLS, and is not shown to the session.
        await peer.raw.receive(filled)
        assert await peer.end() == (b"answer", CLEAN)
        peer.raw.send_eof()

    talked = await talk(
        way, side, body, script, version=version, buffer=4096, drain=Drain(LONG)
    )
    assert (talked.ending.kind, talked.ending.cause) == (CloseKind.FIN, Cause.RETURNED)


@each_way
@each_version
async def test_send_cut_in_the_middle_tears_and_what_arrives_can_still_be_received(
    way: str, side: str, version: ssl.TLSVersion
) -> None:
    torn, received = anyio.Event(), anyio.Event()

    async def body(conn: Connection) -> None:
        async with timeout_once_settled() as scope:
            await conn.send(bytes(BIG))
        assert scope.cancelled_caught
        torn.set()
        with pytest.raises(anyio.BrokenResourceError, match="was cut short"):
            await conn.send(b"more")
        assert await conn.receive() == b"news"
        with pytest.raises(anyio.BrokenResourceError, match="was cut short"):
            await conn.send(b"more")
        received.set()

    async def script(peer: TLSPeer) -> None:
        await torn.wait()
        await peer.send(b"news")
        await received.wait()
        _, end = await peer.end()
        assert end == ["RST"]

    ending = (await talk(way, side, body, script, version=version, buffer=4096)).ending
    assert (ending.kind, ending.cause) == (CloseKind.RST, Cause.TORN_SEND)


# Protocols that delimit themselves.

each_lenient_way = each("start_tls", "wrapped", "buffered", "trio")
lenient_client = each("own", sides=["client"])


async def check_lenient(
    way: str, side: str, version: ssl.TLSVersion, fin_first: str
) -> None:
    async def body(conn: Connection) -> None:
        await conn.send(b"answer")
        if fin_first == "peer":
            for _ in range(2):
                await receive_until(anyio.EndOfStream, conn)

    async def script(peer: TLSPeer) -> None:
        assert await peer.receive(6) == b"answer"
        if fin_first == "peer":
            peer.raw.send_eof()
        assert await peer.end() == (b"", ["FIN"])
        if fin_first == "ours":
            peer.raw.send_eof()

    ending = (
        await talk(way, side, body, script, version=version, standard_compatible=False)
    ).ending
    assert (ending.kind, ending.peer) == (CloseKind.FIN, PeerClose.FIN)


each_order = pytest.mark.parametrize("fin_first", ["ours", "peer"])


@each_lenient_way
@each_version
@each_order
async def test_session_that_is_not_standard_compatible_needs_no_close_notify(
    way: str, side: str, version: ssl.TLSVersion, fin_first: str
) -> None:
    await check_lenient(way, side, version, fin_first)


@lenient_client
@each_version
@each_order
async def test_connect_tcp_that_is_not_standard_compatible_needs_no_close_notify(
    way: str, side: str, version: ssl.TLSVersion, fin_first: str
) -> None:
    await check_lenient(way, side, version, fin_first)
