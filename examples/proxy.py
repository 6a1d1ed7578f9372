"""A TCP proxy that passes the endings on: FIN as FIN, each way by itself, and RST as RST.

python examples/proxy.py 8001 localhost 8000
"""

import sys
from functools import partial

import anyio

from anyio_rst import Connection, connect_tcp, serve_tcp


async def proxy(host: str, port: int, client: Connection) -> None:
    # Whatever fails here leaves both scopes: a reset for either side. That is also so if
    # there is no connection to the server to be had.
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
