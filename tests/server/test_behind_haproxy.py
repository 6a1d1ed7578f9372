"""examples/behind_haproxy.py behind HAProxy and nginx, and with headers by hand."""

from __future__ import annotations

import logging
import shutil
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
import trustme
from test_readme import connect, free_port
from test_serve_processes import answers, example, loops, running

from anyio_rst import Cause, CloseKind, Connection, Ending, PeerClose, Server, serve_tcp
from anyio_rst.testing import (
    Capture,
    CaptureUnavailable,
    Direction,
    TCPFlag,
    capture_segments,
)
from evidence.interop import proxies
from evidence.interop.results import Route

import behind_haproxy
from securing import CLEAN, TLSPeer, client_context, server_context, shake_hands
from serving import LONG, Peer, Seen

pytestmark = pytest.mark.anyio


def needs(program: str, *files: Path) -> pytest.MarkDecorator:
    missing = shutil.which(program) is None or not all(file.exists() for file in files)
    return pytest.mark.skipif(missing, reason=f"no {program} here")


FROM_US = Direction.FROM_PORT

needs_haproxy = needs("haproxy")

each_balancer = pytest.mark.parametrize(
    "balancer",
    [
        pytest.param(
            Route("HAProxy, version 1", "haproxy", option="default-server send-proxy"),
            marks=needs_haproxy,
            id="haproxy-v1",
        ),
        pytest.param(
            Route("HAProxy, version 2", "haproxy", option="default-server send-proxy-v2"),
            marks=needs_haproxy,
            id="haproxy-v2",
        ),
        pytest.param(
            Route("nginx", "nginx", option="proxy_protocol on;"),
            marks=needs("nginx", proxies.STREAM_MODULE),
            id="nginx",
        ),
    ],
)

is_tls = pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])


class Behind:
    """The server of the example, and what became of its connections."""

    def __init__(self, server: Server) -> None:
        self.port = server.port
        self.endings: list[Ending] = []
        self._ended = anyio.Event()

    def on_ending(self, conn: Connection) -> None:
        assert conn.ending is not None
        self.endings.append(conn.ending)
        self._ended.set()

    async def ended(self, count: int = 1) -> list[Ending]:
        """The first *count* endings."""
        with anyio.fail_after(LONG):
            while len(self.endings) < count:
                self._ended = anyio.Event()
                await self._ended.wait()
        return self.endings[:count]


@asynccontextmanager
async def serving_behind(*, tls: bool) -> AsyncIterator[Behind]:
    async with anyio.create_task_group() as tg:

        async def serve(*, task_status: Any) -> None:
            await serve_tcp(
                behind_haproxy.echo,
                host="127.0.0.1",
                preamble=behind_haproxy.proxy_header,
                ssl_context=server_context() if tls else None,
                on_ending=lambda conn: behind.on_ending(conn),
                task_status=task_status,
            )

        behind = Behind(await tg.start(serve))
        yield behind
        tg.cancel_scope.cancel()


def forward(balancer: Route, behind: Behind) -> proxies.Forward:
    return proxies.Forward(balancer, free_port(), behind.port)


def told(address: object, said: bytes) -> bytes:
    """What the example answers."""
    return b"%a: %b" % (address, said)


def above_debug(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "anyio_rst" and record.levelno > logging.DEBUG
    ]


@is_tls
@each_balancer
async def test_client_is_known_behind_a_balancer(
    anyio_backend: Any, balancer: Route, tls: bool, tmp_path: Path
) -> None:
    async with serving_behind(tls=tls) as behind:
        way = forward(balancer, behind)
        with proxies.running(balancer.program, [way], tmp_path), Peer(way.port) as peer:
            await behind.ended()  # of who looked whether it listens
            address = peer.sock.getsockname()
            answer = told(address, b"hello")
            if tls:
                secure = await shake_hands(peer)
                await secure.send(b"hello")
                assert await secure.receive(len(answer)) == answer
                secure.say_close_notify()
                assert await secure.end() == (b"", CLEAN)
                peer.send_eof()
            else:
                await peer.send(b"hello")
                assert await peer.receive(len(answer)) == answer
                peer.send_eof()  # nginx would drop an answer behind it
                assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)
            _, ending = await behind.ended(2)
    assert ending.remote_address == address
    assert (ending.kind, ending.cause) == (CloseKind.FIN, Cause.RETURNED)
    # Of the application, without the header.
    assert (ending.received, ending.sent) == (5, len(answer))
    assert (ending.tls is not None) is tls


# Health checks, all of them at once. HAProxy spreads them over their interval.

CHECKS = {
    "connect": "check",
    "v1": "send-proxy check",
    "v2": "send-proxy-v2 check",
}
TLS_CHECKS = {
    "tls-v1": "send-proxy check check-ssl verify none",
    "tls-v2": "send-proxy-v2 check check-ssl verify none",
}


def checking(checks: dict[str, str], origin: int, log: int) -> Route:
    servers = "\n".join(
        f"    server {name} 127.0.0.1:{origin} {check} inter 1s"
        for name, check in checks.items()
    )
    options = f"option log-health-checks\n    log 127.0.0.1:{log} local0\n{servers}"
    return Route("HAProxy", "haproxy", option=options)


@needs_haproxy
@is_tls
async def test_health_checks_are_quiet(
    anyio_backend: Any, tls: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checks = {**CHECKS, **TLS_CHECKS} if tls else CHECKS
    caplog.set_level(logging.DEBUG, "anyio_rst")
    async with serving_behind(tls=tls) as behind:
        caplog.clear()  # that it listens
        with capturing(behind.port) as capture, health_log() as log:
            haproxy = checking(checks, behind.port, log.getsockname()[1])
            with proxies.running("haproxy", [forward(haproxy, behind)], tmp_path):
                said = await anyio.to_thread.run_sync(first_checks, log, len(checks))
                # One that only connects is over before it could be accepted.
                await behind.ended(3 * (len(checks) - 1))
                # Now: the end of HAProxy may cut a check short.
                assert not above_debug(caplog)
                assert {ending.sent for ending in behind.endings} == {0}
                resets = capture.having(TCPFlag.RST) if capture is not None else ()
            said += later_checks(log)
    for name in checks:
        layer = "Layer6" if name in TLS_CHECKS else "Layer4"
        (check,) = [line for line in said if f"/{name} " in line]
        assert f"succeeded, reason: {layer} check passed" in check
    # The kernel has answers of its own for one that is over before it is accepted.
    ours = {ending.remote_address for ending in behind.endings}
    sent = [each.other_port for each in resets if each.direction is FROM_US]
    assert ours.isdisjoint(("127.0.0.1", port) for port in sent)


@is_tls
@pytest.mark.parametrize("end", [PeerClose.FIN, PeerClose.RST])
async def test_connection_without_a_word_is_quiet(
    anyio_backend: Any, end: PeerClose, tls: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "anyio_rst")
    async with serving_behind(tls=tls) as behind:
        caplog.clear()  # that it listens
        with Peer(behind.port) as peer:
            if end is PeerClose.FIN:
                peer.send_eof()
                assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)
            else:
                peer.reset()
            (ending,) = await behind.ended()
    assert ending.peer is end
    assert not above_debug(caplog)


@contextmanager
def capturing(port: int) -> Iterator[Capture | None]:
    with ExitStack() as stack:
        capture = None
        with suppress(CaptureUnavailable):  # without it HAProxy's word has to do
            capture = stack.enter_context(capture_segments(port))
        yield capture


@contextmanager
def health_log() -> Iterator[socket.socket]:
    """What HAProxy says of checks whose outcome is not that of the one before."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as log:
        log.bind(("127.0.0.1", 0))
        log.settimeout(LONG)
        yield log


def first_checks(log: socket.socket, count: int) -> list[str]:
    said: list[str] = []
    while len(said) < count:
        line = log.recv(10_000).decode()
        if "Health check for" in line:
            said.append(line)
    return said


def later_checks(log: socket.socket) -> list[str]:
    log.setblocking(False)
    said: list[str] = []
    with suppress(BlockingIOError):
        while True:
            said.append(log.recv(10_000).decode())
    return [line for line in said if "Health check for" in line]


# Headers by hand.

SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"


def binary(command: int, family: int, data: bytes) -> bytes:
    """A header of version 2; *command* 0 is LOCAL, *family* 0x11 TCP over IPv4."""
    return SIGNATURE + struct.pack("!BBH", 0x20 | command, family, len(data)) + data


CLIENT4, CLIENT6 = ("203.0.113.7", 4000), ("2001:db8::7", 4000)
PORTS = struct.pack("!HH", 4000, 443)
IPV4 = bytes([203, 0, 113, 7, 192, 0, 2, 1]) + PORTS
IPV6 = socket.inet_pton(socket.AF_INET6, CLIENT6[0]) + bytes(16) + PORTS
V1 = b"PROXY TCP4 203.0.113.7 192.0.2.1 4000 443\r\n"
V2 = binary(1, 0x11, IPV4)
GOOD = {
    "v1-ipv4": (V1, CLIENT4),
    "v1-ipv6": (b"PROXY TCP6 2001:db8::7 2001:db8::1 4000 443\r\n", CLIENT6),
    "v1-unknown": (b"PROXY UNKNOWN\r\n", None),
    "v1-longest": (b"PROXY UNKNOWN " + b"f" * 91 + b"\r\n", None),
    "v2-ipv4": (V2, CLIENT4),
    "v2-ipv6": (binary(1, 0x21, IPV6), CLIENT6),
    "v2-local": (binary(0, 0, b""), None),
    "v2-unspecified": (binary(1, 0, b"whatever"), None),
    "v2-unix": (binary(1, 0x31, b"/client".ljust(216, b"\0")), None),
    "v2-longest": (
        binary(1, 0x11, IPV4 + b"\x04" + struct.pack("!H", 4065) + bytes(4065)),
        CLIENT4,
    ),
}


@is_tls
@pytest.mark.parametrize("header", GOOD)
async def test_nothing_behind_the_header_is_read_with_it(
    anyio_backend: Any, header: str, tls: bool
) -> None:
    """It comes in one segment with what follows."""
    data, address = GOOD[header]
    async with serving_behind(tls=tls) as behind:
        with Peer(behind.port) as peer:
            answer = told(address or peer.sock.getsockname(), b"hello")
            if tls:
                secure = TLSPeer(peer, client_context(), server_side=False)
                await peer.send(data + secure.hello())
                await secure.handshake()
                await secure.send(b"hello")
                assert await secure.receive(len(answer)) == answer
            else:
                await peer.send(data + b"hello")
                assert await peer.receive(len(answer)) == answer


@pytest.mark.parametrize("header", ["v1-ipv6", "v2-ipv6"])
async def test_header_may_come_in_pieces(anyio_backend: Any, header: str) -> None:
    data, address = GOOD[header]
    async with serving_behind(tls=False) as behind:
        with Peer(behind.port) as peer:
            peer.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for byte in data:
                await peer.send(bytes([byte]))
            await peer.send(b"hello")
            answer = told(address, b"hello")
            assert await peer.receive(len(answer)) == answer


BAD = {
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(506),
    "v1-endless": b"PROXY TCP4 " + b"1" * 1000,
    "v1-too-long": b"PROXY UNKNOWN " + b"f" * 92 + b"\r\n",
    "v1-no-address": b"PROXY TCP4 client server 1 2\r\n",
    "v1-port": b"PROXY TCP4 203.0.113.7 192.0.2.1 65536 443\r\n",
    "v1-lf": b"PROXY UNKNOWN\n",
    "v2-version": SIGNATURE + b"\x31\x11\x00\x0c" + IPV4,
    "v2-command": binary(2, 0x11, IPV4),
    "v2-short-addresses": binary(1, 0x11, IPV4[:-1]),
    "v2-too-long": binary(1, 0x11, bytes(4081)),
}
CUT_SHORT = {"v1": b"PROXY TCP4 203.0", "v2": V2[:-1], "v2-signature": b"\r\n"}


@is_tls
@pytest.mark.parametrize(
    ("data", "ends"),
    [
        *(pytest.param(data, False, id=name) for name, data in BAD.items()),
        *(pytest.param(data, True, id=f"{name}-cut") for name, data in CUT_SHORT.items()),
    ],
)
async def test_what_is_no_header_is_reset_in_one_line(
    anyio_backend: Any,
    data: bytes,
    ends: bool,
    tls: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "anyio_rst")
    async with serving_behind(tls=tls) as behind:
        caplog.clear()  # that it listens
        with Peer(behind.port) as peer:
            await peer.send(data)
            if ends:
                peer.send_eof()
            assert await peer.read_to_end() == Seen(b"", PeerClose.RST)
        (ending,) = await behind.ended()
    assert (ending.kind, ending.cause) == (CloseKind.RST, Cause.RAISED)
    (said,) = above_debug(caplog)
    assert said.startswith("the preamble failed (")
    assert len(said.splitlines()) == 1
    assert not any(record.exc_info for record in caplog.records)


# As a program.


@loops
@is_tls
def test_program(loop: str, tls: bool, tmp_path: Path) -> None:
    port = free_port()
    arguments = [str(port)]
    authority = trustme.CA()
    if tls:
        pem = tmp_path / "cert.pem"
        issued = authority.issue_cert("localhost")
        issued.private_key_and_cert_chain_pem.write_to_path(pem)
        arguments.append(str(pem))
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    command = [*example("behind_haproxy.py", loop), *arguments]
    with running(command) as process, connect(port, process) as sock:
        sock.sendall(V1)
        if tls:
            sock = trusting.wrap_socket(sock, server_hostname="localhost")
        with sock:
            sock.sendall(b"hello")
            answers(sock, told(CLIENT4, b"hello"))
