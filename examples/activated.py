"""An echo server on the sockets that systemd has opened: sd_listen_fds(3)."""

import os
import socket
from functools import partial

import anyio

from anyio_rst import Connection, serve_tcp


def activated() -> list[socket.socket]:
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        raise SystemExit("not started by systemd")
    count = int(os.environ["LISTEN_FDS"])
    return [socket.socket(fileno=fd) for fd in range(3, 3 + count)]


async def echo(conn: Connection) -> None:
    async for chunk in conn:
        await conn.send(chunk)


anyio.run(partial(serve_tcp, echo, sockets=activated()))
