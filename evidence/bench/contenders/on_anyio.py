"""`serve_tcp`, and AnyIO's own listener: plain, with a `connection_scope`, or with what
that does written by hand.
"""

from __future__ import annotations

import logging
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
from anyio.abc import ByteStream, SocketAttribute, SocketStream, TaskStatus

from evidence import loops
from evidence.sockets import FIN_ON_CLOSE, HOST, RESET_ON_CLOSE

from . import (
    BACKLOG,
    CHUNK,
    DRAIN,
    Failed,
    announce_port,
    announce_reset,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine


async def fin(stream: ByteStream) -> None:
    await stream.send(await stream.receive())


async def rst(stream: ByteStream) -> None:
    await stream.send(await stream.receive())
    raise Failed


async def echo(stream: ByteStream) -> None:
    async for data in stream:
        await stream.send(data)


async def download(stream: ByteStream) -> None:
    left = int(await stream.receive())
    while left > 0:
        await stream.send(CHUNK[:left])
        left -= len(CHUNK)


HANDLERS: dict[str, Callable[[ByteStream], Awaitable[None]]] = {
    "fin": fin,
    "rst": rst,
    "echo": echo,
    "download": download,
}


async def serve_rst(workload: str, *, task_status: TaskStatus[int]) -> None:
    from anyio_rst import serve_tcp

    # A handler that fails is logged with its traceback; the others log nothing.
    logging.getLogger("anyio_rst").setLevel(logging.CRITICAL)
    async with anyio.create_task_group() as tg:
        serve = partial(serve_tcp, HANDLERS[workload], host=HOST, backlog=BACKLOG)
        server = await tg.start(serve)
        task_status.started(server.port)


async def listen(
    handler: Callable[[SocketStream], Awaitable[None]], task_status: TaskStatus[int]
) -> None:
    async with await anyio.create_tcp_listener(
        local_host=HOST, backlog=BACKLOG
    ) as listener:
        task_status.started(listener.extra(SocketAttribute.local_port))
        await listener.serve(handler)


async def serve_scope(workload: str, *, task_status: TaskStatus[int]) -> None:
    from anyio_rst import connection_scope

    handler = HANDLERS[workload]

    async def in_scope(stream: SocketStream) -> None:
        try:
            async with connection_scope(stream) as conn:
                await handler(conn)
        except Failed:
            pass

    await listen(in_scope, task_status)


async def serve_plain(workload: str, *, task_status: TaskStatus[int]) -> None:
    handler = HANDLERS[workload]

    async def reset_failed(stream: SocketStream) -> None:
        async with stream:
            try:
                await handler(stream)
            except Failed:
                stream.extra(SocketAttribute.raw_socket).setsockopt(*RESET_ON_CLOSE)
            except anyio.get_cancelled_exc_class():
                stream.extra(SocketAttribute.raw_socket).setsockopt(*RESET_ON_CLOSE)
                raise

    await listen(reset_failed, task_status)


async def serve_by_hand(workload: str, *, task_status: TaskStatus[int]) -> None:
    handler = HANDLERS[workload]

    async def armed(stream: SocketStream) -> None:
        sock = stream.extra(SocketAttribute.raw_socket)
        sock.setsockopt(*RESET_ON_CLOSE)
        async with stream:
            try:
                await handler(stream)
            except Failed:
                return  # still armed, as with every other exception
            sock.setsockopt(*FIN_ON_CLOSE)
            await stream.send_eof()
            with anyio.move_on_after(DRAIN):
                try:
                    async for _ in stream:
                        pass
                except anyio.BrokenResourceError:
                    pass  # the client has reset it

    await listen(armed, task_status)


async def main(serve: Callable[..., Coroutine[Any, Any, None]], workload: str) -> None:
    async with anyio.create_task_group() as tg:
        announce_port(await tg.start(serve, workload))
        await anyio.wait_readable(sys.stdin)
        announce_reset()
        tg.cancel_scope.cancel()


def run(contender: str, loop: str, workload: str) -> None:
    serve = {
        "anyio_rst": serve_rst,
        "anyio": serve_plain,
        "scope": serve_scope,
        "by_hand": serve_by_hand,
    }
    anyio.run(main, serve[contender], workload, **loops.options(loop))
