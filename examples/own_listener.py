"""AnyIO's own listener, and a scope around each of its streams."""

import logging

import anyio
from anyio.abc import SocketStream

from anyio_rst import Connection, connection_scope


async def greet(conn: Connection) -> None:
    name = await conn.receive()
    await conn.send(b"Hello, ")
    await conn.send(name.decode("ascii").upper().encode())


async def serve_one(stream: SocketStream) -> None:
    try:
        async with connection_scope(stream) as conn:
            await greet(conn)
    except Exception:  # out here, where the connection has been reset
        logging.exception("a handler failed")


async def main() -> None:
    async with await anyio.create_tcp_listener(local_port=8000) as listener:
        await listener.serve(serve_one)


anyio.run(main)
