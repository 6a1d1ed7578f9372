"""A greeting over TLS: python tls_server.py server.pem, a certificate and its key."""

import ssl
import sys
from functools import partial

import anyio

from anyio_rst import Connection, serve_tcp


async def greet(conn: Connection) -> None:
    name = await conn.receive()
    await conn.send(b"Hello, ")
    await conn.send(name.decode("ascii").upper().encode())  # "Zoë": half an answer


def main() -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(sys.argv[1])
    anyio.run(partial(serve_tcp, greet, 8000, ssl_context=context))


if __name__ == "__main__":
    main()
