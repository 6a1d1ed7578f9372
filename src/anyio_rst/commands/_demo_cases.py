"""The ways out of a handler that the demo shows, and what is whole of each answer.

A handler and the client of it go step by step where it matters: what the process of
the handler prints, the client reads.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anyio
from anyio.abc import SocketAttribute, SocketStream

from ._demo_processes import NotMeasured, say

if TYPE_CHECKING:
    from ._demo_processes import Process

# SO_RCVBUF and SO_SNDBUF, in bytes, where something has to be too much for them. The
# kernel gives twice that (socket(7)), and does not let it grow with the traffic.
BUFFER = 65536

ANSWER = bytes(range(250)) * 8
HALF = ANSWER[: len(ANSWER) // 2]

# Too much for the receive buffer of a client that does not read, but not for the send
# buffer of the server: when its handler returns, a part of it has yet to be delivered.
LATE_ANSWER = ANSWER * 100

# Too much for the buffers of both sides together.
TOO_MUCH = ANSWER * 1000

Handler = Callable[[SocketStream], Awaitable[None]]


class HalfWay(Exception):
    """A handler failed."""


# The ways out, of a handler that has received its request.


async def returns(stream: SocketStream) -> None:
    await stream.send(ANSWER)


async def returns_during_an_upload(stream: SocketStream) -> None:
    await stream.send(LATE_ANSWER)
    say("returning")  # the client uploads the rest: upload()


async def raises(stream: SocketStream) -> None:
    await stream.send(HALF)
    raise HalfWay


async def times_out(stream: SocketStream) -> None:
    await stream.send(HALF)
    with anyio.fail_after(0.1):
        await anyio.sleep_forever()


async def is_cancelled(stream: SocketStream) -> None:
    await stream.send(HALF)
    os.kill(os.getpid(), signal.SIGTERM)  # cancels the server: serve_until_sigterm()
    await anyio.sleep_forever()


async def has_a_failing_child(stream: SocketStream) -> None:
    async with anyio.create_task_group() as tg:
        tg.start_soon(raises, stream)
        await anyio.sleep_forever()


async def cuts_a_send_short(stream: SocketStream) -> None:
    # By the word of a client that has its first bytes, and does not read: cut_the_send().
    # After some time, a slow machine might not have begun, and a fast one be done.
    sock = stream.extra(SocketAttribute.raw_socket)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
    scope = anyio.CancelScope()

    async def cut() -> None:
        await stream.receive()
        scope.cancel()

    async with anyio.create_task_group() as tg:
        tg.start_soon(cut)
        with scope:
            await stream.send(TOO_MUCH)
    say("cut short" if scope.cancelled_caught else "not cut")


async def exits(stream: SocketStream) -> None:
    await stream.send(HALF)
    sys.exit()


async def is_killed(stream: SocketStream) -> None:
    await stream.send(HALF)
    os.kill(os.getpid(), signal.SIGKILL)


async def raises_in_http(stream: SocketStream) -> None:
    # With no length, the end of the connection is the end of the body: RFC 9112, 6.3.
    await stream.send(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
    await raises(stream)


# What a client does after its request and before it reads.


def upload(sock: socket.socket, server: Process) -> None:
    server.next_line()
    sock.sendall(TOO_MUCH)


def cut_the_send(sock: socket.socket, server: Process) -> None:
    sock.recv(1, socket.MSG_PEEK)
    sock.sendall(b"enough")
    if server.next_line() != "cut short":
        raise NotMeasured("the send was not cut short")
    server.next_line()  # closed: nothing more of it can come from the process


# The table.


@dataclass(frozen=True)
class Way:
    """A way out of a handler."""

    name: str
    """What the handler does, to be read after *the handler*."""

    handler: Handler

    before_reading: Callable[[socket.socket, Process], None] | None = None
    """What the client, if it is a socket, does after its request."""

    answer: bytes = ANSWER
    """All that the client is there for."""

    finishes: bool = False
    """Whether the handler sends all of that, and then returns."""

    exits: bool = False
    """Whether the process of the server ends with it."""


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
    Way("is cancelled", is_cancelled, exits=True),
    Way("has a failing child task", has_a_failing_child),
    Way(
        "cuts a send short",
        cuts_a_send_short,
        before_reading=cut_the_send,
        answer=TOO_MUCH,
    ),
    Way("calls sys.exit()", exits, exits=True),
    Way("is killed by SIGKILL", is_killed, exits=True),
)

HTTP_WAYS = (Way("fails half way", raises_in_http),)
