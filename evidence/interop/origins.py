"""Who answers: examples/download.py, served truthfully and plainly, and a recorder."""

from __future__ import annotations

import sys
from contextlib import asynccontextmanager, suppress
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import anyio
from anyio.abc import SocketAttribute, TaskGroup
from anyio.streams.tls import TLSListener

from anyio_rst import Connection, PeerReset, Server, serve_tcp
from evidence import ROOT
from evidence.certificates import server_context
from evidence.sockets import HOST

sys.path.append(str(ROOT / "examples"))

import download
import proxy

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from .results import Answer

PATIENCE = 2.0  # seconds, for the origin to be told of the client's end

RECORDER = "recorder"


class Recorder:
    """An origin that waits, half way in its answer, for the client's end."""

    first, rest = download.table(1, 101), download.table(101, 1001)
    there_is = len(first + rest)

    def __init__(self) -> None:
        self._told: dict[bytes, str] = {}
        self._expected: dict[bytes, anyio.Event] = {}

    def expect(self, target: str) -> Callable[[], Awaitable[str]]:
        """For a request with *target*: a function that waits for the client's end."""
        key = target.encode()
        self._expected[key] = anyio.Event()

        async def told() -> str:
            await self._expected[key].wait()
            return self._told[key]

        return told

    async def handle(self, conn: Connection) -> None:
        request = b""
        while b"\r\n\r\n" not in request:
            try:
                request += await conn.receive()
            except anyio.EndOfStream:
                return  # it was only to see whether somebody listens
        target = request.split()[1]
        await conn.send(download.HEAD + self.first)
        self._told[target] = await self._end(conn)
        self._expected[target].set()
        await conn.send(self.rest)

    async def _end(self, conn: Connection) -> str:
        with anyio.move_on_after(PATIENCE):
            try:
                async for _ in conn:
                    pass
            except PeerReset:
                return "RST"
            return "FIN"
        return f"nothing in {PATIENCE:g} s"


async def in_chunks(conn: Connection) -> None:
    """The download that fails half way, with an end of its own that does not come."""
    await conn.receive()
    fields = b"Transfer-Encoding: chunked\r\nConnection:"
    await conn.send(download.HEAD.replace(b"Connection:", fields))
    for start in range(-500, 500, download.ROWS):
        rows = download.table(start, start + download.ROWS)
        await conn.send(b"%x\r\n%b\r\n" % (len(rows), rows))


@cache
def body(answer: Answer) -> bytes:
    """What there is of *answer*, which may be half of it."""
    return download.table(answer.first, answer.last + 1 if answer.is_whole else 0)


def over(scheme: str, origin: str) -> str:
    """The name of *origin* with TLS or without."""
    return f"{scheme}-{origin}"


@asynccontextmanager
async def running(recorder: Recorder, certificate: Path) -> AsyncIterator[dict[str, int]]:
    """The origins' ports."""
    context = server_context(certificate)
    async with anyio.create_task_group() as tg:

        async def serve(
            handler: Callable[[Connection], Awaitable[None]],
            ssl_context: ssl.SSLContext | None = None,
        ) -> int:
            call = partial(serve_tcp, handler, host=HOST, ssl_context=ssl_context)
            server: Server = await tg.start(call)
            return server.port

        yield {
            over("http", "truthful"): await serve(download.download),
            over("https", "truthful"): await serve(download.download, context),
            over("http", "chunked"): await serve(in_chunks),
            over("https", "chunked"): await serve(in_chunks, context),
            over("http", "plain"): await serve_plainly(tg),
            over("https", "plain"): await serve_plainly(tg, context),
            RECORDER: await serve(recorder.handle),
        }
        tg.cancel_scope.cancel()


async def serve_plainly(tg: TaskGroup, ssl_context: ssl.SSLContext | None = None) -> int:
    """As one does with AnyIO alone."""
    listener = await anyio.create_tcp_listener(local_host=HOST)
    port: int = listener.extra(SocketAttribute.local_port)

    async def serve_one(stream: Any) -> None:  # not a Connection, which it asks for
        # The table's failure costs one connection, and so does one that is lost.
        with suppress(ZeroDivisionError, anyio.BrokenResourceError):
            async with stream:
                await download.download(stream)

    served = TLSListener(listener, ssl_context) if ssl_context else listener
    tg.start_soon(served.serve, serve_one)
    return port


async def serve_proxy(tg: TaskGroup, origin: int) -> int:
    """The port of examples/proxy.py in front of *origin*."""
    handler = partial(proxy.proxy, HOST, origin)
    server: Server = await tg.start(partial(serve_tcp, handler, host=HOST))
    return server.port
