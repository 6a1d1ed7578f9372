"""A server for test_serve_processes.py: `python serving_process.py LOOP MODE [ARGUMENT]`.

It prints the ports it serves. Each connection gets the number of this process, one line,
and then an echo.
"""

from __future__ import annotations

import logging
import os
import resource
import socket
import sys
from typing import Any

import anyio

from anyio_rst import Connection, Server, serve_tcp

LOCALHOST = "127.0.0.1"


class Announcement:
    """A `task_status` that prints the ports."""

    def started(self, value: Any = None) -> None:
        assert isinstance(value, Server)
        sys.stdout.write(" ".join(str(port) for _, port in value.addresses) + "\n")
        sys.stdout.flush()


async def handler(conn: Connection) -> None:
    await conn.send(f"{os.getpid()}\n".encode())
    async for chunk in conn:
        await conn.send(chunk)


async def serve(mode: str, argument: str) -> None:
    options: dict[str, Any]
    if mode == "inherited":  # one at a time, so the next has to go to the other process
        inherited = socket.socket(fileno=int(argument))
        options = {"sockets": [inherited], "max_connections": 1}
    elif mode == "reuse_port":
        options = {"host": LOCALHOST, "port": int(argument), "reuse_port": True}
    else:
        assert mode == "few descriptors"
        listeners = [socket.create_server((LOCALHOST, 0), backlog=200) for _ in "12"]
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(argument), int(argument)))
        options = {"sockets": listeners}
    await serve_tcp(handler, task_status=Announcement(), **options)


if __name__ == "__main__":
    loop, mode, argument = sys.argv[1:]
    logging.basicConfig(format="%(created)f %(levelname)s %(message)s")
    anyio.run(
        serve,
        mode,
        argument,
        backend="trio" if loop == "trio" else "asyncio",
        backend_options={"use_uvloop": True} if loop == "uvloop" else {},
    )
