"""A connection through the proxy: both directions, the cut, and the report."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from anyio import BrokenResourceError, create_task_group, current_time, sleep

from anyio_rst import _sockets, _tcp_info
from anyio_rst._connect import connect_tcp
from anyio_rst._limits import CLIENTS_DRAIN
from anyio_rst._peer import PeerClose, PeerReset

from ._lane import Lane, Stop

if TYPE_CHECKING:
    from collections.abc import Callable

    from anyio.abc import TaskGroup

    from anyio_rst._connection import Connection
    from anyio_rst._native import NativeStream

    from ._lane import Cut, Direction, Pace

Side = Literal["client", "upstream"]

# Seconds between two looks at a side that has sent its FIN and may be gone since, and
# after which it is noticed that its machine is.
LOOK = 0.5
KEEPALIVE = 60.0


@dataclass(frozen=True)
class ProxyConnection:
    """What a :class:`Proxy` knows about one connection."""

    number: int
    """1 for the first that was accepted."""

    client: tuple[str, int] | None
    """(host, port) of the client; None if it was gone before that could be read."""

    up: int
    """Bytes passed on to the upstream."""

    down: int
    """Bytes passed on to the client."""

    client_end: PeerClose
    """How the client ended its side, as far as the proxy has seen it."""

    upstream_end: PeerClose
    """How the upstream ended its side, as far as the proxy has seen it."""

    first_end: Literal["client", "upstream"] | None
    """Which of the two was seen first."""

    cut: Literal["fin", "rst", "silence"] | None
    """How it was cut. Set before either side can notice."""

    cut_direction: Literal["up", "down"] | None
    """The direction that was cut."""

    error: str | None
    """Why the upstream could not be reached. Then the client was reset."""

    aborted: bool
    """Whether it was open when the proxy ended, which reset both sides."""

    duration: float | None
    """Seconds from its beginning to its end; None while it is open."""


class Relay:
    """One connection that the proxy has accepted."""

    def __init__(self, number: int, client: Connection, pace: Callable[[], Pace]) -> None:
        self._number = number
        self._address = client.remote_address
        self._client = client
        self._pace = pace
        self._began = current_time()
        self._ended: float | None = None
        self._lanes: dict[Direction, Lane] = {}
        self._ends: dict[Side, PeerClose] = {}  # in their order
        self._plan: Cut | None = None
        self._done: Cut | None = None
        self._deaf: Side | None = None
        self._error: str | None = None
        self._aborted = False
        self._tasks: TaskGroup | None = None
        self._to_finish: Lane | None = None
        self._broken = False

    def report(self) -> ProxyConnection:
        passed = {way: lane.passed for way, lane in self._lanes.items()}
        none = PeerClose.NONE
        return ProxyConnection(
            number=self._number,
            client=self._address,
            up=passed.get("up", 0),
            down=passed.get("down", 0),
            client_end=self._ends.get("client", none),
            upstream_end=self._ends.get("upstream", none),
            first_end=next(iter(self._ends), None),
            cut=None if self._done is None else self._done.kind,
            cut_direction=None if self._done is None else self._done.direction,
            error=self._error,
            aborted=self._aborted,
            duration=None if self._ended is None else self._ended - self._began,
        )

    def plan(self, cut: Cut | None) -> None:
        """Do that, and nothing that was planned before."""
        self._plan = cut
        for direction, lane in self._lanes.items():
            lane.plan(cut if cut is not None and cut.direction == direction else None)

    def look_again(self) -> None:
        """The pace has changed."""
        for lane in self._lanes.values():
            lane.look_again()

    async def run(self, host: str, port: int) -> None:
        """Connect to the upstream, and pass on what comes until it is over."""
        client = self._client
        upstream = None
        completed = False
        try:
            async with client:
                try:
                    async with connect_tcp(host, port, drain=CLIENTS_DRAIN) as upstream:
                        await self._pass_on(upstream)
                except (OSError, ValueError) as exc:  # ValueError: no name can be so
                    self._error = reason_of(exc)
                    client.abort()
            completed = True
        finally:
            self._ended = current_time()
            self._aborted = not completed
            sides: tuple[tuple[Side, Connection | None], ...]
            sides = ("upstream", upstream), ("client", client)
            for side, connection in sides:
                if connection is not None and connection.ending is not None:
                    self._saw(side, connection.ending.peer)

    async def _pass_on(self, upstream: Connection) -> None:
        client = self._client
        saw = self._saw
        self._lanes = {
            "up": Lane(client, upstream, self._pace, partial(saw, "client")),
            "down": Lane(upstream, client, self._pace, partial(saw, "upstream")),
        }
        self.plan(self._plan)
        async with create_task_group() as self._tasks:
            for direction, lane in self._lanes.items():
                self._tasks.start_soon(lane.read)
                self._tasks.start_soon(self._write, direction, lane)
        if self._to_finish is not None:
            self._to_finish.source.abort()
            await self._to_finish.sink.aclose()
        elif self._broken:
            upstream.abort()
            client.abort()

    async def _write(self, direction: Direction, lane: Lane) -> None:
        sink: Side = "client" if direction == "down" else "upstream"
        while True:
            try:
                stop = await lane.write()
            except BrokenResourceError as exc:
                is_reset = isinstance(exc, PeerReset)
                self._saw(sink, PeerClose.RST if is_reset else PeerClose.LOST)
                if self._deaf is None:
                    self._break()
                    return
                lane.mute()  # the other side is not to learn of it
                continue
            if stop is Stop.PASSED:
                return
            if stop is Stop.BROKEN:
                self._break()
                return
            self._done = self._plan
            assert self._done is not None
            if self._done.kind == "silence":
                self._silence(lane, sink)
                continue
            if self._done.kind == "fin":
                self._to_finish = lane
            else:
                await lane.delivered()
            self._break()
            return

    def _break(self) -> None:
        """Both sides are reset, but for one that is to get a FIN."""
        self._broken = True
        if self._tasks is not None:
            self._tasks.cancel_scope.cancel()

    def _silence(self, lane: Lane, sink: Side) -> None:
        lane.plan(None)
        lane.mute()
        self._deaf = sink
        if sink in self._ends and self._tasks is not None:
            self._tasks.start_soon(self._watch, sink, lane.sink._life.native)

    async def _watch(self, side: Side, native: NativeStream) -> None:
        """Wait for the end of one that has sent its FIN: no event tells of that."""
        native.keep_alive(KEEPALIVE)
        while True:
            loss = _tcp_info.loss(native._sock)
            if loss is not None:
                break
            await sleep(LOOK)
        is_reset = loss.errno in _sockets.RESET_ERRNOS
        self._saw(side, PeerClose.RST if is_reset else PeerClose.LOST)

    def _saw(self, side: Side, end: PeerClose) -> None:
        if end is PeerClose.NONE:
            return
        if end is not PeerClose.FIN or side not in self._ends:  # a reset comes last
            self._ends[side] = end
        if side == self._deaf:
            self._break()


def reason_of(exc: BaseException) -> str:
    """What the system calls it."""
    cause = exc
    while isinstance(cause.__cause__, OSError):
        cause = cause.__cause__
    if isinstance(cause, socket.gaierror):
        return str(cause.strerror)
    if isinstance(cause, OSError) and cause.errno is not None:
        return os.strerror(cause.errno)
    return str(cause)
