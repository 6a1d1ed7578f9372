"""An echo server that ends gracefully on SIGTERM and Ctrl-C."""

import signal

import anyio

from anyio_rst import Connection, serve_tcp

GRACE = 10.0  # seconds


async def echo(conn: Connection) -> None:
    async for chunk in conn:
        await conn.send(chunk)


async def main() -> None:
    # Opened before the port, so that no signal comes too early.
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with anyio.create_task_group() as tg:
            server = await tg.start(serve_tcp, echo, 8000)
            print("serving on", server.port, flush=True)
            async for _ in signals:
                break
            server.stop()  # no new connections; open ones may finish: FIN
            tg.cancel_scope.deadline = anyio.current_time() + GRACE  # and then: RST


anyio.run(main)
