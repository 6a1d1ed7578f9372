"""An echo server on the sockets that systemd has opened (sd_listen_fds(3)).

SIGTERM ends it gracefully, and the next process serves the clients that wait meanwhile.
"""

import os
import signal
import socket
from functools import partial

import anyio

from anyio_rst import Connection, serve_tcp

FIRST, KEEP_ALIVE = 10.0, 30.0  # seconds, for the first line and for the next
GRACE = 10.0  # seconds


def activated() -> list[socket.socket]:
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        raise SystemExit("not started by systemd")
    count = int(os.environ["LISTEN_FDS"])
    return [socket.socket(fileno=fd) for fd in range(3, 3 + count)]


async def echo(conn: Connection) -> None:
    line = b""
    with anyio.move_on_after(FIRST):  # it is on its way, so this is not idle
        line = await anext(conn, b"")
    while line:
        while not line.endswith(b"\n"):
            line += await conn.receive()
        await conn.send(line)
        with conn.idle(KEEP_ALIVE) as idle:
            line = await anext(conn, b"")
        if idle.ended:
            return


async def main() -> None:
    sockets = activated()
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with anyio.create_task_group() as tg:
            server = await tg.start(partial(serve_tcp, echo, sockets=sockets))
            async for _ in signals:
                break
            server.stop()  # from here on the backlog is for the next process
            tg.cancel_scope.deadline = anyio.current_time() + GRACE


anyio.run(main)
