"""The same, with a report each second, which fails when there is nothing new."""

from contextlib import suppress
from functools import partial

import anyio

from anyio_rst import Connection, serve_tcp

INTERVAL = 1.0  # seconds


async def total(conn: Connection) -> None:
    received = bytearray()
    async with conn.create_task_group() as tg:
        tg.start_soon(report, conn, received)
        async for chunk in conn:
            received += chunk
        tg.cancel_scope.cancel()  # stopping a child is no failure
    numbers = [int(line) for line in received.splitlines()]
    await conn.send(b"%d\n" % sum(numbers))


async def report(conn: Connection, received: bytearray) -> None:
    reported = 0
    while True:
        await anyio.sleep(INTERVAL)
        lines = received.count(b"\n")
        if lines == reported:
            raise TimeoutError(f"no new line in {INTERVAL} s")
        await conn.send(b"%d lines so far\n" % lines)
        reported = lines


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):  # Ctrl-C
        anyio.run(partial(serve_tcp, total, on_ending=print), 8000)
