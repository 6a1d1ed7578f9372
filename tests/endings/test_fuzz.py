"""Fuzzed input: nothing hangs, nothing leaks, and the other side gets an end.

The other side is plain blocking sockets in a thread. Each Hypothesis example is a batch
of inputs, all of them on connections that are open at the same time, to one server or
from one program on one event loop; after each batch an honest peer gets an honest answer.

The suite sends a few thousand inputs, always the same ones; `nox -s fuzz` sends many
more, other ones each time.
"""

from __future__ import annotations

import enum
import errno
import logging
import os
import runpy
import signal
import socket
import ssl
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Address
from itertools import count, zip_longest
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import outcome
import pytest
import trustme
from anyio.abc import SocketAttribute
from anyio.lowlevel import checkpoint
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_model import BACKENDS, PROFILE, nothing_left_behind

from anyio_rst import (
    CloseKind,
    Connection,
    Ending,
    PeerClose,
    Server,
    connect_tcp,
    serve_tcp,
)
from anyio_rst.commands import _demo_cases, _demo_clients, _demo_servers
from anyio_rst.commands._demo_processes import NotMeasured

import download
from serving import LONG, Handler, Seen, echo

EXAMPLES = Path(__file__).parents[2] / "examples"

T = TypeVar("T")

LOOPBACK = "127.0.0.1"

numbers = count(1)

# A batch takes longer than a script of the model, and one that hangs as long as it may:
# that is not tried again and again to find a smaller one. The message has the input.
FUZZ = settings(
    PROFILE,
    max_examples=PROFILE.max_examples // 16,
    phases=[Phase.explicit, Phase.generate],
)

# Of a server whose peers fall silent. Long enough for an honest one.
HANDSHAKE_TIMEOUT = 0.4

# For a loop that never gets to the time limits inside of it.
SPINNING = 2 * LONG

# What a peer may make of a TLS connection.
TLS_FAILURES = (ssl.SSLError, anyio.BrokenResourceError, TimeoutError)

VERSIONS = (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)

AUTHORITY = trustme.CA()


def context(protocol: int, version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
    made = ssl.SSLContext(protocol)
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        AUTHORITY.issue_cert("localhost").configure_cert(made)
    else:
        AUTHORITY.configure_trust(made)
    if version is not None:
        made.minimum_version = made.maximum_version = version
    return made


# Ours, and those of the other side.
SERVER = context(ssl.PROTOCOL_TLS_SERVER)
CLIENT = context(ssl.PROTOCOL_TLS_CLIENT)
SERVERS = {each: context(ssl.PROTOCOL_TLS_SERVER, each) for each in VERSIONS}
CLIENTS = {each: context(ssl.PROTOCOL_TLS_CLIENT, each) for each in VERSIONS}


# The inputs.


class End(enum.Enum):
    """What the other side does behind its input."""

    FIN = "FIN"
    RST = "RST"
    SILENCE = "silence"


@dataclass(frozen=True)
class Edit:
    at: int
    remove: int
    insert: bytes


@dataclass(frozen=True)
class Input:
    """What to make of *text*: edits, in turn, then copies of all of it, then pieces."""

    text: bytes
    edits: tuple[Edit, ...] = ()
    copies: int = 1
    cuts: tuple[int, ...] = ()
    end: End = End.FIN

    def pieces(self, text: bytes | None = None) -> list[bytes]:
        data = bytearray(self.text if text is None else text)
        for edit in self.edits:
            at = edit.at % (len(data) + 1)
            data[at : at + edit.remove] = edit.insert
        data *= self.copies
        cuts = sorted({cut % (len(data) + 1) for cut in self.cuts})
        return [
            bytes(data[start:stop])
            for start, stop in zip([0, *cuts], [*cuts, len(data)], strict=True)
            if start < stop
        ]


@dataclass(frozen=True)
class Spoilt(Input):
    """A TLS session, honest up to the flight of this number, which is the *text*.

    A flight is what one side sends before it waits for the other; behind those of the
    handshake comes one of application data.
    """

    flight: int = 0
    version: ssl.TLSVersion = VERSIONS[-1]


EVERYTHING = 2**20

offsets = st.integers(0, 2**12)
edits = st.builds(Edit, offsets, st.integers(0, 8), st.binary(max_size=8))
noise = st.builds(Edit, st.just(0), st.just(EVERYTHING), st.binary(max_size=600))
# A record of TLS is its type, a version, a length and so many bytes: RFC 8446, 5.1.
records = st.builds(
    lambda at, remove, kind, length, data: Edit(
        at, remove, struct.pack("!BHH", kind, 0x0303, length) + data
    ),
    offsets,
    st.sampled_from([0, EVERYTHING]),
    st.integers(19, 25),
    st.integers(0, 2**16 - 1),
    st.binary(max_size=40),
)
ends_of_input = st.sampled_from([End.FIN, End.RST])


def spoilt(**options: st.SearchStrategy[Any]) -> st.SearchStrategy[Spoilt]:
    defaults: dict[str, st.SearchStrategy[Any]] = {
        "text": st.just(b""),
        "edits": st.lists(edits | noise | records, max_size=4).map(tuple),
        "copies": st.integers(1, 3),
        "cuts": st.lists(offsets, max_size=5).map(tuple),
        "end": ends_of_input,
        "flight": st.integers(0, 3),
        "version": st.sampled_from(VERSIONS),
    }
    return st.builds(Spoilt, **defaults | options)


def batches(inputs: st.SearchStrategy[T]) -> st.SearchStrategy[list[T]]:
    return st.lists(inputs, min_size=8, max_size=24)


sessions = spoilt()

# With the handshake not over: a server has to do something about it.
silent_clients = spoilt(flight=st.just(0), end=st.just(End.SILENCE)) | spoilt(
    edits=st.integers(-40, -2).map(lambda at: (Edit(at, EVERYTHING, b""),)),  # cut off
    copies=st.just(1),
    flight=st.just(1),
    end=st.just(End.SILENCE),
)

# A program decides for itself how long it waits for a server.
silent_servers = spoilt(end=st.just(End.SILENCE))


# The other side: plain blocking sockets, in a thread.


class Other:
    """One of them."""

    def __init__(self, sock: socket.socket, fuzzed: Input) -> None:
        sock.settimeout(LONG)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.address: str = sock.getsockname()[0]
        self.fuzzed = fuzzed
        self.seen: Seen | None = None  # None also if it has reset
        self._was_reset = False

    def send(self, data: bytes | None) -> None:
        if data and not self._was_reset:
            try:
                self.sock.sendall(data)
            except (BrokenPipeError, ConnectionResetError):
                # The kernel tells once, and then of an end like any other.
                self._was_reset = True

    def be_honest(self, server_side: bool) -> list[bytes]:
        """The honest part of a TLS session; the pieces of what is to be sent next."""
        fuzzed = self.fuzzed
        if not isinstance(fuzzed, Spoilt):
            return fuzzed.pieces()
        contexts = SERVERS if server_side else CLIENTS
        flights = self._flights(contexts[fuzzed.version], server_side)
        try:
            for number, flight in enumerate(flights):
                if number == fuzzed.flight:
                    return fuzzed.pieces(flight)
                self.sock.sendall(flight)
        except ConnectionResetError:
            if fuzzed.end is not End.SILENCE:
                raise
            self._was_reset = True  # its time was over before
            return []
        return fuzzed.pieces(flight)  # the last, once more

    def _flights(self, chosen: ssl.SSLContext, server_side: bool) -> Iterator[bytes]:
        received, to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
        name = None if server_side else "localhost"
        tls = chosen.wrap_bio(received, to_send, server_side, name)
        done = False
        while not done:
            with suppress(ssl.SSLWantReadError):
                tls.do_handshake()
                done = True
            if to_send.pending:
                yield to_send.read()
            if not done:
                data = self.sock.recv(65536)
                assert data, "FIN during an honest handshake"
                received.write(data)
        tls.write(b"application data")
        yield to_send.read()

    def end(self) -> None:
        if self.fuzzed.end is End.RST:
            linger = struct.pack("ii", 1, 0)
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.sock.close()
        elif self.fuzzed.end is End.FIN:
            with suppress(OSError):  # it may have been reset already
                self.sock.shutdown(socket.SHUT_WR)

    def read_to_end(self, deadline: float) -> None:
        if self.fuzzed.end is End.RST:
            return
        data = bytearray()
        close = PeerClose.FIN
        try:
            while chunk := self._receive(deadline):
                data += chunk
        except TimeoutError:
            close = PeerClose.NONE
        except OSError as exc:
            # ENOTCONN: what MPTCP that fell back says next.
            if exc.errno != errno.ECONNRESET and not self._was_reset:
                raise
            close = PeerClose.RST
        self.seen = Seen(bytes(data), PeerClose.RST if self._was_reset else close)

    def _receive(self, deadline: float) -> bytes:
        self.sock.settimeout(max(deadline - time.monotonic(), 0.001))
        return self.sock.recv(65536)


def connect(port: int) -> socket.socket:
    # Each from an address of its own. The port of one that was reset may be used again.
    source = str(IPv4Address("127.1.0.0") + next(numbers))
    return socket.create_connection((LOOPBACK, port), LONG, (source, 0))


def send_all(
    sockets: Iterator[socket.socket],
    inputs: Sequence[Input],
    stack: ExitStack,
    *,
    server_side: bool = False,
) -> list[Other]:
    """One of *sockets* for each of *inputs*, which are sent piece by piece, in turn."""
    others = []
    pieces = []
    for fuzzed in inputs:
        other = Other(stack.enter_context(next(sockets)), fuzzed)
        others.append(other)
        pieces.append(other.be_honest(server_side))
    for turn in zip_longest(*pieces):
        for other, piece in zip(others, turn, strict=True):
            other.send(piece)
    for other in others:
        other.end()
    return others


def read_all(others: list[Other]) -> None:
    """As far as that takes no longer than LONG for all of them."""
    deadline = time.monotonic() + LONG
    for other in others:
        other.read_to_end(deadline)


# Our side.


class Spinning(BaseException):
    """The event loop has not come back in time. Nothing takes it for a failure."""


def run(backend: str, function: Callable[[], Any]) -> None:
    """On a loop of its own, of which nothing is left."""

    def give_up(*_: object) -> None:
        raise Spinning

    async def main() -> None:
        tasks = set(anyio.get_running_tasks())
        await function()
        with anyio.fail_after(LONG):
            while set(anyio.get_running_tasks()) - tasks:
                await checkpoint()

    name, options = BACKENDS[backend]
    previous = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, SPINNING, 1)  # other tasks may spin as well
    try:
        with nothing_left_behind():
            anyio.run(main, backend=name, backend_options=options)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@dataclass
class Served:
    server: Server
    endings: dict[str, Ending]
    """By the address of the peer."""


@asynccontextmanager
async def serving(handler: Handler, **options: Any) -> AsyncIterator[Served]:
    """A server, which has nothing left to do a moment after the block."""

    def on_ending(conn: Connection) -> None:
        assert conn.ending is not None
        served.endings[str(conn.extra(SocketAttribute.remote_address)[0])] = conn.ending

    async with anyio.create_task_group() as tg:
        start = partial(serve_tcp, handler, host=LOOPBACK, on_ending=on_ending, **options)
        served = Served(await tg.start(start), {})
        yield served
        served.server.stop()
        tg.cancel_scope.deadline = anyio.current_time() + LONG
    assert not tg.cancel_scope.cancelled_caught, "a handler did not come to its end"
    statistics = served.server.statistics()
    assert not served.server.connections
    assert statistics.open_connections == 0
    assert statistics.accepted_connections == len(served.endings)


async def attack(served: Served, inputs: Sequence[Input]) -> list[Other]:
    """Each of *inputs* on a connection of its own, and what came of it."""
    with ExitStack() as stack:
        sockets = (connect(served.server.port) for _ in inputs)
        others = await anyio.to_thread.run_sync(send_all, sockets, inputs, stack)
        await anyio.to_thread.run_sync(read_all, others)
    return others


@pytest.fixture(scope="module", autouse=True)
def failures_are_not_logged() -> Iterator[None]:
    logger = logging.getLogger("anyio_rst")
    logger.disabled = True
    yield
    logger.disabled = False


each_loop = pytest.mark.parametrize("backend", BACKENDS)


# TLS, the server's side.


def ask_securely(port: int) -> None:
    """What an honest client does."""
    with connect(port) as sock:
        with CLIENT.wrap_socket(
            sock, server_hostname="localhost", suppress_ragged_eofs=False
        ) as tls:
            tls.sendall(b"hello")
            assert tls.recv(100) == b"hello"
            tls.unwrap().close()


async def attack_tls_server(
    wrapping: str, inputs: Sequence[Input], timeout: float = LONG
) -> None:
    """*wrapping* says who starts TLS: `serve_tcp` ("served") or a handler."""

    async def start_tls(conn: Connection) -> None:
        with anyio.fail_after(timeout):
            await conn.start_tls(SERVER)
        await echo(conn)

    options: dict[str, Any] = {}
    if wrapping == "served":
        options = {"ssl_context": SERVER, "handshake_timeout": timeout}
    async with serving(echo if options else start_tls, **options) as served:
        others = await attack(served, inputs)
        await anyio.to_thread.run_sync(ask_securely, served.server.port)
    for other in others:
        assert other.seen is None or other.seen.close is PeerClose.RST, other.fuzzed
        ending = served.endings.pop(other.address)
        assert ending.kind is CloseKind.RST
        assert isinstance(ending.outcome, outcome.Error)
        error = ending.outcome.error
        # That of serve_tcp() tells of a handshake, and what ended it is its cause.
        assert isinstance(error, TLS_FAILURES) or isinstance(
            error.__cause__, TLS_FAILURES
        )
    (honest,) = served.endings.values()
    assert honest.kind is CloseKind.FIN


each_wrapping = pytest.mark.parametrize("wrapping", ["served", "start_tls"])


@each_loop
@each_wrapping
def test_fuzzed_client_of_a_tls_server_is_reset(backend: str, wrapping: str) -> None:
    @settings(FUZZ)
    @given(batches(sessions))
    def holds(inputs: list[Spoilt]) -> None:
        run(backend, partial(attack_tls_server, wrapping, inputs))

    holds()


@each_loop
@each_wrapping
def test_client_that_falls_silent_in_a_handshake_is_reset(
    backend: str, wrapping: str
) -> None:
    @settings(FUZZ, max_examples=max(1, FUZZ.max_examples // 10))
    @given(st.lists(silent_clients, min_size=30, max_size=60))
    def holds(inputs: list[Spoilt]) -> None:
        run(backend, partial(attack_tls_server, wrapping, inputs, HANDSHAKE_TIMEOUT))

    holds()


@pytest.fixture(scope="module")
def client_hello() -> bytes:
    sent = ssl.MemoryBIO()
    session = CLIENT.wrap_bio(ssl.MemoryBIO(), sent, server_hostname="localhost")
    with suppress(ssl.SSLWantReadError):
        session.do_handshake()
    return sent.read()


@each_loop
@pytest.mark.parametrize("end", End)
def test_client_hello_that_is_cut_at_any_offset_is_reset(
    backend: str, end: End, client_hello: bytes
) -> None:
    inputs = [Input(client_hello[:size], end=end) for size in range(len(client_hello))]
    timeout = HANDSHAKE_TIMEOUT if end is End.SILENCE else LONG
    run(backend, partial(attack_tls_server, "served", inputs, timeout))


# TLS, the client's side.


def answer_securely(listener: socket.socket) -> None:
    """What an honest server does."""
    with listener.accept()[0] as sock:
        with SERVER.wrap_socket(sock, server_side=True) as tls:
            assert tls.recv(100) == b"hello"
            tls.sendall(b"all of it")
            tls.unwrap().close()


async def ask(port: int, wrapping: str) -> bytes:
    options: dict[str, Any] = {}
    if wrapping == "connected":
        options = {"ssl_context": CLIENT, "tls_hostname": "localhost"}
    async with connect_tcp(LOOPBACK, port, **options) as conn:
        if not options:
            await conn.start_tls(CLIENT, hostname="localhost")
        await conn.send(b"hello")
        return b"".join([chunk async for chunk in conn])


async def attack_tls_clients(wrapping: str, inputs: Sequence[Spoilt]) -> None:
    """*wrapping* says who starts TLS: `connect_tcp` ("connected") or the program."""

    async def be_attacked() -> None:
        with pytest.raises(TLS_FAILURES):
            await ask(port, wrapping)

    with socket.create_server((LOOPBACK, 0)) as listener, ExitStack() as stack:
        listener.settimeout(LONG)
        port: int = listener.getsockname()[1]
        accepted = (listener.accept()[0] for _ in inputs)
        with anyio.fail_after(LONG):
            async with anyio.create_task_group() as tg:
                for _ in inputs:
                    tg.start_soon(be_attacked)
                send = partial(send_all, accepted, inputs, stack, server_side=True)
                others = await anyio.to_thread.run_sync(send)
                if inputs[0].end is End.SILENCE:
                    tg.cancel_scope.cancel()
        await anyio.to_thread.run_sync(read_all, others)
        for other in others:
            assert other.seen is None or other.seen.close is PeerClose.RST, other.fuzzed

        async with anyio.create_task_group() as tg:
            tg.start_soon(anyio.to_thread.run_sync, answer_securely, listener)
            assert await ask(port, wrapping) == b"all of it"


@each_loop
@pytest.mark.parametrize("servers", [sessions, silent_servers], ids=["end", "silence"])
def test_fuzzed_server_of_a_tls_client_is_reset(
    backend: str, servers: st.SearchStrategy[Spoilt]
) -> None:
    @settings(FUZZ)
    @given(st.sampled_from(["connected", "start_tls"]), batches(servers))
    def holds(wrapping: str, inputs: list[Spoilt]) -> None:
        run(backend, partial(attack_tls_clients, wrapping, inputs))

    holds()


# The demo and the examples.


@contextmanager
def not_running() -> Iterator[list[Any]]:
    """Programs come to nothing; the arguments of their `anyio.run()` are kept."""
    kept: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(anyio, "run", lambda *args, **options: kept.append(args))
        yield kept


def demonstrate(way: str) -> Handler:
    """What a server of the demo runs for each connection."""
    with not_running() as kept:
        _demo_servers.serve("asyncio", _demo_servers.OURS, way)
    handler: Handler = kept[0][-1]
    return handler


def example(
    file: str, pick: Callable[[dict[str, Any]], Handler]
) -> Callable[[], Handler]:
    """What an example runs for each connection: *pick* finds it by its name."""

    def load() -> Handler:
        with not_running(), pytest.MonkeyPatch.context() as patch:
            # Of a service manager that has no sockets for it.
            patch.setenv("LISTEN_PID", str(os.getpid()))
            patch.setenv("LISTEN_FDS", "0")
            return pick(runpy.run_path(str(EXAMPLES / file)))

    return load


async def to_an_echo(proxy: Any, conn: Connection) -> None:
    """A proxy in front of a server of its own."""

    async with anyio.create_task_group() as tg:
        server = await tg.start(partial(serve_tcp, echo, host=LOOPBACK))
        await proxy(LOOPBACK, server.port, conn)
        tg.cancel_scope.cancel()


async def behind_a_balancer(its: dict[str, Any], conn: Connection) -> None:
    address = conn.remote_address
    assert address is not None
    try:
        await its["proxy_header"](conn)
        if conn.ending is None:
            await its["echo"](conn)
    finally:
        conn.remote_address = address  # by which the ending is found


@dataclass(frozen=True)
class Parser:
    load: Callable[[], Handler]
    """The handler that parses; called in a process that goes on afterwards."""

    words: Sequence[bytes]
    """Of its language."""

    request: bytes
    answer: Seen
    """To that request."""


HALF_OF_IT = Seen(_demo_cases.HALF, PeerClose.RST)
HEADER = b"PROXY TCP4 192.0.2.1 192.0.2.2 1000 80\r\n"
V2 = b"\r\n\r\n\0\r\nQUIT\n"  # the signature of version 2 of the PROXY protocol
LINES = (b"Ada\n", b"\r\n", b"\0", b"\xff")

PARSERS = {
    "demo: returns": Parser(
        partial(demonstrate, "returns"),
        LINES,
        b"?",
        Seen(_demo_cases.ANSWER, PeerClose.FIN),
    ),
    "demo: raises": Parser(
        partial(demonstrate, "raises an exception"), LINES, b"?", HALF_OF_IT
    ),
    "demo: child": Parser(
        partial(demonstrate, "has a failing child task"), LINES, b"?", HALF_OF_IT
    ),
    "graceful.py": Parser(
        example("graceful.py", itemgetter("echo")),
        LINES,
        b"Ada",
        Seen(b"Ada", PeerClose.FIN),
    ),
    "activated.py": Parser(
        example("activated.py", itemgetter("echo")),
        LINES,
        b"Ada\n",
        Seen(b"Ada\n", PeerClose.FIN),
    ),
    "behind_haproxy.py": Parser(
        example("behind_haproxy.py", lambda its: partial(behind_a_balancer, its)),
        (
            *HEADER.split(),
            b"UNKNOWN",
            b"TCP6 ::1 ::1",
            b"\r\n",
            V2,
            V2 + b"\x21\x11\0\x0c",
        ),
        HEADER + b"Ada",
        Seen(b"('192.0.2.1', 1000): Ada", PeerClose.FIN),
    ),
    "download.py": Parser(
        example("download.py", itemgetter("download")),
        (b"GET ", b"/1/2", b"/0/0", b" HTTP/1.1", b"\r\n", b"\r\n\r\n", b"Host: a"),
        b"GET /1/2 HTTP/1.1\r\nHost: a\r\n\r\n",
        Seen(download.HEAD + download.table(1, 3), PeerClose.FIN),
    ),
    "finish_on.py": Parser(
        example("finish_on.py", itemgetter("shout")),
        (*LINES, b"quit\n"),
        b"Ada\n",
        Seen(b"ADA\n", PeerClose.RST),  # no quit
    ),
    "line_protocol.py": Parser(
        example(
            "line_protocol.py", lambda found: partial(found["serve_lines"], tls=SERVER)
        ),
        (*LINES, b"EXPLAIN ", b"EPIPE", b"STARTTLS\r\n", b"QUIT\r\n", bytes(600)),
        b"EXPLAIN EPIPE\r\nQUIT\r\n",
        Seen(b"+OK ready\r\n+OK Broken pipe\r\n+OK bye\r\n", PeerClose.FIN),
    ),
    "own_listener.py": Parser(
        example("own_listener.py", itemgetter("greet")),
        LINES,
        b"Ada",
        Seen(b"Hello, ADA", PeerClose.FIN),
    ),
    "proxy.py": Parser(
        example("proxy.py", lambda its: partial(to_an_echo, its["proxy"])),
        LINES,
        b"Ada",
        Seen(b"Ada", PeerClose.FIN),
    ),
    "push.py": Parser(
        example("push.py", lambda its: its["Broadcast"]().serve),
        (*LINES, bytes(5000)),
        b"Ada\n",
        Seen(b"Ada\n", PeerClose.FIN),
    ),
    "tutorial/progress.py": Parser(
        example("tutorial/progress.py", itemgetter("total")),
        (*LINES, b"7\n", b"-1\n", b"9" * 5000),
        b"3\n4\n",
        Seen(b"7\n", PeerClose.FIN),
    ),
}

# Parse as one of these does, or are clients.
ALIKE = {
    "aiohttp_server.py",  # they parse nothing: others' servers
    "asgi.py",
    "asgi_hypercorn.py",
    "asgi_table.py",
    "asgi_uvicorn.py",
    "limits.py",
    "log_json.py",
    "metrics.py",
    "metrics_opentelemetry.py",
    "own_trio_listener.py",
    "pool.py",
    "start_stop.py",
    "tls_server.py",
    "workers.py",
    *(f"tutorial/{name}.py" for name in ("add", "ask", "echo", "timeouts", "total")),
}


def test_every_example_is_fuzzed() -> None:
    programs = set(EXAMPLES.rglob("*.py")) - set(EXAMPLES.rglob("test_*.py"))
    programs -= set(EXAMPLES.glob("migrating/*"))  # own_listener.py, again and again
    names = {path.relative_to(EXAMPLES).as_posix() for path in programs}
    assert names - ALIKE == {name for name in PARSERS if not name.startswith("demo:")}


def texts(words: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    return st.lists(st.sampled_from(words) | st.binary(max_size=30)).map(b"".join)


def inputs_of(parser: Parser) -> st.SearchStrategy[Input]:
    return st.builds(
        Input,
        st.just(parser.request) | texts(parser.words),
        st.lists(edits, max_size=4).map(tuple),
        st.integers(1, 20),
        st.lists(offsets, max_size=5).map(tuple),
        ends_of_input,
    )


async def attack_parser(parser: Parser, inputs: Sequence[Input]) -> None:
    async with serving(parser.load()) as served:
        others = await attack(served, inputs)
        (honest,) = await attack(served, [Input(parser.request)])
    assert honest.seen == parser.answer
    for other in others:
        ending = served.endings[other.address]
        if other.seen is not None:
            assert other.seen.close is not PeerClose.NONE, other.fuzzed
            assert other.seen.close.value == ending.kind.value, other.fuzzed


@each_loop
@pytest.mark.parametrize("parser", PARSERS)
def test_fuzzed_client_of_a_program_gets_an_end(backend: str, parser: str) -> None:
    @settings(FUZZ)
    @given(batches(inputs_of(PARSERS[parser])))
    def holds(inputs: list[Input]) -> None:
        run(backend, partial(attack_parser, PARSERS[parser], inputs))

    holds()


answers = st.just(_demo_cases.ANSWER) | st.just(_demo_cases.HALF) | texts(LINES)
WAYS = {way.name: way for way in _demo_cases.WAYS}


@settings(PROFILE)
@given(
    st.sampled_from([WAYS["returns"], WAYS["raises an exception"]]),
    st.builds(
        Input,
        answers,
        st.lists(edits, max_size=1).map(tuple),
        end=ends_of_input,
        cuts=st.lists(offsets, max_size=5).map(tuple),
    ),
)
def test_client_of_the_demo_tells_what_a_fuzzed_server_did(
    way: _demo_cases.Way, fuzzed: Input
) -> None:
    def answer() -> None:
        with listener.accept()[0] as sock:
            other = Other(sock, fuzzed)
            assert sock.recv(100) == b"request"
            for piece in fuzzed.pieces():
                other.send(piece)
            other.end()

    with socket.create_server((LOOPBACK, 0)) as listener:
        listener.settimeout(LONG)
        server: Any = SimpleNamespace(next_line=lambda: str(listener.getsockname()[1]))
        thread = threading.Thread(target=answer)
        thread.start()
        data = b"".join(fuzzed.pieces())
        try:
            seen = _demo_clients.see_by_socket(way, server)
        except NotMeasured:
            assert data == _demo_cases.ANSWER
            assert not way.finishes
            return
        finally:
            thread.join()
    assert seen.text == f"{len(data):,}, {fuzzed.end.value}"
    if fuzzed.end is End.RST:
        assert seen.true is not way.finishes
    else:
        assert seen.true is (way.finishes and data == _demo_cases.ANSWER)
