"""A server that dies: `python dying.py LOOP KIND DEATH`, for test_process_death.py.

It prints its port, waits for `REQUEST` on the one connection it gets, sends `HALF`, and
then dies. (With nothing to wait for it could die before the peer's connect() returns.)
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import resource
import signal
import sys
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import trio
from anyio.abc import ByteStream, SocketAttribute

from anyio_rst import Connection, connection_scope, serve_tcp

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

REQUEST = b"?"
HALF = b"half"
LOCALHOST = "127.0.0.1"


class Failure(Exception):
    pass


class Announcement:
    """A `task_status` that prints the port of what has started."""

    def started(self, value: Any = None) -> None:
        # A Server, or the listeners of Trio.
        announce(value[0].socket.getsockname()[1] if type(value) is list else value.port)


def announce(port: int) -> None:
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()


def die(death: str) -> None:
    """Every death has an exit status of its own. Some are up to main()."""
    if death == "os._exit":
        os._exit(7)
    elif death == "SIGKILL":
        os.kill(os.getpid(), signal.SIGKILL)
    elif death == "SIGSEGV":
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        ctypes.string_at(0)
    elif death == "sys.exit":
        sys.exit(5)
    elif death == "KeyboardInterrupt":
        raise KeyboardInterrupt
    elif death == "exception":
        raise Failure


async def serve(kind: str, death: str, half_sent: anyio.Event) -> None:
    async def handler(stream: ByteStream) -> None:
        assert await stream.receive() == REQUEST
        await stream.send(HALF)
        half_sent.set()
        die(death)
        await anyio.sleep_forever()

    async def in_scope(stream: Any) -> None:
        async with connection_scope(stream) as conn:
            await handler(conn)

    if kind == "native":
        await serve_tcp(
            handler, host=LOCALHOST, propagate_errors=True, task_status=Announcement()
        )
    elif kind == "trio":
        await trio.serve_tcp(in_scope, 0, host=LOCALHOST, task_status=Announcement())
    else:
        async with await anyio.create_tcp_listener(local_host=LOCALHOST) as listener:
            announce(listener.extra(SocketAttribute.local_port))
            await listener.serve(in_scope if kind == "foreign" else handler)


async def return_from_main(kind: str) -> None:
    """Return while the server runs, in a task that nobody waits for."""
    half_sent = anyio.Event()
    if anyio.get_cancelled_exc_class() is asyncio.CancelledError:
        task = asyncio.ensure_future(serve(kind, "", half_sent))
        await half_sent.wait()
        assert not task.done()
    else:
        trio.lowlevel.spawn_system_task(serve, kind, "", half_sent)
        await half_sent.wait()


async def forget(kind: str) -> None:
    """Enter a scope by hand, forget all about it, and go on living."""
    stream = await accept(kind)
    conn = await connection_scope(stream).__aenter__()
    assert await conn.receive() == REQUEST
    # What asyncio's loop is reading is no garbage: the loop holds it. AnyIO lets it read
    # an accepted stream until a receive() has waited.
    with anyio.move_on_after(0):
        await conn.receive()
    await conn.send(HALF)
    del stream, conn
    gc.collect()
    await anyio.to_thread.run_sync(sys.stdin.read)


async def accept(kind: str) -> Any:
    if kind == "native":
        detached: list[Any] = []

        async def handler(conn: Connection) -> None:
            detached.append(conn.detach())
            server.stop()

        async with anyio.create_task_group() as tg:
            server = await tg.start(partial(serve_tcp, handler, host=LOCALHOST))
            announce(server.port)
        return detached.pop()
    if kind == "trio":
        listeners: list[Any] = await trio.open_tcp_listeners(0, host=LOCALHOST)
        announce(listeners[0].socket.getsockname()[1])
    else:
        bound = await anyio.create_tcp_listener(local_host=LOCALHOST)
        listeners = list(bound.listeners)
        announce(bound.extra(SocketAttribute.local_port))
    async with listeners[0]:
        return await listeners[0].accept()


async def main(kind: str, death: str) -> None:
    if death == "return from main":
        await return_from_main(kind)
    elif death == "forgotten":
        await forget(kind)
    else:
        await serve(kind, death, anyio.Event())


def run(loop: str, kind: str, death: str) -> None:
    try:
        if loop == "trio":
            trio.run(main, kind, death)
        else:
            options = {"use_uvloop": loop == "uvloop"}
            anyio.run(main, kind, death, backend_options=options)
    except BaseExceptionGroup as group:
        # The exit status of a group is 1, whatever is in it.
        exc: BaseException = group
        while isinstance(exc, BaseExceptionGroup):
            (exc,) = exc.exceptions
        raise exc from None


if __name__ == "__main__":
    run(*sys.argv[1:])
