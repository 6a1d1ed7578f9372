"""The same with OpenTelemetry, if the program has set it up: `on_ending=count`."""

from opentelemetry import metrics
from opentelemetry.metrics import Observation

from anyio_rst import Connection, Server

meter = metrics.get_meter("echo")
endings = meter.create_counter("tcp.endings")
size = meter.create_counter("tcp.io", unit="By")
duration = meter.create_histogram("tcp.connection.duration", unit="s")


def count(conn: Connection) -> None:
    ending = conn.ending
    assert ending is not None
    endings.add(1, {"kind": ending.kind.value, "cause": ending.cause.value})
    size.add(ending.received, {"direction": "received"})
    size.add(ending.sent, {"direction": "sent"})
    duration.record(ending.duration)


def observe(server: Server) -> None:
    meter.create_observable_up_down_counter(
        "tcp.connections.open",
        [lambda _: [Observation(server.statistics().open_connections)]],
    )
