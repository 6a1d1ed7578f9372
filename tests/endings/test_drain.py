"""The drain: what a clean end owes to a peer that still sends, and for how long.

Judged by a plain socket; the `Ending` is then held against what that socket saw.
"""

from __future__ import annotations

import hashlib
import os
import random
import resource
import socket
import subprocess
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from anyio.abc import SocketAttribute

from anyio_rst import Cause, CloseKind, Connection, Drain, Ending, PeerClose

from serving import (
    DISSOLVES,
    LONG,
    TELLS_OF_QUEUES,
    Peer,
    Seen,
    arrived,
    block_until_arrived,
    error_of,
    queued,
    serve,
    told,
    value_of,
)

# For a drain that has to end before any limit. Service.ending() gives up after LONG.
ENDLESS = 10 * LONG

ANSWER = b"all of it"
BIG_ANSWER = random.Random(1).randbytes(4 * 2**20)

# Too much for the receive buffer of a peer that asked for a small one, but not for the
# send buffer. (Trio wants less than 16 KiB in there that wait to be sent.)
MIDDLING_ANSWER = BIG_ANSWER[:16384]
SMALL_BUFFER = 4096

# Far more than the socket buffers of both sides hold.
UPLOAD = bytes(8 * 2**20)


class Failure(Exception):
    pass


async def answer(conn: Connection) -> None:
    await conn.send(ANSWER)


def assert_finished(ending: Ending, peer: PeerClose) -> None:
    assert (ending.kind, ending.cause) == (CloseKind.FIN, Cause.RETURNED)
    assert value_of(ending) is None
    assert ending.peer is peer


def assert_whole(seen: Seen, data: bytes) -> None:
    """*data*, and FIN."""
    assert (len(seen.data), seen.close) == (len(data), PeerClose.FIN)
    # Not the data: it would take pytest minutes to find where they differ.
    assert hashlib.sha256(seen.data).digest() == hashlib.sha256(data).digest()


def fill(peer: Peer, data: bytes) -> int:
    """Send *data* until that would block; how much was sent."""
    sent = 0
    peer.sock.setblocking(False)
    with suppress(BlockingIOError):
        while sent < len(data):
            sent += peer.sock.send(data[sent : sent + 65536])
    peer.sock.settimeout(LONG)
    return sent


@contextmanager
def flood(peer: Peer) -> Iterator[subprocess.Popen[bytes]]:
    """Let a process send without end. It is faster than the one that tests could be."""
    peer.sock.settimeout(None)  # the process gets the socket as it is
    command = ["timeout", str(LONG), "cat", "/dev/zero"]
    with subprocess.Popen(
        command, stdout=peer.sock.fileno(), stderr=subprocess.DEVNULL
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


async def reset_of(flooding: subprocess.Popen[bytes]) -> None:
    """Wait until the flood is stopped by the other side."""
    status = await anyio.to_thread.run_sync(flooding.wait)
    assert status != 124, "timeout(1) had to stop it"


# A FIN stays a FIN.


@pytest.mark.anyio
async def test_answer_reaches_a_client_that_reads_when_its_upload_is_blocked(
    kind: str,
) -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(BIG_ANSWER)

    async with serve(kind, handler, drain=Drain(timeout=ENDLESS)) as service:
        with service.connect() as peer:
            sent = fill(peer, UPLOAD)
            assert sent < len(UPLOAD)
            async with anyio.create_task_group() as tg:
                tg.start_soon(peer.send, UPLOAD[sent:])
                assert_whole(await peer.read_to_end(), BIG_ANSWER)
            peer.send_eof()
            ending = await service.ending()
    assert_finished(ending, PeerClose.FIN)
    assert ending.unacknowledged == told(0)
    assert ending.discarded == len(UPLOAD)


@pytest.mark.anyio
async def test_answer_reaches_a_client_that_reads_when_its_upload_is_done(
    kind: str,
) -> None:
    received: list[int] = []

    async def handler(conn: Connection) -> None:
        received.append(len(await conn.receive(1000)))
        await conn.send(MIDDLING_ANSWER)

    async with serve(kind, handler, drain=Drain(timeout=ENDLESS)) as service:
        with service.connect(buffer=SMALL_BUFFER) as peer:
            await peer.send(UPLOAD)
            seen = await peer.read_to_end()
            peer.send_eof()
            ending = await service.ending()
    assert_whole(seen, MIDDLING_ANSWER)
    assert_finished(ending, PeerClose.FIN)
    assert ending.unacknowledged == told(0)
    assert ending.discarded == len(UPLOAD) - sum(received)


@pytest.mark.anyio
async def test_answer_would_be_lost_without_a_drain(anyio_backend: object) -> None:
    """So the judge can tell: the kernel answers unread input with an RST."""
    unread = anyio.Event()

    async def handler(conn: Connection) -> None:
        await conn.send(MIDDLING_ANSWER)
        await unread.wait()

    async with serve("native", handler, drain=None) as service:
        with service.connect(buffer=SMALL_BUFFER) as peer:
            await peer.send(b"unread")
            await arrived(peer)
            unread.set()
            await service.ending()
            seen = await peer.read_to_end()
    assert seen.close is PeerClose.RST
    assert len(seen.data) < len(MIDDLING_ANSWER)


# The limits.


@pytest.mark.anyio
async def test_peer_that_never_closes_is_left_at_the_timeout(kind: str) -> None:
    async with serve(kind, answer, drain=Drain(timeout=0.05)) as service:
        with service.connect() as peer:
            assert await peer.read_to_end() == Seen(ANSWER, PeerClose.FIN)
            ending = await service.ending()
    assert_finished(ending, PeerClose.NONE)
    assert ending.discarded == 0
    assert ending.unacknowledged == told(0)


@pytest.mark.anyio
async def test_trickle_does_not_start_the_timeout_again(kind: str) -> None:
    async with serve(kind, answer, drain=Drain(timeout=0.25)) as service:
        with service.connect() as peer:
            assert await peer.read_to_end() == Seen(ANSWER, PeerClose.FIN)
            with anyio.fail_after(LONG):
                with pytest.raises((ConnectionResetError, BrokenPipeError)):
                    while True:
                        await peer.send(b".")
                        await anyio.sleep(0.01)
            ending = await service.ending()
    assert_finished(ending, PeerClose.NONE)
    assert ending.discarded > 0


async def ending_in_a_flood(kind: str, drain: Drain) -> Ending:
    async with serve(kind, answer, drain=drain) as service:
        with service.connect() as peer:
            assert await peer.read_to_end() == Seen(ANSWER, PeerClose.FIN)
            with flood(peer) as flooding:
                await reset_of(flooding)
            ending = await service.ending()
    assert_finished(ending, PeerClose.NONE)
    return ending


@pytest.mark.anyio
async def test_flood_ends_at_the_timeout(kind: str) -> None:
    # Longer than a process takes to begin: some time on PyPy, and more in a sandbox.
    drain = Drain(timeout=1 if DISSOLVES else 2)
    assert (await ending_in_a_flood(kind, drain)).discarded > 0


@pytest.mark.anyio
@pytest.mark.parametrize("max_bytes", [0, 1, 1_000_000])
async def test_flood_ends_at_max_bytes(kind: str, max_bytes: int) -> None:
    drain = Drain(timeout=ENDLESS, max_bytes=max_bytes)
    assert (await ending_in_a_flood(kind, drain)).discarded == max_bytes


@pytest.mark.anyio
async def test_other_connections_are_served_during_a_flood(kind: str) -> None:
    async def handler(conn: Connection) -> None:
        if await conn.receive(1) == b"f":
            return
        async for chunk in conn:
            await conn.send(chunk)

    async with serve(kind, handler, drain=Drain(timeout=ENDLESS)) as service:
        with service.connect() as flooder:
            await flooder.send(b"f")
            assert await flooder.read_to_end() == Seen(b"", PeerClose.FIN)
            drained = await service.next()
            with flood(flooder) as flooding, service.connect() as other:
                while TELLS_OF_QUEUES and not queued(
                    flooder.sock.fileno(), termios.TIOCOUTQ
                ):
                    await anyio.lowlevel.checkpoint()  # not yet flooding
                await other.send(b"e")
                for _ in range(100):
                    await other.send(b"ping")
                    assert await other.receive(4) == b"ping"
                assert flooding.poll() is None
                assert drained.connection.ending is None
            flooder.send_eof()
            ending = await drained.ending()
    assert_finished(ending, PeerClose.FIN)
    assert ending.discarded > 0


@pytest.mark.anyio
async def test_no_drain_closes_right_after_the_fin(kind: str) -> None:
    async with serve(kind, answer, drain=None) as service:
        with service.connect() as peer:
            ending = await service.ending()
            assert await peer.read_to_end() == Seen(ANSWER, PeerClose.FIN)
            # Nobody is there any more.
            with pytest.raises((ConnectionResetError, BrokenPipeError)):
                while True:
                    await peer.send(b"too late")
    assert_finished(ending, PeerClose.NONE)
    assert ending.discarded == 0


@pytest.mark.anyio
async def test_drain_of_no_time_discards_what_has_arrived(
    kind: str,
) -> None:
    unread = anyio.Event()

    async def handler(conn: Connection) -> None:
        await conn.send(MIDDLING_ANSWER)
        await unread.wait()

    async with serve(kind, handler, drain=Drain(timeout=0)) as service:
        with service.connect(buffer=SMALL_BUFFER) as peer:
            await peer.send(b"unread")
            await arrived(peer)
            unread.set()
            ending = await service.ending()
            seen = await peer.read_to_end()
    assert_whole(seen, MIDDLING_ANSWER)
    assert_finished(ending, PeerClose.NONE)
    assert ending.discarded == len(b"unread")


IMPATIENCE = 0.2


@pytest.mark.anyio
async def test_slow_reader_gets_all_of_the_answer(kind: str) -> None:
    """The drain waits as long as the answer is being taken, however long that takes."""
    data = BIG_ANSWER[: 2**18]

    async def handler(conn: Connection) -> None:
        await conn.send(data)

    async with serve(kind, handler, drain=Drain(timeout=IMPATIENCE)) as service:
        with service.connect(buffer=SMALL_BUFFER) as peer:
            seen = b""
            start = anyio.current_time()
            while anyio.current_time() < start + 4 * IMPATIENCE:
                await anyio.sleep(IMPATIENCE / 2)
                seen += peer.sock.recv(SMALL_BUFFER // 2)
            assert len(seen) < len(data)
            rest = await peer.read_to_end()
        ending = await service.ending()
    assert_whole(Seen(seen + rest.data, rest.close), data)
    assert ending.kind is CloseKind.FIN


@pytest.mark.anyio
@pytest.mark.parametrize(
    "drain", [Drain(timeout=IMPATIENCE), Drain(timeout=ENDLESS, total=IMPATIENCE)]
)
async def test_peer_that_only_sends_makes_no_progress(kind: str, drain: Drain) -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(MIDDLING_ANSWER)

    async with serve(kind, handler, drain=drain) as service:
        with service.connect(buffer=SMALL_BUFFER) as peer:
            async with anyio.create_task_group() as tg:

                async def trickle() -> None:
                    with suppress(OSError):
                        while True:
                            peer.sock.send(b"x")
                            await anyio.sleep(IMPATIENCE / 10)

                tg.start_soon(trickle)
                ending = await service.ending()
                tg.cancel_scope.cancel()
    assert_finished(ending, PeerClose.NONE)
    assert ending.discarded
    assert ending.unacknowledged or not TELLS_OF_QUEUES


@pytest.mark.anyio
@pytest.mark.parametrize("how", ["abort", "cancel", *(["urgent"] if DISSOLVES else [])])
async def test_drain_that_is_cut_short_discards_first_what_has_arrived(
    kind: str, how: str
) -> None:
    """Closed with unread input, the socket would reset, and the answer be lost."""

    async def handler(conn: Connection) -> None:
        await conn.send(MIDDLING_ANSWER)
        await ready.wait()
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tg:
                tg.start_soon(conn.aclose)
                await anyio.wait_all_tasks_blocked()
                if how == "urgent":
                    peer.sock.send(b"!", socket.MSG_OOB)
                # No turn of the loop, in which the drain would read it.
                peer.sock.send(b"unread")
                block_until_arrived(peer.sock)
                if how == "abort":
                    conn.abort()
                else:
                    scope.cancel()
        ended.set()

    ready, ended = anyio.Event(), anyio.Event()
    async with serve(kind, handler, drain=Drain(timeout=ENDLESS)) as service:
        with service.connect(buffer=SMALL_BUFFER) as peer:
            ready.set()
            await ended.wait()
            seen = await peer.read_to_end()
        ending = await service.ending()
    assert_whole(seen, MIDDLING_ANSWER)
    assert (ending.kind, ending.cause) == (CloseKind.FIN, Cause.CLOSED)
    assert ending.discarded == len(b"unread")


@pytest.mark.anyio
async def test_drain_of_no_time_discards_however_much_has_arrived(
    anyio_backend: object,
) -> None:
    """More than the drain reads before it lets other tasks run."""
    upload = bytes(3 * 2**19)
    ready, unread = anyio.Event(), anyio.Event()
    buffer_sizes: list[int] = []

    async def handler(conn: Connection) -> None:
        sock = conn.extra(SocketAttribute.raw_socket)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2 * len(upload))
        buffer_sizes.append(sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF))
        ready.set()
        await conn.send(MIDDLING_ANSWER)
        await unread.wait()

    async with serve("native", handler, drain=Drain(timeout=0)) as service:
        with service.connect(buffer=SMALL_BUFFER) as peer:
            await ready.wait()
            # Linux doubles what was asked for: socket(7).
            if buffer_sizes[0] < 4 * len(upload):
                pytest.skip("net.core.rmem_max is too small")
            await peer.send(upload)
            await arrived(peer)
            unread.set()
            ending = await service.ending()
            seen = await peer.read_to_end()
    assert_whole(seen, MIDDLING_ANSWER)
    assert_finished(ending, PeerClose.NONE)
    assert ending.discarded == len(upload)


# What the peer does meanwhile.


@pytest.mark.anyio
async def test_peer_that_resets_during_the_drain_harms_nobody(kind: str) -> None:
    async with serve(kind, answer, drain=Drain(timeout=ENDLESS)) as service:
        with service.connect() as peer:
            assert await peer.read_to_end() == Seen(ANSWER, PeerClose.FIN)
            served = await service.next()
            await anyio.wait_all_tasks_blocked()
            assert served.connection.ending is None
            peer.reset()
            ending = await served.ending()
    assert served.raised is None
    assert_finished(ending, PeerClose.RST)


@pytest.mark.anyio
@pytest.mark.parametrize("case", ["received", "not received", "behind unread input"])
async def test_peer_that_finished_first_is_not_waited_for(kind: str, case: str) -> None:
    upload = b"unread" if case == "behind unread input" else b""
    finished = anyio.Event()

    async def handler(conn: Connection) -> None:
        await conn.send(ANSWER)
        if case == "received":
            with pytest.raises(anyio.EndOfStream):
                await conn.receive()
        else:
            await finished.wait()

    async with serve(kind, handler, drain=Drain(timeout=ENDLESS)) as service:
        with service.connect() as peer:
            await peer.send(upload)
            peer.send_eof()
            await arrived(peer)  # counts the FIN as a byte
            finished.set()
            ending = await service.ending()
            assert await peer.read_to_end() == Seen(ANSWER, PeerClose.FIN)
    assert_finished(ending, PeerClose.FIN)
    assert ending.discarded == len(upload)


# Ending.unacknowledged.


@pytest.mark.anyio
async def test_what_a_closed_window_holds_back_is_unacknowledged(kind: str) -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(MIDDLING_ANSWER)

    async with serve(kind, handler, drain=Drain(timeout=0.05)) as service:
        with service.connect(buffer=SMALL_BUFFER) as peer:
            ending = await service.ending()
            taken = queued(peer.sock.fileno(), termios.FIONREAD)
            # The kernel goes on delivering behind a closed socket.
            seen = await peer.read_to_end()
    assert_whole(seen, MIDDLING_ANSWER)
    assert_finished(ending, PeerClose.NONE)
    assert 0 < taken < len(MIDDLING_ANSWER)
    assert ending.unacknowledged == told(len(MIDDLING_ANSWER) - taken)


@pytest.mark.anyio
@pytest.mark.skipif(not TELLS_OF_QUEUES, reason="this kernel has no TIOCOUTQ for TCP")
async def test_what_a_reset_destroys_is_unacknowledged(kind: str) -> None:
    in_buffer: list[int] = []

    async def handler(conn: Connection) -> None:
        sock = conn.extra(SocketAttribute.raw_socket)
        with anyio.move_on_after(0.05):
            await conn.send(UPLOAD)
        in_buffer.append(queued(sock.fileno(), termios.TIOCOUTQ))
        raise Failure

    async with serve(kind, handler) as service:
        with service.connect(buffer=SMALL_BUFFER) as peer:
            ending = await service.ending()
            seen = await peer.read_to_end()
    assert seen.close is PeerClose.RST
    assert isinstance(error_of(ending), Failure)
    assert (ending.kind, ending.cause) == (CloseKind.RST, Cause.RAISED)
    assert in_buffer[0] > 0
    assert ending.unacknowledged == in_buffer[0]


# Without a descriptor for the copy of a foreign stream's socket.


@contextmanager
def no_descriptor_to_be_had() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            os.dup(0)
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.anyio
@pytest.mark.parametrize("upload", [b"", b"unread"], ids=["quiet peer", "unread input"])
async def test_fin_needs_no_descriptor(kind: str, upload: bytes) -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(ANSWER)
        await ready.wait()

    ready = anyio.Event()
    async with serve(kind, handler, drain=Drain(timeout=ENDLESS)) as service:
        with service.connect() as peer:
            await peer.send(upload)
            await arrived(peer)
            assert await peer.receive(len(ANSWER)) == ANSWER
            with no_descriptor_to_be_had():
                ready.set()
                assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)
                peer.send_eof()
                served = await service.next()
                ending = await served.ending()
    assert served.raised is None
    assert_finished(ending, PeerClose.FIN)
    assert ending.discarded == len(upload)


# The arguments.


@pytest.mark.parametrize(
    ("timeout", "error"),
    [
        (-1, ValueError),
        (-0.001, ValueError),
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        (float("-inf"), ValueError),
        (None, TypeError),
        ("1", TypeError),
        (True, TypeError),
        (1j, TypeError),
    ],
)
def test_timeout_is_refused_by_name(timeout: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="timeout") as excinfo:
        Drain(timeout=timeout)
    assert repr(timeout) in str(excinfo.value)


@pytest.mark.parametrize(
    ("max_bytes", "error"),
    [
        (-1, ValueError),
        (1.0, TypeError),
        (float("nan"), TypeError),
        (float("inf"), TypeError),
        ("1", TypeError),
        (False, TypeError),
    ],
)
def test_max_bytes_is_refused_by_name(max_bytes: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="max_bytes") as excinfo:
        Drain(max_bytes=max_bytes)
    assert repr(max_bytes) in str(excinfo.value)


@pytest.mark.parametrize("timeout", [0, 0.0, 1, 1e9])
@pytest.mark.parametrize("max_bytes", [None, 0, 1, 2**40])
def test_limits_are_accepted(timeout: float, max_bytes: int | None) -> None:
    drain = Drain(timeout, max_bytes)
    assert (drain.timeout, drain.max_bytes) == (timeout, max_bytes)


def test_total_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="Drain total must be finite"):
        Drain(total=-1)
