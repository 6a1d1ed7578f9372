import logging

import trio

from anyio_rst import trio_streams


@trio_streams.scoped
async def greet(stream: trio.SocketStream) -> None:
    name = await stream.receive_some()
    await stream.send_all(b"Hello, ")
    await stream.send_all(name.decode("ascii").upper().encode())


async def serve_one(stream: trio.SocketStream) -> None:
    try:
        await greet(stream)
    except Exception:  # it would end the server
        logging.exception("a handler failed")


trio.run(trio.serve_tcp, serve_one, 8000)
