"""A connection belongs to the thread of its event loop."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import anyio
import pytest
from anyio import from_thread, to_thread

from anyio_rst import Cause, CloseKind, Connection, PeerClose, serve_tcp

from serving import Peer, Seen, serve

pytestmark = pytest.mark.anyio

REFUSED = r"thread of its event loop: call it there, with anyio\.from_thread"


@pytest.mark.parametrize(
    "call", [Connection.abort, Connection.detach, Connection.is_stale]
)
async def test_call_in_another_thread_is_refused_and_changes_nothing(
    kind: str, call: Callable[[Connection], object]
) -> None:
    async def handler(conn: Connection) -> None:
        with pytest.raises(RuntimeError, match=REFUSED):
            await to_thread.run_sync(call, conn)
        await conn.send(await conn.receive())

    async with serve(kind, handler) as service:
        with service.connect() as peer:
            await peer.send(b"echo")
            seen = await peer.read_to_end()
            peer.send_eof()
            ending = await service.ending()
    assert (seen.data, seen.close) == (b"echo", PeerClose.FIN)
    assert ending.cause is Cause.RETURNED


async def test_abort_that_is_passed_to_its_thread_wakes_the_reader(kind: str) -> None:
    async def handler(conn: Connection) -> None:
        def abort() -> None:
            from_thread.run_sync(conn.abort)

        async with anyio.create_task_group() as tg:
            tg.start_soon(to_thread.run_sync, abort)
            with pytest.raises(anyio.ClosedResourceError):
                await conn.receive()

    async with serve(kind, handler) as service:
        with service.connect() as peer:
            seen = await peer.read_to_end()
            ending = await service.ending()
    assert seen.close is PeerClose.RST
    assert ending.cause is Cause.ABORTED


async def test_stop_in_another_thread_is_refused_and_changes_nothing() -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(b"served")

    async with anyio.create_task_group() as tg:
        server = await tg.start(lambda **status: serve_tcp(handler, **status))
        with pytest.raises(RuntimeError, match=REFUSED):
            await to_thread.run_sync(server.stop)
        assert not server.stopping
        with Peer(server.port) as peer:
            seen = await peer.read_to_end()
        server.stop()
    assert (seen.data, seen.close) == (b"served", PeerClose.FIN)


async def serve_half_of_them(count: int) -> tuple[list[Seen], dict[CloseKind, int]]:
    async def handler(conn: Connection) -> None:
        word = await conn.receive()
        await conn.send(word)
        if word == b"fail":
            raise ValueError

    seen = []
    async with anyio.create_task_group() as tg:
        server = await tg.start(lambda **status: serve_tcp(handler, **status))
        for number in range(count):
            with Peer(server.port) as peer:
                await peer.send(b"fail" if number % 2 else b"work")
                seen.append(await peer.read_to_end())
        server.stop()
    return seen, dict(server.statistics().endings_by_kind)


def test_event_loops_in_several_threads() -> None:
    loops: list[dict[str, Any]] = [
        {"backend": "asyncio"},
        {"backend": "asyncio", "backend_options": {"use_uvloop": True}},
        {"backend": "trio"},
    ]
    if find_spec("uvloop") is None:
        del loops[1]

    def run(loop: dict[str, Any]) -> tuple[list[Seen], dict[CloseKind, int]]:
        return anyio.run(serve_half_of_them, 20, **loop)

    with ThreadPoolExecutor(6) as threads:
        for seen, totals in threads.map(run, loops * 2):
            assert (
                seen == [Seen(b"work", PeerClose.FIN), Seen(b"fail", PeerClose.RST)] * 10
            )
            assert (totals[CloseKind.FIN], totals[CloseKind.RST]) == (10, 10)
