"""`demo`: what a client sees of each way out of a handler, without and with anyio_rst.

Each server runs in a process of its own, for one connection, because some of the ways
out end the process. The clients are a plain blocking socket, and curl. Both servers get
the same handler.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
from anyio.abc import ByteStream, SocketAttribute

from ._peer import PeerClose
from ._serve import serve_tcp

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from anyio.abc import TaskStatus

# AnyIO's name of the backend, and its options, for each --loop.
LOOPS: dict[str, tuple[str, dict[str, Any]]] = {
    "asyncio": ("asyncio", {"use_uvloop": False}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}

LOOPBACK = "127.0.0.1"

# How long a client waits for an end of any kind, in seconds.
PATIENCE = 10.0

ANSWER = bytes(range(256)) * 8
HALF = ANSWER[: len(ANSWER) // 2]

# Fits into the send buffer of the server, and not into the receive buffer of a client
# that does not read: a part of it is still to be delivered when the handler returns.
LATE_ANSWER = ANSWER * 100

# More than the socket buffers of both sides hold while one of them does not read.
TOO_MUCH = ANSWER * 4000

Handler = Callable[[ByteStream], Awaitable[None]]


# The ways out.


async def returns(stream: ByteStream) -> None:
    await stream.send(ANSWER)


async def returns_during_an_upload(stream: ByteStream) -> None:
    await stream.receive()
    await stream.send(LATE_ANSWER)


async def raises(stream: ByteStream) -> None:
    await stream.send(HALF)
    raise RuntimeError("half way")


async def times_out(stream: ByteStream) -> None:
    await stream.send(HALF)
    with anyio.fail_after(0.1):
        await anyio.sleep_forever()


async def is_cancelled(stream: ByteStream) -> None:
    await stream.send(HALF)
    os.kill(os.getpid(), signal.SIGTERM)  # which cancels the server: see _serve()
    await anyio.sleep_forever()


async def has_a_child_that_fails(stream: ByteStream) -> None:
    async def fail() -> None:
        raise RuntimeError("half way")

    await stream.send(HALF)
    async with anyio.create_task_group() as tg:
        tg.start_soon(fail)
        await anyio.sleep_forever()


async def has_a_send_cut_short(stream: ByteStream) -> None:
    with anyio.move_on_after(0.25):
        await stream.send(TOO_MUCH)
    print("cut short", flush=True)  # the client reads from now on


async def exits(stream: ByteStream) -> None:
    await stream.send(HALF)
    sys.exit()


async def is_killed(stream: ByteStream) -> None:
    await stream.send(HALF)
    os.kill(os.getpid(), signal.SIGKILL)


async def raises_in_http(stream: ByteStream) -> None:
    request = b""
    while b"\r\n\r\n" not in request:
        request += await stream.receive()
    # Without a length: the body ends where the connection does (RFC 9112, 6.3).
    await stream.send(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + HALF)
    raise RuntimeError("half way")


# The servers.


async def serve_plainly(handler: Handler, *, task_status: TaskStatus[int]) -> None:
    """Serve as one does with AnyIO alone."""

    async def serve_one(stream: ByteStream) -> None:
        with suppress(Exception):  # the server survives its handlers, as ours does
            async with stream:
                await handler(stream)

    async with await anyio.create_tcp_listener(local_host=LOOPBACK) as listener:
        task_status.started(listener.extra(SocketAttribute.local_port))
        await listener.serve(serve_one)


async def serve_truthfully(handler: Handler, *, task_status: TaskStatus[int]) -> None:
    async with anyio.create_task_group() as tg:
        server = await tg.start(partial(serve_tcp, handler, host=LOOPBACK))
        task_status.started(server.port)


SIDES = {"plain AnyIO": serve_plainly, "anyio_rst": serve_truthfully}


async def _serve(side: str, handler: Handler) -> None:
    """Serve until SIGTERM, and print the port."""
    with anyio.open_signal_receiver(signal.SIGTERM) as signals:
        async with anyio.create_task_group() as tg:
            print(await tg.start(SIDES[side], handler), flush=True)
            await anext(signals)
            tg.cancel_scope.cancel()


@contextmanager
def server(loop: str, side: str, way: Way) -> Iterator[subprocess.Popen[str]]:
    """A process that serves *way*, and prints its port first.

    What it logs of the failures, which are deliberate, is kept off the terminal.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", __spec__.name, loop, side, way.label],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def next_line(process: subprocess.Popen[str]) -> str:
    """The next line that a server prints."""
    assert process.stdout is not None
    assert process.stderr is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"a server of the demo is gone:\n{process.stderr.read()}")
    return line


# The clients.


@dataclass(frozen=True)
class Seen:
    """What a client saw of an answer."""

    text: str
    is_true: bool


def is_true(*, claimed: bool, finished: bool, whole: bool) -> bool:
    """Whether a client was told the truth.

    Args:
      claimed: the client was told that it has the whole answer.
      finished: the handler did finish it.
      whole: the client does have all of it.
    """
    return finished and whole if claimed else not finished


def see_by_socket(way: Way, process: subprocess.Popen[str]) -> Seen:
    """Read to the end, and see what kind of end it is."""
    close = PeerClose.FIN
    data = bytearray()
    port = int(next_line(process))
    with socket.create_connection((LOOPBACK, port), timeout=PATIENCE) as sock:
        try:
            if way.before_reading is not None:
                try:
                    way.before_reading(sock, process)
                except (ConnectionResetError, BrokenPipeError):
                    # The kernel tells once. What had arrived can still be read, and
                    # after it comes an end like any other.
                    close = PeerClose.RST
            while chunk := sock.recv(65536):
                data += chunk
        except ConnectionResetError:
            close = PeerClose.RST
        except TimeoutError:
            close = PeerClose.NONE
    end = "no end" if close is PeerClose.NONE else close.value
    return Seen(
        f"{len(data):,} of {len(way.answer):,} B, {end}",
        is_true(
            claimed=close is PeerClose.FIN,
            finished=way.finishes,
            whole=data == way.answer,
        ),
    )


def upload(sock: socket.socket, process: subprocess.Popen[str]) -> None:
    sock.sendall(TOO_MUCH)


def wait_until_cut(sock: socket.socket, process: subprocess.Popen[str]) -> None:
    next_line(process)


def see_by_curl(way: Way, process: subprocess.Popen[str]) -> Seen:
    """Download, and see what curl says, and what is in the file."""
    url = f"http://{LOOPBACK}:{int(next_line(process))}/"
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "answer")
        options = ["--silent", "--noproxy", "*", "--max-time", str(PATIENCE)]
        status = subprocess.run(
            # --disable: no .curlrc
            ["curl", "--disable", *options, "--output", str(file), url],
            check=False,
        ).returncode
        data = file.read_bytes() if file.exists() else b""
    return Seen(
        f"{len(data):,} of {len(way.answer):,} B, exit {status}",
        is_true(
            claimed=status == 0,
            finished=way.finishes,
            whole=data == way.answer,
        ),
    )


# The table.


@dataclass(frozen=True)
class Way:
    """A way out of a handler."""

    label: str
    """What the handler does, to be read after "the handler ..."."""

    handler: Handler
    see: Callable[[Way, subprocess.Popen[str]], Seen] = see_by_socket
    before_reading: Callable[[socket.socket, subprocess.Popen[str]], None] | None = None

    answer: bytes = ANSWER
    """All of what the client should get."""

    finishes: bool = False
    """Whether the handler sends all of that, and then returns."""


WAYS = (
    Way("returns", returns, finishes=True),
    Way(
        "returns during an upload",
        returns_during_an_upload,
        before_reading=upload,
        answer=LATE_ANSWER,
        finishes=True,
    ),
    Way("raises an exception", raises),
    Way("runs into a timeout", times_out),
    Way("is cancelled", is_cancelled),
    Way("has a child that fails", has_a_child_that_fails),
    Way(
        "has a send cut short",
        has_a_send_cut_short,
        before_reading=wait_until_cut,
        answer=TOO_MUCH,
    ),
    Way("calls sys.exit()", exits),
    Way("is killed by SIGKILL", is_killed),
)

WAYS_SEEN_BY_CURL = (Way("raises half way", raises_in_http, see_by_curl),)


@dataclass(frozen=True)
class Row:
    """One way out, on both sides."""

    way: Way
    plain: Seen
    anyio_rst: Seen


def measure(loop: str, way: Way) -> Row:
    with ExitStack() as stack:
        # Both start at the same time: that is what takes the time here.
        processes = [stack.enter_context(server(loop, side, way)) for side in SIDES]
        return Row(way, *(way.see(way, process) for process in processes))


def show(loop: str) -> list[Row]:
    """Measure everything on *loop*, and print each row when it is there."""
    print_line(loop, *SIDES)
    print_line("the handler ...", *("what the client saw" for _ in SIDES))
    rows = [measure_and_print(loop, way) for way in WAYS]
    print()
    if shutil.which("curl") is None:
        print("curl is not installed: what it makes of a failure is left out")
    else:
        print_line("the HTTP handler ...", *("the file, and curl's exit" for _ in SIDES))
        rows += [measure_and_print(loop, way) for way in WAYS_SEEN_BY_CURL]
    print()
    for side, truths in zip(
        SIDES,
        (
            [row.plain.is_true for row in rows],
            [row.anyio_rst.is_true for row in rows],
        ),
        strict=True,
    ):
        print(f"{side} told the truth in {sum(truths)} of {len(truths)} rows", flush=True)
    return rows


def measure_and_print(loop: str, way: Way) -> Row:
    row = measure(loop, way)
    cells = (
        f"{seen.text:29} {'true' if seen.is_true else 'LIE'}"
        for seen in (row.plain, row.anyio_rst)
    )
    print_line(way.label, *cells)
    return row


def print_line(label: str, plain: str, anyio_rst: str) -> None:
    print(f"{label:24}  {plain:34}  {anyio_rst}".rstrip(), flush=True)


def exit_status(rows: Iterable[Row]) -> int:
    """1 if anyio_rst lied anywhere, else 0."""
    return 0 if all(row.anyio_rst.is_true for row in rows) else 1
