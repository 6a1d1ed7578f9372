"""A proxy between a client and a server, which cuts connections at a chosen byte."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Literal, get_args

from anyio import create_task_group
from anyio.from_thread import start_blocking_portal
from anyio.lowlevel import checkpoint

from anyio_rst._limits import check_seconds
from anyio_rst._serve import serve_tcp

from ._lane import Cut, Direction, Kind, Pace
from ._relay import ProxyConnection, Relay

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from types import TracebackType

    from typing_extensions import Self

    from anyio_rst._connection import Connection
    from anyio_rst._server import Server

LOOPBACK = "127.0.0.1"

# Turns of the loop at the end of the block, for what has arrived to be passed on.
LAST_TURNS = 30


class Proxy:
    """A TCP proxy, made by :func:`open_proxy`, for as long as its block lasts.

    It passes on a FIN as a FIN, in each direction separately, and a reset as a reset. If
    the upstream cannot be reached, it resets the client. Its methods take effect at once,
    also for open connections.
    """

    port: int
    """Where clients connect, at 127.0.0.1."""

    address: tuple[str, int]
    """The same as (host, port)."""

    def __init__(
        self, host: str, port: int, *, listen: tuple[str, int] = (LOOPBACK, 0)
    ) -> None:
        self._upstream = host, port
        self._listen = listen
        self._pace = Pace()
        self._cut: Cut | None = None
        self._count = 0  # accepted
        self._counted_from = 0  # for every N-th
        self._open: list[Relay] = []
        self._relays: list[Relay] | None = []
        self._on_end: Callable[[ProxyConnection], object] | None = None
        # In the thread of the event loop.
        self._call: Callable[[Callable[[], None]], None] = _call
        self._running: AbstractAsyncContextManager[None] | None = None
        self._in_thread = ExitStack()

    async def __aenter__(self) -> Self:
        self._running = self._run()
        await self._running.__aenter__()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        assert self._running is not None
        await self._running.__aexit__(exc_type, exc_val, exc_tb)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            portal = stack.enter_context(start_blocking_portal("asyncio"))
            stack.enter_context(portal.wrap_async_context_manager(self._run()))
            self._call = portal.call
            self._in_thread = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._in_thread.close()
        finally:
            self._call = _call

    @property
    def connections(self) -> tuple[ProxyConnection, ...]:
        """What is known about each connection now, in the order of the accepts.

        Readable after the block, too, when all have ended.
        """
        reports: list[ProxyConnection] = []

        def report() -> None:
            reports.extend(relay.report() for relay in self._relays or self._open)

        self._call(report)  # between two steps: what a client has got is counted
        return tuple(reports)

    def cut(
        self,
        *,
        after: int = 0,
        kind: Literal["fin", "rst", "silence"] = "fin",
        direction: Literal["up", "down"] = "down",
        every: int = 1,
        close_notify: bool = False,
    ) -> None:
        """Cut connections after a number of bytes.

        This replaces an earlier call. Bytes count from now on, and for later connections
        from their beginning.

        Args:
          after: bytes to pass on before the cut. 0 cuts open connections now, and later
            ones right after the connect.
          kind: what the side that *direction* leads to gets: "fin", "rst", or "silence",
            which is nothing more, not even an end, until that side ends the connection.
            With "fin" and "rst" the other side gets an RST.
          direction: "down" to the client, or "up" to the upstream.
          every: 3 cuts the third connection from now on, the sixth, and so on. 1 cuts
            the open connections, too.
          close_notify: cut a TLS session before its close_notify, and not *after* bytes.
            The session has to begin with the connection.

        Raises:
          ValueError: a number is too small, or *kind* or *direction* is not one of these.
        """
        if after < 0:
            raise ValueError(f"after must be >= 0, not {after!r}")
        if every < 1:
            raise ValueError(f"every must be >= 1, not {every!r}")
        if close_notify and after:
            raise ValueError("pass either after or close_notify, not both")
        for name, word, words in (
            ("kind", kind, get_args(Kind)),
            ("direction", direction, get_args(Direction)),
        ):
            if word not in words:
                raise ValueError(f"{name} must be one of {words}, not {word!r}")
        cut = Cut(direction, None if close_notify else after, kind, every)
        self._call(partial(self._plan, cut))

    def mend(self) -> None:
        """Cut nothing more. Connections that were cut stay cut."""
        self._call(partial(self._plan, None))

    def slow(
        self, *, delay: float = 0.0, rate: int | None = None, chunk: int | None = None
    ) -> None:
        """Slow down each direction of each connection.

        This replaces an earlier call. Without arguments, nothing is slowed down.

        Args:
          delay: seconds to delay everything by, including the end, as a long line does.
          rate: bytes per second; None for no limit.
          chunk: bytes to send at a time, each in its own segment; None for no splitting.

        Raises:
          TypeError: *delay* is no number.
          ValueError: a number is too small.
        """
        check_seconds("delay", delay)
        for name, number in (("rate", rate), ("chunk", chunk)):
            if number is not None and number < 1:
                raise ValueError(f"{name} must be >= 1, not {number!r}")
        self._call(partial(self._set_pace, Pace(delay, rate, chunk)))

    def _plan(self, cut: Cut | None) -> None:
        self._cut = cut
        self._counted_from = self._count
        for relay in self._open:
            relay.plan(cut if cut is not None and cut.every == 1 else None)

    def _set_pace(self, pace: Pace) -> None:
        self._pace = pace
        for relay in self._open:
            relay.look_again()

    async def _handle(self, client: Connection) -> None:
        self._count += 1
        relay = Relay(self._count, client, lambda: self._pace)
        cut = self._cut
        if cut is not None and (self._count - self._counted_from) % cut.every == 0:
            relay.plan(cut)
        self._open.append(relay)
        if self._relays is not None:
            self._relays.append(relay)
        try:
            await relay.run(*self._upstream)
        finally:
            self._open.remove(relay)
            if self._on_end is not None:
                self._on_end(relay.report())

    @asynccontextmanager
    async def _run(self) -> AsyncIterator[None]:
        host, port = self._listen
        # By hand: around an exception of the block it would put a group.
        tasks = create_task_group()
        await tasks.__aenter__()
        try:
            serve = partial(serve_tcp, self._handle, port, host=host)
            server: Server = await tasks.start(serve)
            self.address, self.port = server.addresses[0], server.port
            yield
            for _ in range(LAST_TURNS):
                if self._open:
                    await checkpoint()
        finally:
            tasks.cancel_scope.cancel()
            await tasks.__aexit__(None, None, None)


def _call(function: Callable[[], None]) -> None:
    function()


def open_proxy(port: int, *, host: str = LOOPBACK) -> Proxy:
    """Run a :class:`Proxy` in front of a server, for as long as the block lasts.

    ::

        async with open_proxy(server.port) as proxy:
            proxy.cut(after=1000, kind="rst")
            ...  # a client of proxy.port

    It listens at 127.0.0.1. In a program without an event loop, `with open_proxy(port)`
    runs it in a thread, on asyncio. Then its methods may be called from any thread. At
    the end of the block it resets the open connections.

    Args:
      port, host: of the server, the upstream; a name or an address.

    Raises:
      OSError: on entry, it cannot listen.
    """
    return Proxy(host, port)
