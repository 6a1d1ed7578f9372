"""Trio's own server, with a handler of `Connection`."""

import logging

import trio

from anyio_rst import Connection, scoped


@scoped  # from here on a function of a stream
async def greet(conn: Connection) -> None:
    name = await conn.receive()
    await conn.send(b"Hello, ")
    await conn.send(name.decode("ascii").upper().encode())


async def serve_one(stream: trio.SocketStream) -> None:
    try:
        await greet(stream)
    except Exception:
        logging.exception("a handler failed")


trio.run(trio.serve_tcp, serve_one, 8000)
