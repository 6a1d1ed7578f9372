"""`connect_tcp`: the connection of a client, and what may fail before it has one."""

from __future__ import annotations

import errno
import os
import socket
import ssl
import threading
from contextlib import suppress

import anyio
import anyio.to_thread
import pytest
from conftest import ASYNCIO, collect

from anyio_rst import (
    Cause,
    CloseKind,
    PeerClose,
    PeerReset,
    connect_tcp,
)

from serving import (
    LONG,
    Seen,
    accepted,
    ending_with,
    plain_server,
    while_waiting,
)

pytestmark = pytest.mark.anyio

ON_ASYNCIO = pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)

# More than the kernel takes before the peer reads.
TOO_MUCH = bytes(8 * 2**20)


async def test_connection_does_not_need_its_context_manager() -> None:
    with plain_server() as listener:
        conn = await connect_tcp(*listener.getsockname())
        with accepted(listener) as peer:
            collect()
            got = await while_waiting(conn.receive(), peer.sock.sendall, b"x")
            assert got == b"x"
            peer.send_eof()
            await conn.aclose()
            assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)
    ending_with(CloseKind.FIN, conn, Cause.CLOSED)


async def test_connect_tcp_is_entered_once_and_uses_the_local_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        local_port = free.getsockname()[1]
    with plain_server() as listener:
        connecting = connect_tcp(
            *listener.getsockname(), local_host="127.0.0.1", local_port=local_port
        )
        async with connecting as conn:
            with accepted(listener) as peer:
                assert peer.sock.getpeername()[1] == local_port
                with pytest.raises(RuntimeError, match="only be entered once"):
                    await connecting.__aenter__()
                # The port is not kept by TIME_WAIT.
                conn.abort()


async def test_peer_that_resets_at_once_is_an_error_of_connecting_or_a_peer_reset() -> (
    None
):
    with plain_server() as listener:
        for _ in range(20):
            thread = threading.Thread(target=lambda: accepted(listener).reset())
            thread.start()
            with suppress(OSError):
                async with connect_tcp(*listener.getsockname()) as conn:
                    with pytest.raises(PeerReset):
                        await conn.receive()
                assert conn.ending is not None
                assert conn.ending.peer is PeerClose.RST
            thread.join()


@pytest.mark.parametrize("answer", [b"", b"no TLS\r\n" * 10], ids=["none", "garbage"])
async def test_handshake_that_fails_at_entry_resets(answer: bytes) -> None:
    with plain_server() as listener:
        context = ssl.create_default_context()
        connecting = connect_tcp(*listener.getsockname(), ssl_context=context)
        async with anyio.create_task_group() as tg:
            peers = []

            async def answer_it() -> None:
                peers.append(await anyio.to_thread.run_sync(accepted, listener))
                await peers[0].receive(5)  # of the ClientHello
                peers[0].sock.sendall(answer)
                if not answer:
                    scope.cancel()

            tg.start_soon(answer_it)
            raised = False
            with anyio.fail_after(LONG), anyio.CancelScope() as scope:
                try:
                    await connecting.__aenter__()
                except ssl.SSLError:
                    raised = True
            assert (raised, scope.cancelled_caught) == (bool(answer), not answer)
        with peers[0] as peer:
            assert (await peer.read_to_end()).close is PeerClose.RST


@ON_ASYNCIO
async def test_no_descriptor_for_a_copy_resets_what_was_connected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(socket, "fromfd", fail)
    with plain_server() as listener:
        with pytest.raises(OSError, match="open files"):
            await connect_tcp(*listener.getsockname()).__aenter__()
        with accepted(listener) as peer:
            assert await peer.read_to_end(timeout=3) == Seen(b"", PeerClose.RST)


def test_local_port_without_an_address_is_refused() -> None:
    with pytest.raises(ValueError, match="local_port goes with local_host"):
        connect_tcp("127.0.0.1", 1, local_port=2)
