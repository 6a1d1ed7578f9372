"""`trio.serve_tcp`."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING

import trio

from evidence.sockets import HOST, RESET_ON_CLOSE

from . import BACKLOG, CHUNK, Failed, announce_port, announce_reset

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


async def fin(stream: trio.SocketStream) -> None:
    await stream.send_all(await stream.receive_some())


async def rst(stream: trio.SocketStream) -> None:
    await stream.send_all(await stream.receive_some())
    raise Failed


async def echo(stream: trio.SocketStream) -> None:
    async for data in stream:
        await stream.send_all(data)


async def download(stream: trio.SocketStream) -> None:
    left = int(await stream.receive_some())
    while left > 0:
        await stream.send_all(CHUNK[:left])
        left -= len(CHUNK)


HANDLERS: dict[str, Callable[[trio.SocketStream], Awaitable[None]]] = {
    "fin": fin,
    "rst": rst,
    "echo": echo,
    "download": download,
}


async def main(workload: str) -> None:
    handler = HANDLERS[workload]

    async def by_hand(stream: trio.SocketStream) -> None:
        try:
            await handler(stream)
        except Failed:
            stream.setsockopt(*RESET_ON_CLOSE)
        except trio.Cancelled:
            stream.setsockopt(*RESET_ON_CLOSE)
            raise

    serve = partial(trio.serve_tcp, by_hand, 0, host=HOST, backlog=BACKLOG)
    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(serve)
        announce_port(listener.socket.getsockname()[1])
        await trio.lowlevel.wait_readable(sys.stdin)
        announce_reset()
        nursery.cancel_scope.cancel()


def run(contender: str, loop: str, workload: str) -> None:
    trio.run(main, workload)
