"""examples/download.py, with the clients that people use, and docs/download.md."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import subprocess
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import httpx
import pytest
from anyio.abc import ByteStream, SocketAttribute
from test_readme import connect, free_port
from test_serve_processes import example, loops, running

from anyio_rst import Cause, CloseKind, PeerClose

import download
from serving import LONG, Seen, serve

pytestmark = pytest.mark.anyio

DOCS = Path(__file__).parents[2] / "docs" / "download.md"

# All of the one table, and what there is of the other before n is 0.
WHOLE = download.table(1, 1001)
HALF = download.table(-500, 0)

# What a client said, and the body, if it hands that out.
Told = tuple[str, bytes | None]


@asynccontextmanager
async def truthfully() -> AsyncIterator[int]:
    async with serve("native", download.download) as service:
        yield service.port


@asynccontextmanager
async def plainly(
    handler: Callable[[Any], Awaitable[None]] = download.download,
) -> AsyncIterator[int]:
    """Served as one does with AnyIO alone."""

    async def serve_one(stream: ByteStream) -> None:
        with suppress(ZeroDivisionError):  # it costs one connection
            async with stream:
                await handler(stream)

    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
        async with anyio.create_task_group() as tg:
            tg.start_soon(listener.serve, serve_one)
            yield listener.extra(SocketAttribute.local_port)
            tg.cancel_scope.cancel()


def by_command(*command: str) -> Told:
    done = subprocess.run(
        command,
        capture_output=True,
        timeout=LONG,
        check=False,
        env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
    )
    said = f"exit {done.returncode}"
    # What wget says besides this is how far it has come.
    messages = re.findall(
        r"(?:curl: \(\d+\)| -) (.* reset by peer\)?)", done.stderr.decode()
    )
    if messages:
        said += ": " + re.sub(r"\d+", "…", messages[0])
    if len(messages) > 1:
        said += f", {len(messages)} times"
    return said, done.stdout


def by_curl(url: str) -> Told:
    return by_command("curl", "--disable", "--silent", "--show-error", url)


def by_wget(url: str, tries: str = "--tries=1") -> Told:
    return by_command("wget", "--no-config", tries, "--output-document=-", url)


def by_urllib(url: str) -> Told:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=LONG) as response:
            return "returns", response.read()
    except (OSError, http.client.HTTPException) as exc:
        return f"{type(exc).__name__}: {exc}", None


def by_httpx(url: str) -> Told:
    try:
        with httpx.Client(trust_env=False, timeout=LONG) as client:
            return "returns", client.get(url).content
    except httpx.HTTPError as exc:
        return f"{type(exc).__name__}: {exc}", None


def needs(program: str) -> pytest.MarkDecorator:
    missing = shutil.which(program) is None
    return pytest.mark.skipif(missing, reason=f"no {program} on the path")


CLIENTS = {
    "curl": by_curl,
    "wget --tries=1": by_wget,
    "urllib.request": by_urllib,
    "httpx": by_httpx,
}

PROGRAMS = {by_curl: [needs("curl")], by_wget: [needs("wget")]}
EACH_CLIENT = [
    pytest.param(client, id=name, marks=PROGRAMS.get(client, []))
    for name, client in CLIENTS.items()
]

COLUMNS: list[tuple[Callable[[], AbstractAsyncContextManager[int]], str, bytes]] = [
    (truthfully, "/1/1000", WHOLE),
    (plainly, "/-500/500", HALF),
    (truthfully, "/-500/500", HALF),
]


ROWS = dict(re.findall(r"^\| `(.*)` \| (.*) \|$", DOCS.read_text(), re.MULTILINE))


def test_docs_have_each_client() -> None:
    assert list(ROWS) == list(CLIENTS)


@pytest.mark.parametrize("client", EACH_CLIENT)
async def test_what_each_client_says_is_in_the_docs(
    client: Callable[[str], Told],
) -> None:
    told = []
    for served, path, there_is in COLUMNS:
        async with served() as port:
            url = f"http://127.0.0.1:{port}{path}"
            said, body = await anyio.to_thread.run_sync(client, url)
            assert body in (there_is, None)
            told.append(said)
    (name,) = (name for name, each in CLIENTS.items() if each is client)
    assert ROWS[name].split(" | ") == told


@needs("wget")
async def test_wget_tries_again_twenty_times() -> None:
    async with truthfully() as port:
        url = f"http://127.0.0.1:{port}/-500/500"
        said, _ = await anyio.to_thread.run_sync(by_wget, url, "--waitretry=0")
    message = "Read error at byte … (Connection reset by peer)"
    assert said == f"exit 4: {message}, 20 times"


@pytest.mark.parametrize("client", EACH_CLIENT)
@pytest.mark.parametrize(
    "rest",
    ["Content-Length: 9\r\n\r\nhalf", "Transfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n"],
    ids=["length", "chunks"],
)
async def test_body_with_an_end_of_its_own(
    rest: str, client: Callable[[str], Told]
) -> None:
    """That it is missing is noticed after a FIN, too: by a plain server."""

    async def tear(stream: ByteStream) -> None:
        await stream.receive()
        await stream.send(f"HTTP/1.1 200 OK\r\n{rest}".encode())

    async with plainly(tear) as port:
        url = f"http://127.0.0.1:{port}/"
        said, _ = await anyio.to_thread.run_sync(client, url)
    assert said not in ("exit 0", "returns")


async def test_failure_half_way_resets() -> None:
    async with serve("native", download.download) as service:
        with service.connect() as peer:
            await peer.send(b"GET /-500/500 HTTP/1.1\r\nHost: x\r\n\r\n")
            seen = await peer.read_to_end()
        assert seen == Seen(download.HEAD + HALF, PeerClose.RST)
        ending = await service.ending()
    assert (ending.kind, ending.cause) == (CloseKind.RST, Cause.RAISED)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"garbage\r\n\r\n", "400 Bad Request"),
        (b"GET /1/2 HTTP/1.1\r\n\r\n", "400 Bad Request"),  # no Host
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "404 Not Found"),
        (b"GET /1/2/../../x HTTP/1.1\r\nHost: x\r\n\r\n", "404 Not Found"),
        (b"GET /1/10000000 HTTP/1.1\r\nHost: x\r\n\r\n", "404 Not Found"),
        (b"GET /1/2 HTTP/1.1\r\nA: " + b"a" * 100_000, "431 Request Header Fields"),
        (
            b"POST /1/2 HTTP/1.1\r\nHost: x\r\nContent-Length: 3000000\r\n\r\n"
            + b"a" * 3_000_000,
            "501 Not Implemented",
        ),
    ],
    ids=lambda value: value[:3] if isinstance(value, str) else "",
)
async def test_bad_request_is_answered_and_ends_with_fin(
    request_: bytes, status: str
) -> None:
    """Also while the client is still sending."""
    async with serve("native", download.download) as service:
        with service.connect() as peer:
            await peer.send(request_)
            peer.send_eof()
            seen = await peer.read_to_end()
        assert seen.data.startswith(b"HTTP/1.1 " + status.encode())
        assert seen.data.endswith(b"\r\n\r\n")
        assert seen.close is PeerClose.FIN


async def test_torn_request_is_answered() -> None:
    async with serve("native", download.download) as service:
        with service.connect() as peer:
            await peer.send(b"GET /1/1000 HT")
            peer.send_eof()
            seen = await peer.read_to_end()
    assert seen.data.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert seen.close is PeerClose.FIN


async def test_client_without_a_request() -> None:
    async with serve("native", download.download) as service:
        with service.connect() as peer:
            peer.send_eof()
            assert await peer.read_to_end() == Seen(b"", PeerClose.FIN)


async def test_request_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 0.1)
    async with serve("native", download.download) as service:
        with service.connect() as peer:
            await peer.send(b"GET /1/1000 HT")
            seen = await peer.read_to_end()
    assert seen.data.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
    assert seen.close is PeerClose.FIN


async def test_client_of_http_1_0() -> None:
    async with serve("native", download.download) as service:
        with service.connect() as peer:
            await peer.send(b"GET /1/1000 HTTP/1.0\r\n\r\n")
            assert await peer.read_to_end() == Seen(download.HEAD + WHOLE, PeerClose.FIN)


@needs("curl")
@loops
def test_program(loop: str) -> None:
    port = free_port()
    with running([*example("download.py", loop), str(port)]) as process:
        connect(port, process).close()
        said, body = by_curl(f"http://127.0.0.1:{port}/1/1000")
        assert (said, body) == ("exit 0", WHOLE)
        said, body = by_curl(f"http://127.0.0.1:{port}/-500/500")
        assert (said, body) == ("exit 56: Recv failure: Connection reset by peer", HALF)
