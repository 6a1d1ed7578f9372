"""httpx on our connections: what its servers see, judged by plain sockets."""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import h2.config
import h2.connection
import h2.events
import httpcore
import httpx
import pytest
from conftest import capturing, collect

from anyio_rst import Cause, CloseKind, Connection, PeerClose
from anyio_rst.httpx import _HTTPX_ERRORS, AsyncHTTPTransport
from anyio_rst.testing import TCPFlag

from securing import CLEAN, TLSPeer, client_context, server_context, shake_hands
from serving import LONG, Peer, Seen

pytestmark = [
    pytest.mark.anyio,
    # Trio's, of those of httpx and httpcore, when a response is left half read.
    pytest.mark.filterwarnings("ignore:Async generator:ResourceWarning"),
]

FIN, RST = Seen(b"", PeerClose.FIN), Seen(b"", PeerClose.RST)
TOO_MUCH = 2**24
SHORT = 0.05  # a time-out that is to run out

WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwhole"
HALF = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nha"
LAST = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 4\r\n\r\nlast"
SWITCHED = b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"
UPGRADE = {"Connection": "upgrade", "Upgrade": "x"}


class Failure(Exception):
    pass


Script = Callable[[Any], Awaitable[object]]


class Site:
    """A server that plays *script* on each of its connections, and then reads on."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.accepted = 0
        self.put, self._get = anyio.create_memory_object_stream[Any](100)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    @property
    def secure_url(self) -> str:
        return f"https://localhost:{self.port}/"

    async def end(self) -> Any:
        """What the server saw of the connection that ended next."""
        with anyio.fail_after(LONG):
            return await self._get.receive()

    async def play(self, script: Script, sock: socket.socket, tls: str | None) -> None:
        with sock:
            raw = Peer.__new__(Peer)
            raw.sock = sock
            sock.settimeout(LONG)
            peer: Peer | TLSPeer = raw
            if tls is not None:
                context = server_context()
                context.set_alpn_protocols([tls])
                peer = TLSPeer(raw, context, server_side=True)
            try:
                if isinstance(peer, TLSPeer):
                    await peer.handshake()
                await script(peer)
                end = peer.end() if isinstance(peer, TLSPeer) else peer.read_to_end()
                seen: Any = await end
            except ConnectionResetError:
                seen = RST
            except ssl.SSLError as exc:
                seen = exc.reason
            except OSError:
                assert sock.fileno() == -1  # the script has closed it
                return
        await self.put.send(seen)

    def close(self) -> None:
        self.put.close()
        self._get.close()


@asynccontextmanager
async def site(script: Script, *, tls: str | None = None) -> AsyncIterator[Site]:
    """*tls*: over that, and the protocol that is agreed on in it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        here = Site(listener.getsockname()[1])

        async def accept() -> None:
            while True:
                await anyio.wait_readable(listener)
                sock, _ = listener.accept()
                here.accepted += 1
                tg.start_soon(here.play, script, sock, tls)

        try:
            async with anyio.create_task_group() as tg:
                tg.start_soon(accept)
                yield here
                tg.cancel_scope.cancel()
        finally:
            here.close()


def client(**options: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=AsyncHTTPTransport(**options), timeout=LONG)


def connection_of(response: httpx.Response) -> Connection:
    connection = response.extensions["network_stream"].get_extra_info("connection")
    assert isinstance(connection, Connection)
    return connection


def ended(connection: Connection) -> tuple[CloseKind, Cause]:
    assert connection.ending is not None
    return connection.ending.kind, connection.ending.cause


FINISHED = CloseKind.FIN, Cause.CLOSED
RESET = CloseKind.RST, Cause.ABORTED


async def head(peer: Peer | TLSPeer) -> bytes:
    """The request, up to its body."""
    data = b""
    while not data.endswith(b"\r\n\r\n"):
        data += await peer.receive(1)
    return data


def say(*answers: bytes) -> Script:
    """A server that gives these answers to as many requests."""

    async def script(peer: Peer | TLSPeer) -> None:
        for answer in answers:
            await head(peer)
            await peer.send(answer)

    return script


# A finished exchange.


async def test_finished_exchanges_share_a_connection_that_ends_with_fin() -> None:
    async with site(say(WHOLE, WHOLE)) as server:
        async with client() as http:
            for _ in range(2):
                response = await http.get(server.url)
                assert response.text == "whole"
            assert connection_of(response).ending is None
        assert await server.end() == FIN
        assert server.accepted == 1
    assert ended(connection_of(response)) == FINISHED
    ending = connection_of(response).ending
    assert ending is not None
    assert ending.received == 2 * len(WHOLE)
    assert ending.unacknowledged in (0, None)


async def test_last_exchange_of_a_connection_ends_it_with_fin() -> None:
    async with site(say(LAST)) as server, client() as http:
        response = await http.post(server.url, content=b"")
        assert response.text == "last"
        assert await server.end() == FIN
    assert ended(connection_of(response)) == FINISHED


async def test_cancellation_behind_the_last_byte_comes_too_late() -> None:
    async with site(say(LAST)) as server, client() as http:
        with anyio.CancelScope() as scope:
            async with http.stream("GET", server.url) as response:
                async for _ in response.aiter_raw():
                    scope.cancel()
        assert await server.end() == FIN
    assert ended(connection_of(response)) == FINISHED


async def test_response_that_the_connection_delimits() -> None:
    async def old_server(peer: Peer) -> None:
        await head(peer)
        await peer.send(b"HTTP/1.0 200 OK\r\n\r\nold")
        peer.send_eof()

    async with site(old_server) as server, client() as http:
        response = await http.get(server.url)
        assert response.text == "old"
        assert await server.end() == FIN
    assert ended(connection_of(response)) == FINISHED


async def test_failure_after_the_exchange_is_none_of_the_connection() -> None:
    async with site(say(WHOLE)) as server:
        with pytest.raises(Failure):
            async with client() as http:
                await http.get(server.url)
                raise Failure
        assert await server.end() == FIN


async def test_cancellation_after_the_exchange_is_none_of_the_connection() -> None:
    async with site(say(WHOLE)) as server:
        with anyio.CancelScope() as scope:
            async with client() as http:
                await http.get(server.url)
                scope.cancel()
        assert await server.end() == FIN


@pytest.mark.parametrize(
    "limits",
    [
        httpx.Limits(keepalive_expiry=0),
        httpx.Limits(max_connections=1, max_keepalive_connections=0),
    ],
    ids=["expired", "surplus"],
)
async def test_connection_that_is_not_kept_ends_with_fin(limits: httpx.Limits) -> None:
    async with site(say(WHOLE)) as server, client(limits=limits) as http:
        for _ in range(3):
            await http.get(server.url)
        assert await server.end() == await server.end() == FIN


async def test_what_comes_unasked_does_not_make_a_reset_of_the_fin() -> None:
    async def talkative(peer: Peer) -> None:
        await head(peer)
        await peer.send(WHOLE)
        await read.wait()
        await peer.send(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
        said.set()
        await closed.wait()

    read, said, closed = anyio.Event(), anyio.Event(), anyio.Event()
    async with site(talkative) as server:
        with capturing(server.port) as capture:
            async with client() as http:
                await http.get(server.url)
                read.set()
                await said.wait()
        closed.set()
        assert await server.end() == FIN
    assert not capture.having(TCPFlag.RST)


# An exchange that was given up, or failed.


@asynccontextmanager
async def given_up(
    answer: bytes = HALF,
) -> AsyncIterator[tuple[httpx.AsyncClient, str, list[Connection]]]:
    """A download to be given up, in the block. The connections are those it used."""
    connections: list[Connection] = []
    async with site(say(answer)) as server:
        async with client() as http:
            yield http, server.url, connections
            assert await server.end() == RST
    for connection in connections:
        assert ended(connection) == RESET


async def test_download_that_is_cancelled_resets() -> None:
    async with given_up() as (http, url, used):
        with anyio.CancelScope() as scope:
            async with http.stream("GET", url) as response:
                used.append(connection_of(response))
                async for _ in response.aiter_raw():
                    scope.cancel()
        assert scope.cancelled_caught


@pytest.mark.parametrize("reads", [False, True])
async def test_download_that_is_left_resets(reads: bool) -> None:
    async with given_up() as (http, url, used):
        async with http.stream("GET", url) as response:
            used.append(connection_of(response))
            if reads:
                async for _ in response.aiter_raw():
                    break


async def test_download_whose_reader_fails_resets() -> None:
    async with given_up() as (http, url, used):
        with pytest.raises(Failure):
            async with http.stream("GET", url) as response:
                used.append(connection_of(response))
                async for _ in response.aiter_raw():
                    raise Failure


@pytest.mark.parametrize("answer", [b"", HALF])
async def test_read_timeout_resets(answer: bytes) -> None:
    async with given_up(answer) as (http, url, _):
        with pytest.raises(httpx.ReadTimeout):
            await http.get(url, timeout=httpx.Timeout(LONG, read=SHORT))


async def test_answer_that_makes_no_sense_resets() -> None:
    async with given_up(b"nonsense\r\n\r\n") as (http, url, _):
        with pytest.raises(httpx.RemoteProtocolError):
            await http.get(url)


async def test_answer_that_is_truncated_resets() -> None:
    async def server_fails(peer: Peer) -> None:
        await head(peer)
        await peer.send(HALF)
        peer.send_eof()

    async with site(server_fails) as server, client() as http:
        with pytest.raises(httpx.RemoteProtocolError):
            await http.get(server.url)
        assert await server.end() == RST


async def test_upload_that_fails_resets() -> None:
    async def content() -> AsyncIterator[bytes]:
        yield b"half"
        raise Failure

    async with site(head) as server, client() as http:
        with pytest.raises(Failure):
            await http.post(server.url, content=content())
        assert await server.end() == Seen(b"4\r\nhalf\r\n", PeerClose.RST)


async def test_upload_that_is_cancelled_resets() -> None:
    async def start(peer: Peer) -> None:
        await head(peer)
        await peer.receive(1000)
        scope.cancel()

    async with site(start) as server, client() as http:
        with anyio.CancelScope() as scope:
            await http.post(server.url, content=bytes(TOO_MUCH))
        assert scope.cancelled_caught
        seen = await server.end()
    assert seen.close is PeerClose.RST
    assert len(seen.data) < TOO_MUCH


async def test_write_timeout_resets() -> None:
    over = anyio.Event()

    async def ignore(peer: Peer) -> None:
        await over.wait()

    async with site(ignore) as server, client() as http:
        with pytest.raises(httpx.WriteTimeout):
            timeout = httpx.Timeout(LONG, write=SHORT)
            await http.post(server.url, content=bytes(TOO_MUCH), timeout=timeout)
        over.set()
        assert (await server.end()).close is PeerClose.RST


async def test_upload_that_an_answer_cuts_short_is_no_success() -> None:
    """Though httpx has its answer, as ever."""

    async def refuse(peer: Peer) -> None:
        await head(peer)
        await peer.receive(1000)
        await peer.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
        peer.reset()

    async with site(refuse) as server, client() as http:
        response = await http.post(server.url, content=bytes(TOO_MUCH))
        assert response.status_code == 413
        assert response.text == "no"
    assert ended(connection_of(response)) == RESET


async def test_client_that_is_closed_resets_what_is_under_way() -> None:
    async with site(say(HALF)) as server, client() as http:
        async with http.stream("GET", server.url) as response:
            await http.aclose()
            with pytest.raises(httpx.ReadError):
                await response.aread()
        assert await server.end() == RST
    assert ended(connection_of(response)) == RESET


@pytest.mark.filterwarnings("ignore::ResourceWarning")
async def test_what_is_forgotten_is_reset() -> None:
    async def forget() -> None:
        http = client()
        await http.send(http.build_request("GET", server.url), stream=True)

    async with site(say(HALF)) as server:
        await forget()
        collect()
        assert await server.end() == RST


async def test_process_that_dies_resets_its_idle_connections(anyio_backend: Any) -> None:
    program = """\
import os, sys, anyio, httpx
from anyio_rst.httpx import AsyncHTTPTransport

async def main():
    client = httpx.AsyncClient(transport=AsyncHTTPTransport())
    await client.get(sys.argv[1])
    os._exit(0)

anyio.run(main, backend=sys.argv[2], backend_options=eval(sys.argv[3]))
"""
    backend, options = anyio_backend
    async with site(say(WHOLE)) as server:
        command = [sys.executable, "-c", program, server.url, backend, repr(options)]
        await anyio.to_thread.run_sync(partial(subprocess.run, command, check=True))
        assert await server.end() == RST


async def test_reset_by_the_server_is_an_error() -> None:
    async def fail(peer: Peer) -> None:
        await head(peer)
        await peer.send(b"HTTP/1.0 200 OK\r\n\r\nhalf of what the server meant to sa")
        sent.set()
        await read.wait()
        peer.reset()

    sent, read = anyio.Event(), anyio.Event()
    async with site(fail) as server, client() as http:
        with pytest.raises(httpx.ReadError):
            async with http.stream("GET", server.url) as response:
                async for _ in response.aiter_raw():
                    read.set()
        ending = connection_of(response).ending
        assert ending is not None
        assert ending.peer is PeerClose.RST


# Connections that went stale in the pool.


async def fins(peer: Peer) -> None:
    peer.send_eof()


async def resets(peer: Peer) -> None:
    peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    peer.sock.close()


async def says_more(peer: Peer) -> None:
    await peer.send(b"HTTP/1.1 408 Request Timeout\r\n\r\n")


@pytest.mark.parametrize("spoil", [fins, resets, says_more])
async def test_stale_connection_is_found_before_it_is_used(spoil: Script) -> None:
    asked, spoilt = anyio.Event(), anyio.Event()

    async def script(peer: Peer) -> None:
        await head(peer)
        await peer.send(WHOLE)
        if not spoilt.is_set():
            await asked.wait()
            await spoil(peer)
            spoilt.set()

    async with site(script) as server, client() as http:
        first = await http.get(server.url)
        asked.set()
        await spoilt.wait()
        second = await http.post(server.url, content=b"only once")
        assert second.text == "whole"
        assert connection_of(first).ending is not None
        assert server.accepted == 2


# Another protocol, on the connection of a response.


@pytest.mark.parametrize("fails", [False, True])
async def test_protocol_after_http_ends_as_its_block_does(fails: bool) -> None:
    async def echo(peer: Peer) -> None:
        await head(peer)
        await peer.send(SWITCHED)
        await peer.send(await peer.receive(4))

    async with site(echo) as server, client() as http:
        with suppress(Failure):
            async with http.stream("GET", server.url, headers=UPGRADE) as response:
                stream = response.extensions["network_stream"]
                await stream.write(b"ping")
                assert await stream.read(10) == b"ping"
                if fails:
                    raise Failure
        assert await server.end() == (RST if fails else FIN)
    assert ended(connection_of(response)) == (RESET if fails else FINISHED)


async def test_protocol_after_http_that_is_given_up_resets() -> None:
    async with site(say(SWITCHED)) as server, client() as http:
        with anyio.CancelScope() as scope:
            async with http.stream("GET", server.url, headers=UPGRADE) as response:
                scope.cancel()
                await anyio.sleep_forever()
        assert await server.end() == RST
        async with http.stream("GET", server.url, headers=UPGRADE) as response:
            with anyio.CancelScope() as scope:
                scope.cancel()
                await response.extensions["network_stream"].aclose()
        assert await server.end() == RST


# TLS.


async def test_fin_follows_a_close_notify() -> None:
    async with site(say(WHOLE), tls="http/1.1") as server:
        async with client(verify=client_context()) as http:
            response = await http.get(server.secure_url)
            assert response.text == "whole"
        assert await server.end() == (b"", CLEAN)
    assert ended(connection_of(response)) == FINISHED


async def test_reset_follows_no_close_notify() -> None:
    async with site(say(HALF), tls="http/1.1") as server:
        async with client(verify=client_context()) as http:
            async with http.stream("GET", server.secure_url):
                pass
            assert await server.end() == (b"", ["RST"])


async def test_end_without_a_close_notify_is_an_error() -> None:
    """Of a response that only the end of the connection delimits: RFC 9112, 9.8."""

    async def truncate(peer: TLSPeer) -> None:
        await head(peer)
        await peer.send(b"HTTP/1.0 200 OK\r\n\r\nhalf")
        peer.raw.send_eof()

    async with site(truncate, tls="http/1.1") as server:
        async with client(verify=client_context()) as http:
            with pytest.raises(httpx.ReadError):
                await http.get(server.secure_url)
        assert (await server.end())[1] == ["RST"]


async def test_certificate_that_is_not_trusted() -> None:
    async with site(say(WHOLE), tls="http/1.1") as server, client() as http:
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            await http.get(server.secure_url)
        assert await server.end() == "TLSV1_ALERT_UNKNOWN_CA"


async def test_handshake_that_takes_too_long_resets() -> None:
    async def silent(peer: Peer) -> None:
        pass

    async with site(silent) as server, client() as http:
        with pytest.raises(httpx.ConnectTimeout):
            timeout = httpx.Timeout(LONG, connect=0.3)  # the TCP connection is made
            await http.get(f"https://127.0.0.1:{server.port}/", timeout=timeout)
        assert (await server.end()).close is PeerClose.RST


# Proxies.


async def test_proxy_that_forwards() -> None:
    async def forward(peer: Peer) -> None:
        asked.append(await head(peer))
        await peer.send(WHOLE)

    asked: list[bytes] = []
    async with site(forward) as proxy:
        given = f"http://user:secret@127.0.0.1:{proxy.port}"
        async with client(proxy=given) as http:
            response = await http.get("http://example.org/page")
            assert response.text == "whole"
        assert await proxy.end() == FIN
    assert asked[0].startswith(b"GET http://example.org/page HTTP/1.1\r\n")
    assert b"\r\nProxy-Authorization: Basic dXNlcjpzZWNyZXQ=\r\n" in asked[0]


class Inside:
    """What a proxy passes on, as a socket."""

    def __init__(self, outside: TLSPeer) -> None:
        self._outside = outside
        self.sock: Any = self

    def recv(self, size: int) -> bytes:
        received = self._outside._run(self._outside.tls.read, size)
        assert isinstance(received, bytes)
        return received

    def sendall(self, data: bytes) -> None:
        self._outside._run(self._outside.tls.write, data)


@pytest.mark.parametrize("answer", [WHOLE, HALF])
@pytest.mark.parametrize("secure_proxy", [False, True])
async def test_tunnel_through_a_proxy(answer: bytes, secure_proxy: bool) -> None:
    async def tunnel(peer: Peer | TLSPeer) -> None:
        asked.append(await head(peer))
        await peer.send(b"HTTP/1.1 200 Connected\r\n\r\n")
        inside: Any = Inside(peer) if isinstance(peer, TLSPeer) else peer
        origin = await shake_hands(inside, server_side=True)
        await head(origin)
        await origin.send(answer)
        if not secure_proxy:
            ends.append(await origin.end())

    asked: list[bytes] = []
    ends: list[object] = []
    async with site(tunnel, tls="http/1.1" if secure_proxy else None) as proxy:
        address = f"https://localhost:{proxy.port}"
        if not secure_proxy:
            address = f"http://127.0.0.1:{proxy.port}"
        context = client_context() if secure_proxy else None
        given = httpx.Proxy(address, ssl_context=context)
        async with client(proxy=given, verify=client_context()) as http:
            async with http.stream("GET", "https://localhost:444/") as response:
                if answer is WHOLE:
                    assert await response.aread() == b"whole"
        seen = await proxy.end()
    assert asked[0].startswith(b"CONNECT localhost:444 HTTP/1.1\r\n")
    kind = FINISHED if answer is WHOLE else RESET
    assert ended(connection_of(response)) == kind
    if secure_proxy:
        assert seen == (b"", CLEAN if answer is WHOLE else ["RST"])
    else:
        assert ends == [(b"", CLEAN if answer is WHOLE else ["RST"])]


async def test_tunnel_that_is_refused_resets() -> None:
    refusal = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"
    async with site(say(refusal)) as proxy:
        async with client(proxy=f"http://127.0.0.1:{proxy.port}") as http:
            with pytest.raises(httpx.ProxyError, match="403 Forbidden"):
                await http.get("https://localhost/")
            assert await proxy.end() == RST


def socks(reply: int, answer: bytes) -> Script:
    async def script(peer: Peer) -> None:
        assert await peer.receive(3) == b"\5\1\0"  # RFC 1928: no authentication
        await peer.send(b"\5\0")
        assert await peer.receive(4) == b"\5\1\0\3"  # connect to a name
        (size,) = await peer.receive(1)
        assert await peer.receive(size + 2) == b"example.org\0\x50"
        await peer.send(bytes([5, reply, 0, 1, 0, 0, 0, 0, 0, 0]))
        if reply == 0:
            await head(peer)
            await peer.send(answer)

    return script


@pytest.mark.parametrize("answer", [WHOLE, HALF])
async def test_socks(answer: bytes) -> None:
    async with site(socks(0, answer)) as proxy:
        async with client(proxy=f"socks5://127.0.0.1:{proxy.port}") as http:
            async with http.stream("GET", "http://example.org/") as response:
                if answer is WHOLE:
                    assert await response.aread() == b"whole"
        assert await proxy.end() == (FIN if answer is WHOLE else RST)


@pytest.mark.parametrize("http2", [False, True])
async def test_socks_that_refuses_is_reset(http2: bool) -> None:
    async with site(socks(5, b"")) as proxy:
        async with client(proxy=f"socks5://127.0.0.1:{proxy.port}", http2=http2) as http:
            with pytest.raises(httpx.ProxyError, match="refused"):
                await http.get("http://example.org/")
            assert await proxy.end() == RST


# HTTP/2, whose exchanges share a connection.


async def http2_server(peer: Peer | TLSPeer) -> None:
    config = h2.config.H2Configuration(client_side=False)
    state = h2.connection.H2Connection(config)
    state.initiate_connection()
    while True:
        await peer.send(state.data_to_send())
        if isinstance(peer, Peer):
            data = await anyio.to_thread.run_sync(peer.sock.recv, 65536)
        else:
            data = await anyio.to_thread.run_sync(peer._run, peer.tls.read, 65536)
        if not data:
            return
        for event in state.receive_data(data):
            if not isinstance(event, h2.events.RequestReceived):
                continue
            assert event.headers
            assert event.stream_id
            path = dict(event.headers)[b":path"]
            if path == b"/silence":
                continue
            state.send_headers(event.stream_id, [(":status", "200")])
            state.send_data(event.stream_id, path, end_stream=path == b"/whole")


async def finish(http: httpx.AsyncClient, url: str) -> None:
    await http.get(f"{url}whole")


async def leave(http: httpx.AsyncClient, url: str) -> None:
    async with http.stream("GET", f"{url}half"):
        pass


async def cancel(http: httpx.AsyncClient, url: str) -> None:
    with anyio.CancelScope() as scope:
        async with http.stream("GET", f"{url}half") as response:
            async for _ in response.aiter_raw():
                scope.cancel()


async def cancel_unanswered(http: httpx.AsyncClient, url: str) -> None:
    async def trace(name: str, info: object) -> None:
        if name == "http2.receive_response_headers.started":
            scope.cancel()

    with anyio.CancelScope() as scope:
        await http.get(f"{url}silence", extensions={"trace": trace})


@pytest.mark.parametrize("tls", [None, "h2"])
@pytest.mark.parametrize("use", [finish, leave, cancel, cancel_unanswered])
async def test_http2_connection_ends_as_its_exchanges_did(
    use: Callable[[httpx.AsyncClient, str], Awaitable[None]], tls: str | None
) -> None:
    options: dict[str, Any] = {"http2": True, "http1": tls is not None}
    async with site(http2_server, tls=tls) as server:
        url = server.url if tls is None else server.secure_url
        async with client(verify=client_context(), **options) as http:
            first = await http.get(f"{url}whole")
            assert first.http_version == "HTTP/2"
            await use(http, url)
            last = await http.get(f"{url}whole")
            assert last.text == "/whole"
            assert connection_of(last) is connection_of(first)
        seen = await server.end()
        assert server.accepted == 1
    assert ended(connection_of(first)) == (FINISHED if use is finish else RESET)
    if use is not finish:
        assert seen in (RST, (b"", ["RST"]))
    else:
        assert seen == (FIN if tls is None else (b"", CLEAN))


async def test_http2_download_within_an_upload_is_an_exchange_of_its_own() -> None:
    async with (
        site(http2_server) as source,
        site(head) as sink,
        client(http1=False, http2=True) as http2,
        client() as http1,
    ):
        async with http2.stream("GET", f"{source.url}whole") as response:

            async def content() -> AsyncIterator[bytes]:
                async for part in response.aiter_raw():
                    yield part
                raise Failure

            with pytest.raises(Failure):
                await http1.post(sink.url, content=content())
            assert (await sink.end()).close is PeerClose.RST
        again = await http2.get(f"{source.url}whole")
        assert connection_of(again) is connection_of(response)
        await http2.aclose()
        assert await source.end() == FIN


# As with httpx's own.


async def test_connection_that_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    async with client(retries=1) as http:
        told: list[str] = []

        async def trace(name: str, info: object) -> None:
            told.append(name)

        with pytest.raises(httpx.ConnectError):
            await http.get(f"http://127.0.0.1:{port}/", extensions={"trace": trace})
    assert told.count("connection.connect_tcp.failed") == 2


async def test_pool_that_is_exhausted() -> None:
    limits = httpx.Limits(max_connections=1)
    async with site(say(HALF)) as server, client(limits=limits) as http:
        async with http.stream("GET", server.url):
            with pytest.raises(httpx.PoolTimeout):
                timeout = httpx.Timeout(LONG, pool=SHORT)
                await http.get(server.url, timeout=timeout)


async def test_scheme_that_is_none() -> None:
    async with client() as http:
        with pytest.raises(httpx.UnsupportedProtocol):
            await http.get("gopher://localhost/")


async def test_options_of_the_socket() -> None:
    option = (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options: dict[str, Any] = {
        "local_address": "127.0.0.2",
        "socket_options": [option],
    }
    async with site(say(WHOLE)) as server, client(**options) as http:
        response = await http.get(server.url)
        stream = response.extensions["network_stream"]
        host, port = stream.get_extra_info("client_addr")
        assert host == "127.0.0.2"
        assert stream.get_extra_info("server_addr") == ("127.0.0.1", server.port)
        sock = stream.get_extra_info("socket")
        assert sock.getsockname() == (host, port)
        assert sock.getsockopt(*option[:2]) == 1
        assert stream.get_extra_info("ssl_object") is None
        assert stream.get_extra_info("is_readable") is False
        assert stream.get_extra_info("nothing") is None
    assert stream.get_extra_info("is_readable") is True


async def test_what_is_refused() -> None:
    with pytest.raises(TypeError, match="UNIX socket has no RST"):
        AsyncHTTPTransport(uds="/run/socket")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gopher"):
        AsyncHTTPTransport(proxy="gopher://localhost")
    option = (socket.SOL_SOCKET, -1, 1)
    async with site(head) as server, client(socket_options=[option]) as http:
        with pytest.raises(httpx.ConnectError):
            await http.get(server.url)
        assert await server.end() == RST


def test_every_error_of_httpcore_is_one_of_httpx() -> None:
    errors = {
        error
        for error in map(partial(getattr, httpcore), httpcore.__all__)
        if isinstance(error, type) and issubclass(error, Exception)
    }
    errors.remove(httpcore.ConnectionNotAvailable)  # which stays within the pool
    assert set(_HTTPX_ERRORS) == errors
    for theirs, ours in _HTTPX_ERRORS.items():
        assert theirs.__name__ == ours.__name__
        first = next(error for error in _HTTPX_ERRORS if issubclass(theirs, error))
        assert first is theirs  # the most special
