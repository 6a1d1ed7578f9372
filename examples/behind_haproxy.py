"""A server behind HAProxy or nginx that knows its clients: the PROXY protocol, 1 and 2.

python examples/behind_haproxy.py 8000 cert.pem
"""

import ssl
import sys
from functools import partial

import anyio
from proxyprotocol import ProxyProtocolIncompleteError
from proxyprotocol.detect import ProxyProtocolDetect
from proxyprotocol.result import ProxyResult, is_ipv4, is_ipv6

from anyio_rst import Connection, serve_tcp

# Bytes of a header: of version 1 by the specification, of version 2 as for nginx.
MAX_LINE = 107
MAX_HEADER = 4096

parser = ProxyProtocolDetect()


async def proxy_header(conn: Connection) -> None:
    """Read the header of the balancer, which comes before the client's first byte."""
    try:
        result = await read_header(conn)
    except anyio.EndOfStream:  # a health check that only connects
        await conn.aclose()
        return
    if is_ipv4(result) or is_ipv6(result):  # otherwise it is the balancer itself
        host, port = result.source
        conn.remote_address = str(host), port


async def read_header(conn: Connection) -> ProxyResult:
    header = b""
    while True:
        try:
            return parser.unpack(header)
        except ProxyProtocolIncompleteError as exc:
            want = exc.want_read
        # Read the line byte by byte, because TLS may follow it.
        size = 1 if want.want_bytes is None else want.want_bytes
        if len(header) + size > (MAX_LINE if want.want_line else MAX_HEADER):
            raise ValueError("the header is too long")
        try:
            header += await conn.receive(size)
        except anyio.EndOfStream:
            if header:
                raise ValueError("the header is cut short") from None
            raise


async def echo(conn: Connection) -> None:
    async for chunk in conn:
        await conn.send(b"%a: %b" % (conn.remote_address, chunk))


async def main(port: int, certificate: str | None = None) -> None:
    context = None
    if certificate is not None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate)
    # For the balancer alone: other clients could claim any address.
    host = "127.0.0.1"
    await serve_tcp(echo, port, host=host, preamble=proxy_header, ssl_context=context)


if __name__ == "__main__":
    _, port, *certificate = sys.argv
    anyio.run(partial(main, int(port), *certificate))
