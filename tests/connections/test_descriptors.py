"""Copies of a connection's descriptor delay neither FIN nor RST.

A copy, made by dup() or inherited by another process, keeps the socket open after its
owner has closed it. A plain socket on the other side judges while the copy is there.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress

import pytest
from anyio.abc import SocketAttribute

from anyio_rst import Cause, CloseKind, Drain, Ending, PeerClose
from anyio_rst.testing import Seen, connect_peer

from serving import LONG, connection_of

# Only shows that nothing happens.
SHORT = 0.1

pytestmark = pytest.mark.anyio


class Failure(Exception):
    pass


@contextmanager
def duplicate(descriptor: int) -> Iterator[None]:
    copy = os.dup(descriptor)
    try:
        yield
        os.fstat(copy)  # was open to the end
    finally:
        os.close(copy)


@contextmanager
def other_process(descriptor: int) -> Iterator[None]:
    """A child that has inherited the descriptor and does not know about it."""
    with subprocess.Popen(
        ["cat"], stdin=subprocess.PIPE, pass_fds=[descriptor]
    ) as process:
        # Popen() returns when the other program runs.
        held = os.readlink(f"/proc/{process.pid}/fd/{descriptor}")
        assert held == os.readlink(f"/proc/self/fd/{descriptor}")
        yield
        assert process.poll() is None
        # The end of its input ends it.


Copy = Callable[[int], AbstractContextManager[None]]

copies = pytest.mark.parametrize("copy", [duplicate, other_process])


async def judge(
    kind: str, copy: Copy, end: str, *, drain: Drain | None = None
) -> tuple[Seen, Ending]:
    """What the peer saw, and the `Ending`, both from before the copy was closed."""
    with ExitStack() as copies:
        with suppress(Failure):
            async with connection_of(kind, drain=drain) as (conn, peer):
                sock = conn.extra(SocketAttribute.raw_socket)
                copies.enter_context(copy(sock.fileno()))
                await conn.send(b"data")
                if end == "raise":
                    raise Failure
                if end == "abort":
                    conn.abort()
        assert conn.ending is not None
        return await peer.read_to_end(), conn.ending


@copies
@pytest.mark.parametrize(
    ("end", "cause"), [("raise", Cause.RAISED), ("abort", Cause.ABORTED)]
)
async def test_reset_goes_out_at_once(
    kind: str, copy: Copy, end: str, cause: Cause
) -> None:
    seen, ending = await judge(kind, copy, end)
    assert seen == Seen(b"data", PeerClose.RST)
    assert (ending.kind, ending.cause) == (CloseKind.RST, cause)


@copies
@pytest.mark.parametrize("drain", [None, Drain(timeout=LONG)], ids=["close", "drain"])
async def test_fin_goes_out_at_once(kind: str, copy: Copy, drain: Drain | None) -> None:
    seen, ending = await judge(kind, copy, "return", drain=drain)
    assert seen == Seen(b"data", PeerClose.FIN)
    assert (ending.kind, ending.cause) == (CloseKind.FIN, Cause.RETURNED)
    assert ending.peer is (PeerClose.NONE if drain is None else PeerClose.FIN)


@copies
async def test_closing_alone_would_send_nothing(
    copy: Copy, anyio_backend: object
) -> None:
    """So the judge can tell: SO_LINGER {1, 0} waits for the last copy to be closed."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with connect_peer(listener.getsockname()[1]) as peer:
            sock, _ = listener.accept()
            linger = struct.pack("ii", 1, 0)
            with sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                with copy(sock.fileno()):
                    sock.close()
                    seen = await peer.read_to_end(timeout=SHORT)
            assert seen == Seen(b"", PeerClose.NONE)
            assert await peer.read_to_end() == Seen(b"", PeerClose.RST)
