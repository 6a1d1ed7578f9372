"""An exception that a signal handler raises, at every point of an exit and of a send.

CPython runs signal handlers when a function begins, after a call, and before a jump back.
Whatever one of them interrupts, the connection has ended then, and the peer and the
`Ending` agree how.
"""

from __future__ import annotations

import dis
import os
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import cache
from types import CodeType, FrameType
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

import anyio_rst
from anyio_rst import Cause, CloseKind, Connection, PeerClose, connection_scope

from securing import CLEAN, TLSPeer, client_context, server_context
from serving import Peer, Seen, foreign_pair

pytestmark = [
    pytest.mark.anyio,
    # Between the call of an async function and its await there is a point.
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]

PACKAGE = os.path.dirname(anyio_rst.__file__)

ANSWER = b"answer"

# Where an exit begins.
EXITS = ("abort", "aclose", "body_returned", "body_raised", "send_eof")


class Failure(Exception):
    pass


class Struck(BaseException):
    """What the signal handler raises."""


@cache
def points(code: CodeType) -> frozenset[int]:
    """Offsets of the instructions before which signal handlers may run."""
    offsets = set()
    before = "RESUME"
    for instruction in dis.get_instructions(code):
        if before.startswith(("CALL", "RESUME", "YIELD")):
            offsets.add(instruction.offset)
        if instruction.opname.startswith("JUMP"):
            offsets.add(instruction.offset)
        if instruction.opname not in ("CACHE", "PRECALL"):
            before = instruction.opname
    return frozenset(offsets)


class Strike:
    """Raises at one of the points of the library's that follow a call of *begins*."""

    def __init__(self, at: int, begins: tuple[str, ...]) -> None:
        self.left = at
        self.begins = begins
        self.has_begun = False
        self.has_struck = False

    def __enter__(self) -> None:
        self.before = sys.gettrace()
        # Python 3.12 traces no opcode if no frame asked for it before the tracing began.
        sys._getframe().f_trace_opcodes = True
        sys.settrace(self.trace)

    def __exit__(self, *exc_info: object) -> None:
        sys.settrace(self.before)

    def trace(self, frame: FrameType, event: str, arg: object) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(PACKAGE) or self.has_struck:
            return None
        # Python drops what is raised in the first two, and in the first instructions of
        # the last, nobody has a chance.
        if code.co_name in ("__del__", "forget", "__aexit__"):
            return None
        self.has_begun |= code.co_name in self.begins
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        return self.trace_instruction

    def trace_instruction(self, frame: FrameType, event: str, arg: object) -> Any:
        if (
            event == "opcode"
            and self.has_begun
            and not self.has_struck
            and frame.f_lasti in points(frame.f_code)
        ):
            self.left -= 1
            if self.left < 0:
                self.has_struck = True
                raise Struck
        return self.trace_instruction


async def at_every_point(
    once: Callable[[Strike], Awaitable[object]], begins: tuple[str, ...]
) -> None:
    at = 0
    while True:
        strike = Strike(at, begins)
        await once(strike)
        if not strike.has_struck:
            assert at > 0
            return
        at += 1


def seen_by(peer: Peer) -> Seen:
    """All of it is on the wire already, and on loopback that is there."""
    data = b""
    with peer.sock as sock:
        try:
            while chunk := sock.recv(65536):
                data += chunk
        except ConnectionResetError:
            return Seen(data, PeerClose.RST)
        return Seen(data, PeerClose.FIN)


async def leave(conn: Connection, how: str) -> None:
    if how == "raises":
        raise Failure
    if how == "half-closes and raises":
        await conn.send_eof()
        raise Failure
    if how == "is cancelled":
        await checkpoint()
    if how == "closes":
        await conn.aclose()
    if how == "aborts":
        conn.abort()


@pytest.mark.parametrize(
    "how",
    ["returns", "raises", "is cancelled", "closes", "aborts", "half-closes and raises"],
)
async def test_exit_that_is_interrupted_anywhere_ends_truly(how: str) -> None:
    async def once(strike: Strike) -> None:
        stream, peer = await foreign_pair()
        peer.send_eof()
        with anyio.CancelScope() as scope, suppress(Failure, Struck):
            with strike:
                async with connection_scope(stream) as conn:
                    await conn.send(ANSWER)
                    if how == "is cancelled":
                        scope.cancel()
                    await leave(conn, how)
        ending = conn.ending
        seen = seen_by(peer)
        assert ending is not None
        assert ending.outcome is not None
        if ending.fin_sent_before_reset:
            assert seen == Seen(ANSWER, PeerClose.FIN)
        else:
            assert seen.close.value == ending.kind.value

    await at_every_point(once, EXITS)


async def test_send_that_is_interrupted_anywhere_is_whole_or_not_there_or_torn() -> None:
    async def once(strike: Strike) -> None:
        stream, peer = await foreign_pair()
        peer.send_eof()
        with suppress(Struck):
            async with connection_scope(stream, finish_on=Struck) as conn:
                with strike:
                    await conn.send(ANSWER)
        ending = conn.ending
        seen = seen_by(peer)
        assert ending is not None
        assert seen.close.value == ending.kind.value
        if ending.kind is CloseKind.FIN:
            assert seen.data in (b"", ANSWER)
        else:
            assert ending.cause is Cause.TORN_SEND

    await at_every_point(once, ("send",))


async def test_tls_send_that_is_interrupted_anywhere_leaves_no_session_broken() -> None:
    async def once(strike: Strike) -> None:
        stream, plain = await foreign_pair()
        peer = TLSPeer(plain, client_context(), server_side=False)
        seen: list[tuple[bytes, list[str]]] = []

        async def talk() -> None:
            await peer.handshake()
            await peer.send(b"go")
            seen.append(await peer.end())
            plain.sock.close()

        async with anyio.create_task_group() as tg:
            tg.start_soon(talk)
            with suppress(Struck):
                async with connection_scope(stream, finish_on=Struck) as conn:
                    await conn.start_tls(server_context(), server_side=True)
                    assert await conn.receive() == b"go"
                    with strike:
                        await conn.send(ANSWER)
        [(data, ends)] = seen
        ending = conn.ending
        assert ending is not None
        if ending.kind is CloseKind.FIN:
            assert data in (b"", ANSWER)
            assert ends == CLEAN
        else:
            assert ending.cause is Cause.TORN_SEND
            assert ends == ["RST"]

    await at_every_point(once, ("send",))
