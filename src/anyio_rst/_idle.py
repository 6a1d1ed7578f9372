"""Waiting for the next request, which may be ended by a server that stops."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from anyio import CancelScope, current_time

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Protocol

    from typing_extensions import Self

    from ._lifecycle import Lifecycle

    class Stoppable(Protocol):
        """A server, to its connections."""

        @property
        def stopping(self) -> bool: ...


__all__ = ["Idle"]


class Idle:
    """What :meth:`Connection.idle` gives: whether the wait was ended, and by what.

    A receive in it prefers what has arrived to being cancelled.
    """

    __slots__ = ("_life", "_scope", "_server_stops", "_timeout", "ended")

    def __init__(self, life: Lifecycle, timeout: float | None) -> None:
        self._life = life
        self._timeout = math.inf if timeout is None else timeout
        self._scope = CancelScope()
        self._server_stops = False
        self.ended: bool = False
        """The wait was ended: nothing was received, and it is time to return."""

    def __enter__(self) -> Self:
        life = self._life
        if life.native.idle is not None:
            raise RuntimeError("the connection is idle already")
        life.native.idle = self
        self._scope.deadline = current_time() + self._timeout
        self._scope.__enter__()
        if life.server is not None and life.server.stopping:
            self.stop()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> bool:
        self._life.native.idle = None
        is_over = self._scope.__exit__(exc_type, exc_val, exc_tb)
        self.ended = self._scope.cancelled_caught
        return bool(is_over)

    @property
    def stopping(self) -> bool:
        """It was ended because the server is stopping."""
        return self.ended and self._server_stops

    @property
    def timed_out(self) -> bool:
        """It was ended by its time-out."""
        return self.ended and not self._server_stops

    def stop(self) -> None:
        """The server stops."""
        self._server_stops = True
        self._scope.cancel()

    @property
    def is_over(self) -> bool:
        """Whether it has been cancelled, by its time-out or the server."""
        return self._scope.cancel_called
