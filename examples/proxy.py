"""A TCP proxy that passes endings on: FIN as FIN, in each direction, and RST as RST.

python examples/proxy.py 8001 localhost 8000
"""

import sys
from functools import partial

import anyio

from anyio_rst import Connection, connect_tcp, serve_tcp


async def proxy(host: str, port: int, client: Connection) -> None:
    # A failure here leaves both scopes, which resets both sides. If there is no
    # connection to the server, it resets the client.
    async with connect_tcp(host, port) as server, anyio.create_task_group() as tg:
        tg.start_soon(pump, client, server)
        tg.start_soon(pump, server, client)


async def pump(source: Connection, sink: Connection) -> None:
    async for chunk in source:  # no faster than the sink takes it
        await sink.send(chunk)
    await sink.send_eof()


if __name__ == "__main__":
    listen, host, port = sys.argv[1:] or ("8001", "localhost", "8000")
    anyio.run(serve_tcp, partial(proxy, host, int(port)), int(listen))
