"""An echo server that limits each client: in number, in silence, in time.

python examples/limits.py 8000
"""

import sys
from collections import Counter
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

import anyio

from anyio_rst import Connection, Drain, serve_tcp

MAX_CONNECTIONS = 1000
MAX_PER_SOURCE = 10
IDLE = 30.0  # seconds from one request to the next
TOTAL = 600.0  # seconds for a connection
DRAIN = Drain(timeout=5.0, total=30.0)  # then, for the client to take its answer

Source = IPv4Address | IPv6Address | IPv6Network | None


class Limits:
    def __init__(self) -> None:
        self._open = Counter[Source]()

    async def admit(self, conn: Connection) -> None:
        """A preamble, so that a refused client costs no TLS handshake."""
        source = source_of(conn)
        if self._open[source] >= MAX_PER_SOURCE:
            # FIN would look as if it had been served, and the connection would drain.
            conn.abort()
            return
        self._open[source] += 1
        conn.state.source = source

    def release(self, conn: Connection) -> None:
        if hasattr(conn.state, "source"):
            self._open[conn.state.source] -= 1
            if not self._open[conn.state.source]:
                del self._open[conn.state.source]


def source_of(conn: Connection) -> Source:
    if conn.remote_address is None:
        return None
    address = ip_address(conn.remote_address[0])
    if isinstance(address, IPv4Address):
        return address
    # A client with IPv6 has a network of addresses (RFC 6177).
    return address.ipv4_mapped or IPv6Network((address.packed, 64), strict=False)


async def echo(conn: Connection) -> None:
    deadline = anyio.current_time() + TOTAL
    while True:
        left = deadline - anyio.current_time()
        with conn.idle(max(0, min(IDLE, left))) as idle:
            request = await conn.receive()
        if idle.ended:  # between requests nothing is missing: FIN
            return
        with anyio.CancelScope(deadline=deadline) as scope:
            await conn.send(request)
        if scope.cancelled_caught:
            conn.abort()
            return


async def main(port: int) -> None:
    limits = Limits()
    await serve_tcp(
        echo,
        port,
        max_connections=MAX_CONNECTIONS,
        finish_on=anyio.EndOfStream,  # the client's FIN, between two requests
        preamble=limits.admit,
        on_ending=limits.release,
        drain=DRAIN,
    )


if __name__ == "__main__":
    anyio.run(main, int(sys.argv[1]) if len(sys.argv) > 1 else 8000)
