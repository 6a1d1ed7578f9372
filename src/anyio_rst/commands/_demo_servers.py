"""The servers of the demo: each a process, whose handler takes one way out."""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
from anyio.abc import SocketAttribute, SocketStream

from anyio_rst._serve import serve_tcp

from ._demo_cases import HTTP_WAYS, WAYS
from ._demo_processes import HERE, running, say

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from anyio.abc import TaskStatus

    from anyio_rst._connection import Connection

    from ._demo_cases import Handler, Way
    from ._demo_processes import Process

# AnyIO's name of the backend, and its options, for each --loop.
LOOPS: dict[str, tuple[str, dict[str, Any]]] = {
    "asyncio": ("asyncio", {"use_uvloop": False}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}

LOOPBACK = "127.0.0.1"

# Clients that are there before the one that is looked at: what a kernel does with the
# first connection of a server need not be what it does with the others.
VISITORS = 2


async def serve_plainly(handler: Handler, *, task_status: TaskStatus[int]) -> None:
    """Serve as one does with AnyIO alone."""

    async def serve_one(stream: SocketStream) -> None:
        with suppress(Exception):  # it costs one connection, as with serve_tcp()
            async with stream:
                await handler(stream)
        say_closed()

    async with await anyio.create_tcp_listener(local_host=LOOPBACK) as listener:
        task_status.started(listener.extra(SocketAttribute.local_port))
        await listener.serve(serve_one)


async def serve_truthfully(handler: Handler, *, task_status: TaskStatus[int]) -> None:
    """Serve with anyio_rst."""
    async with anyio.create_task_group() as tg:
        server = await tg.start(
            partial(serve_tcp, handler, host=LOOPBACK, on_ending=say_closed)
        )
        task_status.started(server.port)


def say_closed(_: Connection | None = None) -> None:
    say("closed")


PLAIN = "plain AnyIO"
OURS = "anyio_rst"
SIDES = {PLAIN: serve_plainly, OURS: serve_truthfully}


def serve(loop: str, side: str, way: str) -> None:
    """What the process of a server runs: print its port, then serve *way*."""
    way_out = next(each.handler for each in (*WAYS, *HTTP_WAYS) if each.name == way)

    visits = iter(range(VISITORS))

    async def handler(stream: SocketStream) -> None:
        if next(visits, None) is not None:
            async for greeting in stream:
                await stream.send(greeting)
            return
        # With no request to wait for, an RST could be there before the connect() of
        # the client has returned, and make that fail.
        await stream.receive()
        await way_out(stream)

    backend, options = LOOPS[loop]
    anyio.run(
        serve_until_sigterm, side, handler, backend=backend, backend_options=options
    )


async def serve_until_sigterm(side: str, handler: Handler) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM) as signals:
        async with AsyncExitStack() as visits, anyio.create_task_group() as tg:
            port = await tg.start(SIDES[side], handler)
            for _ in range(VISITORS):
                await visit(port, visits)
            say(str(port))
            await anext(signals)
            tg.cancel_scope.cancel()


async def visit(port: int, visits: AsyncExitStack) -> None:
    """Be one more client, and stay until the end of *visits*."""
    stream = await anyio.connect_tcp(LOOPBACK, port)
    await visits.enter_async_context(stream)
    await stream.send(b"?")
    await stream.receive()  # so it is there


def answer_the_demo() -> None:
    """Say that this process lives, for as long as the demo does, that may be killed."""
    while os.read(0, 1):
        say(HERE)
    os._exit(1)


def running_server(loop: str, side: str, way: Way) -> AbstractContextManager[Process]:
    """A process in which one side serves *way*. It is killed at the end.

    What it says of the failures, which are deliberate, stays in a pipe.
    """
    return running([sys.executable, "-m", __name__, loop, side, way.name])


if __name__ == "__main__":
    threading.Thread(target=answer_the_demo, daemon=True).start()
    serve(*sys.argv[1:])
