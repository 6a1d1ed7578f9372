"""Add up numbers, with the server's help."""

import sys

import anyio

from anyio_rst import connect_tcp


async def main() -> None:
    async with connect_tcp("127.0.0.1", 8000) as conn:
        for word in sys.argv[1:]:
            await conn.send(b"%d\n" % int(word))
        await conn.send_eof()  # FIN: no more numbers
        answer = b"".join([chunk async for chunk in conn])
        print("the total is", int(answer))


anyio.run(main)
