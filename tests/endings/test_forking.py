"""A forked child keeps none of its parent's connections, and ends none of them.

Judged by plain sockets, and by what the child finds among its descriptors.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from anyio.abc import SocketAttribute
from conftest import KINDS, collect

from anyio_rst import (
    Cause,
    CloseKind,
    Connection,
    PeerClose,
    connect_tcp,
    connection_scope,
    serve_tcp,
)

from forking import (
    connected_to,
    descriptors_of,
    forked,
    forked_in_a_thread,
    inode_of,
)
from securing import TLSPeer, each_way, talk
from serving import (
    Peer,
    Seen,
    accepted,
    assert_finished,
    connection_of,
    ending_with,
    plain_server,
    serve,
    settled,
)

pytestmark = pytest.mark.anyio


class Failure(Exception):
    pass


# What the child has.


async def test_child_has_no_copy_and_the_parent_notices_nothing(kind: str) -> None:
    async with connection_of(kind) as (conn, peer):
        inode = inode_of(conn)
        assert descriptors_of(inode) >= 2  # its own, and what it shows to others
        received: list[bytes] = []

        async def receive() -> None:
            received.append(await conn.receive())

        async with anyio.create_task_group() as tg:
            tg.start_soon(receive)
            await settled()
            assert forked(partial(descriptors_of, inode)) == 0
            await peer.send(b"to one who waits")
        assert received == [b"to one who waits"]
        await conn.send(b"whole")
    await assert_finished(conn, peer, Cause.RETURNED, b"whole")


async def test_child_that_ends_the_connection_ends_nothing(kind: str) -> None:
    """It has the objects still, and may use them, or let go of them."""
    async with connection_of(kind) as (conn, peer):

        def end() -> int:
            before = descriptors_of(inode)
            taken = [open(os.devnull, "rb") for _ in range(20)]  # noqa: SIM115
            conn.abort()
            collect()
            for file in taken:
                assert file.read() == b""  # nobody closed their numbers
            return before

        async with anyio.create_task_group() as tg:
            inode = inode_of(conn)
            tg.start_soon(conn.receive)
            await settled()
            assert forked(end) == 0
            await peer.send(b"word")
        await conn.send(b"whole")
    await assert_finished(conn, peer, Cause.RETURNED, b"whole")


@each_way
async def test_child_has_no_copy_of_what_speaks_tls(
    way: str, side: str, anyio_backend: object
) -> None:
    async def body(conn: Connection) -> None:
        inode = inode_of(conn)
        assert descriptors_of(inode) >= 2
        assert forked(partial(descriptors_of, inode)) == 0
        await conn.send(b"whole")

    async def script(peer: TLSPeer) -> None:
        assert await peer.receive(5) == b"whole"
        assert await peer.end() == (b"", ["close_notify", "FIN"])

    it = await talk(way, side, body, script, drain=None)
    assert it.ending.kind is CloseKind.FIN


async def test_child_has_no_copy_of_a_clients_connection(anyio_backend: object) -> None:
    with plain_server() as listener:
        async with connect_tcp(*listener.getsockname()) as conn:
            with accepted(listener) as peer:
                async with connection_scope(conn) as inner:
                    inode = inode_of(inner)
                    assert forked(partial(descriptors_of, inode)) == 0
                    await conn.send(b"whole")
                    peer.send_eof()
                assert await peer.read_to_end() == Seen(b"whole", PeerClose.FIN)
    ending_with(CloseKind.FIN, conn, Cause.RETURNED)


async def test_child_has_no_copy_of_what_drains(anyio_backend: object) -> None:
    async with anyio.create_task_group() as tg:

        async def handler(conn: Connection) -> None:
            inodes.append(inode_of(conn))
            await conn.send(b"whole")

        inodes: list[int] = []
        server = await tg.start(partial(serve_tcp, handler, host="127.0.0.1"))
        with Peer(server.port) as peer:
            assert await peer.read_to_end() == Seen(b"whole", PeerClose.FIN)
            assert len(server.connections) == 1
            assert forked(partial(descriptors_of, inodes[0])) == 0
        server.stop()


async def test_child_keeps_what_was_given_away(kind: str) -> None:
    async with connection_of(kind) as (conn, peer):
        conn.extra(SocketAttribute.raw_socket)
        inode = inode_of(conn)
        stream = conn.detach()
        await settled()  # what was shown to others is closed a turn later
        assert forked(partial(descriptors_of, inode)) == descriptors_of(inode) >= 1
        async with connection_scope(stream, drain=None) as again:  # and comes back
            assert inode_of(again) == inode
            assert forked(partial(descriptors_of, inode)) == 0
            assert (await peer.read_to_end(timeout=0)).close is PeerClose.NONE
    ending_with(CloseKind.FIN, again, Cause.RETURNED)


async def test_child_keeps_the_listening_sockets(anyio_backend: object) -> None:
    """A parent forks those who accept."""

    async def handler(conn: Connection) -> None:
        pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        inode = os.fstat(listener.fileno()).st_ino
        async with anyio.create_task_group() as tg:
            server = await tg.start(partial(serve_tcp, handler, sockets=[listener.dup()]))
            assert forked(partial(descriptors_of, inode)) == 2
            server.stop()


async def test_child_of_a_child_is_none_of_its_parents(anyio_backend: object) -> None:
    async with connection_of("native") as (conn, _):
        inode = inode_of(conn)
        assert forked(lambda: forked(partial(descriptors_of, inode))) == 0


async def test_child_serves_on_a_loop_of_its_own(kind: str, anyio_backend: Any) -> None:
    """As one that was forked in advance, by a parent that serves as well."""
    backend, options = anyio_backend

    async def serve_one() -> int:
        async def handler(conn: Connection) -> None:
            await conn.send(await conn.receive())
            if await conn.receive() == b"fail":
                raise Failure

        async with serve(kind, handler) as service:
            for last, end in ((b"stop", PeerClose.FIN), (b"fail", PeerClose.RST)):
                with service.connect() as peer:
                    await peer.send(b"echo")
                    assert await peer.receive(4) == b"echo"
                    await peer.send(last)
                    assert await peer.read_to_end() == Seen(b"", end)
                    peer.sock.close()
                ending = await service.ending()
                assert ending.kind.value == end.value
        return 0

    def child() -> int:
        signal.set_wakeup_fd(-1)  # the parent's, and the loop wants it
        return anyio.run(serve_one, backend=backend, backend_options=options)

    async with connection_of(kind) as (conn, peer):
        assert await anyio.to_thread.run_sync(forked_in_a_thread, child) == 0
        await conn.send(b"whole")
    await assert_finished(conn, peer, Cause.RETURNED, b"whole")


async def test_thread_that_forks_meanwhile_gets_no_copy(anyio_backend: object) -> None:
    """Not even of a connection that is accepted, or copied, at that moment."""
    done = threading.Event()
    found: list[int] = []

    def fork_again_and_again(port: int) -> None:
        while not done.is_set() or len(found) < 20:
            found.append(forked(partial(connected_to, port)))

    def connect_again_and_again(port: int) -> None:
        while len(found) < 40:
            with Peer(port) as peer:
                while peer.sock.recv(100):
                    pass
        done.set()

    async def handler(conn: Connection) -> None:
        conn.extra(SocketAttribute.raw_socket)
        await conn.send(b"whole")

    async with anyio.create_task_group() as tg:
        server = await tg.start(partial(serve_tcp, handler, host="127.0.0.1"))
        async with anyio.create_task_group() as threads:
            for act in (fork_again_and_again, connect_again_and_again):
                threads.start_soon(anyio.to_thread.run_sync, act, server.port)
        server.stop()
    assert set(found) == {0}


# What the peer gets.


@pytest.mark.parametrize(
    ("loop", "kind", "way"),
    [
        (loop, kind, "fork")
        for loop in ("asyncio", "uvloop", "trio")
        for kind in KINDS
        if kind != "trio" or loop == "trio"
    ]
    # To the loop these are the same.
    + [("asyncio", "native", way) for way in ("thread", "process", "pool")],
)
def test_killed_parent_resets_while_its_child_lives(
    loop: str, kind: str, way: str
) -> None:
    ours, control = socket.socketpair()
    script = Path(__file__).parents[1] / "forking.py"
    with (
        ours,
        control,
        subprocess.Popen(
            [sys.executable, script, loop, kind, way, str(control.fileno())],
            stdout=subprocess.PIPE,
            pass_fds=[control.fileno()],
            start_new_session=True,
        ) as parent,
    ):
        control.close()
        assert parent.stdout is not None
        try:
            with Peer(int(parent.stdout.readline())) as peer:
                child, copies = json.loads(parent.stdout.readline())
                parent.kill()
                parent.wait()
                assert anyio.run(peer.read_to_end) == Seen(b"half", PeerClose.RST)
                ours.sendall(b"alive?\n")
                assert parent.stdout.readline() == b"alive?\n"
                assert (copies, child != parent.pid) == (0, True)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(parent.pid, signal.SIGKILL)  # a pool's child never ends
