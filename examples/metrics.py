"""An echo server with metrics for Prometheus, on a port of their own.

python examples/metrics.py 8000 9000
"""

import sys
from functools import partial

import anyio
from prometheus_client import Counter, Gauge, Histogram, start_http_server

from anyio_rst import Connection, serve_tcp

OPEN = Gauge("tcp_connections_open", "Connections open now, drains included.")
ENDINGS = Counter("tcp_endings", "How connections ended, and why.", ["kind", "cause"])
RECEIVED = Counter("tcp_received_bytes", "Of the application, so after decryption.")
SENT = Counter("tcp_sent_bytes", "Of the application, so before encryption.")
DURATION = Histogram(
    "tcp_connection_seconds",
    "From accept() to the end.",
    buckets=(0.001, 0.01, 0.1, 1, 10, 100, 1000, 10000),
)


def count(conn: Connection) -> None:
    ending = conn.ending
    assert ending is not None  # on_ending is called once it has ended
    ENDINGS.labels(ending.kind.value, ending.cause.value).inc()
    RECEIVED.inc(ending.received)
    SENT.inc(ending.sent)
    DURATION.observe(ending.duration)


async def echo(conn: Connection) -> None:
    async for chunk in conn:
        await conn.send(chunk)


async def main(port: int, metrics_port: int) -> None:
    async with anyio.create_task_group() as tg:
        server = await tg.start(partial(serve_tcp, echo, port, on_ending=count))
        OPEN.set_function(lambda: server.statistics().open_connections)
        # In its own thread, which answers even when the event loop does not.
        start_http_server(metrics_port, addr="127.0.0.1")


if __name__ == "__main__":
    port, metrics_port = sys.argv[1:] or ("8000", "9000")
    anyio.run(main, int(port), int(metrics_port))
