"""The server that is soaked.

`python -m evidence.soak.server LOOP FILE CERTIFICATE [DESCRIPTORS]` appends a line to
FILE for each connection that has ended, and serves on loopback, in each of the ways, and
on the listening sockets DESCRIPTORS, one for each native way. Its first line has the
ports on loopback. Commands come on its standard input, each is answered with a line of
JSON, and it ends with that input.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import logging
import os
import resource
import socket
import sys
import time
from collections import Counter, deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
from anyio import fail_after, move_on_after
from anyio.abc import SocketAttribute
from outcome import Error

from anyio_rst import Connection, Drain, Server, serve_tcp
from evidence import loops
from evidence.certificates import server_context
from evidence.sockets import HOST, allow_descriptors

from .plans import DRAIN_TIMEOUT, NATIVE_WAYS, REQUEST_TIMEOUT, TRIO_WAYS, Way
from .scopes import Scopes
from .wire import REQUEST
from .works import WORKS, Finished, Request

if TYPE_CHECKING:
    import ssl
    from typing import TextIO

BACKLOG = 4096
# Fewer than the server itself has open, so that there is none for a connection.
NO_DESCRIPTORS = 4
STARVED_AT_MOST = 5.0  # seconds
WATCH_EVERY = 0.1
LOOPBACK = "127."
PAGE_SIZE = resource.getpagesize()


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


class Soaked:
    """The server, and what it knows of its connections."""

    def __init__(self, endings: TextIO, context: ssl.SSLContext) -> None:
        self.records = Records()
        self.ended = 0  # on loopback
        self.begun = 0  # requests
        self._late: deque[tuple[float, float]] = deque()  # when, and how much
        self._children = 0
        self._endings = endings
        self._requests: dict[Connection, Request] = {}
        self.servers: list[Server] = []
        self.scopes = Scopes(
            self,
            context,
            finish_on=Finished,
            drain=Drain(timeout=DRAIN_TIMEOUT),
            backlog=BACKLOG,
        )

    async def handle(self, conn: Connection) -> None:
        with fail_after(REQUEST_TIMEOUT):
            header = await conn.receive(REQUEST.size)
            while len(header) < REQUEST.size:
                header += await conn.receive(REQUEST.size - len(header))
            request = self._requests[conn] = Request(header)
        self.begun += 1
        # Not a later deadline for the same scope, which may have been cancelled by now.
        with fail_after(request.timeout):
            try:
                await WORKS[request.work](conn, request)
            finally:
                if request.finished is None:
                    request.finished = anyio.current_time()

    def on_ending(self, way: Way, conn: Connection) -> None:
        ending = conn.ending
        assert ending is not None
        host, port = ending.remote_address or (None, None)
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
            way.value,
            self.late(),
        )
        self._write(line)

    def on_refusal(
        self, way: Way, address: tuple[str, int] | None, exc: Exception | None
    ) -> None:
        """A connection that has never come into a scope."""
        host, port = address or (None, None)
        ending = ("REFUSED", "", "NONE", 0, None, False, type(exc).__name__, None)
        self._write((host, port, None, *ending, way.value, self.late()))

    def _write(self, line: tuple[object, ...]) -> None:
        """The fields of `judge.Ended`."""
        self._endings.write(json.dumps(line) + "\n")
        # The others are across the link, where every address is known.
        self.ended += line[0] is None or str(line[0]).startswith(LOOPBACK)

    async def watch(self) -> None:
        """How late the event loop is, of late."""
        while True:
            due = anyio.current_time() + WATCH_EVERY
            await anyio.sleep(WATCH_EVERY)
            self._late.append((now := anyio.current_time(), now - due))
            while self._late[0][0] < now - REQUEST_TIMEOUT:
                self._late.popleft()

    def late(self) -> float:
        """In all, in seconds, within the last that a request may take."""
        return sum(late for _, late in self._late)

    def note(self, fault: str) -> None:
        self.records.counts[fault] += 1

    def status(self) -> dict[str, Any]:
        still_open = sum(len(server.connections) for server in self.servers)
        while self._children and os.waitpid(-1, os.WNOHANG)[0]:
            self._children -= 1
        return {
            "open": still_open + self.scopes.open,
            "ended": self.ended,
            "begun": self.begun,
            "children": self._children,
        }

    def fork(self, seconds: str) -> dict[str, Any]:
        """A child that lives for so long, and does nothing."""
        child = os.fork()
        if not child:
            try:
                time.sleep(float(seconds))
            finally:
                os._exit(0)
        self._children += 1
        return {"child": child}

    def sample(self) -> dict[str, Any]:
        """At rest: what it holds."""
        gc.collect()
        # glibc would hold on to what the large answers of TLS took: malloc_trim(3).
        ctypes.CDLL(None).malloc_trim(0)
        kinds: Counter[str] = Counter()
        for server in self.servers:
            for kind, number in server.statistics().endings_by_kind.items():
                kinds[kind.value] += number
        return {
            "rss": int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_SIZE,
            "descriptors": len(os.listdir("/proc/self/fd")),
            "blocks": sys.getallocatedblocks(),
            "kinds": kinds,  # of the native ways
            "records": self.records.counts,
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

    async def obey(self) -> None:
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
                elif command == "fork":
                    reply = self.fork(*arguments)
                else:
                    reply = {"status": self.status, "sample": self.sample}[command]()
                say(reply)


async def warm_up() -> None:
    """Make a stream: with its first, uvloop opens a descriptor that it keeps (libuv)."""
    async with await anyio.create_tcp_listener(local_host=HOST) as listener:
        port = listener.extra(SocketAttribute.local_port)
        async with await anyio.connect_tcp(HOST, port):
            pass


def say(reply: dict[str, Any]) -> None:
    print(json.dumps(reply), flush=True)


async def serve(
    endings: TextIO, ways: list[Way], certificate: str, descriptors: list[int]
) -> None:
    context = server_context(certificate)
    soaked = Soaked(endings, context)
    logger = logging.getLogger("anyio_rst")
    logger.addHandler(soaked.records)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    await warm_up()
    ports = {}
    async with anyio.create_task_group() as tg:
        for index, way in enumerate(NATIVE_WAYS):
            sockets = [socket.create_server((HOST, 0), backlog=BACKLOG)]
            if descriptors:
                sockets.append(socket.socket(fileno=descriptors[index]))
            serve_way = functools.partial(
                serve_tcp,
                soaked.handle,
                sockets=sockets,
                finish_on=Finished,
                drain=Drain(timeout=DRAIN_TIMEOUT),
                on_ending=functools.partial(soaked.on_ending, way),
                ssl_context=context if way.is_tls else None,
                handshake_timeout=REQUEST_TIMEOUT,
            )
            server = await tg.start(serve_way)
            soaked.servers.append(server)
            ports[way.name] = server.port
        for way in ways:
            if way.is_scope:
                ports[way.name] = await soaked.scopes.listen(way, tg)
        tg.start_soon(soaked.watch)
        say({"ports": ports})
        await soaked.obey()
        tg.cancel_scope.cancel()


def main(loop: str, path: str, certificate: str, *descriptors: str) -> None:
    allow_descriptors()
    # Line by line: it may be killed.
    with Path(path).open("a", buffering=1) as endings:
        anyio.run(
            serve,
            endings,
            [way for way in Way if loop == "trio" or way not in TRIO_WAYS],
            certificate,
            list(map(int, descriptors)),
            **loops.options(loop),
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
