"""A line protocol that says what the error codes of the system mean.

    $ python examples/line_protocol.py
    $ nc localhost 8000
    +OK ready
    EXPLAIN ECONNRESET
    +OK Connection reset by peer
    QUIT
    +OK bye

For STARTTLS it needs a certificate: python examples/line_protocol.py 8000 cert.pem
"""

import errno
import os
import ssl
import sys
from functools import partial

import anyio
from anyio.streams.buffered import BufferedByteReceiveStream

from anyio_rst import Connection, serve_tcp

MAX_LINE = 512  # bytes, including the end of the line (RFC 5321, 4.5.3.1.4)
MAX_REQUESTS = 1000  # on one connection
MAX_CONNECTIONS = 100
PATIENCE = 60.0  # seconds, for a request, for taking an answer, for a handshake


class Goodbye(Exception):
    """A last line, after which the connection ends cleanly: FIN."""


class Violation(Exception):
    """Cannot be answered, because what follows cannot be trusted: RST."""


async def serve_lines(conn: Connection, tls: ssl.SSLContext | None = None) -> None:
    lines = BufferedByteReceiveStream(conn)
    secure = False
    await send_line(conn, "+OK ready")
    try:
        for _ in range(MAX_REQUESTS):
            line = await receive_line(lines)
            if line is None:
                return  # the client's FIN
            match line.upper().split():
                case [b"EXPLAIN", name]:
                    await send_line(conn, explain(name.decode("ascii", "replace")))
                case [b"STARTTLS"] if tls is not None and not secure:
                    await start_tls(conn, lines, tls)
                    secure = True
                case [b"QUIT"]:
                    raise Goodbye("+OK bye")
                case _:
                    await send_line(conn, "-ERR EXPLAIN name, STARTTLS or QUIT")
        raise Goodbye("-BYE too many requests")
    except Goodbye as goodbye:
        await send_line(conn, str(goodbye))


def explain(name: str) -> str:
    code = getattr(errno, name, None)
    return f"+OK {os.strerror(code)}" if isinstance(code, int) else "-ERR unknown"


async def receive_line(lines: BufferedByteReceiveStream) -> bytes | None:
    """The next line, or None for a FIN between two lines."""
    try:
        with anyio.fail_after(PATIENCE):
            line = await lines.receive_until(b"\n", MAX_LINE)
    except TimeoutError:
        raise Goodbye("-BYE too slow") from None
    except anyio.DelimiterNotFound:
        raise Goodbye("-BYE line too long") from None
    except anyio.IncompleteRead:
        if lines.buffer:
            raise Violation("FIN in the middle of a line") from None
        return None
    if len(line) >= MAX_LINE:  # it came in one piece
        raise Goodbye("-BYE line too long")
    return line


async def send_line(conn: Connection, line: str) -> None:
    with anyio.fail_after(PATIENCE):  # a client that takes no answers: RST
        await conn.send(line.encode("ascii") + b"\r\n")


async def start_tls(
    conn: Connection, lines: BufferedByteReceiveStream, tls: ssl.SSLContext
) -> None:
    # Otherwise it would be executed after the handshake, as if TLS had protected it
    # (CVE-2011-0411). Plaintext that is still on its way breaks the handshake.
    if lines.buffer:
        raise Violation("plaintext behind STARTTLS")
    await send_line(conn, "+OK go ahead")
    with anyio.fail_after(PATIENCE):
        await conn.start_tls(tls, server_side=True)


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
    tls = None
    if len(sys.argv) > 2:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(sys.argv[2])
    serve = partial(serve_tcp, max_connections=MAX_CONNECTIONS)
    anyio.run(serve, partial(serve_lines, tls=tls), port)
