"""Waiting for the next request, until the server stops or a time-out."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING

from anyio import (
    CancelScope,
    current_effective_deadline,
    current_time,
    get_cancelled_exc_class,
)

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any, Protocol

    from typing_extensions import Self

    from ._lifecycle import Lifecycle

    class Stoppable(Protocol):
        """A server, to its connections."""

        @property
        def stopping(self) -> bool: ...


__all__ = ["Idle"]


class Idle:
    """What :meth:`Connection.idle` yields: whether the wait was ended, and by what."""

    __slots__ = (
        "_cancellations",
        "_ended",
        "_life",
        "_scope",
        "_server_stops",
        "_timeout",
    )

    def __init__(self, life: Lifecycle, timeout: float | None) -> None:
        self._life = life
        self._timeout = math.inf if timeout is None else timeout
        self._scope = CancelScope()
        self._server_stops = False
        self._cancellations = 0
        self._ended = False

    def __enter__(self) -> Self:
        life = self._life
        if life.native.idle is not None:
            raise RuntimeError("the connection is already in an idle() block")
        self._scope = CancelScope(deadline=current_time() + self._timeout)
        self._ended = False
        self._server_stops = life.server is not None and life.server.stopping
        if self._server_stops:
            self._scope.cancel()
        self._cancellations = _cancellations()
        self._scope.__enter__()
        life.native.idle = self
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> bool:
        self._life.native.idle = None
        is_over = self._scope.__exit__(exc_type, exc_val, exc_tb)
        self._ended = self._scope.cancelled_caught
        if exc_val is None and self._scope.cancel_called:
            _cancel_again(self._cancellations)
        return bool(is_over)

    @property
    def ended(self) -> bool:
        """The wait was ended, and nothing was received. Return now."""
        return self._ended

    @property
    def stopping(self) -> bool:
        """It was ended because the server is stopping."""
        return self._ended and self._server_stops

    @property
    def timed_out(self) -> bool:
        """It was ended by its time-out."""
        return self._ended and not self._server_stops

    def _stop(self) -> None:
        """The server stops."""
        if not self._scope.cancel_called:
            self._server_stops = True
            self._scope.cancel()

    @property
    def _is_over(self) -> bool:
        """Whether it has been cancelled, by its time-out or the server."""
        return self._scope.cancel_called


def _cancellations() -> int:
    """How often asyncio's `Task.cancel()` was called; 0 where that is not counted."""
    if get_cancelled_exc_class() is asyncio.CancelledError:
        cancelling = getattr(asyncio.current_task(), "cancelling", None)
        if cancelling is not None:  # from Python 3.11 on
            count: int = cancelling()
            return count
    return 0


def _cancel_again(before: int) -> None:
    """A receive that prefers its data has taken a `Task.cancel()` for the idle's end."""
    if _cancellations() > before and current_effective_deadline() != -math.inf:
        task: Any = asyncio.current_task()
        task.uncancel()
        task.cancel()
