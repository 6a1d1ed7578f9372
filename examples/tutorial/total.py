"""Add up numbers, one per line. The client's FIN says that there are no more."""

from contextlib import suppress
from functools import partial

import anyio

from anyio_rst import Connection, serve_tcp


async def total(conn: Connection) -> None:
    received = b"".join([chunk async for chunk in conn])
    numbers = [int(line) for line in received.splitlines()]
    await conn.send(b"%d\n" % sum(numbers))


with suppress(KeyboardInterrupt):  # Ctrl-C
    anyio.run(partial(serve_tcp, total, on_ending=print), 8000)
