"""Multipath TCP over more than one path: two machines with two cables between them.

The peers judge, over there. They are plain sockets, whose kernel opens a second subflow,
over the second cable; and the first cable may be cut.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio
import anyio.abc
import anyio.to_thread
import pytest
from conftest import BACKENDS
from cutting import in_a_thread_that_ends, link, on_machine
from test_mptcp import (
    HALF,
    IPPROTO_MPTCP,
    KILLED,
    MPTCP_INFO,
    SOL_MPTCP,
    WHY_NOT,
    Failure,
    killed_in_the_end,
    raw_of,
)
from test_odd_networks import Service

from anyio_rst import (
    Cause,
    CloseKind,
    Connection,
    Ending,
    PeerClose,
    connection_scope,
    serve_tcp,
)

from serving import LONG, Handler, Peer, Seen

pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

OUR_ADDRESS = "10.77.0.1"
HELLO = b"hello"
SECOND_CABLE = "cable1"

# Seconds in which MPTCP gives up waiting for a subflow whose cable is cut.
PATIENCE = 60.0


class Machines:
    """Network namespaces, ours and that of the peers."""

    def __init__(self) -> None:
        self.ours, self.theirs = (
            link.in_new_namespace(partial(os.open, "/proc/thread-self/ns/net", 0))
            for _ in range(2)
        )

    def close(self) -> None:
        os.close(self.ours)
        os.close(self.theirs)

    def set_up(self) -> None:
        self.ip(self.ours, "link set lo up")
        for number in range(2):
            there = f"/proc/{os.getpid()}/fd/{self.theirs}"
            name = f"cable{number}"
            self.ip(
                self.ours, f"link add {name} type veth peer name {name} netns {there}"
            )
            for machine, last in ((self.ours, 1), (self.theirs, 2)):
                self.ip(machine, f"address add 10.77.{number}.{last}/24 dev {name}")
                self.ip(machine, f"link set {name} up")
        for machine in (self.ours, self.theirs):
            self.ip(machine, "mptcp limits set subflows 2 add_addr_accepted 2")
        self.ip(self.theirs, f"mptcp endpoint add 10.77.1.2 dev {SECOND_CABLE} subflow")

    def ip(self, machine: int, arguments: str) -> None:
        command = ["ip", *arguments.split()]
        on_machine(machine, partial(subprocess.run, command, check=True))

    def connect(self, port: int, **options: Any) -> Peer:
        peer = on_machine(
            self.theirs,
            lambda: Peer(port, host=OUR_ADDRESS, protocol=IPPROTO_MPTCP, **options),
        )
        peer.sock.sendall(HELLO)  # no subflow is added before that is acknowledged
        return peer

    def cut_first_cable(self) -> None:
        self.ip(self.theirs, "link set cable0 down")


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machines]:
    if shutil.which("ip") is None:
        pytest.skip("there is no ip(8)")
    monkeypatch.setattr(anyio.to_thread, "run_sync", in_a_thread_that_ends)
    try:
        machines = Machines()
    except (OSError, AttributeError) as exc:
        pytest.skip(f"there are no two machines: {exc}")
    try:
        try:
            machines.set_up()
        except subprocess.CalledProcessError as exc:
            pytest.skip(f"there are no two cables with MPTCP: {exc}")
        yield machines
    finally:
        machines.close()


@pytest.fixture(params=BACKENDS)
def run_there(request: pytest.FixtureRequest, machines: Machines) -> Any:
    """Run a function on our machine, with each event loop."""
    name, options = request.param
    run = partial(anyio.run, backend=name, backend_options=options)
    return partial(on_machine, machines.ours, run)


def listen() -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP)
    listener.bind((OUR_ADDRESS, 0))
    listener.listen()
    return listener


def more_subflows(sock: Any) -> int:
    """How many there are besides the first: mptcpi_subflows of linux/mptcp.h."""
    info: bytes = sock.getsockopt(SOL_MPTCP, MPTCP_INFO, 1)
    return info[0]


async def has_two_subflows(sock: Any) -> None:
    with anyio.fail_after(LONG):
        while not more_subflows(sock):
            await anyio.sleep(0.001)


@asynccontextmanager
async def served(kind: str, handler: Handler) -> AsyncIterator[Service]:
    """By `serve_tcp`, or in a scope around AnyIO's own stream."""
    send, receive = anyio.create_memory_object_stream[Ending](10)

    async def over_two_subflows(conn: Connection) -> None:
        assert await conn.receive(len(HELLO)) == HELLO
        await has_two_subflows(raw_of(conn))
        await handler(conn)

    def ended(conn: Connection) -> None:
        assert conn.ending is not None
        send.send_nowait(conn.ending)

    async def in_scope(listener: socket.socket) -> None:
        listener.setblocking(False)
        await anyio.wait_readable(listener)
        stream = await anyio.abc.SocketStream.from_socket(listener.accept()[0])
        try:
            async with connection_scope(stream) as conn:
                await over_two_subflows(conn)
        except Failure:
            pass
        ended(conn)

    with send, receive, listen() as listener:
        async with anyio.create_task_group() as tg:
            if kind == "scope":
                tg.start_soon(in_scope, listener)
            else:
                serve = partial(serve_tcp, over_two_subflows, sockets=[listener])
                await tg.start(partial(serve, on_ending=ended))
            yield Service(listener.getsockname()[1], receive)
            tg.cancel_scope.cancel()


@pytest.fixture(params=["served", "scope"])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


# More than the socket buffers of both sides hold.
LONG_ANSWER = bytes(range(256)) * 2**15


@pytest.mark.parametrize("answer", [HALF, LONG_ANSWER], ids=["short", "long"])
@pytest.mark.parametrize("fails", [False, True], ids=["return", "raise"])
def test_return_finishes_and_raise_resets(
    machines: Machines, run_there: Any, kind: str, fails: bool, answer: bytes
) -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(answer)
        if fails:
            raise Failure

    async def main() -> None:
        async with served(kind, handler) as service:
            with machines.connect(service.port) as peer:
                seen = await peer.read_to_end()
            ending = await service.ending()
        if fails:
            assert answer.startswith(seen.data)
            assert (seen.close, ending.kind) == (PeerClose.RST, CloseKind.RST)
            assert ending.cause is Cause.RAISED
        else:
            assert seen == Seen(answer, PeerClose.FIN)
            assert (ending.kind, ending.peer) == (CloseKind.FIN, PeerClose.FIN)
            assert ending.unacknowledged == 0

    run_there(main)


@pytest.mark.parametrize("fails", [False, True], ids=["return", "raise"])
def test_in_the_middle_of_an_upload(
    machines: Machines, run_there: Any, kind: str, fails: bool
) -> None:
    async def handler(conn: Connection) -> None:
        await conn.receive()
        await conn.send(b"enough")
        if fails:
            raise Failure

    async def upload(peer: Peer) -> None:
        try:
            await peer.send(LONG_ANSWER)
        except (ConnectionResetError, BrokenPipeError):
            assert fails

    async def main() -> None:
        async with served(kind, handler) as service:
            with machines.connect(service.port) as peer:
                async with anyio.create_task_group() as tg:
                    tg.start_soon(upload, peer)
                    if not fails:
                        assert await peer.read_to_end() == Seen(b"enough", PeerClose.FIN)
            ending = await service.ending()
        kind_of_it = CloseKind.RST if fails else CloseKind.FIN
        assert ending.kind is kind_of_it
        assert ending.peer is (PeerClose.NONE if fails else PeerClose.FIN)

    run_there(main)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop", "trio"])
def test_a_killed_process_resets(machines: Machines, loop: str) -> None:
    with on_machine(machines.ours, listen) as listener:
        number, port = listener.fileno(), listener.getsockname()[1]
        command = [sys.executable, "-c", KILLED, loop, str(number)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, pass_fds=[number])
    assert process.stdout is not None
    peers: list[Peer] = []
    with killed_in_the_end(process, peers):
        assert int(process.stdout.readline()) == port
        for _ in range(3):
            peers.append(machines.connect(port))
            assert peers[-1].sock.recv(100) == HALF
            deadline = time.monotonic() + LONG
            while not more_subflows(peers[-1].sock):
                assert time.monotonic() < deadline


@pytest.mark.parametrize("fails", [False, True], ids=["return", "raise"])
def test_over_the_second_cable_alone(
    machines: Machines, run_there: Any, fails: bool
) -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(HALF)
        await conn.receive()
        machines.cut_first_cable()
        await conn.send(HALF)
        if fails:
            raise Failure

    async def main() -> None:
        async with served("served", handler) as service:
            with machines.connect(service.port) as peer:
                assert await peer.receive(len(HALF)) == HALF
                await peer.send(b"?")
                seen = await peer.read_to_end(timeout=PATIENCE)
            ending = await service.ending()
        # What was under way on the first is lost with a reset.
        assert HALF.startswith(seen.data) if fails else seen.data == HALF
        assert seen.close is (PeerClose.RST if fails else PeerClose.FIN)
        assert ending.kind is (CloseKind.RST if fails else CloseKind.FIN)

    run_there(main)
