"""`anyio_rst.lowlevel`, on whatever has a TCP socket, judged by a plain one."""

from __future__ import annotations

import asyncio
import http.server
import os
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import anyio
import pytest
import trio
from anyio.abc import SocketAttribute
from anyio.streams.buffered import BufferedByteStream
from anyio.streams.stapled import MultiListener
from conftest import BACKENDS, on_one_loop

from anyio_rst import Connection, PeerClose, connection_scope, lowlevel

from serving import DISSOLVES, LONG, TELLS_OF_QUEUES, Peer, Seen, fill_buffers

pytestmark = pytest.mark.anyio

ANSWER = b"answer"

# Whatever has a TCP socket, on each event loop.
HOLDERS = {
    "asyncio": ["socket", "anyio", "buffered", "connection", "transport", "writer"],
    "uvloop": ["socket", "anyio", "buffered", "connection", "transport", "writer"],
    "trio": ["socket", "anyio", "buffered", "connection", "trio", "trio socket"],
}

each_holder = pytest.mark.parametrize(
    ("anyio_backend", "holder"),
    [
        pytest.param(backend.values[0], holder, id=f"{backend.id}-{holder}")
        for backend in BACKENDS
        for holder in HOLDERS[backend.id]
    ],
    indirect=["anyio_backend"],
)


class Failure(Exception):
    pass


@asynccontextmanager
async def held(holder: str) -> AsyncIterator[tuple[Any, socket.socket, Peer]]:
    """What has the socket, a plain copy of that, and the peer."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer = Peer(listener.getsockname()[1])
        sock, _ = listener.accept()
    with peer, sock.dup() as copy:
        if holder == "socket":
            with sock:
                yield sock, copy, peer
        elif holder in ("transport", "writer"):
            _, writer = await asyncio.open_connection(sock=sock)
            yield (writer if holder == "writer" else writer.transport), copy, peer
            writer.transport.abort()
            with suppress(OSError):
                await writer.wait_closed()
        elif holder.startswith("trio"):
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
            async with stream:
                yield (stream if holder == "trio" else stream.socket), copy, peer
        else:
            inner = await anyio.abc.SocketStream.from_socket(sock)
            if holder == "connection":
                async with connection_scope(inner, drain=None) as conn:
                    yield conn, copy, peer
            else:
                async with inner:
                    wrapped = BufferedByteStream(inner)
                    yield (wrapped if holder == "buffered" else inner), copy, peer


def linger(sock: socket.socket) -> bytes:
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)


@each_holder
async def test_arm_and_disarm(holder: str) -> None:
    async with held(holder) as (given, copy, _):
        lowlevel.arm(given)
        assert linger(copy) == b"\1" + bytes(7)
        lowlevel.disarm(given)
        assert linger(copy) == bytes(8)


@pytest.mark.skipif(not DISSOLVES, reason="in this kernel only a close resets")
@each_holder
async def test_reset_is_sent_at_once(holder: str) -> None:
    async with held(holder) as (given, copy, peer):
        copy.send(ANSWER)
        lowlevel.reset(given)
        assert await peer.read_to_end() == Seen(ANSWER, PeerClose.RST)
        lowlevel.reset(given)  # what has ended is left alone


@each_holder
async def test_finish_sends_a_fin_and_receiving_goes_on(holder: str) -> None:
    async with held(holder) as (given, copy, peer):
        lowlevel.arm(given)
        copy.send(ANSWER)
        blocks = os.get_blocking(copy.fileno())
        lowlevel.finish(given)
        assert os.get_blocking(copy.fileno()) is blocks
        assert linger(copy) == bytes(8)
        assert await peer.read_to_end() == Seen(ANSWER, PeerClose.FIN)


@pytest.mark.skipif(not TELLS_OF_QUEUES, reason="this kernel has no TIOCOUTQ for TCP")
@each_holder
async def test_unacknowledged(holder: str) -> None:
    async with held(holder) as (given, copy, peer):
        copy.send(ANSWER)
        await peer.receive(6)
        with anyio.fail_after(LONG):
            while lowlevel.unacknowledged(given):
                await anyio.sleep(0.001)
        fill_buffers(copy)
        left = lowlevel.unacknowledged(given)
        assert left is not None
        assert left > 0


@each_holder
async def test_set_keepalive(holder: str) -> None:
    async with held(holder) as (given, copy, _):
        with pytest.raises(ValueError, match="keepalive must be from 1"):
            lowlevel.set_keepalive(given, 0)
        assert not copy.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        lowlevel.set_keepalive(given, 6)
        assert copy.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 6000


async def test_socket_that_does_not_know_its_family() -> None:
    """`socket.fromfd()` believes what it is told, and so does what it accepts."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        Peer(listener.getsockname()[1]) as peer,
    ):
        with socket.fromfd(listener.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as told:
            sock, _ = told.accept()
        with sock:
            assert sock.family == socket.AF_UNIX
            lowlevel.arm(sock)
            lowlevel.reset(sock)
            assert (await peer.read_to_end()).close is PeerClose.RST
    one, other = socket.socketpair()
    with one, other, pytest.raises(TypeError, match="its socket is AF_UNIX"):
        lowlevel.arm(one)


@pytest.mark.skipif(not DISSOLVES, reason="in this kernel only a close resets")
@each_holder
async def test_reset_on_failure(holder: str) -> None:
    async with held(holder) as (given, copy, peer):
        with lowlevel.reset_on_failure(given):
            assert linger(copy) != bytes(8)
            copy.send(ANSWER)
        assert linger(copy) == bytes(8)
        with pytest.raises(Failure), lowlevel.reset_on_failure(given):
            raise Failure
        assert await peer.read_to_end() == Seen(ANSWER, PeerClose.RST)


async def test_fin_would_overtake_what_waits_in_a_transport(anyio_backend: Any) -> None:
    if anyio_backend[0] == "trio":
        return
    async with held("writer") as (writer, copy, peer):
        fill_buffers(copy)
        writer.write(bytes(2**20))
        with pytest.raises(RuntimeError, match="its write_eof"):
            lowlevel.finish(writer)
        lowlevel.reset(writer)
        if not DISSOLVES:
            writer.transport.abort()
            copy.close()
        assert (await peer.read_to_end()).close is PeerClose.RST


@pytest.mark.skipif(not DISSOLVES, reason="this kernel passes on nothing")
async def test_what_listeners_accept_is_armed() -> None:
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    assert isinstance(listener, MultiListener)
    async with listener:
        lowlevel.arm(listener)
        raw = listener.extra(SocketAttribute.raw_socket)
        with Peer(raw.getsockname()[1]) as peer:
            first: Any = listener.listeners[0]
            stream = await first.accept()
            accepted = stream.extra(SocketAttribute.raw_socket)
            assert linger(accepted) != bytes(8)
            for refused in (lowlevel.reset, lowlevel.finish, lowlevel.unacknowledged):
                with pytest.raises(ValueError, match="is listening"):
                    refused(listener)
            lowlevel.reset(stream)
            assert (await peer.read_to_end()).close is PeerClose.RST
            await stream.aclose()


@on_one_loop
@pytest.mark.parametrize("function", [lowlevel.arm, lowlevel.reset, lowlevel.finish])
async def test_what_has_no_tcp_socket_is_refused(function: Any) -> None:
    with pytest.raises(TypeError, match="object has no socket"):
        function(object())
    send, receive = anyio.create_memory_object_stream[bytes]()
    with send, receive, pytest.raises(TypeError, match="has no socket"):
        function(send)
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(TypeError, match="is not a TCP connection"):
        function(ours)
    closed = socket.socket()
    closed.close()
    if function is not lowlevel.reset:  # which leaves alone what has ended
        with pytest.raises(ValueError, match="is closed"):
            function(closed)


# Programs without an event loop.


@contextmanager
def serving(server: socketserver.TCPServer) -> Iterator[int]:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    with server:
        thread.start()
        try:
            yield server.socket.getsockname()[1]
        finally:
            server.shutdown()
            thread.join()


class Handler(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        with suppress(Failure), lowlevel.reset_on_failure(self.request):
            self.request.sendall(ANSWER)
            if self.request.recv(1) == b"x":
                raise Failure


@pytest.mark.parametrize(("asks", "close"), [(b"x", "RST"), (b"y", "FIN")])
async def test_socketserver(asks: bytes, close: str) -> None:
    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
    with serving(server) as port, Peer(port) as peer:
        await peer.send(asks)
        assert await peer.read_to_end() == Seen(ANSWER, PeerClose(close))


class Page(http.server.BaseHTTPRequestHandler):
    """HTTP/1.0: only the end of the connection delimits the body."""

    def handle(self) -> None:
        with suppress(Failure), lowlevel.reset_on_failure(self.request):
            super().handle()

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(ANSWER)
        if self.path == "/half":
            raise Failure

    def log_request(self, code: object = "-", size: object = "-") -> None:
        pass


@pytest.mark.parametrize(("path", "status"), [("whole", 0), ("half", 56)])
async def test_curl_knows_a_truncated_page_of_http_server(path: str, status: int) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    with serving(server) as port:
        curl = ["curl", "-sS", f"http://127.0.0.1:{port}/{path}"]
        result = await anyio.run_process(curl, check=False, stderr=subprocess.DEVNULL)
    assert (result.returncode, result.stdout) == (status, ANSWER)


async def test_death_of_an_armed_program_is_a_reset() -> None:
    program = (
        "import os, socket, sys\n"
        "from anyio_rst import lowlevel\n"
        "sock = socket.create_connection(('127.0.0.1', int(sys.argv[1])))\n"
        "lowlevel.arm(sock)\n"
        "sock.sendall(b'answer')\n"
        "os._exit(1)\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        command = [sys.executable, "-c", program, str(port)]
        await anyio.run_process(command, check=False)
        sock, _ = listener.accept()
    with sock, pytest.raises(ConnectionResetError):
        sock.settimeout(LONG)
        assert sock.recv(6) == ANSWER
        sock.recv(1)


async def test_of_a_connection_its_own_socket_is_used() -> None:
    async with held("connection") as (conn, _, _):
        assert isinstance(conn, Connection)
        lowlevel.arm(conn)
        assert conn._life.native._copy is None
