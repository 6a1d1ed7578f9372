"""Our own end over TLS: a close_notify and a FIN, or an RST and no close_notify."""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from anyio.abc import SocketAttribute

from anyio_rst import Cause, CloseKind, Connection, Drain, PeerClose
from anyio_rst.testing import Direction, TCPFlag

from securing import (
    CERTIFICATE,
    CLEAN,
    TLSPeer,
    client_context,
    each_version,
    each_way,
    each_way_of_a_server,
    server_context,
    shake_hands,
    talk,
)
from serving import LONG, Peer, fill_buffers, has_ended, serve, settled

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup

pytestmark = pytest.mark.anyio

BIG = 4 * 2**20


class Failure(Exception):
    pass


# An RST.


@each_way_of_a_server
@each_version
@pytest.mark.parametrize("how", ["raise", "group", "cancel", "abort"])
async def test_any_other_end_is_an_rst_without_close_notify(
    way: str, side: str, version: ssl.TLSVersion, how: str
) -> None:
    async def fail() -> None:
        raise Failure

    async def body(conn: Connection) -> None:
        await conn.send(b"half")
        if how == "raise":
            raise Failure
        if how == "abort":
            conn.abort()
        elif how == "group":
            async with conn.create_task_group() as tg:
                tg.start_soon(fail)
        else:
            with anyio.CancelScope() as scope:
                async with conn:
                    scope.cancel()
                    await anyio.sleep_forever()

    async def script(peer: TLSPeer) -> None:
        assert await peer.end() == (b"half", ["RST"])

    failures = (Failure, ExceptionGroup)
    talked = await talk(way, side, body, script, version=version, expecting=failures)
    assert talked.ending.kind is CloseKind.RST


# A close_notify, and the FIN.


@each_way
@each_version
async def test_clean_end_is_whole_while_the_peer_is_still_sending(
    way: str, side: str, version: ssl.TLSVersion
) -> None:
    stuck = anyio.Event()

    async def body(conn: Connection) -> None:
        assert await conn.receive(1)
        await stuck.wait()
        await conn.send(bytes(BIG))

    async def script(peer: TLSPeer) -> None:
        peer.raw.sock.setblocking(False)
        rest = b""
        try:
            while True:
                rest = peer.encrypted(bytes(2**14))
                while rest:
                    rest = rest[peer.raw.sock.send(rest) :]
        except BlockingIOError:
            peer.raw.sock.settimeout(LONG)
        stuck.set()
        data, end = await peer.end()
        assert (len(data), end) == (BIG, CLEAN)
        peer.raw.send_eof()

    ending = (
        await talk(way, side, body, script, version=version, drain=Drain(LONG))
    ).ending
    assert (ending.kind, ending.cause) == (CloseKind.FIN, Cause.RETURNED)
    if way not in ("wrapped", "buffered"):
        # There asyncio's and uvloop's transports may have read all of it ahead.
        assert ending.discarded > 0


@each_way
@pytest.mark.parametrize("second", [False, True], ids=["one", "refused a second"])
async def test_clean_end_does_not_wait_for_a_task_that_receives(
    way: str, side: str, second: bool
) -> None:
    woken = anyio.Event()

    async def receive(conn: Connection) -> None:
        with pytest.raises(anyio.ClosedResourceError):
            await conn.receive()
        woken.set()

    async def body(conn: Connection) -> None:
        async with anyio.create_task_group() as tg:
            async with conn:
                assert await conn.receive() == b"ready"
                tg.start_soon(receive, conn)
                await settled()
                if second:
                    with pytest.raises(anyio.BusyResourceError):
                        await conn.receive()
                await conn.send(b"answer")
        await woken.wait()

    async def script(peer: TLSPeer) -> None:
        await peer.send(b"ready")
        assert await peer.end() == (b"answer", CLEAN)
        peer.raw.send_eof()

    ending = (await talk(way, side, body, script, drain=Drain(LONG))).ending
    assert (ending.kind, ending.peer) == (CloseKind.FIN, PeerClose.FIN)


@each_way_of_a_server
@each_version
async def test_close_notify_to_a_peer_that_has_closed_goes_out_with_the_fin(
    way: str, side: str, version: ssl.TLSVersion, rst_segments: Any
) -> None:
    """Sent by itself it is answered by an RST, and then there is no FIN to be sent."""
    gone = anyio.Event()
    ours: list[Connection] = []

    async def body(conn: Connection) -> None:
        ours.append(conn)
        await conn.send(b"x")
        with pytest.raises(anyio.EndOfStream):
            await conn.receive()
        await gone.wait()

    async def script(peer: TLSPeer) -> None:
        # Whatever the server sends for TLS itself comes before.
        assert await peer.receive(1) == b"x"
        port = peer.raw.sock.getpeername()[1]
        peer.say_close_notify()
        peer.raw.sock.close()
        with rst_segments(port) as capture:
            gone.set()
            await has_ended(ours[0])
            # Besides, the kernel may acknowledge the peer's end only now, and the peer's
            # may send it again before.
            ends = TCPFlag.FIN | TCPFlag.RST
            segments = [s for s in capture.segments if s.length or s.flags & ends]
        sent = [s for s in segments if s.direction is Direction.FROM_PORT]
        answers = [s for s in segments if s.direction is Direction.TO_PORT]
        assert [(TCPFlag.FIN in s.flags, s.length > 0) for s in sent] == [(True, True)]
        resets = [s for s in answers if TCPFlag.FIN not in s.flags]
        assert {TCPFlag.RST in s.flags for s in resets} == {True}

    ending = (await talk(way, side, body, script, version=version)).ending
    assert (ending.kind, ending.peer) == (CloseKind.FIN, PeerClose.FIN)


@each_way_of_a_server
@each_version
async def test_cancellation_that_the_body_never_noticed_still_says_close_notify(
    way: str, side: str, version: ssl.TLSVersion
) -> None:
    async def body(conn: Connection) -> None:
        await conn.send(b"all of it")
        with anyio.CancelScope() as scope:
            async with conn:
                scope.cancel()

    async def script(peer: TLSPeer) -> None:
        data, end = await peer.end()
        assert (data, end[0]) == (b"all of it", "close_notify")

    await talk(way, side, body, script, version=version)


@each_way
async def test_cancelled_aclose_while_another_ends_the_session_cuts_only_the_drain(
    way: str, side: str
) -> None:
    async def body(conn: Connection) -> None:
        async def close() -> None:
            begun.set()
            await conn.aclose()

        begun = anyio.Event()
        await conn.send(b"answer")
        async with anyio.create_task_group() as tg:
            tg.start_soon(close)
            await begun.wait()
            with anyio.CancelScope() as scope:
                scope.cancel()
                await conn.aclose()
        assert conn.ending is not None

    async def script(peer: TLSPeer) -> None:
        assert await peer.receive(6) == b"answer"
        assert await peer.end() == (b"", CLEAN)

    ending = (await talk(way, side, body, script)).ending
    assert (ending.kind, ending.cause) == (CloseKind.FIN, Cause.CLOSED)


# A close_notify that finds no room.

# Less than it takes TCP to probe a closed window, which may open it a little: 200 ms, the
# least RTO of Linux.
SOON = 0.1


@each_way_of_a_server
@each_version
async def test_close_notify_that_finds_no_room_is_sent_in_the_drain(
    way: str, side: str, version: ssl.TLSVersion
) -> None:
    filled = 0
    full = anyio.Event()

    async def body(conn: Connection) -> None:
        nonlocal filled
        # Whatever the session sends for itself comes before.
        await conn.send(b"ready")
        assert await conn.receive() == b"ready"
        filled = fill_buffers(conn.extra(SocketAttribute.raw_socket))
        full.set()

    async def script(peer: TLSPeer) -> None:
        assert await peer.receive(5) == b"ready"
        await peer.send(b"ready")
        await full.wait()
        seen = await peer.raw.read_to_end()
        # Behind what is no TLS, an alert: RFC 8446, 5.1 and 6.
        assert len(seen.data) > filled
        assert seen.close is PeerClose.FIN
        peer.raw.send_eof()

    talked = await talk(
        way, side, body, script, version=version, buffer=4096, drain=Drain(LONG)
    )
    assert (talked.ending.kind, talked.ending.cause) == (CloseKind.FIN, Cause.RETURNED)


@each_way_of_a_server
@each_version
async def test_close_notify_that_never_finds_room_is_a_reset(
    way: str, side: str, version: ssl.TLSVersion
) -> None:
    async def body(conn: Connection) -> None:
        ours.append(conn)
        fill_buffers(conn.extra(SocketAttribute.raw_socket))
        full.set()

    async def script(peer: TLSPeer) -> None:
        await full.wait()
        ending = await has_ended(ours[-1])
        assert (await peer.raw.read_to_end()).close.value == ending.kind.value

    ours: list[Connection] = []
    for _ in range(10):  # on a busy machine the window may be probed in time
        full = anyio.Event()
        talked = await talk(
            way, side, body, script, version=version, buffer=4096, drain=Drain(SOON)
        )
        if talked.ending.kind is CloseKind.RST:
            assert talked.ending.cause is Cause.TORN_SEND
            return
    pytest.fail("it found room, each time")


async def test_close_notify_that_finds_no_room_costs_one_time_out(
    anyio_backend: object,
) -> None:
    ends: list[float] = []

    async def handler(conn: Connection) -> None:
        fill_buffers(conn.extra(SocketAttribute.raw_socket))
        ends.append(anyio.current_time() + 2 * SOON)

    options: Any = {"ssl_context": server_context(), "drain": Drain(SOON)}
    async with serve("native", handler, **options) as service:
        for _ in range(10):  # the machine may be busy with something else
            with service.connect(buffer=4096) as raw:
                await shake_hands(raw)
                await service.ending()
            if anyio.current_time() < ends[-1]:
                return
    pytest.fail("it took two, each time")


# What the peer answers.


@each_way_of_a_server
@each_version
@pytest.mark.parametrize("says", ["nothing", "fin", "rst", "data", "close_notify"])
async def test_answer_to_close_notify_is_bounded_and_no_exception(
    way: str, side: str, version: ssl.TLSVersion, says: str
) -> None:
    async def body(conn: Connection) -> None:
        ours.append(conn)
        await conn.send(b"x")

    async def script(peer: TLSPeer) -> None:
        assert await peer.end() == (b"x", CLEAN)
        if says == "close_notify":
            peer.say_close_notify()
        elif says == "data":
            await peer.raw.send(b"not even TLS")
        if says == "rst":
            peer.raw.reset()
        elif says != "nothing":
            peer.raw.send_eof()
        await has_ended(ours[0])

    ours: list[Connection] = []
    drain = Drain(timeout=0.05 if says == "nothing" else LONG)
    ending = (await talk(way, side, body, script, version=version, drain=drain)).ending
    assert (ending.kind, ending.cause) == (CloseKind.FIN, Cause.RETURNED)
    expected = {"nothing": PeerClose.NONE, "rst": PeerClose.RST}
    assert ending.peer is expected.get(says, PeerClose.FIN)


# Other programs.


async def test_default_client_of_an_old_python_takes_a_reset_for_an_end() -> None:
    """As docs/explanation.md has it: suppress_ragged_eofs suppresses that, too."""

    async def handler(conn: Connection) -> None:
        await conn.send(b"half")
        raise Failure

    def read(port: int) -> bytes:
        with socket.create_connection(("127.0.0.1", port), timeout=LONG) as sock:
            with client_context().wrap_socket(sock, server_hostname="localhost") as tls:
                return b"".join(iter(partial(tls.recv, 100), b""))

    async with serve("native", handler, ssl_context=server_context()) as service:
        if sys.version_info < (3, 13):
            assert await anyio.to_thread.run_sync(read, service.port) == b"half"
        else:
            with pytest.raises(ConnectionResetError):
                await anyio.to_thread.run_sync(read, service.port)


DYING = """
import os, signal, ssl, sys
import anyio
from anyio_rst import serve_tcp

context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(sys.argv[1])

async def handler(conn):
    await conn.receive()
    await conn.send(b"half")
    os.kill(os.getpid(), signal.SIGKILL)

class Status:
    def started(self, server):
        print(server.port, flush=True)

async def main():
    await serve_tcp(handler, host="127.0.0.1", ssl_context=context, task_status=Status())

anyio.run(main, backend=sys.argv[2], backend_options={"use_uvloop": True}
          if sys.argv[3] == "uvloop" else {})
"""


@each_version
async def test_process_that_is_killed_says_no_close_notify(
    anyio_backend: Any, version: ssl.TLSVersion, tmp_path: Path
) -> None:
    certificate = tmp_path / "server.pem"
    CERTIFICATE.private_key_and_cert_chain_pem.write_to_path(certificate)
    name, options = anyio_backend
    loop = "uvloop" if options.get("use_uvloop") else name
    with subprocess.Popen(
        [sys.executable, "-c", DYING, str(certificate), name, loop],
        stdout=subprocess.PIPE,
    ) as process:
        try:
            assert process.stdout is not None
            port = int(await anyio.to_thread.run_sync(process.stdout.readline))
            with Peer(port) as raw:
                peer = await shake_hands(raw, version=version)
                await peer.send(b"?")
                assert await peer.end() == (b"half", ["RST"])
        finally:
            process.kill()


async def test_openssl_sees_a_clean_end_and_a_reset() -> None:
    async def handler(conn: Connection) -> None:
        word = await conn.receive()
        await conn.send(b"answer\n")
        if word.startswith(b"fail"):
            raise Failure

    def s_client(word: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["openssl", "s_client", "-connect", f"127.0.0.1:{service.port}", "-quiet"],
            input=word,
            capture_output=True,
            text=True,
            timeout=LONG,
            check=False,
        )

    async with serve("native", handler, ssl_context=server_context()) as service:
        clean = await anyio.to_thread.run_sync(s_client, "fine\n")
        failed = await anyio.to_thread.run_sync(s_client, "fail\n")
    assert clean.stdout == failed.stdout == "answer\n"
    assert clean.returncode == 0
    assert "errno=104" in failed.stderr
    assert failed.returncode != 0
