"""What other platforms do, as far as that can be had on this one."""

from __future__ import annotations

import asyncio
import socket

import anyio
import anyio.abc
import pytest
from conftest import ASYNCIO

from anyio_rst import (
    Cause,
    CloseKind,
    Connection,
    PeerClose,
    _sockets,
    connect_tcp,
    connection_scope,
)

from serving import Seen, foreign_pair, serve

pytestmark = pytest.mark.anyio


class Failure(Exception):
    pass


@pytest.fixture
def no_dissolving(monkeypatch: pytest.MonkeyPatch) -> None:
    """As everywhere but on Linux: only closing the armed socket resets."""
    monkeypatch.setattr(_sockets, "_dissolve", lambda sock: None)
    monkeypatch.setattr(_sockets, "RESETS_UNDER_A_TRANSPORT", False)


@pytest.mark.usefixtures("no_dissolving")
@pytest.mark.parametrize("how", ["failure", "abort", "return"])
async def test_closing_the_armed_socket_resets_as_well(kind: str, how: str) -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(b"data")
        if how == "failure":
            raise Failure
        if how == "abort":
            conn.abort()

    async with serve(kind, handler) as service:
        with service.connect() as peer:
            seen = await peer.read_to_end()
        ending = await service.ending()
    if how == "return":
        assert seen == Seen(b"data", PeerClose.FIN)
        assert (ending.kind, ending.cause) == (CloseKind.FIN, Cause.RETURNED)
    else:
        assert seen == Seen(b"data", PeerClose.RST)
        assert ending.kind is CloseKind.RST


@pytest.mark.usefixtures("no_dissolving")
@pytest.mark.parametrize("anyio_backend", ASYNCIO, indirect=True)
async def test_windows_default_loop_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its transports shut down before they close."""
    loop_class = type(asyncio.get_running_loop())
    monkeypatch.setattr(asyncio, "ProactorEventLoop", loop_class, raising=False)
    stream, peer = await foreign_pair()
    with peer:
        with pytest.raises(RuntimeError, match="ProactorEventLoop sends a FIN"):
            connection_scope(stream)
        await stream.aclose()
        assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        with pytest.raises(RuntimeError, match="sends a FIN before it closes"):
            async with connect_tcp("127.0.0.1", listener.getsockname()[1]):
                pytest.fail("it could be entered")
        with pytest.raises(BlockingIOError):
            listener.accept()


async def test_accepted_sockets_that_inherit_nothing_are_armed_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_sockets, "ACCEPTED_SOCKETS_INHERIT", False)
    armed: list[tuple[bytes, int]] = []

    async def handler(conn: Connection) -> None:
        sock = conn.extra(anyio.abc.SocketAttribute.raw_socket)
        linger = sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)
        nodelay = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        armed.append((linger, nodelay))
        raise Failure

    async with serve("native", handler) as service:
        with service.connect() as peer:
            assert await peer.read_to_end() == Seen(b"", PeerClose.RST)
    assert armed == [(_sockets._LINGER_RESET, 1)]
