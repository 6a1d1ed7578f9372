"""The server that is soaked: `python -m soak.server LOOP FILE [DESCRIPTOR]`.

It appends a line to FILE for each connection that has ended, and serves on loopback, and
on the listening socket DESCRIPTOR. Commands come on its standard input, and it ends with
that; each is answered with a line of JSON.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import resource
import socket
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import anyio
from anyio import fail_after, move_on_after, sleep, sleep_forever
from outcome import Error

from anyio_rst import Connection, Drain, Server, serve_tcp

from .plans import DRAIN_TIMEOUT, PATTERN, REQUEST, REQUEST_TIMEOUT, Work
from .plans import place as place_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import TextIO

LOOPBACK = "127."
BACKLOG = 4096
# Fewer than the server itself has open, so that there is none for a connection.
NO_DESCRIPTORS = 4
STARVED_AT_MOST = 5.0  # seconds

PAGE_SIZE = resource.getpagesize()


class Failure(Exception):
    """What a handler raises that was asked to fail."""


class Finished(Exception):
    """What is declared a clean end."""


class Records(logging.Handler):
    """Counts what is logged, by what it says, and formats none of it."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.starved = 0
        self.next_starved = anyio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.counts[f"{record.levelname} {record.msg}"] += 1
        if isinstance(record.args, tuple) and record.args[:1] == ("EMFILE",):
            self.starved += 1
            self.next_starved.set()


class Request:
    def __init__(self, header: bytes) -> None:
        self.number, work, self.size, self.upload, timeout = REQUEST.unpack(header)
        self.work = Work(work)
        self.timeout = timeout / 1000
        self.finished: float | None = None  # when the drain began
        place = place_of(self.number)
        # Which send() takes as well, and which copies nothing.
        view = memoryview(PATTERN)[place : place + self.size]
        self.answer = cast("bytes", view)
        self.half = self.answer[: self.size // 2]


async def read_all(conn: Connection, request: Request) -> None:
    received = 0
    async for data in conn:
        received += len(data)
    if received != request.upload:
        raise AssertionError(f"{received} of {request.upload} bytes were uploaded")


async def answer(conn: Connection, request: Request) -> None:
    await conn.send(request.answer)


async def pieces(conn: Connection, request: Request) -> None:
    step = request.size // 4 + 1
    for start in range(0, request.size, step):
        await conn.send(request.answer[start : start + step])
        await sleep(0.002)


async def close(conn: Connection, request: Request) -> None:
    await conn.send(request.answer)
    request.finished = anyio.current_time()
    await conn.aclose()
    raise Failure


async def finish_on(conn: Connection, request: Request) -> None:
    await conn.send(request.answer)
    raise Finished


async def group(conn: Connection, request: Request) -> None:
    async with conn.create_task_group() as tg:
        tg.start_soon(sleep_forever)
        await conn.send(request.answer)
        tg.cancel_scope.cancel()


async def eof(conn: Connection, request: Request) -> None:
    await conn.send(request.answer)
    await conn.send_eof()
    await read_all(conn, request)


async def read_all_answer(conn: Connection, request: Request) -> None:
    await read_all(conn, request)
    await conn.send(request.answer)


async def fail(conn: Connection, request: Request) -> None:
    await conn.send(request.half)
    raise Failure


async def read_all_fail(conn: Connection, request: Request) -> None:
    await read_all(conn, request)
    await conn.send(request.half)
    raise Failure


async def cancel(conn: Connection, request: Request) -> None:
    with move_on_after(0.01):
        async with conn:
            await conn.send(request.half)
            await sleep_forever()


async def group_fail(conn: Connection, request: Request) -> None:
    async def child() -> None:
        await conn.send(request.half)
        raise Failure

    async with conn.create_task_group() as tg:
        tg.start_soon(child)
        await sleep_forever()


async def abort(conn: Connection, request: Request) -> None:
    await conn.send(request.half)
    conn.abort()


async def torn(conn: Connection, request: Request) -> None:
    async with anyio.create_task_group() as tg:
        tg.start_soon(conn.send, request.answer)
        await conn.receive(1)  # when the peer has got something
        tg.cancel_scope.cancel()


async def eof_fail(conn: Connection, request: Request) -> None:
    await conn.send(request.answer)
    await conn.send_eof()
    raise Failure


async def wait(conn: Connection, request: Request) -> None:
    await read_all(conn, request)


WORKS: dict[Work, Callable[[Connection, Request], Awaitable[None]]] = {
    Work.ANSWER: answer,
    Work.PIECES: pieces,
    Work.CLOSE: close,
    Work.FINISH_ON: finish_on,
    Work.GROUP: group,
    Work.EOF: eof,
    Work.READ_ALL: read_all_answer,
    Work.RAISE: fail,
    Work.READ_ALL_RAISE: read_all_fail,
    Work.CANCEL: cancel,
    Work.GROUP_FAIL: group_fail,
    Work.ABORT: abort,
    Work.TORN: torn,
    Work.EOF_RAISE: eof_fail,
    Work.WAIT: wait,
}


class Soaked:
    """The server, and what it knows of its connections."""

    def __init__(self, endings: TextIO) -> None:
        self.records = Records()
        self.ended = 0  # on loopback
        self._endings = endings
        self._requests: dict[Connection, Request] = {}

    async def handle(self, conn: Connection) -> None:
        with fail_after(REQUEST_TIMEOUT):
            header = await conn.receive(REQUEST.size)
            while len(header) < REQUEST.size:
                header += await conn.receive(REQUEST.size - len(header))
            request = self._requests[conn] = Request(header)
        # Not a later deadline for the same scope, which may have been cancelled by now.
        with fail_after(request.timeout):
            try:
                await WORKS[request.work](conn, request)
            finally:
                if request.finished is None:
                    request.finished = anyio.current_time()

    def on_ending(self, conn: Connection) -> None:
        ending = conn.ending
        assert ending is not None
        assert ending.remote_address is not None
        host, port = ending.remote_address
        outcome = ending.outcome
        request = self._requests.pop(conn, None)
        drained = None
        if request is not None and request.finished is not None:
            drained = anyio.current_time() - request.finished
        line = (
            host,
            port,
            None if request is None else request.number,
            ending.kind.value,
            ending.cause.value,
            ending.peer.value,
            ending.discarded,
            ending.unacknowledged,
            ending.fin_sent_before_reset,
            type(outcome.error).__name__ if isinstance(outcome, Error) else None,
            drained,
        )
        self._endings.write(json.dumps(line) + "\n")
        self.ended += host.startswith(LOOPBACK)

    def status(self, server: Server) -> dict[str, Any]:
        return {"open": len(server.connections), "ended": self.ended}

    def sample(self, server: Server) -> dict[str, Any]:
        """At rest: what it holds."""
        self._endings.flush()
        gc.collect()
        statistics = server.statistics()
        return {
            "rss": int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_SIZE,
            "descriptors": len(os.listdir("/proc/self/fd")),
            "blocks": sys.getallocatedblocks(),
            "kinds": {k.value: n for k, n in statistics.endings_by_kind.items()},
            "records": self.records.counts,
            "accepted": statistics.accepted_connections,
        }

    async def starve(self, failures: int) -> dict[str, Any]:
        """Have no descriptor to accept with, until *failures* have been logged."""
        before = self.records.starved
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (NO_DESCRIPTORS, limits[1]))
        try:
            with move_on_after(STARVED_AT_MOST):
                while self.records.starved < before + failures:
                    self.records.next_starved = anyio.Event()
                    await self.records.next_starved.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        return {"failures": self.records.starved - before}

    async def obey(self, server: Server) -> None:
        """Until the standard input ends."""
        read = b""
        while True:
            await anyio.wait_readable(sys.stdin.fileno())
            arrived = os.read(sys.stdin.fileno(), 4096)
            if not arrived:
                return
            *lines, read = (read + arrived).split(b"\n")
            for line in lines:
                command, *arguments = line.decode().split()
                if command == "starve":
                    reply = await self.starve(int(arguments[0]))
                else:
                    reply = {"status": self.status, "sample": self.sample}[command](
                        server
                    )
                say(reply)


def say(reply: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(reply) + "\n")
    sys.stdout.flush()


async def serve(endings: TextIO, descriptors: list[int]) -> None:
    soaked = Soaked(endings)
    logger = logging.getLogger("anyio_rst")
    logger.addHandler(soaked.records)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    sockets = [socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)]
    sockets += [socket.socket(fileno=descriptor) for descriptor in descriptors]
    async with anyio.create_task_group() as tg:
        start = tg.start(
            lambda *, task_status: serve_tcp(
                soaked.handle,
                sockets=sockets,
                finish_on=Finished,
                drain=Drain(timeout=DRAIN_TIMEOUT),
                on_ending=soaked.on_ending,
                task_status=task_status,
            )
        )
        server = await start
        say({"port": server.port})
        await soaked.obey(server)
        tg.cancel_scope.cancel()


def main(loop: str, path: str, *descriptors: str) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with Path(path).open("a") as endings:
        anyio.run(
            serve,
            endings,
            list(map(int, descriptors)),
            backend="trio" if loop == "trio" else "asyncio",
            backend_options={"use_uvloop": True} if loop == "uvloop" else {},
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
