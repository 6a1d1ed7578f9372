"""Downloads over HTTP/1.1 whose length is not known in advance.

curl http://localhost:8000/1/1000     a table of 1/n, all of it
curl http://localhost:8000/-500/500   fails half way, where n is 0
"""

import re
import sys
from http import HTTPStatus

import anyio
import h11

from anyio_rst import Connection, serve_tcp

TIMEOUT = 10.0  # seconds for a request to arrive
ROWS = 100  # in one send()

# With no length, the end of the connection is the end of the body (RFC 9112, 6.3). h11
# would send chunks to a client of HTTP/1.1, so it does not write this response.
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n"


async def download(conn: Connection) -> None:
    http = h11.Connection(h11.SERVER)
    try:
        with anyio.fail_after(TIMEOUT):
            request = await next_event(conn, http)
    except h11.RemoteProtocolError as exc:
        await refuse(conn, http, HTTPStatus(exc.error_status_hint))
    except TimeoutError:
        await refuse(conn, http, HTTPStatus.REQUEST_TIMEOUT)
    else:
        if isinstance(request, h11.Request):  # otherwise the client asked for nothing
            await answer(conn, http, request)


async def answer(conn: Connection, http: h11.Connection, request: h11.Request) -> None:
    numbers = re.fullmatch(rb"/(-?\d{1,6})/(-?\d{1,6})", request.target)
    if request.method != b"GET":
        await refuse(conn, http, HTTPStatus.NOT_IMPLEMENTED)
    elif numbers is None:
        await refuse(conn, http, HTTPStatus.NOT_FOUND)
    else:
        first, last = map(int, numbers.groups())
        await conn.send(HEAD)
        for start in range(first, last + 1, ROWS):
            await conn.send(table(start, min(start + ROWS, last + 1)))


async def next_event(conn: Connection, http: h11.Connection) -> object:
    while (event := http.next_event()) is h11.NEED_DATA:
        try:
            http.receive_data(await conn.receive())
        except anyio.EndOfStream:
            http.receive_data(b"")
    return event


async def refuse(conn: Connection, http: h11.Connection, status: HTTPStatus) -> None:
    """An error is a complete answer, too: the handler returns, so FIN."""
    response = h11.Response(
        status_code=status,
        reason=status.phrase,
        headers=[("Content-Length", "0"), ("Connection", "close")],
    )
    await conn.send(http.send(response) or b"")


def table(start: int, stop: int) -> bytes:
    return b"".join(b"%d %.6f\n" % (n, 1 / n) for n in range(start, stop))


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
    anyio.run(serve_tcp, download, port)
