from contextlib import suppress

import anyio

from anyio_rst import Connection, serve_tcp


async def echo(conn: Connection) -> None:
    async for chunk in conn:  # until the client's FIN
        await conn.send(chunk)


with suppress(KeyboardInterrupt):  # Ctrl-C
    anyio.run(serve_tcp, echo, 8000)
