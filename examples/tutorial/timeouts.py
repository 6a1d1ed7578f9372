"""The same, with a limit of three seconds."""

from contextlib import suppress
from functools import partial

import anyio

from anyio_rst import Connection, serve_tcp


async def total(conn: Connection) -> None:
    with anyio.fail_after(3):
        received = b"".join([chunk async for chunk in conn])
        numbers = [int(line) for line in received.splitlines()]
        await conn.send(b"%d\n" % sum(numbers))


with suppress(KeyboardInterrupt):  # Ctrl-C
    anyio.run(partial(serve_tcp, total, on_ending=print), 8000)
