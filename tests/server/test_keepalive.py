"""`keepalive=`: a peer whose machine is gone is noticed."""

from __future__ import annotations

import errno
import logging
import socket
import termios
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import anyio
import anyio.abc
import anyio.to_thread
import pytest
import trio
from anyio.abc import SocketAttribute
from conftest import BACKENDS
from cutting import (
    OUR_ADDRESS,
    PEERS_ADDRESS,
    Cable,
    cable,
    in_a_thread_that_ends,
    link,
    on_machine,
)

from anyio_rst import (
    Cause,
    CloseKind,
    Connection,
    ConnectionLost,
    Ending,
    PeerClose,
    PeerReset,
    Server,
    connect_tcp,
    connection_scope,
    scoped,
    serve_tcp,
)
from anyio_rst.testing import open_peer

from securing import client_context, server_context, shake_hands
from serving import (
    LONG,
    Peer,
    Seen,
    accepted,
    plain_server,
    queued,
    said,
    stream_and_peer,
)

OPTIONS = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
]


def options_of(sock: Any) -> list[int]:
    """As the kernel has them."""
    return [sock.getsockopt(*option) for option in OPTIONS]


def kernels_own() -> list[int]:
    with socket.socket() as sock:
        return options_of(sock)


# Silence of a third, and two probes that far apart; milliseconds.
AFTER_30 = [1, 10, 10, 2, 30_000]


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[tuple[Server, list[list[int]]]]:
    """A server, and the options of each socket that it has accepted."""
    seen: list[list[int]] = []

    async def handler(conn: Connection) -> None:
        seen.append(options_of(conn.extra(SocketAttribute.raw_socket)))
        await conn.send(b"x")

    async with anyio.create_task_group() as tg:
        yield await tg.start(partial(serve_tcp, handler, **options)), seen
        tg.cancel_scope.cancel()


async def visit(port: int) -> None:
    with Peer(port) as peer:
        assert await peer.read_to_end() == Seen(b"x", PeerClose.FIN)


# The options.


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("keepalive", "expected"),
    [
        (30, AFTER_30),
        (1, [1, 1, 1, 2, 1_000]),
        (2.5, [1, 1, 1, 2, 2_500]),
        (32767, [1, 10922, 10922, 2, 32_767_000]),
        (None, kernels_own()),
    ],
)
async def test_accepted_sockets_have_it(
    keepalive: float | None, expected: list[int]
) -> None:
    """Also the later ones, which get it from the listening socket."""
    async with serving(host="127.0.0.1", keepalive=keepalive) as (server, seen):
        for _ in range(3):
            await visit(server.port)
    assert seen == [expected] * 3


@pytest.mark.anyio
async def test_who_connected_before_the_server_had_begun_has_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        early = Peer(listener.getsockname()[1])
        async with serving(sockets=[listener], keepalive=30) as (_, seen):
            with early:
                assert await early.read_to_end() == Seen(b"x", PeerClose.FIN)
    assert seen == [AFTER_30]


@pytest.mark.anyio
async def test_given_sockets_are_not_changed() -> None:
    """Others accept from them, too."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with listener.dup() as other:
            async with serving(sockets=[listener], keepalive=30) as (server, seen):
                for _ in range(2):
                    await visit(server.port)
                assert options_of(other) == kernels_own()
            assert seen == [AFTER_30] * 2


@pytest.mark.anyio
@pytest.mark.parametrize("keepalive", [None, 30])
async def test_connecting_sockets_have_it(keepalive: float | None) -> None:
    with plain_server() as listener:
        host, port = listener.getsockname()
        async with connect_tcp(host, port, keepalive=keepalive, drain=None) as conn:
            with accepted(listener):
                raw = conn.extra(SocketAttribute.raw_socket)
                assert options_of(raw) == (AFTER_30 if keepalive else kernels_own())


@pytest.mark.anyio
@pytest.mark.parametrize("keepalive", [None, 30])
async def test_scoped_sockets_have_it(
    anyio_backend: Any, owner: str, keepalive: float | None
) -> None:
    stream, peer = await stream_and_peer(owner)
    with peer:
        async with connection_scope(stream, keepalive=keepalive, drain=None) as conn:
            raw = conn.extra(SocketAttribute.raw_socket)
            assert options_of(raw) == (AFTER_30 if keepalive else kernels_own())


@pytest.mark.anyio
async def test_a_scope_within_a_scope_sets_it_and_none_changes_nothing() -> None:
    async with open_peer() as (conn, _):
        raw = conn.extra(SocketAttribute.raw_socket)
        async with connection_scope(conn, keepalive=30, drain=None) as inner:
            assert options_of(raw) == AFTER_30
            async with connection_scope(inner, drain=None):
                assert options_of(raw) == AFTER_30


@pytest.mark.anyio
async def test_scoped_has_it() -> None:
    seen = anyio.create_memory_object_stream[list[int]](1)
    send, receive = seen

    async def handler(conn: Connection) -> None:
        send.send_nowait(options_of(conn.extra(SocketAttribute.raw_socket)))

    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    async with send, receive, listener, anyio.create_task_group() as tg:
        tg.start_soon(listener.serve, scoped(handler, keepalive=30))
        with Peer(listener.extra(SocketAttribute.local_port)):
            assert await receive.receive() == AFTER_30
        tg.cancel_scope.cancel()


BAD: list[tuple[Any, type[Exception]]] = [
    (0, ValueError),
    (0.5, ValueError),
    (-1, ValueError),
    (32768, ValueError),
    (float("nan"), ValueError),
    (float("inf"), ValueError),
    (True, TypeError),
    ("30", TypeError),
]


@pytest.mark.anyio
@pytest.mark.parametrize(("keepalive", "error"), BAD)
async def test_bad_values_are_refused_before_anything_is_changed(
    keepalive: Any, error: type[Exception]
) -> None:
    refused = partial(pytest.raises, error, match="keepalive must be")

    async def handler(conn: Connection) -> None:
        pytest.fail("called")

    with plain_server() as listener:
        with refused():
            await serve_tcp(handler, sockets=[listener], keepalive=keepalive)
        assert listener.gettimeout() == LONG
        assert options_of(listener) == kernels_own()
        host, port = listener.getsockname()
        with refused():
            connect_tcp(host, port, keepalive=keepalive)
        with refused():
            scoped(handler, keepalive=keepalive)
        async with await anyio.connect_tcp(host, port) as stream:
            with accepted(listener) as peer:
                with refused():
                    connection_scope(stream, keepalive=keepalive)
                await stream.send(b"x")
                assert await peer.receive(1) == b"x"


@pytest.mark.anyio
async def test_a_peer_that_takes_nothing_for_so_long_counts_as_gone() -> None:
    """So TCP_USER_TIMEOUT is: "buffered data may remain untransmitted", tcp(7)."""
    with plain_server() as listener:
        host, port = listener.getsockname()
        with pytest.raises(ConnectionLost, match="timed out"):
            async with connect_tcp(host, port, keepalive=1) as conn:
                with accepted(listener), anyio.fail_after(LONG):
                    await conn.send(bytes(50_000_000))
    assert conn.ending is not None
    assert conn.ending.peer is PeerClose.LOST


# The cable is cut.


@dataclass
class Case:
    """A connection of ours, whose peer's machine is about to be gone."""

    name: str
    raised: BaseException | None = None
    ending: Ending | None = None
    began: anyio.Event = field(default_factory=anyio.Event)

    async def body(self, is_cut: anyio.Event, conn: Connection) -> None:
        await conn.send(b"ready")
        raw = conn.extra(SocketAttribute.raw_socket)
        while queued(raw.fileno(), termios.TIOCOUTQ):
            await anyio.sleep(0.001)
        self.began.set()
        await is_cut.wait()
        try:
            if "unacknowledged" in self.name:
                await conn.send(b"more")
            await conn.receive()
        except BaseException as exc:
            self.raised = exc
            raise

    def over(self, conn: Connection) -> None:
        self.ending = conn.ending


WAYS = ["served", "given", "connected", "scoped", "trio"]
CASES = [
    f"{way} {secure} {state}"
    for way in WAYS
    for secure in ("plain", "TLS")
    for state in ("idle", "unacknowledged")
]


async def lose_them_all(between: Cable, on_trio: bool) -> list[Case]:
    is_cut = anyio.Event()
    cases = [Case(name) for name in CASES if on_trio or not name.startswith("trio")]
    control = Case("served plain forever")
    peers: list[Peer] = []

    async def secured_peer(case: Case, peer: Peer, *, server_side: bool) -> None:
        peers.append(peer)
        if "TLS" not in case.name:
            assert await peer.receive(5) == b"ready"
            return
        tls = await shake_hands(peer, server_side=server_side)
        assert await tls.receive(5) == b"ready"

    async def serve(case: Case, keepalive: float | None) -> None:
        options: dict[str, Any] = {"host": OUR_ADDRESS}
        if case.name.startswith("given"):
            options = {"sockets": [socket.create_server((OUR_ADDRESS, 0))]}
        if "TLS" in case.name:
            options["ssl_context"] = server_context()

        async def start(*, task_status: Any) -> None:
            await serve_tcp(
                partial(case.body, is_cut),
                keepalive=keepalive,
                on_ending=case.over,
                task_status=task_status,
                **options,
            )

        async with anyio.create_task_group() as tg:
            server = await tg.start(start)
            peer = await anyio.to_thread.run_sync(between.connect, server.port)
            await secured_peer(case, peer, server_side=False)
            server.stop()

    async def connect(case: Case) -> None:
        with between.listen() as listener:
            host, port = listener.getsockname()
            secure = "TLS" in case.name
            async with anyio.create_task_group() as tg:
                tg.start_soon(be_asked, case, listener)
                conn = None
                try:
                    if case.name.startswith("connected"):
                        context = client_context() if secure else None
                        async with connect_tcp(
                            host,
                            port,
                            ssl_context=context,
                            tls_hostname="localhost" if secure else None,
                            keepalive=1,
                        ) as conn:
                            await case.body(is_cut, conn)
                    else:
                        stream: Any
                        if case.name.startswith("trio"):
                            stream = await trio.open_tcp_stream(host, port)
                        else:
                            stream = await anyio.connect_tcp(host, port)
                        async with connection_scope(stream, keepalive=1) as conn:
                            if secure:
                                await conn.start_tls(
                                    client_context(), hostname="localhost"
                                )
                            await case.body(is_cut, conn)
                except ConnectionLost:
                    pass
                assert conn is not None
                case.over(conn)

    async def be_asked(case: Case, listener: socket.socket) -> None:
        peer = await anyio.to_thread.run_sync(accepted, listener)
        await secured_peer(case, peer, server_side=True)

    with anyio.fail_after(LONG):
        async with anyio.create_task_group() as forever:
            forever.start_soon(serve, control, None)
            async with anyio.create_task_group() as tg:
                for case in cases:
                    if case.name.startswith(("served", "given")):
                        tg.start_soon(serve, case, 1)
                    else:
                        tg.start_soon(connect, case)
                for case in (*cases, control):
                    await case.began.wait()
                between.cut()
                is_cut.set()
            assert control.raised is None
            assert control.ending is None
            forever.cancel_scope.cancel()
    for peer in peers:
        peer.sock.close()
    return cases


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_peer_whose_machine_is_gone_is_noticed(
    backend: tuple[str, dict[str, Any]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if (missing := link.available()) is not None:
        pytest.skip(f"there are no two machines: {missing}")
    caplog.set_level(logging.INFO, "anyio_rst")
    monkeypatch.setattr(anyio.to_thread, "run_sync", in_a_thread_that_ends)
    name, options = backend
    with cable() as between:
        run = partial(anyio.run, backend=name, backend_options=options)
        cases = on_machine(between.ours, run, lose_them_all, between, name == "trio")
    for case in cases:
        raised, ending = case.raised, case.ending
        assert isinstance(raised, ConnectionLost), (case.name, raised)
        assert not isinstance(raised, PeerReset), case.name
        assert isinstance(raised.__cause__, OSError), (case.name, raised.__cause__)
        assert raised.__cause__.errno == errno.ETIMEDOUT, case.name
        assert ending is not None, case.name
        assert ending.peer is PeerClose.LOST, case.name
        assert (ending.kind, ending.cause) == (CloseKind.RST, Cause.RAISED), case.name
        assert ending.remote_address is not None
        assert ending.remote_address[0] == PEERS_ADDRESS
        assert ending.duration >= 1
    served = [case for case in cases if case.name.startswith(("served", "given"))]
    told = [record.getMessage() for record in said(caplog)]
    assert len(told) == len(served)  # each of them had a server of its own
    for record in told:
        assert record.startswith("the peer went away: <Connection with ")
        assert "timed out" in record
    assert {record.levelno for record in caplog.records} == {logging.INFO}
