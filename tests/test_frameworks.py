"""docs/frameworks.md: uvicorn, hypercorn and aiohttp, judged by curl, httpx and sockets.

The applications are in asgi_cases.py; they run in the real servers, as processes.
"""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import trustme
from test_download import needs
from test_readme import connect, free_port
from test_serve_processes import read_to_end

from anyio_rst import PeerClose

from asgi_cases import BIG, HALF, WHOLE
from serving import LONG

HERE = Path(__file__).parent
ROOT = HERE.parent
EXAMPLES = ROOT / "examples"

Process = subprocess.Popen[bytes]

SERVERS = [
    "uvicorn-h11-asyncio",
    "uvicorn-h11-uvloop",
    "uvicorn-httptools-asyncio",
    "uvicorn-httptools-uvloop",
    "hypercorn-asyncio",
    "hypercorn-uvloop",
    "hypercorn-trio",
    "aiohttp-asyncio",
    "aiohttp-uvloop",
]

# Seconds for which a server that is told to stop lets its applications go on.
GRACE = 1


def command(server: str, port: int, *, armed: bool, tls: str = "") -> list[str]:
    """How one starts it, from the command line or in a program."""
    name, *kind, loop = server.split("-")
    python = sys.executable
    if name == "uvicorn":
        http = {"h11": "H11", "httptools": "HttpTools"}[kind[0]]
        app = ["asgi_cases:armed", "--http", f"asgi_cases:{http}"]
        if not armed:
            app = ["asgi_cases:cases", "--http", kind[0]]
        options = [f"--port={port}", "--loop", loop, "--lifespan=off"]
        options.append(f"--timeout-graceful-shutdown={GRACE}")
        if tls:
            options.append(f"--ssl-certfile={tls}")
        return [python, "-m", "uvicorn", *app, *options]
    if name == "hypercorn":
        app = ["asgi_cases:by_address" if armed else "asgi_cases:cases"]
        options = [f"--bind=127.0.0.1:{port}", "-k", loop, "--graceful-timeout", str(GRACE)]
        if tls:
            options += ["--certfile", tls, "--keyfile", tls]
        return [python, "-m", "hypercorn", *app, *options]
    app = ["aiohttp_armed" if armed else "aiohttp_plain"]
    context = "None"
    if tls:
        context = "ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)"
    program = f"""
import asyncio, ssl, uvloop
from aiohttp import web
from asgi_cases import {app[0]} as app
context = {context}
if context is not None:
    context.load_cert_chain({tls!r})
loop = {"uvloop" if loop == "uvloop" else "asyncio"}.new_event_loop()
web.run_app(
    app, host="127.0.0.1", port={port}, loop=loop, ssl_context=context,
    shutdown_timeout={GRACE},
)
"""
    return [python, "-c", program]


@dataclass
class Service:
    port: int
    process: Process
    scheme: str = "http"

    def url(self, path: str) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}{path}"

    def connect(self) -> socket.socket:
        return connect(self.port, self.process)  # type: ignore[arg-type]


@contextmanager
def running(arguments: list[str], port: int, scheme: str = "http") -> Iterator[Service]:
    path = os.pathsep.join([str(HERE), str(EXAMPLES), *sys.path])
    with subprocess.Popen(
        arguments,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path},
    ) as process:
        try:
            service = Service(port, process, scheme)
            service.connect().close()  # it serves
            yield service
        finally:
            process.kill()


@contextmanager
def serving(server: str, *, armed: bool = True, tls: str = "") -> Iterator[Service]:
    port = free_port()
    arguments = command(server, port, armed=armed, tls=tls)
    with running(arguments, port, "https" if tls else "http") as service:
        yield service


@pytest.fixture(scope="module", params=SERVERS)
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    with serving(request.param) as started:
        yield started


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def curl(url: str, *options: str) -> tuple[int, bytes]:
    """Its exit status, and the body."""
    quiet = "--disable", "--silent", "--show-error", "--noproxy", "*"
    done = subprocess.run(
        ["curl", *quiet, *options, url], capture_output=True, timeout=LONG, check=False
    )
    return done.returncode, done.stdout


VERSIONS = ["--http1.0", "--http1.1"]  # without a length: to the end, and in chunks
LENGTHS = ["none", "length"]
FAILURES = ["raises", "times_out"]

each_version = pytest.mark.parametrize("version", VERSIONS)
each_length = pytest.mark.parametrize("length", LENGTHS)


@needs("curl")
@each_version
@each_length
@pytest.mark.parametrize("way", ["done", "at_once"])
def test_whole_answer(service: Service, version: str, length: str, way: str) -> None:
    assert curl(service.url(f"/{length}/{way}"), version) == (0, WHOLE)


@needs("curl")
@each_version
@each_length
@pytest.mark.parametrize("way", FAILURES)
def test_failure_half_way(service: Service, version: str, length: str, way: str) -> None:
    status, body = curl(service.url(f"/{length}/{way}"), version)
    assert status == 56
    assert body in (HALF, b"")
