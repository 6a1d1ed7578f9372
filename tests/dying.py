"""A server that dies: `python dying.py LOOP KIND DEATH`, for test_process_death.py.

It prints its port, sends `HALF` to its first connection, and then dies.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import resource
import signal
import sys
from typing import Any

import anyio
import anyio.abc
import anyio.to_thread

from anyio_rst import Connection, connection_scope, serve_tcp

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

HALF = b"half"

LOCALHOST = "127.0.0.1"


class Failure(Exception):
    pass


def die(death: str) -> None:
    """Does not return. Whatever ends the process, these give it different exit codes."""
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


class Program:
    def __init__(self, kind: str, death: str) -> None:
        self.kind = kind
        self.death = death
        self.half_sent = anyio.Event()

    async def handle(self, stream: anyio.abc.ByteStream) -> None:
        await stream.send(HALF)
        die(self.death)
        self.half_sent.set()
        await anyio.sleep_forever()

    async def handle_in_scope(self, stream: Any) -> None:
        async with connection_scope(stream) as conn:
            await self.handle(conn)

    async def serve(self) -> None:
        if self.kind == "native":
            await serve_tcp(
                self.handle, host=LOCALHOST, propagate_errors=True, task_status=Announce()
            )
        elif self.kind == "trio":
            import trio

            await trio.serve_tcp(
                self.handle_in_scope, 0, host=LOCALHOST, task_status=Announce()
            )
        else:
            listener = await anyio.create_tcp_listener(local_host=LOCALHOST)
            async with listener:
                announce(listener.extra(anyio.abc.SocketAttribute.local_port))
                await listener.serve(
                    self.handle_in_scope if self.kind == "foreign" else self.handle
                )

    async def return_from_main(self) -> None:
        """Return while the server still runs, in a task that nobody waits for."""
        if asyncio_is_running():
            task = asyncio.ensure_future(self.serve())
            await self.half_sent.wait()
            del task
        else:
            import trio

            trio.lowlevel.spawn_system_task(self.serve)
            await self.half_sent.wait()

    async def forget(self) -> None:
        """Enter a scope by hand, forget everything about it, and live on."""
        stream = await self.accept_one()
        conn = await connection_scope(stream).__aenter__()
        # An accepted stream of asyncio belongs to the loop until its first receive().
        assert await conn.receive() == b"?"
        await conn.send(HALF)
        del stream, conn
        gc.collect()
        await anyio.to_thread.run_sync(sys.stdin.read)

    async def accept_one(self) -> Any:
        if self.kind == "native":
            # Not forgotten by serve_tcp() before it is detached.
            detached: list[Any] = []

            async def detach(conn: Connection) -> None:
                detached.append(conn.detach())
                server.stop()

            async with anyio.create_task_group() as tg:
                server = await tg.start(serve_here, detach)
            return detached.pop()
        if self.kind == "trio":
            import trio

            (trio_listener,) = await trio.open_tcp_listeners(0, host=LOCALHOST)
            async with trio_listener:
                announce(trio_listener.socket.getsockname()[1])
                return await trio_listener.accept()
        multi_listener = await anyio.create_tcp_listener(local_host=LOCALHOST)
        async with multi_listener:
            (listener,) = multi_listener.listeners
            announce(listener.extra(anyio.abc.SocketAttribute.local_port))
            return await listener.accept()

    async def main(self) -> None:
        if self.death == "return from main":
            await self.return_from_main()
        elif self.death == "forgotten":
            await self.forget()
        else:
            await self.serve()


