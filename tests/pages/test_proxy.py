"""examples/proxy.py, with a plain socket on either side."""

from __future__ import annotations

import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import anyio
import pytest
from test_readme import connect, free_port
from test_serve_processes import answers, example, loops, read_to_end, running

from anyio_rst import Cause, CloseKind, Ending, PeerClose
from anyio_rst.testing import Peer, assert_fin, assert_rst, connect_peer

import proxy
import serving
from serving import LONG, Service, serve

pytestmark = pytest.mark.anyio

# Far more than all buffers on the way.
MUCH = random.Random(1).randbytes(40_000_000)

SIDES = pytest.mark.parametrize("first", ["client", "server"])


@asynccontextmanager
async def proxied() -> AsyncIterator[tuple[Peer, Peer, Service]]:
    """A client and a server that talk through the proxy."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        handler = partial(proxy.proxy, "127.0.0.1", listener.getsockname()[1])
        async with serve("native", handler) as service:
            async with connect_peer(service.port) as client:
                await anyio.wait_readable(listener)
                server = Peer(listener.accept()[0])
                try:
                    yield client, server, service
                finally:
                    server.close()


def sides(first: str, client: Peer, server: Peer) -> tuple[Peer, Peer]:
    return (client, server) if first == "client" else (server, client)


async def passes(source: Peer, sink: Peer, data: bytes) -> None:
    await source.send(data)
    assert await sink.receive_exactly(len(data)) == data


def kind_and_cause(ending: Ending) -> tuple[CloseKind, Cause]:
    return ending.kind, ending.cause


CLEAN = CloseKind.FIN, Cause.RETURNED
FAILED = CloseKind.RST, Cause.GROUP_FAILED


def test_it_is_short() -> None:
    assert len(Path(proxy.__file__).read_text().splitlines()) < 60


@SIDES
async def test_half_close_passes_and_the_other_direction_goes_on(first: str) -> None:
    async with proxied() as (client, server, service):
        one, other = sides(first, client, server)
        await passes(one, other, b"ask")
        await passes(other, one, b"well")
        await one.send(b"that was all")
        one.send_eof()
        await assert_fin(other, b"that was all")
        await passes(other, one, b"here it is")
        await other.send(b"the end")
        other.send_eof()
        await assert_fin(one, b"the end")
        assert kind_and_cause(await service.ending()) == CLEAN


@SIDES
async def test_reset_passes(first: str) -> None:
    async with proxied() as (client, server, service):
        one, other = sides(first, client, server)
        await passes(other, one, b"ask")
        await passes(one, other, b"half an ans")
        one.reset()
        assert (await assert_rst(other)).data == b""
        assert kind_and_cause(await service.ending()) == FAILED


@SIDES
async def test_reset_behind_the_half_close_of_the_other_side(first: str) -> None:
    """The usual way for a download to fail: the request has ended, the answer breaks."""
    async with proxied() as (client, server, service):
        one, other = sides(first, client, server)
        await other.send(b"ask")
        other.send_eof()
        await assert_fin(one, b"ask")
        await passes(one, other, b"half an ans")
        one.reset()
        assert (await assert_rst(other)).data == b""
        assert kind_and_cause(await service.ending()) == FAILED


@SIDES
async def test_reset_by_a_side_that_does_not_read_what_is_sent_to_it(first: str) -> None:
    async with proxied() as (client, server, service):
        one, other = sides(first, client, server)
        async with anyio.create_task_group() as tg:

            async def send_until_reset() -> None:
                with pytest.raises(ConnectionResetError):
                    await other.send(MUCH)

            tg.start_soon(send_until_reset)
            assert await one.receive_exactly(1) == MUCH[:1]
            one.reset()
        await assert_rst(other)
        assert kind_and_cause(await service.ending()) == FAILED


@SIDES
async def test_reset_behind_data_that_the_other_side_has_not_read(first: str) -> None:
    """It passes when that side reads on, and is not lost behind the data."""
    async with proxied() as (client, server, service):
        one, other = sides(first, client, server)
        with anyio.move_on_after(0.2):  # until every buffer is full
            await one.send(MUCH)
        one.reset()
        seen = await assert_rst(other)
        assert len(seen.data) < len(MUCH)
        assert MUCH.startswith(seen.data)
        assert kind_and_cause(await service.ending()) == FAILED


@SIDES
async def test_much_to_a_slow_reader(first: str) -> None:
    """It waits with its sender, and everything arrives: in both directions at once."""
    async with proxied() as (client, server, service):
        one, other = sides(first, client, server)
        sent = anyio.Event()

        async def send() -> None:
            await one.send(MUCH)
            one.send_eof()
            sent.set()

        async with anyio.create_task_group() as tg:
            tg.start_soon(send)
            await passes(other, one, b"not so fast")
            with anyio.move_on_after(0.5):  # enough for a proxy that takes everything
                await sent.wait()
            assert not sent.is_set()
            assert await other.receive_exactly(1000) == MUCH[:1000]
            await passes(other, one, b"go on")
            seen = await other.read_to_end(timeout=LONG)
        assert seen.data == MUCH[1000:]
        assert seen.close is PeerClose.FIN
        other.send_eof()
        await assert_fin(one, b"")
        assert kind_and_cause(await service.ending()) == CLEAN


async def test_server_that_cannot_be_reached_resets_the_client() -> None:
    handler = partial(proxy.proxy, "127.0.0.1", free_port())
    async with serve("native", handler) as service:
        with service.connect() as client:
            assert await client.read_to_end() == serving.Seen(b"", PeerClose.RST)


async def test_end_of_the_proxy_resets_both_sides() -> None:
    async with proxied() as (client, server, service):
        await passes(client, server, b"ask")
        (await service.next()).connection.abort()
        await assert_rst(client)
        await assert_rst(server)


@loops
def test_program(loop: str) -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(LONG)
        upstream = str(listener.getsockname()[1])
        command = [*example("proxy.py", loop), str(port), "127.0.0.1", upstream]
        with running(command) as process:
            with connect(port, process) as client, listener.accept()[0] as server:
                client.sendall(b"ask")
                client.shutdown(socket.SHUT_WR)
                assert read_to_end(server) == serving.Seen(b"ask", PeerClose.FIN)
                server.sendall(b"half an ans")
                answers(client, b"half an ans")
                process.kill()
                process.wait()
                assert read_to_end(client) == serving.Seen(b"", PeerClose.RST)
                # Its own FIN has been read: a reset after that is told by EPIPE.
                with pytest.raises(BrokenPipeError):
                    server.sendall(b"wer")
