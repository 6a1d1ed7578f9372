import logging

import trio


async def greet(stream: trio.SocketStream) -> None:
    try:
        name = await stream.receive_some()
        await stream.send_all(b"Hello, ")
        await stream.send_all(name.decode("ascii").upper().encode())
    except Exception:  # it would end the server
        logging.exception("a handler failed")


trio.run(trio.serve_tcp, greet, 8000)
