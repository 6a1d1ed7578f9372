"""The ways out of a handler that the demo shows, and what is whole of each answer.

A handler and the client of it go step by step where it matters: what the process of
the handler prints, the client reads.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anyio
from anyio.abc import ByteStream

if TYPE_CHECKING:
    import socket
    import subprocess

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


# What a client does after its request and before it reads.


def next_line(server: subprocess.Popen[str]) -> str:
    """Wait for the next line that *server* prints."""
    assert server.stdout is not None
    assert server.stderr is not None
    line = server.stdout.readline()
    if not line:
        raise RuntimeError(f"a server of the demo is gone:\n{server.stderr.read()}")
    return line


def upload(sock: socket.socket, server: subprocess.Popen[str]) -> None:
    next_line(server)
    sock.sendall(TOO_MUCH)


def wait_for_the_cut(sock: socket.socket, server: subprocess.Popen[str]) -> None:
    next_line(server)


# The table.


@dataclass(frozen=True)
class Way:
    """A way out of a handler."""

    name: str
    """What the handler does, to be read after *the handler*."""

    handler: Handler

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

HTTP_WAYS = (Way("fails half way", raises_in_http),)
