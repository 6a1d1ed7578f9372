"""The line protocol and its endings, on every loop, with the fixtures of anyio_rst."""

import ssl
from functools import partial

import anyio
import pytest
import trustme
from anyio.streams.buffered import BufferedByteReceiveStream

from anyio_rst import PeerReset, connect_tcp, serve_tcp
from anyio_rst.testing import Faults, assert_fin, assert_rst

import line_protocol
from line_protocol import Violation, serve_lines

pytestmark = pytest.mark.anyio

READY = b"+OK ready\r\n"
ASK = b"EXPLAIN ECONNRESET\r\n"
ANSWER = b"+OK Connection reset by peer\r\n"


@pytest.fixture(
    params=["asyncio", ("asyncio", {"use_uvloop": True}), "trio"],
    ids=["asyncio", "uvloop", "trio"],
)
def anyio_backend(request):
    return request.param


@pytest.fixture(scope="session")
def authority():
    return trustme.CA()


@pytest.fixture(scope="session")
def tls(authority):
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    return context


# What ends with FIN: everything has been said, if only that there will be no more.


async def test_conversation(rst_peer):
    async with rst_peer() as (conn, peer):
        await peer.send(ASK + b"explain nothing\nHELP\nEXPLAIN \xff\nQUIT\n" + ASK)
        await serve_lines(conn)
    errors = b"-ERR unknown\r\n-ERR EXPLAIN name, STARTTLS or QUIT\r\n-ERR unknown\r\n"
    await assert_fin(peer, READY + ANSWER + errors + b"+OK bye\r\n")


async def test_client_that_just_leaves(rst_peer):
    async with rst_peer() as (conn, peer):
        await peer.send(ASK)
        peer.send_eof()
        await serve_lines(conn)
    await assert_fin(peer, READY + ANSWER)


@pytest.mark.parametrize("chunk", [300, 1100])
async def test_longest_line(rst_peer, chunk):
    line = b"EXPLAIN EPIPE".ljust(line_protocol.MAX_LINE - 2) + b"\r\n"
    longer = b" " + line
    async with rst_peer() as (conn, peer), anyio.create_task_group() as tg:
        tg.start_soon(serve_lines, conn)
        for start in range(0, len(line + longer), chunk):
            await peer.send((line + longer)[start : start + chunk])
            await anyio.wait_all_tasks_blocked()  # the chunk has been read
    await assert_fin(peer, READY + b"+OK Broken pipe\r\n-BYE line too long\r\n")


async def test_last_line_arrives_at_a_client_that_is_still_sending(rst_peer):
    async with rst_peer() as (conn, peer):
        await peer.send(b"x" * 100_000)
        await serve_lines(conn)
    await assert_fin(peer, READY + b"-BYE line too long\r\n")


async def test_client_that_is_too_slow(rst_peer, monkeypatch):
    monkeypatch.setattr(line_protocol, "PATIENCE", 0.2)
    async with rst_peer() as (conn, peer):
        await peer.send(ASK[:-1])
        await serve_lines(conn)
    await assert_fin(peer, READY + b"-BYE too slow\r\n")


async def test_too_many_requests(rst_peer, monkeypatch):
    monkeypatch.setattr(line_protocol, "MAX_REQUESTS", 2)
    async with rst_peer() as (conn, peer):
        await peer.send(ASK * 3)
        await serve_lines(conn)
    await assert_fin(peer, READY + ANSWER * 2 + b"-BYE too many requests\r\n")


async def test_starttls_without_a_certificate(rst_peer):
    async with rst_peer() as (conn, peer):
        await peer.send(b"STARTTLS\r\nQUIT\r\n")
        await serve_lines(conn)
    refusal = b"-ERR EXPLAIN name, STARTTLS or QUIT\r\n"
    await assert_fin(peer, READY + refusal + b"+OK bye\r\n")


# What ends with RST: something broke.


async def test_client_that_is_cut_off_in_a_line(rst_peer):
    with pytest.raises(Violation, match="in the middle of a line"):
        async with rst_peer() as (conn, peer):
            await peer.send(ASK[:-1])
            peer.send_eof()
            await serve_lines(conn)
    await assert_rst(peer)


async def test_client_that_takes_no_answers(rst_peer, monkeypatch):
    monkeypatch.setattr(line_protocol, "PATIENCE", 0.2)
    with pytest.raises(TimeoutError):
        async with rst_peer(small_buffers=True) as (conn, peer):
            await peer.send(ASK * 500)
            await serve_lines(conn)
    seen = await assert_rst(peer)
    assert (READY + ANSWER * 500).startswith(seen.data)


async def test_lost_client(rst_peer):
    faults = Faults()
    faults.reset_after(len(READY) + 5)  # in the middle of the answer
    with pytest.raises(PeerReset):
        async with rst_peer(faults=faults) as (conn, peer):
            await peer.send(ASK)
            await serve_lines(conn)


# STARTTLS.


async def test_upgrade(authority, tls):
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    async with anyio.create_task_group() as tg:
        server = await tg.start(serve_tcp, partial(serve_lines, tls=tls))
        async with connect_tcp("127.0.0.1", server.port) as conn:
            await conn.send(ASK + b"STARTTLS\r\n")
            plain = READY + ANSWER + b"+OK go ahead\r\n"
            answers = BufferedByteReceiveStream(conn)
            assert await answers.receive_exactly(len(plain)) == plain
            await conn.start_tls(trusting, hostname="localhost")
            await conn.send(ASK + b"STARTTLS\r\nQUIT\r\n")
            secret = b"".join([chunk async for chunk in conn])  # to the close_notify
            again = b"-ERR EXPLAIN name, STARTTLS or QUIT\r\n"
            assert secret == ANSWER + again + b"+OK bye\r\n"
        tg.cancel_scope.cancel()


async def test_plaintext_behind_starttls_is_not_executed(rst_peer, tls):
    with pytest.raises(Violation, match="plaintext"):
        async with rst_peer() as (conn, peer):
            await peer.send(b"STARTTLS\r\n" + ASK)
            await serve_lines(conn, tls)
    assert (await assert_rst(peer)).data == READY


async def test_plaintext_that_comes_later_breaks_the_handshake(rst_connect, tls):
    async with anyio.create_task_group() as tg:
        server = await tg.start(serve_tcp, partial(serve_lines, tls=tls))
        async with rst_connect(server.port) as peer:
            await peer.send(b"STARTTLS\r\n")
            plain = READY + b"+OK go ahead\r\n"
            assert await peer.receive_exactly(len(plain)) == plain
            await peer.send(ASK)
            assert ANSWER not in (await assert_rst(peer)).data
        tg.cancel_scope.cancel()


async def test_handshake_that_is_too_slow(rst_peer, tls, monkeypatch):
    monkeypatch.setattr(line_protocol, "PATIENCE", 0.2)
    with pytest.raises(TimeoutError):
        async with rst_peer() as (conn, peer):
            await peer.send(b"STARTTLS\r\n")
            await serve_lines(conn, tls)
    assert (await assert_rst(peer)).data == READY + b"+OK go ahead\r\n"
