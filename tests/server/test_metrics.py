"""examples/metrics.py, scraped as Prometheus does, and the same by OpenTelemetry."""

from __future__ import annotations

import importlib
import socket
import struct
import time
import urllib.request
from functools import partial
from typing import Any

import anyio
import pytest
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client.parser import text_string_to_metric_families
from test_readme import connect, free_port
from test_serve_processes import echoes, example, finish, loops, running

from anyio_rst import Connection, Server, serve_tcp

import metrics_opentelemetry
from serving import LONG, Peer

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(port: int) -> Samples:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(f"http://127.0.0.1:{port}/metrics", timeout=LONG) as answer:
        text = answer.read().decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def of(samples: Samples, name: str, **labels: str) -> float | None:
    return samples.get((name, frozenset(labels.items())))


@loops
def test_prometheus_is_told(loop: str) -> None:
    port, metrics_port = free_port(), free_port()
    command = [*example("metrics.py", loop), str(port), str(metrics_port)]
    with running(command) as process:
        first = connect(port, process)
        connect(metrics_port, process).close()
        echoes(first, b"hello")
        assert of(scrape(metrics_port), "tcp_connections_open") == 1
        finish(first)
        with connect(port, process) as second, connect(port, process) as third:
            echoes(second, b"hello again")
            echoes(third, b"still here")
            reset = struct.pack("ii", 1, 0)
            second.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            second.close()
            samples = scrape(metrics_port)
            deadline = time.monotonic() + LONG
            while of(samples, "tcp_connection_seconds_count") == 1:
                assert time.monotonic() < deadline
                samples = scrape(metrics_port)
    assert of(samples, "tcp_connections_open") == 1
    assert of(samples, "tcp_endings_total", kind="FIN", cause="RETURNED") == 1
    assert of(samples, "tcp_endings_total", kind="RST", cause="RAISED") == 1
    # Of those that have ended.
    assert of(samples, "tcp_received_bytes_total") == 5 + 11
    assert of(samples, "tcp_sent_bytes_total") == 5 + 11
    assert of(samples, "tcp_connection_seconds_bucket", le="10000.0") == 2
    seconds = of(samples, "tcp_connection_seconds_sum")
    assert seconds is not None
    assert 0 < seconds < LONG


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> InMemoryMetricReader:
    """Of a provider of the test's own: that of the process can be set only once."""
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader], shutdown_on_exit=False)
    monkeypatch.setattr(metrics, "get_meter", provider.get_meter)
    importlib.reload(metrics_opentelemetry)
    return reader


def collected(
    reader: InMemoryMetricReader,
) -> dict[tuple[str, frozenset[tuple[str, Any]]], Any]:
    data = reader.get_metrics_data()
    assert data is not None
    return {
        (metric.name, frozenset((point.attributes or {}).items())): point
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        for point in metric.data.data_points
    }


@pytest.mark.anyio
async def test_opentelemetry_is_told(
    anyio_backend: Any, reader: InMemoryMetricReader
) -> None:
    over = anyio.Event()

    def on_ending(conn: Connection) -> None:
        metrics_opentelemetry.count(conn)
        over.set()

    async def echo(conn: Connection) -> None:
        async for chunk in conn:
            await conn.send(chunk)

    async with anyio.create_task_group() as tg:
        serve = partial(serve_tcp, echo, host="127.0.0.1", on_ending=on_ending)
        server: Server = await tg.start(serve)
        metrics_opentelemetry.observe(server)
        with Peer(server.port) as peer, Peer(server.port) as other:
            for one in (peer, other):
                await one.send(b"hello")
                assert await one.receive(5) == b"hello"
            peer.send_eof()
            await peer.read_to_end()
            await over.wait()
            points = collected(reader)
        tg.cancel_scope.cancel()

    def point(name: str, **labels: str) -> Any:
        return points[name, frozenset(labels.items())]

    assert point("tcp.endings", kind="FIN", cause="RETURNED").value == 1
    assert point("tcp.io", direction="received").value == 5
    assert point("tcp.io", direction="sent").value == 5
    assert point("tcp.connection.duration").count == 1
    assert 0 < point("tcp.connection.duration").sum < LONG
    assert point("tcp.connections.open").value == 1
