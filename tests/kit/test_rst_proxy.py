"""`open_proxy`: truthful, and cut at the exact byte, judged by plain sockets and curl."""

from __future__ import annotations

import logging
import math
import random
import shutil
import socket
import ssl
import struct
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from itertools import pairwise
from typing import Any, Literal

import anyio
import anyio.to_thread
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import PROFILE

from anyio_rst import PeerClose
from anyio_rst.testing import (
    CaptureUnavailable,
    Direction,
    Peer,
    Proxy,
    ProxyConnection,
    assert_fin,
    assert_rst,
    capture_segments,
    connect_peer,
    open_proxy,
)
from anyio_rst.testing._close_notify import CloseNotify
from anyio_rst.testing._relay import Relay

from securing import VERSIONS, client_context, server_context
from serving import LONG

pytestmark = pytest.mark.anyio

# Far more than all buffers on the way.
MUCH = random.Random(1).randbytes(20_000_000)

SOON = 0.2  # seconds, for what is not to come

Kind = Literal["fin", "rst", "silence"]
Way = Literal["up", "down"]

WAYS = pytest.mark.parametrize("way", ["up", "down"])
KINDS = pytest.mark.parametrize("kind_of_cut", ["fin", "rst", "silence"])


class Proxied:
    """A client and a server that talk through a proxy."""

    def __init__(self, proxy: Proxy, listener: socket.socket) -> None:
        self.proxy = proxy
        self._listener = listener

    @asynccontextmanager
    async def pair(self, **options: Any) -> AsyncIterator[tuple[Peer, Peer]]:
        """The client, and the server."""
        async with connect_peer(self.proxy.port, **options) as client:
            await anyio.wait_readable(self._listener)
            server = Peer(self._listener.accept()[0])
            try:
                yield client, server
            finally:
                server.close()

    async def ended(self, number: int = 1) -> ProxyConnection:
        """What the proxy says of a connection, once that has ended."""
        with anyio.fail_after(LONG):
            while True:
                seen = self.proxy.connections[number - 1]
                if seen.duration is not None:
                    return seen
                await anyio.sleep(0.001)


@asynccontextmanager
async def proxied() -> AsyncIterator[Proxied]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with open_proxy(listener.getsockname()[1]) as proxy:
            yield Proxied(proxy, listener)


def along(way: Way, client: Peer, server: Peer) -> tuple[Peer, Peer]:
    """Who sends that way, and who receives."""
    return (client, server) if way == "up" else (server, client)


def passed(seen: ProxyConnection, way: Way) -> int:
    return seen.up if way == "up" else seen.down


async def passes(source: Peer, sink: Peer, data: bytes = b"x") -> None:
    async with anyio.create_task_group() as tg:
        tg.start_soon(source.send, data)
        assert await sink.receive_exactly(len(data), timeout=LONG) == data


# Truthful, as long as nobody asks for anything else.


@WAYS
async def test_half_close_passes_and_the_other_direction_goes_on(way: Way) -> None:
    async with proxied() as at:
        async with at.pair() as pair:
            one, other = along(way, *pair)
            await passes(one, other, b"ask")
            one.send_eof()
            await assert_fin(other, b"")
            await passes(other, one, b"answer")
            other.send_eof()
            await assert_fin(one, b"")
        seen = await at.ended()
    assert (seen.client_end, seen.upstream_end) == (PeerClose.FIN, PeerClose.FIN)
    assert seen.first_end == ("client" if way == "up" else "upstream")
    assert {seen.up, seen.down} == {3, 6}
    assert (seen.cut, seen.error, seen.aborted) == (None, None, False)


@WAYS
async def test_reset_passes(way: Way) -> None:
    async with proxied() as at:
        async with at.pair() as pair:
            one, other = along(way, *pair)
            await passes(one, other)
            one.reset()
            await assert_rst(other)
        seen = await at.ended()
    ends = (seen.client_end, seen.upstream_end)
    expected = (PeerClose.RST, PeerClose.NONE)
    assert ends == (expected if way == "up" else expected[::-1])
    assert seen.cut is None


async def test_much_passes_both_ways_at_once() -> None:
    async with proxied() as at:
        async with at.pair() as (client, server):
            async with anyio.create_task_group() as tg:
                tg.start_soon(passes, client, server, MUCH)
                tg.start_soon(passes, server, client, MUCH[::-1])
        seen = await at.ended()
    assert seen.up == seen.down == len(MUCH)


async def test_refused_upstream_is_a_reset(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    async with open_proxy(port) as proxy:
        async with connect_peer(proxy.port) as client:
            await assert_rst(client)
        at = Proxied(proxy, listener)
        seen = await at.ended()
    assert seen.error == "Connection refused"
    assert (seen.up, seen.down, seen.cut) == (0, 0, None)
    assert not caplog.records


@pytest.mark.parametrize("host", ["no-such-name.invalid", "a..b", "x" * 64, "☃" * 64])
async def test_upstream_that_has_no_address_is_a_reset(host: str) -> None:
    async with open_proxy(80, host=host) as proxy:
        async with connect_peer(proxy.port) as client:
            await assert_rst(client)
        assert (await Proxied(proxy, client.socket).ended()).error


async def test_end_of_the_block_resets_what_is_open() -> None:
    async with proxied() as at:
        pair = at.pair()
        client, server = await pair.__aenter__()
        await passes(client, server)
    assert (await assert_rst(client)).data == b""
    await assert_rst(server)
    await pair.__aexit__(None, None, None)
    (seen,) = at.proxy.connections
    assert seen.aborted
    assert seen.duration is not None


async def test_exception_of_the_block_leaves_it_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError):
        async with proxied() as at, at.pair():
            raise ZeroDivisionError


async def test_block_can_be_cancelled() -> None:
    with anyio.CancelScope() as scope:
        async with proxied() as at, at.pair():
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught


# At the exact byte.


async def sees_the_end(sink: Peer, kind: str, data: bytes) -> None:
    if kind == "fin":
        await assert_fin(sink, data)
        return
    timeout = LONG if kind == "rst" else SOON
    seen = await sink.read_to_end(timeout=timeout)
    assert seen.data == data
    assert seen.close is (PeerClose.RST if kind == "rst" else PeerClose.NONE)


async def send_while_possible(source: Peer) -> None:
    with suppress(ConnectionResetError, BrokenPipeError):
        await source.send(MUCH)


def done(seen: ProxyConnection) -> tuple[str | None, str | None]:
    return seen.cut, seen.cut_direction


@KINDS
@WAYS
@pytest.mark.parametrize("after", [0, 1, 1000, 3_000_001])
async def test_cut(kind_of_cut: Kind, way: Way, after: int) -> None:
    async with proxied() as at:
        at.proxy.cut(after=after, kind=kind_of_cut, direction=way)
        async with at.pair() as pair, anyio.create_task_group() as tg:
            source, sink = along(way, *pair)

            async def send() -> None:
                await send_while_possible(source)
                assert (
                    kind_of_cut == "silence"
                    or (await source.read_to_end()).close is PeerClose.RST
                )

            tg.start_soon(send)
            await sees_the_end(sink, kind_of_cut, MUCH[:after])
            (seen,) = at.proxy.connections
            assert done(seen) == (kind_of_cut, way)
            sink.close()
        seen = await at.ended()
    assert passed(seen, way) == after
    assert not seen.aborted


@pytest.mark.parametrize("end", ["fin", "rst"])
@pytest.mark.parametrize("after", [1000, 4_000_001])
async def test_client_that_reads_late_gets_all_before_the_cut(
    end: Kind, after: int
) -> None:
    async with proxied() as at:
        at.proxy.cut(after=after, kind=end)
        async with at.pair(receive_buffer=4096) as (client, server):
            async with anyio.create_task_group() as tg:
                tg.start_soon(send_while_possible, server)
                await anyio.sleep(SOON)
                await sees_the_end(client, end, MUCH[:after])


async def test_shorter_than_that_passes_whole() -> None:
    async with proxied() as at:
        at.proxy.cut(after=1000)
        async with at.pair() as (client, server):
            await server.send(b"short")
            server.send_eof()
            await assert_fin(client, b"short")
            await passes(client, server)
            client.send_eof()
            await assert_fin(server, b"")
        seen = await at.ended()
    assert done(seen) == (None, None)


# Changed while it runs.


@KINDS
@WAYS
async def test_cut_now(kind_of_cut: Kind, way: Way) -> None:
    async with proxied() as at, at.pair() as pair:
        source, sink = along(way, *pair)
        await passes(source, sink, b"before")
        await passes(sink, source)
        at.proxy.cut(kind=kind_of_cut, direction=way)
        await sees_the_end(sink, kind_of_cut, b"")


@KINDS
async def test_bytes_count_from_the_call_on(kind_of_cut: Kind) -> None:
    async with proxied() as at, at.pair() as (client, server):
        await passes(server, client, MUCH[:1_000_000])
        at.proxy.cut(after=10, kind=kind_of_cut)
        await server.send(b"0123456789and more")
        await sees_the_end(client, kind_of_cut, b"0123456789")


@KINDS
@pytest.mark.parametrize("after", [0, 1, 100_000])
async def test_cut_of_what_waits_for_a_client_that_does_not_read(
    kind_of_cut: Kind, after: int
) -> None:
    async with proxied() as at, at.pair(receive_buffer=4096) as (client, server):
        async with anyio.create_task_group() as tg:
            tg.start_soon(send_while_possible, server)
            await stuck(at.proxy)
            before = at.proxy.connections[0].down
            at.proxy.cut(after=after, kind=kind_of_cut)
            expected = MUCH[: before + after]
            assert await client.receive_exactly(len(expected), timeout=LONG) == expected
            await sees_the_end(client, kind_of_cut, b"")
            tg.cancel_scope.cancel()


async def stuck(proxy: Proxy) -> None:
    """Until nothing more passes down."""
    before = -1
    while not proxy.connections or proxy.connections[0].down != before:
        before = proxy.connections[0].down if proxy.connections else -1
        await anyio.sleep(0.05)


async def test_reset_of_a_client_that_never_reads_comes_in_time() -> None:
    async with proxied() as at, at.pair(receive_buffer=4096) as (_, server):
        async with anyio.create_task_group() as tg:

            async def send() -> None:
                with pytest.raises((ConnectionResetError, BrokenPipeError)):
                    await server.send(MUCH)

            tg.start_soon(send)
            await stuck(at.proxy)
            at.proxy.cut(kind="rst")
        assert (await at.ended()).cut == "rst"


async def test_mended() -> None:
    async with proxied() as at:
        at.proxy.cut(after=10)
        async with at.pair() as (client, server):
            await passes(server, client, b"12345")
            at.proxy.mend()
            await passes(server, client, b"67890abc")
        async with at.pair() as (client, server):
            await passes(server, client, bytes(100))


async def test_every_third_from_the_call_on() -> None:
    async with proxied() as at, at.pair() as other:
        at.proxy.cut(after=1, every=3)
        for number in range(2, 9):
            async with at.pair() as (client, server):
                await server.send(b"12")
                assert await client.receive_exactly(1) == b"1"
                if number in (4, 7):
                    await assert_fin(client, b"")
                else:
                    assert await client.receive_exactly(1) == b"2"
        await passes(other[1], other[0], b"all of it")
    assert [seen.number for seen in at.proxy.connections if seen.cut] == [4, 7]


@pytest.mark.parametrize(
    "wrong",
    [
        {"after": -1},
        {"every": 0},
        {"kind": "FIN"},
        {"direction": "left"},
        {"after": 1, "close_notify": True},
    ],
    ids=str,
)
async def test_what_makes_no_cut(wrong: Any) -> None:
    async with proxied() as at:
        with pytest.raises(ValueError, match=r"must be|close_notify"):
            at.proxy.cut(**wrong)


@pytest.mark.parametrize(
    "wrong", [{"delay": -1.0}, {"delay": math.inf}, {"rate": 0}, {"chunk": 0}], ids=str
)
async def test_what_makes_nothing_slow(wrong: Any) -> None:
    async with proxied() as at:
        with pytest.raises(ValueError, match="must be"):
            at.proxy.slow(**wrong)


# Silence.


@pytest.mark.parametrize("end", ["fin", "rst"])
@pytest.mark.parametrize("upstream", ["stays", "fin", "rst"])
async def test_silence_lasts_until_the_client_has_enough(end: str, upstream: str) -> None:
    async with proxied() as at:
        at.proxy.cut(after=1, kind="silence")
        async with at.pair() as (client, server):
            await server.send(b"123")
            assert await client.receive_exactly(1) == b"1"
            await passes(client, server, b"still there?")
            if upstream == "fin":
                server.send_eof()
            elif upstream == "rst":
                server.reset()
            assert (await client.read_to_end(timeout=SOON)).close is PeerClose.NONE
            await client.send(b"hello?")
            assert at.proxy.connections[0].duration is None
            if end == "fin":
                client.send_eof()
            else:
                client.reset()
            if upstream != "rst":
                await assert_rst(server)
        seen = await at.ended()
    assert seen.client_end.value == end.upper()
    assert seen.upstream_end.value == {"stays": "NONE"}.get(upstream, upstream.upper())


async def test_client_that_had_finished_is_left_in_silence() -> None:
    async with proxied() as at:
        at.proxy.cut(after=1, kind="silence")
        async with at.pair() as (client, server):
            client.send_eof()
            await assert_fin(server, b"")
            await server.send(b"123")
            server.close()
            assert await client.receive_exactly(1) == b"1"
            assert (await client.read_to_end(timeout=SOON)).close is PeerClose.NONE
            client.reset()
        assert (await at.ended()).client_end is PeerClose.RST


@pytest.mark.parametrize("end", ["fin", "rst"])
async def test_silence_can_be_ended(end: Kind) -> None:
    async with proxied() as at:
        at.proxy.cut(kind="silence")
        async with at.pair() as (client, server):
            await server.send(b"123")
            assert (await client.read_to_end(timeout=SOON)).close is PeerClose.NONE
            at.proxy.cut(kind=end)
            await sees_the_end(client, end, b"")
            await assert_rst(server)


# Slow.


@WAYS
async def test_delay_holds_back_data_and_end(way: Way) -> None:
    async with proxied() as at:
        at.proxy.slow(delay=0.1)
        async with at.pair() as pair:
            source, sink = along(way, *pair)
            start = anyio.current_time()
            await passes(source, sink, MUCH)
            data, again = anyio.current_time() - start, anyio.current_time()
            source.send_eof()
            await assert_fin(sink, b"")
            end = anyio.current_time() - again
    assert 0.1 <= data < LONG / 2  # and not 0.1 s for each chunk
    assert end >= 0.09


@WAYS
async def test_rate(way: Way) -> None:
    async with proxied() as at:
        at.proxy.slow(rate=100_000)
        async with at.pair() as pair:
            source, sink = along(way, *pair)
            start = anyio.current_time()
            await passes(source, sink, MUCH[:30_000])
            took = anyio.current_time() - start
            at.proxy.slow()
            await passes(source, sink, MUCH)
    assert took >= 0.2


@WAYS
async def test_chunks_are_segments(way: Way) -> None:
    async with proxied() as at:
        at.proxy.slow(chunk=7)
        async with at.pair() as pair:
            source, sink = along(way, *pair)
            port = at.proxy.port if way == "down" else sink.socket.getsockname()[1]
            try:
                with capture_segments(port) as capture:
                    await passes(source, sink, bytes(100))
            except CaptureUnavailable as exc:
                pytest.skip(str(exc))
    towards = Direction.FROM_PORT if way == "down" else Direction.TO_PORT
    sizes = [at.length for at in capture.segments if at.direction is towards]
    assert sorted(filter(None, sizes)) == [2, *[7] * 14]


async def test_cut_is_exact_in_what_is_slow() -> None:
    async with proxied() as at:
        at.proxy.slow(delay=0.01, rate=1_000_000, chunk=999)
        at.proxy.cut(after=10_001)
        async with at.pair() as (client, server):
            await server.send(MUCH[:20_000])
            await assert_fin(client, MUCH[:10_001])


async def test_cut_does_not_wait_for_what_is_held_back() -> None:
    async with proxied() as at:
        at.proxy.slow(delay=LONG)
        async with at.pair() as (client, server):
            await server.send(b"never")
            at.proxy.cut(kind="rst")
            assert (await assert_rst(client)).data == b""


# TLS: encrypted bytes are cut.


@contextmanager
def tls_server(version: ssl.TLSVersion, *, waits: bool) -> Iterator[int]:
    """Answers once, and ends its session; *waits*: TCP only after the client's answer."""

    def serve() -> None:
        sock, _ = listener.accept()
        sock.settimeout(LONG)
        context = server_context(version)
        with suppress(OSError), context.wrap_socket(sock, server_side=True) as tls:
            tls.recv(100)
            for start in range(0, len(ANSWER), 1000):
                tls.sendall(ANSWER[start : start + 1000])
            tls.sendall(b"!?")  # two bytes look like an alert, at first
            if waits:
                tls.unwrap()
            else:
                tls.setblocking(False)
                with suppress(ssl.SSLWantReadError):
                    tls.unwrap()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = threading.Thread(target=serve)
        serving.start()
        try:
            yield listener.getsockname()[1]
        finally:
            serving.join(LONG)


ANSWER = MUCH[:50_000]


def ask_over_tls(port: int, version: ssl.TLSVersion) -> tuple[bytes, str]:
    data = bytearray()
    with socket.create_connection(("127.0.0.1", port), LONG) as sock:
        with client_context(version).wrap_socket(
            sock, server_hostname="localhost", suppress_ragged_eofs=False
        ) as tls:
            tls.sendall(b"go")
            try:
                while chunk := tls.recv(65536):
                    data += chunk
            except ssl.SSLEOFError:
                return bytes(data), "FIN alone"
            except ConnectionResetError:
                return bytes(data), "RST"
            return bytes(data), "close_notify"


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_close_notify_can_be_held_back(version: ssl.TLSVersion, waits: bool) -> None:
    for cut, expected in ((False, "close_notify"), (True, "FIN alone")):
        with tls_server(version, waits=waits) as port, open_proxy(port) as proxy:
            if cut:
                proxy.cut(close_notify=True)
            answer, end = ask_over_tls(proxy.port, version)
            assert (answer, end) == (ANSWER + b"!?", expected)
        (seen,) = proxy.connections
        assert seen.cut == ("fin" if cut else None)


@pytest.mark.parametrize("version", VERSIONS)
def test_session_that_is_cut_is_truncated(version: ssl.TLSVersion) -> None:
    with tls_server(version, waits=False) as port, open_proxy(port) as proxy:
        proxy.cut(after=30_000)
        answer, end = ask_over_tls(proxy.port, version)
    assert end == "FIN alone"
    assert ANSWER.startswith(answer)
    assert 20_000 < len(answer) < 30_000  # the last record was not whole


async def test_what_is_not_tls_has_no_close_notify() -> None:
    async with proxied() as at:
        at.proxy.cut(close_notify=True)
        async with at.pair() as (client, server):
            await passes(server, client, b"\x15")
            await passes(server, client, b"plain")
            server.send_eof()
            await assert_fin(client, b"")
        assert at.proxy.connections[0].cut is None


async def test_half_a_record_is_no_close_notify() -> None:
    record = b"\x16\x03\x03\x00\x02hi\x17\x03\x03\x00\x13half"
    async with proxied() as at:
        at.proxy.cut(close_notify=True)
        async with at.pair() as (client, server):
            await server.send(record)
            assert await client.receive_exactly(7) == record[:7]
            server.send_eof()
            await assert_fin(client, record[7:])


def record(kind: int, body: bytes) -> bytes:
    return bytes([kind, 3, 3]) + len(body).to_bytes(2, "big") + body


HELLO = record(22, b"hello")
RECORDS = {
    "close_notify of TLS 1.3": (record(23, bytes(19)), True),
    "close_notify in the clear": (record(21, b"\1\0"), True),
    "other alert in the clear": (record(21, b"\2\50"), False),
    "encrypted alert of TLS 1.2": (record(21, bytes(26)), True),
    "data": (record(23, bytes(20)), False),
    "empty": (record(23, b""), False),
}


@settings(PROFILE)
@given(
    names=st.lists(st.sampled_from(sorted(RECORDS)), max_size=6),
    cuts=st.lists(st.integers(0, 250)),
)
def test_records_are_found_however_they_are_split(
    names: list[str], cuts: list[int]
) -> None:
    records = [RECORDS[name] for name in names]
    stream = HELLO + b"".join(data for data, _ in records)
    looking = CloseNotify()
    edges = sorted({0, len(stream), *(min(cut, len(stream)) for cut in cuts)})
    for start, end in pairwise(edges):
        looking.feed(stream[start:end])
        assert looking.limit <= end
    is_there = bool(records) and records[-1][1]
    assert looking.is_there is is_there
    assert looking.limit == len(stream) - (len(records[-1][0]) if is_there else 0)


@settings(PROFILE)
@given(st.lists(st.binary()))
def test_garbage_is_looked_at_without_harm(chunks: list[bytes]) -> None:
    looking = CloseNotify()
    size = 0
    for chunk in chunks:
        looking.feed(chunk)
        size += len(chunk)
        assert looking.limit >= 0
        assert looking.limit in (math.inf, looking.limit)
        assert looking.limit == math.inf or looking.limit <= size


# In tests that are not async.


@contextmanager
def http_server(head: bytes, body: bytes) -> Iterator[int]:
    """Answers each request so, and finishes."""

    def serve() -> None:
        with suppress(OSError):
            while True:
                with listener.accept()[0] as sock, suppress(OSError):
                    sock.recv(1000)
                    sock.sendall(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n" + body)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = threading.Thread(target=serve)
        serving.start()
        try:
            yield listener.getsockname()[1]
        finally:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
            serving.join(LONG)


def curl(port: int, *options: str) -> tuple[int, int]:
    """Its exit status, and how many bytes it has."""
    command = ["curl", "--disable", "--silent", "--noproxy", "*", *options]
    done = subprocess.run(
        [*command, f"http://127.0.0.1:{port}/"],
        capture_output=True,
        timeout=LONG,
        check=False,
    )
    return done.returncode, len(done.stdout)


BODY = bytes(10_000)
HEADS = {
    "close": b"Connection: close\r\n",
    "length": b"Content-Length: 10000\r\n",
    "chunked": b"Transfer-Encoding: chunked\r\n",
}


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        ("close", "fin", 0),
        ("length", "fin", 18),
        ("chunked", "fin", 18),
        ("close", "rst", 56),
        ("length", "rst", 56),
        ("chunked", "rst", 56),
        ("close", "silence", 28),
    ],
)
def test_curl(body: str, kind: Kind, status: int) -> None:
    framing = b"2710\r\n", b"\r\n0\r\n\r\n"
    framed = BODY.join(framing) if body == "chunked" else BODY
    head = len(b"HTTP/1.1 200 OK\r\n" + HEADS[body] + b"\r\n")
    if body == "chunked":
        head += len(framing[0])
    with http_server(HEADS[body], framed) as port, open_proxy(port) as proxy:
        assert curl(proxy.port) == (0, len(BODY))
        proxy.cut(after=head + 1000, kind=kind)
        assert curl(proxy.port, "--max-time", "0.5") == (status, 1000)
        proxy.cut(after=0)
        assert curl(proxy.port)[0] in (52, 56)
        proxy.mend()
        assert curl(proxy.port) == (0, len(BODY))
    cuts = [seen.cut for seen in proxy.connections]
    assert cuts == [None, kind, "fin", None]


def test_in_a_thread_the_methods_are_for_any_thread() -> None:
    def use(proxy: Proxy) -> None:
        proxy.cut(after=5, kind="rst")
        proxy.slow(chunk=3)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        with open_proxy(listener.getsockname()[1]) as proxy:
            address = ("127.0.0.1", proxy.port)
            assert proxy.address == address
            with socket.create_connection(address, LONG) as client:
                with listener.accept()[0] as server:
                    other = threading.Thread(target=use, args=[proxy])
                    other.start()
                    other.join()
                    server.sendall(b"0123456789")
                    assert read_exactly(client, 5) == b"01234"
                    with pytest.raises(ConnectionResetError):
                        client.recv(1)
                    with pytest.raises(ConnectionResetError):
                        server.recv(1)
    (seen,) = proxy.connections
    assert done(seen) == ("rst", "down")


def read_exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += sock.recv(size - len(data))
    return data


def test_in_a_thread_nobody_looks_between_a_send_and_its_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads = []

    def report(relay: Relay) -> ProxyConnection:
        threads.append(threading.get_ident())
        return original(relay)

    original = Relay.report
    monkeypatch.setattr(Relay, "report", report)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with open_proxy(listener.getsockname()[1]) as proxy:
            with socket.create_connection(("127.0.0.1", proxy.port), LONG) as client:
                with listener.accept()[0] as server:
                    server.sendall(b"answer")
                    assert read_exactly(client, 6) == b"answer"
                    (seen,) = proxy.connections
    assert seen.down == 6
    assert threads
    assert threading.get_ident() not in threads


def test_exception_of_the_thread_s_block_leaves_it_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError):
        with open_proxy(1):
            raise ZeroDivisionError


async def test_client_of_the_same_program_in_a_thread() -> None:
    """The proxy of an async test serves blocking clients, as long as the loop runs."""

    def ask(port: int) -> bytes:
        with socket.create_connection(("127.0.0.1", port), LONG) as sock:
            return read_to_end(sock)

    async with proxied() as at:
        at.proxy.cut(after=3)
        async with anyio.create_task_group() as tg:

            async def answer() -> None:
                await anyio.wait_readable(at._listener)
                with at._listener.accept()[0] as sock:
                    sock.sendall(b"hello")

            tg.start_soon(answer)
            assert await anyio.to_thread.run_sync(ask, at.proxy.port) == b"hel"


def read_to_end(sock: socket.socket) -> bytes:
    data = b""
    while chunk := sock.recv(100):
        data += chunk
    return data


# Whatever happens on both sides.


@pytest.mark.parametrize("seed", range(10))
async def test_random_conversations_leave_nothing_behind(
    seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    chance = random.Random(seed)

    async def talk(peer: Peer) -> None:
        with suppress(OSError, anyio.ClosedResourceError):
            for _ in range(chance.randrange(4)):
                await peer.send(MUCH[: chance.choice([1, 1000, 300_000])])
                await anyio.sleep(chance.random() * 0.01)
            chance.choice([peer.reset, peer.close, peer.send_eof])()
            await peer.read_to_end(timeout=SOON)
        peer.close()

    def change(proxy: Proxy) -> None:
        kinds: list[Kind] = ["fin", "rst", "silence"]
        ways: list[Way] = ["up", "down"]
        changes: list[Callable[[], object]] = [
            proxy.mend,
            proxy.slow,
            lambda: proxy.slow(delay=0.01, chunk=10_000),
            lambda: proxy.slow(rate=10_000_000),
            *[
                lambda kind=kind, way=way: proxy.cut(
                    after=chance.choice([0, 1, 5000]), kind=kind, direction=way
                )
                for kind in kinds
                for way in ways
            ],
            lambda: proxy.cut(close_notify=True),
        ]
        chance.choice(changes)()

    caplog.set_level(logging.WARNING)
    async with proxied() as at:
        with anyio.fail_after(LONG):
            async with anyio.create_task_group() as tg:
                for _ in range(20):
                    change(at.proxy)
                    async with connect_peer(at.proxy.port) as client:
                        with anyio.move_on_after(0.05):
                            await anyio.wait_readable(at._listener)
                            server = Peer(at._listener.accept()[0])
                            tg.start_soon(talk, server)
                        await talk(client)
    assert not caplog.records
    assert all(seen.duration is not None for seen in at.proxy.connections)


def test_linger_of_a_client_is_a_reset_to_the_upstream() -> None:
    """By a plain blocking socket on either side, without any of this library's peers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with open_proxy(listener.getsockname()[1]) as proxy:
            client = socket.create_connection(("127.0.0.1", proxy.port), LONG)
            with listener.accept()[0] as server:
                server.settimeout(LONG)
                client.sendall(b"x")
                assert server.recv(1) == b"x"
                linger = struct.pack("ii", 1, 0)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                client.close()
                with pytest.raises(ConnectionResetError):
                    server.recv(1)
