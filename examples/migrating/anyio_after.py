import anyio

from anyio_rst import Connection, serve_tcp


async def greet(conn: Connection) -> None:
    name = await conn.receive()
    await conn.send(b"Hello, ")
    await conn.send(name.decode("ascii").upper().encode())


anyio.run(serve_tcp, greet, 8000)
