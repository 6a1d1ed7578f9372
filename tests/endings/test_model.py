"""Random scripts of both sides of a connection, held to a model of the rules.

Hypothesis generates a script: operations of our side (a handler, a child of its task
group, a task beside it) and of the peer, a plain socket, in one order. They run step by
step on a real connection, and after each step the event loop gets a number of turns that
is a part of the script. So an operation may come when the one before it has settled, or
at any checkpoint on the way there; a failing script replays, and shrinks to a list of
steps that can be read.

These are scripts, and not a `RuleBasedStateMachine` on a `start_blocking_portal()`,
because the loop of a portal runs on between two rules: the checkpoint at which the next
rule strikes would be a matter of luck.

The suite runs a few hundred scripts, always the same ones; `nox -s model` runs many
thousands, other ones each time.
"""

from __future__ import annotations

import enum
import logging
import math
import os
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fcntl import ioctl
from functools import partial
from random import Random
from termios import FIONREAD, TIOCOUTQ
from typing import Any, Literal, TypeAlias, get_args

import anyio
import anyio.abc
import outcome
import pytest
import trio
from anyio.lowlevel import checkpoint
from conftest import collect, open_descriptors
from hypothesis import Phase, event, example, given, register_random, settings
from hypothesis import strategies as st

from anyio_rst import (
    Cause,
    CloseKind,
    Connection,
    Drain,
    Ending,
    PeerClose,
    PeerReset,
    connection_scope,
    serve_tcp,
)

from serving import LONG

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup, ExceptionGroup

# The suite is the same everywhere and every time; the nightly run explores.
COMMON = settings(
    deadline=None, database=None, phases=[Phase.explicit, Phase.generate, Phase.shrink]
)
PROFILES = {
    "suite": settings(COMMON, max_examples=100, derandomize=True),
    "nightly": settings(COMMON, max_examples=3_500, print_blob=True),
}
PROFILE = PROFILES[os.environ.get("MODEL_PROFILE", "suite")]

# Small, so that buffers are soon full; with segments that are smaller still, so that a
# window opens as soon as the peer reads, and not by a probe of the kernel's timer.
BUFFER = 16384
SEGMENT = 1460

# More than the buffers of both sides hold.
TOO_MUCH = 400_000

# Turns of the loop after which nothing goes on without the other side.
SETTLED = 30

# linux/tcp_states.h
TCP_CLOSE = 7

# What either side sends: no part of it is like another.
OURS, THEIRS = (Random(seed).randbytes(2**23) for seed in (1, 2))

BACKENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "asyncio": ("asyncio", {"use_uvloop": False}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}


class Failure(Exception):
    pass


class Stop(Exception):
    """In *finish_on*."""


# The script.

Who: TypeAlias = Literal["body", "child", "beside"]


@dataclass(frozen=True)
class Send:
    size: int
    by: Who
    swallow: bool  # the exceptions of the connection


@dataclass(frozen=True)
class Receive:
    max_bytes: int
    by: Who
    swallow: bool


@dataclass(frozen=True)
class Call:
    method: Literal["send_eof", "aclose", "detach"]
    by: Who
    swallow: bool


@dataclass(frozen=True)
class Raise:
    what: type[Exception]
    by: Who


@dataclass(frozen=True)
class TimeOut:
    """A timeout around what is under way passes, and is caught."""

    of: Who


class Do(enum.Enum):
    RETURN = enum.auto()
    ABORT = enum.auto()
    CANCEL = enum.auto()
    """All of our side, from outside."""
    OPEN_GROUP = enum.auto()
    OPEN_GROUP_THAT_SWALLOWS = enum.auto()
    STOP_GROUP = enum.auto()
    LEAVE_GROUP = enum.auto()
    LINGERING_CHILD = enum.auto()
    """One that stays in a shielded clean-up until the script is over."""
    PEER_HALF_CLOSES = enum.auto()
    PEER_CLOSES = enum.auto()
    PEER_RESETS = enum.auto()


@dataclass(frozen=True)
class PeerSend:
    size: int


@dataclass(frozen=True)
class PeerRead:
    size: int


Work: TypeAlias = Send | Receive | Call | Raise
Op: TypeAlias = Work | TimeOut | Do | PeerSend | PeerRead
Script: TypeAlias = list[tuple[Op, int]]

whos = st.sampled_from(get_args(Who))
sizes = st.sampled_from([1, 0, 1000, BUFFER, 2 * BUFFER, TOO_MUCH])
most = st.sampled_from([65536, 1, 1000])
methods = st.sampled_from(["send_eof", "aclose", "detach"])
swallows = st.sampled_from([True, True, False])
turns = st.sampled_from([SETTLED, SETTLED, 0, 1, 2, 3, 5])

OPEN_GROUP = [Do.OPEN_GROUP, Do.OPEN_GROUP_THAT_SWALLOWS]

work: st.SearchStrategy[Op] = st.one_of(
    st.builds(Send, size=sizes, by=whos, swallow=swallows),
    st.builds(Receive, max_bytes=most, by=whos, swallow=swallows),
    st.builds(TimeOut, of=whos),
    st.builds(PeerSend, size=sizes),
    st.builds(PeerRead, size=sizes),
    st.builds(Call, method=st.just("send_eof"), by=whos, swallow=swallows),
    st.sampled_from([*OPEN_GROUP, Do.LINGERING_CHILD, Do.PEER_HALF_CLOSES]),
)
ends: st.SearchStrategy[Op] = st.one_of(
    st.just(Do.RETURN),
    st.sampled_from(Do),
    st.builds(Raise, what=st.sampled_from([Failure, Stop]), by=whos),
    st.builds(Call, method=methods, by=whos, swallow=swallows),
)


def steps(ops: st.SearchStrategy[Op], most: int) -> st.SearchStrategy[Script]:
    return st.lists(st.tuples(ops, turns), max_size=most)


@st.composite
def scripts(draw: st.DrawFn) -> Script:
    """Work, perhaps in a group or with a send that is cut; then an end, and the rest."""
    script: Script = []
    if draw(st.booleans()):
        script.append((draw(st.sampled_from(OPEN_GROUP)), SETTLED))
    script += draw(steps(work, 6))
    if draw(st.booleans()):
        who = draw(whos)
        script.append((Send(TOO_MUCH, by=who, swallow=True), draw(turns)))
        script.append((TimeOut(of=who), draw(turns)))
    script += draw(steps(work, 3))
    script += draw(steps(ends, 2))
    return script + draw(steps(st.one_of(work, ends), 5))


PATIENT_DRAIN = Drain(timeout=LONG)
drains = st.sampled_from(
    [PATIENT_DRAIN, Drain(timeout=0), Drain(timeout=LONG, max_bytes=1000), None]
)

# What was found, and is to be found again.

# On uvloop: a shutdown() before the transport's own broke the transport, and what it had
# yet to read was lost.
HALF_CLOSE_AFTER_THE_PEERS: Script = [
    (Do.PEER_HALF_CLOSES, SETTLED),
    (Call(method="send_eof", by="body", swallow=True), SETTLED),
    (Receive(max_bytes=65536, by="body", swallow=True), SETTLED),
]

# The drain took an end that followed a loss, told before, for a FIN.
RESET_BEFORE_A_SEND_BESIDE_THE_RETURN: Script = [
    (Call(method="send_eof", by="body", swallow=True), 0),
    (Do.PEER_RESETS, SETTLED),
    (Send(size=1, by="beside", swallow=True), 0),
    (Do.RETURN, SETTLED),
]

# The drain went on, on a descriptor of its own that nobody closed.
ABORT_BEFORE_THE_FIRST_TURN_OF_THE_DRAIN: Script = [(Do.RETURN, 1), (Do.ABORT, SETTLED)]

# asyncio's transport had noticed the reset, and not yet told of it; the socket told the
# drain of an end like any other.
RESET_THAT_THE_TRANSPORT_KEEPS_TO_ITSELF: Script = [
    (Call(method="send_eof", by="body", swallow=True), SETTLED),
    (Do.PEER_RESETS, 1),
    (Do.RETURN, SETTLED),
]

# What a few hundred scripts may not come to.

ANSWER_THAT_WAITS_FOR_THE_PEER_TO_READ: Script = [
    (Send(size=2 * BUFFER, by="body", swallow=True), SETTLED),
    (Do.RETURN, SETTLED),
]

CANCELLATION_BESIDE_A_SHIELDED_CLEAN_UP: Script = [
    (Do.OPEN_GROUP, SETTLED),
    (Do.LINGERING_CHILD, SETTLED),
    (Do.CANCEL, SETTLED),
]


# The model.


@dataclass(frozen=True)
class Fact:
    """What our side did, in the order of time, and how its sending stood then."""

    what: Literal[
        "aborted",
        "closed",
        "detached",
        "left",  # the body, with *leaves*
        "group entered",
        "group failed",  # an exception of *leaves* left a child or the body of the group
        "group stopped",
        "cancelled from outside",
        "settled",
    ]
    leaves: frozenset[str] = frozenset()  # names of exceptions
    grouped: bool = False
    torn: bool = False
    eof_sent: bool = False
    peer: str = "open"
    whole: int = 0  # bytes that every completed send adds up to


def leaves_of(exc: BaseException) -> frozenset[str]:
    if isinstance(exc, BaseExceptionGroup):
        return frozenset().union(*map(leaves_of, exc.exceptions))
    if isinstance(exc, anyio.get_cancelled_exc_class()):
        return frozenset(["cancelled"])
    return frozenset([type(exc).__name__])


def verdict(facts: Sequence[Fact]) -> tuple[Fact, set[Cause]] | None:
    """Rules 1 and 4: what decided, and the causes it admits; None if nothing has yet.

    More than one only if a cancellation from outside was still on its way.
    """
    stopped = cancelled = False
    for fact in facts:
        cause: Cause | None = None
        if fact.what == "aborted":
            cause = Cause.ABORTED
        elif fact.what == "closed":
            cause = Cause.CLOSED
        elif fact.what == "detached":
            cause = Cause.DETACHED
        elif fact.what == "group entered":
            stopped = False
        elif fact.what == "group stopped":
            stopped = True
        elif fact.what == "group failed":
            if fact.leaves == {"cancelled"}:
                cause = None if stopped else Cause.CANCELLED
            elif fact.leaves == {"Stop"}:
                stopped = True
            else:
                cause = Cause.GROUP_FAILED
        elif fact.what == "left":
            if not fact.leaves:
                cause = Cause.RETURNED
            elif fact.leaves == {"Stop"}:
                cause = Cause.FINISH_ON
            elif fact.leaves == {"cancelled"}:
                cause = Cause.CANCELLED
            else:
                cause = Cause.GROUP_FAILED if fact.grouped else Cause.RAISED
        elif fact.what == "cancelled from outside":
            cancelled = True
        elif cancelled and not stopped:  # and settled
            cause = Cause.CANCELLED
        if cause is not None:
            if fact.torn and cause in EARNS_FIN:
                cause = Cause.TORN_SEND
            return fact, {cause, Cause.CANCELLED} if cancelled else {cause}
    return None


EARNS_FIN = {Cause.RETURNED, Cause.CLOSED, Cause.FINISH_ON}


# The two sides.

ORDINARY = (
    anyio.ClosedResourceError,
    anyio.BrokenResourceError,
    anyio.BusyResourceError,
    anyio.EndOfStream,
)


class OurSide:
    """The handler and the tasks around it, and a record of what they did."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.conn: Connection = None  # type: ignore[assignment]
        self.facts: list[Fact] = []
        self.whole = 0  # bytes of completed sends
        self.offered = 0  # and of those that were begun
        self.pending: int | None = None  # size of the send that is not complete
        self.using: set[str] = set()  # directions in use
        self.eof_sent = False
        self.lost = False
        self.received = 0
        self.detached: anyio.abc.SocketStream | None = None
        self.scopes: dict[Who, anyio.CancelScope] = {}  # of what is under way
        self.group: anyio.abc.TaskGroup | None = None
        self.tasks: anyio.abc.TaskGroup
        self.outside = anyio.CancelScope()
        self.over = anyio.Event()  # for a lingering child
        self.returning = False
        self.left = False
        self.raised: BaseException | None = None
        self.first_ending: Ending | None = None
        self.peer_closes = set(PeerClose)  # what `Ending.peer` may be
        self.started = anyio.Event()
        self.wrong: BaseException | None = None  # a failure of an assertion in a task
        self._orders: deque[Work | Do] = deque()
        self._order_came: anyio.Event | None = None
        self._first: int | None = None
        self._took = 0
        self.sock: Any

    # What the kernel took, from the kernel.

    def took(self) -> int:
        """Bytes that the kernel has taken of our sends, ever."""
        descriptor = self.sock.fileno()
        # A FIN counts as one more, and a reset starts from nothing.
        if descriptor != -1 and not self.eof_sent and not self.decided:
            sock = socket.socket(socket.AF_INET, fileno=descriptor)
            try:
                info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 128)
                queued = struct.unpack("i", ioctl(descriptor, TIOCOUTQ, b"\0" * 4))[0]
            finally:
                sock.detach()
            # tcpi_bytes_acked of linux/tcp.h
            total: int = struct.unpack_from("Q", info, 120)[0] + queued
            if self._first is None:
                self._first = total
            self._took = total - self._first
        return self._took

    @property
    def torn(self) -> bool:
        if self.pending is None:
            return False
        return self.whole < self.took() < self.whole + self.pending

    @property
    def decided(self) -> bool:
        return any(
            fact.what in ("aborted", "closed", "detached", "left") for fact in self.facts
        ) or (self.conn.ending is not None)

    def record(self, what: Any, exc: BaseException | None = None) -> None:
        whole = self.whole
        took = self.took()
        if self.pending and took == whole + self.pending:
            whole += self.pending  # its task has only to wake up
        self.facts.append(
            Fact(
                what,
                frozenset() if exc is None else leaves_of(exc),
                isinstance(exc, BaseExceptionGroup),
                self.torn,
                self.eof_sent,
                self.peer.end,
                whole,
            )
        )

    # The tasks.

    async def handler(self, conn: Connection) -> None:
        self.conn = conn
        self.sock = conn.extra(anyio.abc.SocketAttribute.raw_socket)
        self.took()
        self.started.set()
        try:
            await self.obey()
        except BaseException as exc:
            self.raised = exc
            self.record("left", exc)
            raise
        else:
            self.record("left")
        finally:
            self.left = True

    @property
    def idle(self) -> bool:
        return self._order_came is not None and not self._orders

    def order(self, op: Work | Do) -> None:
        self._orders.append(op)
        assert self._order_came is not None
        self._order_came.set()

    def start(self, op: Work) -> None:
        scope = anyio.CancelScope()
        if op.by == "body":
            if self.idle:
                self.scopes["body"] = scope
                self.order(op)
        elif op.by == "child":
            if self.idle and self.group is not None:
                self.scopes["child"] = scope
                self.group.start_soon(self.child, op)
        elif not isinstance(op, Raise):
            self.scopes["beside"] = scope
            self.tasks.start_soon(self.beside, op)

    async def obey(self) -> None:
        while not self.returning:
            if not self._orders:
                self._order_came = anyio.Event()
                try:
                    await self._order_came.wait()
                finally:
                    self._order_came = None
            op = self._orders.popleft()
            if op is Do.RETURN:
                self.returning = True
            elif op is Do.LEAVE_GROUP:
                return
            elif isinstance(op, Do):
                await self.in_group(swallow=op is Do.OPEN_GROUP_THAT_SWALLOWS)
            else:
                await self.work(op, "body")

    async def in_group(self, *, swallow: bool) -> None:
        try:
            self.record("group entered")
            async with self.conn.create_task_group() as self.group:
                try:
                    await self.obey()
                except BaseException as exc:
                    self.record("group failed", exc)
                    raise
        except ExceptionGroup:
            if not swallow:
                raise
        finally:
            self.group = None

    async def child(self, op: Work) -> None:
        try:
            await self.work(op, "child")
        except BaseException as exc:
            self.record("group failed", exc)
            raise

    async def lingering_child(self) -> None:
        try:
            try:
                await anyio.sleep_forever()
            finally:
                with anyio.CancelScope(shield=True):
                    await self.over.wait()
        except BaseException as exc:
            self.record("group failed", exc)
            raise

    async def beside(self, op: Work) -> None:
        with suppress(*ORDINARY):
            await self.work(op, "beside")

    async def work(self, op: Work, who: Who) -> None:
        try:
            with self.scopes[who]:
                if isinstance(op, Send):
                    await self.send(op.size)
                elif isinstance(op, Receive):
                    await self.receive(op.max_bytes)
                elif isinstance(op, Raise):
                    raise op.what
                elif op.method == "send_eof":
                    await self.send_eof()
                elif op.method == "aclose":
                    self.record("closed")
                    await self.conn.aclose()
                else:
                    self.detach()
        except (AssertionError, pytest.fail.Exception) as exc:
            self.wrong = self.wrong or exc
        except ORDINARY:
            if isinstance(op, Raise) or not op.swallow:
                raise
        finally:
            del self.scopes[who]

    async def send(self, size: int) -> None:
        if self.decided or self.eof_sent:
            with pytest.raises((anyio.ClosedResourceError, anyio.BusyResourceError)):
                await self.conn.send(OURS[:size])
            raise anyio.ClosedResourceError
        if "send" in self.using:
            with pytest.raises(anyio.BusyResourceError):
                await self.conn.send(OURS[:size])
            raise anyio.BusyResourceError("sending")
        if self.pending is not None or self.lost:
            with pytest.raises(anyio.BrokenResourceError):
                await self.conn.send(OURS[:size])
            raise anyio.BrokenResourceError
        self.using.add("send")
        self.pending = size or None
        self.offered = self.whole + size
        try:
            await self.conn.send(OURS[self.whole : self.whole + size])
        except BaseException as exc:
            self.note_loss(exc)
            if self.took() == self.whole:
                self.pending = None
            raise
        else:
            self.whole += size
            self.pending = None
        finally:
            self.using.remove("send")

    async def receive(self, max_bytes: int) -> None:
        if "receive" in self.using and not self.decided:
            with pytest.raises(anyio.BusyResourceError):
                await self.conn.receive(max_bytes)
            raise anyio.BusyResourceError("receiving")
        self.using.add("receive")
        try:
            data = await self.conn.receive(max_bytes)
        except BaseException as exc:
            self.note_loss(exc)
            if isinstance(exc, anyio.EndOfStream):
                assert self.peer.fin_sent
                assert self.received == self.peer.sent
                self.peer_closes -= {PeerClose.NONE}
            raise
        else:
            assert 0 < len(data) <= max_bytes
            assert data == THEIRS[self.received : self.received + len(data)]
            self.received += len(data)
        finally:
            self.using.discard("receive")

    async def send_eof(self) -> None:
        free = "send" not in self.using
        self.took()
        self.using.add("send")
        try:
            await self.conn.send_eof()
            assert free
            self.eof_sent = True
        except BaseException as exc:
            self.note_loss(exc)
            raise
        finally:
            if free:
                self.using.discard("send")

    def note_loss(self, exc: BaseException) -> None:
        if isinstance(exc, PeerReset):
            self.lost = True
            assert self.peer.gone
            self.peer_closes = {PeerClose.RST}
        elif isinstance(exc, anyio.BrokenResourceError):
            assert self.pending is not None

    def detach(self) -> None:
        stream = self.conn.detach()
        assert not self.using
        self.detached = stream
        self.record("detached")


class Peer:
    """A plain non-blocking socket."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.sock = socket.socket()
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT)
        self.sock.connect(address)
        self.sock.setblocking(False)
        self.sent = 0
        self.read_bytes = 0
        self.saw: PeerClose = PeerClose.NONE
        self.end = "open"  # what it did itself: "half-closed", "closed", "reset"
        self.fin_sent = False

    def send(self, size: int) -> None:
        end = self.sent + size
        while self.sent < end and self.end == "open":
            try:
                self.sent += self.sock.send(THEIRS[self.sent : end])
            except BlockingIOError:
                return
            except ConnectionResetError:
                self.saw = PeerClose.RST
                return
            except BrokenPipeError:
                # A reset after our FIN, which is still there to be read: tcp_reset() in
                # net/ipv4/tcp_input.c. Or it has been told before.
                return

    def read(self, size: int) -> None:
        while size and self.saw is PeerClose.NONE and not self.gone:
            try:
                data = self.sock.recv(min(size, 65536))
            except BlockingIOError:
                return
            except ConnectionResetError:
                self.saw = PeerClose.RST
                return
            if not data:
                self.saw = PeerClose.FIN
                return
            assert data == OURS[self.read_bytes : self.read_bytes + len(data)]
            self.read_bytes += len(data)
            size -= len(data)

    def half_close(self) -> None:
        if self.end == "open":
            with suppress(OSError):
                self.sock.shutdown(socket.SHUT_WR)
            self.end = "half-closed"
            self.fin_sent = True

    def close(self) -> None:
        if self.gone:
            return
        unread = struct.unpack("i", ioctl(self.sock.fileno(), FIONREAD, b"\0" * 4))[0]
        # RFC 2525, 2.17
        self.end = "reset" if unread else "closed"
        self.fin_sent |= not unread
        self.sock.close()

    def reset(self) -> None:
        if self.gone:
            return
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()
        self.end = "reset"

    @property
    def gone(self) -> bool:
        return self.end in ("closed", "reset")

    def _info(self, size: int) -> bytes:
        return self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, size)

    def learns_of_a_reset(self) -> bool:
        """Whether its socket is dead, without a turn of our loop."""
        for _ in range(1000):
            # tcpi_state of tcp(7)
            if self.sock.fileno() == -1 or self._info(1)[0] == TCP_CLOSE:
                return True
            time.sleep(0.001)  # a busy kernel may deliver later
        return False


# The run.


async def loop_turns(number: int) -> None:
    for _ in range(number):
        await checkpoint()


def step(ours: OurSide, peer: Peer, op: Op) -> None:
    """Start *op*, if there is somebody who can."""
    if isinstance(op, TimeOut):
        if op.of in ours.scopes:
            ours.scopes[op.of].deadline = -math.inf
    elif isinstance(op, PeerSend):
        peer.send(op.size)
    elif isinstance(op, PeerRead):
        peer.read(op.size)
    elif not isinstance(op, Do):
        if op.by not in ours.scopes:
            ours.start(op)
    elif op is Do.ABORT:
        ours.record("aborted")
        ours.conn.abort()
    elif op is Do.CANCEL:
        ours.record("cancelled from outside")
        ours.outside.cancel()
    elif op is Do.PEER_HALF_CLOSES:
        peer.half_close()
    elif op is Do.PEER_CLOSES:
        peer.close()
    elif op is Do.PEER_RESETS:
        peer.reset()
    elif op is Do.RETURN:
        if ours.idle:
            ours.order(op)
    elif op in OPEN_GROUP:
        if ours.idle and ours.group is None:
            ours.order(op)
    elif ours.idle and ours.group is not None:
        if op is Do.LEAVE_GROUP:
            ours.order(op)
        elif op is Do.LINGERING_CHILD:
            ours.group.start_soon(ours.lingering_child)
        else:
            ours.record("group stopped")
            ours.group.cancel_scope.cancel()


async def wind_up(ours: OurSide, peer: Peer) -> None:
    """End what the script left open, as a peer that reads to the end and closes."""
    ours.over.set()
    while not ours.left:
        peer.read(TOO_MUCH)
        await loop_turns(SETTLED)
        for scope in list(ours.scopes.values()):
            scope.deadline = -math.inf
        if ours.group is not None:
            ours.record("group stopped")
            ours.group.cancel_scope.cancel()
        elif ours.idle:
            ours.order(Do.RETURN)
        await loop_turns(SETTLED)
    if ours.detached is not None:
        peer.read(TOO_MUCH)
        assert peer.saw is PeerClose.NONE or ours.eof_sent
        await ours.detached.aclose()
    peer.read(TOO_MUCH)
    while not peer.gone and peer.saw is PeerClose.NONE:
        await anyio.sleep(0.001)
        peer.read(TOO_MUCH)
    peer.fin_sent |= not peer.gone
    peer.sock.close()


async def run(
    native: bool, script: Script, drain: Drain | None, listener: socket.socket
) -> tuple[OurSide, Peer]:
    serve = serve_native if native else serve_foreign
    peer = Peer(listener.getsockname())
    ours = OurSide(peer)
    try:
        with anyio.fail_after(LONG):
            async with anyio.create_task_group() as ours.tasks:
                ours.tasks.start_soon(serve, ours, drain, listener)
                await ours.started.wait()
                await loop_turns(SETTLED)
                try:
                    for op, then in script:
                        step(ours, peer, op)
                        await loop_turns(then)
                        if then == SETTLED:
                            ours.record("settled")
                        judge_so_far(ours)
                    await wind_up(ours, peer)
                finally:
                    ours.over.set()  # or a shielded child would hold up a failure
    finally:
        peer.sock.close()
    if ours.wrong is not None:
        raise ours.wrong
    return ours, peer


async def serve_native(
    ours: OurSide, drain: Drain | None, listener: socket.socket
) -> None:
    # A copy, because the server closes it.
    serve = partial(serve_tcp, ours.handler, sockets=[listener.dup()])
    with ours.outside:
        async with anyio.create_task_group() as tg:
            server = await tg.start(partial(serve, finish_on=Stop, drain=drain))
            await ours.started.wait()
            server.stop()


async def serve_foreign(
    ours: OurSide, drain: Drain | None, listener: socket.socket
) -> None:
    stream = await anyio.abc.SocketStream.from_socket(listener.accept()[0])
    with suppress(Exception), ours.outside:  # the handler has a record of it
        async with connection_scope(stream, finish_on=Stop, drain=drain) as conn:
            await ours.handler(conn)


def judge_so_far(ours: OurSide) -> None:
    """A verdict of RST is carried out before any checkpoint, and nothing changes it."""
    decision = verdict(ours.facts)
    ending = ours.conn.ending
    if decision is not None and not decision[1] & EARNS_FIN:
        assert ending is not None
        assert ending.kind is CloseKind.DETACHED or ours.peer.learns_of_a_reset()
    if ours.first_ending is None:
        ours.first_ending = ending
    else:
        assert ending is not None
        assert replace(ending, outcome=None) == replace(ours.first_ending, outcome=None)


def judge(ours: OurSide, peer: Peer, drain: Drain | None) -> None:
    """Hold what the peer saw, and what the `Ending` says, to the model."""
    judge_so_far(ours)
    ending = ours.conn.ending
    assert ending is not None
    event(f"{ending.kind.value}, {ending.cause.value}")
    decision = verdict(ours.facts)
    assert decision is not None
    fact, causes = decision

    if ours.raised is None:
        assert ending.outcome == outcome.Value(None)
    else:
        assert isinstance(ending.outcome, outcome.Error)
        assert ending.outcome.error is ours.raised

    # Which way it ended, and why.
    assert ending.cause in causes
    if ending.cause is Cause.DETACHED:
        assert ending.kind is CloseKind.DETACHED
        return
    earned = ending.cause in EARNS_FIN
    finished = ending.kind is CloseKind.FIN
    if not earned or fact.eof_sent or fact.peer in ("open", "half-closed"):
        assert finished is earned
    elif fact.peer == "reset":
        assert not finished
    if fact.peer != "reset":
        expected = not earned and fact.eof_sent
        if not (expected and ending.unacknowledged):  # else it may wait behind that
            assert ending.fin_sent_before_reset is expected

    # What the peer saw of it. Nothing ended the drain before the peer did, if ...
    drained = (
        drain == PATIENT_DRAIN
        and fact.what == "left"
        and not {"aborted", "cancelled from outside"} & {each.what for each in ours.facts}
    )
    if peer.saw is PeerClose.FIN:
        assert finished or ending.fin_sent_before_reset
        assert peer.read_bytes == fact.whole
    elif peer.saw is PeerClose.RST:
        # Unread input resets a connection whose FIN has not arrived.
        assert not finished or peer.sent > ours.received + ending.discarded
        assert not (finished and drained)
    else:
        assert peer.gone
    assert peer.read_bytes <= ours.offered

    # What our side saw of the peer.
    if ending.peer is PeerClose.FIN:
        assert peer.fin_sent
    elif ending.peer is PeerClose.RST:
        assert peer.gone
    assert ending.peer in ours.peer_closes
    if finished and drained:
        assert ending.peer is not PeerClose.NONE
    assert ours.received + ending.discarded <= peer.sent
    if finished and ending.peer is PeerClose.FIN:
        assert ours.received + ending.discarded == peer.sent


@pytest.fixture(scope="module")
def listener() -> Iterator[socket.socket]:
    with socket.socket() as listener:
        # Inherited by what it accepts.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener


@pytest.fixture(scope="module", autouse=True)
def failures_are_not_logged() -> Iterator[None]:
    logger = logging.getLogger("anyio_rst")
    logger.disabled = True
    yield
    logger.disabled = False


@pytest.fixture(scope="module", autouse=True)
def trio_is_deterministic() -> Iterator[None]:
    """What pytest-trio does for Hypothesis, and a comment in Trio's source is about."""
    scheduler: Any = trio._core._run
    register_random(scheduler._r)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
        yield


@contextmanager
def nothing_left_behind() -> Iterator[None]:
    """No open descriptor, and none that only the garbage collector has closed."""
    left: list[str] = []
    before = open_descriptors()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "unraisablehook", lambda what: left.append(repr(what.object)))
        yield
        if open_descriptors() - before:
            collect()  # exceptions may keep frames, and with them sockets, alive
    assert not left
    assert not open_descriptors() - before


@pytest.mark.parametrize("native", [True, False], ids=["native", "foreign"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_ending_is_what_the_rules_say(
    backend: str, native: bool, listener: socket.socket
) -> None:
    name, options = BACKENDS[backend]

    @settings(PROFILE)
    @given(scripts(), drains)
    @example(HALF_CLOSE_AFTER_THE_PEERS, PATIENT_DRAIN)
    @example(ABORT_BEFORE_THE_FIRST_TURN_OF_THE_DRAIN, PATIENT_DRAIN)
    @example(ANSWER_THAT_WAITS_FOR_THE_PEER_TO_READ, None)
    @example(CANCELLATION_BESIDE_A_SHIELDED_CLEAN_UP, PATIENT_DRAIN)
    @example(RESET_BEFORE_A_SEND_BESIDE_THE_RETURN, PATIENT_DRAIN)
    @example(RESET_THAT_THE_TRANSPORT_KEEPS_TO_ITSELF, PATIENT_DRAIN)
    def holds(script: Script, drain: Drain | None) -> None:
        with nothing_left_behind():
            ours, peer = anyio.run(
                run,
                native,
                script,
                drain,
                listener,
                backend=name,
                backend_options=options,
            )
            judge(ours, peer, drain)
            del ours, peer

    holds()
