import logging

import anyio
from anyio.abc import SocketStream


async def greet(stream: SocketStream) -> None:
    try:
        async with stream:
            name = await stream.receive()
            await stream.send(b"Hello, ")
            await stream.send(name.decode("ascii").upper().encode())
    except Exception:  # it would end the server
        logging.exception("a handler failed")


async def main() -> None:
    listener = await anyio.create_tcp_listener(local_port=8000)
    await listener.serve(greet)


anyio.run(main)
