"""`demo`: what a client sees of each way out of a handler, without and with anyio_rst.

Every answer is served by a process of its own, because some ways out of a handler end
the process. The handlers are the same on both sides. The clients, a blocking socket and
curl, know nothing of either.
"""

from __future__ import annotations

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
    import argparse
    from collections.abc import Iterable, Iterator

    from anyio.abc import TaskStatus

# AnyIO's name of the backend, and its options, for each --loop.
LOOPS: dict[str, tuple[str, dict[str, Any]]] = {
    "asyncio": ("asyncio", {"use_uvloop": False}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}

LOOPBACK = "127.0.0.1"

# Seconds that a client waits for an end of any kind.
PATIENCE = 10

# Seconds that a server lives when the demo itself was killed, and cannot kill it.
LIFETIME = 60

ANSWER = bytes(range(250)) * 8
HALF = ANSWER[: len(ANSWER) // 2]

# Too much for the receive buffer of a client that does not read, but not for the send
# buffer of the server: when its handler returns, a part of it has yet to be delivered.
LATE_ANSWER = ANSWER * 100

# Too much for the buffers of both sides together.
TOO_MUCH = ANSWER * 4000

Handler = Callable[[ByteStream], Awaitable[None]]


class HalfWay(Exception):
    """A handler failed."""


# The ways out, of a handler that has received its request.


async def returns(stream: ByteStream) -> None:
    await stream.send(ANSWER)


async def returns_during_an_upload(stream: ByteStream) -> None:
    await stream.send(LATE_ANSWER)
    print("returning", flush=True)  # the client uploads the rest: upload()


async def raises(stream: ByteStream) -> None:
    await stream.send(HALF)
    raise HalfWay


async def times_out(stream: ByteStream) -> None:
    await stream.send(HALF)
    with anyio.fail_after(0.1):
        await anyio.sleep_forever()


async def is_cancelled(stream: ByteStream) -> None:
    await stream.send(HALF)
    os.kill(os.getpid(), signal.SIGTERM)  # cancels the server: serve_until_sigterm()
    await anyio.sleep_forever()


async def has_a_failing_child(stream: ByteStream) -> None:
    async with anyio.create_task_group() as tg:
        tg.start_soon(raises, stream)
        await anyio.sleep_forever()


async def cuts_a_send_short(stream: ByteStream) -> None:
    with anyio.move_on_after(0.25):
        await stream.send(TOO_MUCH)
    print("cut short", flush=True)  # the client reads: wait_for_the_cut()


async def exits(stream: ByteStream) -> None:
    await stream.send(HALF)
    sys.exit()


async def is_killed(stream: ByteStream) -> None:
    await stream.send(HALF)
    os.kill(os.getpid(), signal.SIGKILL)


async def raises_in_http(stream: ByteStream) -> None:
    # With no length, the end of the connection is the end of the body: RFC 9112, 6.3.
    await stream.send(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
    await raises(stream)


# The servers.


async def serve_plainly(handler: Handler, *, task_status: TaskStatus[int]) -> None:
    """Serve as one does with AnyIO alone."""

    async def serve_one(stream: ByteStream) -> None:
        with suppress(Exception):  # it costs one connection, as with serve_tcp()
            async with stream:
                await handler(stream)

    async with await anyio.create_tcp_listener(local_host=LOOPBACK) as listener:
        task_status.started(listener.extra(SocketAttribute.local_port))
        await listener.serve(serve_one)


async def serve_truthfully(handler: Handler, *, task_status: TaskStatus[int]) -> None:
    """Serve with anyio_rst."""
    async with anyio.create_task_group() as tg:
        server = await tg.start(partial(serve_tcp, handler, host=LOOPBACK))
        task_status.started(server.port)


PLAIN = "plain AnyIO"
OURS = "anyio_rst"
SIDES = {PLAIN: serve_plainly, OURS: serve_truthfully}


def serve(loop: str, side: str, way: str) -> None:
    """What the process of a server runs: print its port, then serve *way*."""
    way_out = next(each.handler for each in (*WAYS, *HTTP_WAYS) if each.name == way)

    async def handler(stream: ByteStream) -> None:
        # With no request to wait for, an RST could be there before the connect() of
        # the client has returned, and make that fail.
        await stream.receive()
        await way_out(stream)

    backend, options = LOOPS[loop]
    anyio.run(
        serve_until_sigterm, side, handler, backend=backend, backend_options=options
    )


async def serve_until_sigterm(side: str, handler: Handler) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM) as signals:
        async with anyio.create_task_group() as tg:
            print(await tg.start(SIDES[side], handler), flush=True)
            with anyio.move_on_after(LIFETIME):
                await anext(signals)
            tg.cancel_scope.cancel()


@contextmanager
def running_server(loop: str, side: str, way: Way) -> Iterator[subprocess.Popen[str]]:
    """A process in which one side serves *way*. It is killed at the end.

    What it says of the failures, which are deliberate, stays in a pipe.
    """
    with subprocess.Popen(
        [sys.executable, "-m", __name__, loop, side, way.name],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def next_line(server: subprocess.Popen[str]) -> str:
    """Wait for the next line that *server* prints."""
    assert server.stdout is not None
    assert server.stderr is not None
    line = server.stdout.readline()
    if not line:
        raise RuntimeError(f"a server of the demo is gone:\n{server.stderr.read()}")
    return line


# The clients.


@dataclass(frozen=True)
class Seen:
    """What a client saw of an answer, and whether that was true."""

    text: str
    true: bool


def is_true(*, claimed: bool, finished: bool, whole: bool) -> bool:
    """Whether a client was told the truth.

    Args:
      claimed: it was told that it has the whole answer.
      finished: the handler finished the answer.
      whole: the client has all of it.
    """
    if claimed:
        return finished and whole
    return not finished


def see_by_socket(way: Way, server: subprocess.Popen[str]) -> Seen:
    """Read to the end, and tell by which kind of end it was."""
    data = bytearray()
    close = PeerClose.FIN
    port = int(next_line(server))
    with socket.create_connection((LOOPBACK, port), timeout=PATIENCE) as sock:
        try:
            try:
                sock.sendall(b"request")
                if way.before_reading is not None:
                    way.before_reading(sock, server)
            except (BrokenPipeError, ConnectionResetError):
                # The kernel tells once. What had arrived before can still be read, and
                # then comes an end like any other.
                close = PeerClose.RST
            while chunk := sock.recv(65536):
                data += chunk
        except ConnectionResetError:
            close = PeerClose.RST
        except TimeoutError:
            close = PeerClose.NONE
    end = "no end" if close is PeerClose.NONE else close.value
    claimed = close is PeerClose.FIN
    return judge(way, bytes(data), end, claimed=claimed)


def upload(sock: socket.socket, server: subprocess.Popen[str]) -> None:
    next_line(server)
    sock.sendall(TOO_MUCH)


def wait_for_the_cut(sock: socket.socket, server: subprocess.Popen[str]) -> None:
    next_line(server)


def see_by_curl(way: Way, server: subprocess.Popen[str]) -> Seen:
    """Download with curl, and tell by its exit status."""
    url = f"http://{LOOPBACK}:{int(next_line(server))}/"
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "answer")
        # --disable: no ~/.curlrc.
        command = ["curl", "--disable", "--silent", "--noproxy", "*"]
        command += ["--max-time", str(PATIENCE), "--output", str(file), url]
        status = subprocess.run(command, check=False).returncode
        data = file.read_bytes() if file.exists() else b""
    return judge(way, data, f"exit {status}", claimed=status == 0)


def judge(way: Way, data: bytes, end: str, *, claimed: bool) -> Seen:
    true = is_true(claimed=claimed, finished=way.finishes, whole=data == way.answer)
    return Seen(f"{len(data):,} of {len(way.answer):,} B, {end}", true)


# The table.


@dataclass(frozen=True)
class Way:
    """A way out of a handler."""

    name: str
    """What the handler does, to be read after *the handler*."""

    handler: Handler

    see: Callable[[Way, subprocess.Popen[str]], Seen] = see_by_socket
    """The client."""

    before_reading: Callable[[socket.socket, subprocess.Popen[str]], None] | None = None
    """What the client, if it is a socket, does after its request."""

    answer: bytes = ANSWER
    """All that the client is there for."""

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
    Way("has a failing child task", has_a_failing_child),
    Way(
        "cuts a send short",
        cuts_a_send_short,
        before_reading=wait_for_the_cut,
        answer=TOO_MUCH,
    ),
    Way("calls sys.exit()", exits),
    Way("is killed by SIGKILL", is_killed),
)

HTTP_WAYS = (Way("fails half way", raises_in_http, see_by_curl),)

# What the client saw on each of SIDES.
Row = dict[str, Seen]


def measure(loop: str, way: Way) -> Row:
    with ExitStack() as stack:
        # Both start at once: that takes the most time by far.
        servers = {
            side: stack.enter_context(running_server(loop, side, way)) for side in SIDES
        }
        return {side: way.see(way, server) for side, server in servers.items()}


def show(loop: str) -> list[Row]:
    """Measure every way out on *loop*, and print the table row by row."""
    print_line(loop, *SIDES)
    rows = show_rows(loop, "the handler ...", "the client got", WAYS)
    if shutil.which("curl") is None:
        print("curl is not installed: its part is left out")
    else:
        rows += show_rows(loop, "the HTTP handler ...", "curl got", HTTP_WAYS)
    for side in SIDES:
        truths = [row[side].true for row in rows]
        print(f"{side} told the truth in {sum(truths)} of {len(truths)} rows", flush=True)
    return rows


def show_rows(loop: str, label: str, heading: str, ways: Iterable[Way]) -> list[Row]:
    print_line(label, *(heading for _ in SIDES))
    rows: list[Row] = []
    for way in ways:
        row = measure(loop, way)
        print_line(way.name, *(cell(seen) for seen in row.values()))
        rows.append(row)
    return rows


def cell(seen: Seen) -> str:
    return f"{seen.text:29}  {'true' if seen.true else 'LIE'}"


def print_line(label: str, *cells: str) -> None:
    columns = (f"{label:24}", *(f"{text:35}" for text in cells))
    print("  ".join(columns).rstrip(), flush=True)


def exit_status(rows: Iterable[Row]) -> int:
    """1 if anyio_rst lied anywhere, otherwise 0."""
    return 0 if all(row[OURS].true for row in rows) else 1


# The command.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--loop",
        choices=[*LOOPS, "all"],
        default="asyncio",
        help="event loop of the servers (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the demo.

    Returns:
      The exit status: 1 if anyio_rst lied, 2 if the loop is not installed, otherwise 0.
    """
    rows: list[Row] = []
    for loop in LOOPS if arguments.loop == "all" else [arguments.loop]:
        if importlib.util.find_spec(loop) is not None:
            rows += show(loop)
        elif arguments.loop == "all":
            print(f"{loop} is not installed, and left out")
        else:
            print(f"anyio-rst demo: {loop} is not installed", file=sys.stderr)
            return 2
    return exit_status(rows)


if __name__ == "__main__":
    serve(*sys.argv[1:])
