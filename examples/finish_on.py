"""Answers lines in capitals. `quit` ends a session, from deep inside."""

from functools import partial

import anyio
from anyio.streams.buffered import BufferedByteReceiveStream

from anyio_rst import Connection, serve_tcp


class Quit(Exception):
    """The client said goodbye."""


async def shout(conn: Connection) -> None:
    lines = BufferedByteReceiveStream(conn)
    while True:
        await answer(conn, await lines.receive_until(b"\n", 100))


async def answer(conn: Connection, line: bytes) -> None:
    if line == b"quit":
        await conn.send(b"BYE\n")
        raise Quit
    await conn.send(line.decode("ascii").upper().encode() + b"\n")


anyio.run(partial(serve_tcp, shout, finish_on=Quit), 8000)
