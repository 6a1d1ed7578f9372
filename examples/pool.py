"""A pool of connections to a server that answers each line with a line.

$ python examples/line_protocol.py &
$ python examples/pool.py "EXPLAIN EPIPE" "EXPLAIN ENOTCONN"
"""

import sys

import anyio
from anyio.abc import AsyncResource
from anyio.streams.buffered import BufferedByteReceiveStream

from anyio_rst import Connection, connect_tcp, connection_scope

MAX_LINE = 512  # bytes
MAX_CONNECTIONS = 10
MAX_IDLE = 30.0  # seconds
TRIES = 3  # of an idempotent request


class Pool(AsyncResource):
    def __init__(self, host: str, port: int) -> None:
        self._address = host, port
        self._places = anyio.Semaphore(MAX_CONNECTIONS)
        self._idle: list[tuple[float, Connection]] = []
        self._is_closed = False

    async def ask(
        self, line: bytes, *, timeout: float = 10.0, idempotent: bool = False
    ) -> bytes:
        """The answer; *timeout* is for all of it, and *idempotent* allows to ask twice.

        OSError says that nothing was sent. After BrokenResourceError, IncompleteRead or
        TimeoutError the server may have done what it was asked for, or not.
        """
        tries = TRIES if idempotent else 1
        with anyio.fail_after(timeout):
            async with self._places:
                while True:
                    tries -= 1
                    conn = await self._take()
                    try:
                        answer = await exchange(conn, line + b"\r\n")
                    except (anyio.BrokenResourceError, anyio.IncompleteRead):
                        if not tries:
                            raise
                    else:
                        await self._put(conn)
                        return answer

    async def _take(self) -> Connection:
        while self._idle:
            since, conn = self._idle.pop()
            if since + MAX_IDLE > anyio.current_time() and not conn.is_stale():
                return conn
            await conn.aclose()
        if self._is_closed:
            raise anyio.ClosedResourceError
        # No drain: nothing is under way on an idle connection.
        conn = await connect_tcp(*self._address, drain=None)
        await exchange(conn, b"")  # the server's greeting
        return conn

    async def _put(self, conn: Connection) -> None:
        if self._is_closed:
            await conn.aclose()
        else:
            self._idle.append((anyio.current_time(), conn))

    async def aclose(self) -> None:
        """FIN for idle connections; a request under way is answered before that."""
        self._is_closed = True
        while self._idle:
            await self._idle.pop()[1].aclose()


async def exchange(conn: Connection, request: bytes) -> bytes:
    """One request, one answer. If it fails or is cancelled, *conn* is reset.

    So nobody who takes the connection next gets the answer that is still to come.
    """
    async with connection_scope(conn) as scope:
        await scope.send(request)
        lines = BufferedByteReceiveStream(scope)
        answer = await lines.receive_until(b"\r\n", MAX_LINE)
        if lines.buffer:
            raise ValueError("the server sent more than an answer")
        scope.detach()  # otherwise the connection would end here
        return answer


async def main() -> None:
    async with Pool("localhost", 8000) as pool:
        for line in sys.argv[1:]:
            print((await pool.ask(line.encode(), idempotent=True)).decode())


if __name__ == "__main__":
    anyio.run(main)
