"""What befalls the processes of a round in the middle of it: stops, and forks."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    from collections.abc import Iterable
    from types import TracebackType

    from typing_extensions import Self

    from evidence.processes import Process

    from .results import Result

# Seconds. Some stops are longer than the drain's limit, and none so long that two of them
# within REQUEST_TIMEOUT of the plans would keep a request from the server.
STOPPED = 0.05, 1.5
BETWEEN_STOPS = 3.0, 5.0
BETWEEN_FORKS = 0.5, 2.0
CHILD_LIVES = 0.1, 2.0
FIRST = 0.02, 0.4  # after the round has begun


class Disturbances:
    """Peers' processes are stopped and go on, each by itself, and the server forks.

    When a round is left, all go on.
    """

    def __init__(
        self,
        rng: random.Random,
        server: Process,
        peers: Iterable[Process],
        result: Result,
    ) -> None:
        self._rng = rng
        self._server = server
        self._result = result
        self._stopped: dict[Process, float] = {}
        """Since when."""
        now = time.monotonic()
        self._fork_at = now + rng.uniform(*FIRST)
        # When the next stop begins or ends.
        self._turns = {process: now + rng.uniform(*FIRST) for process in peers}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for process in list(self._stopped):
            self._turn(process, time.monotonic())

    def until_next(self) -> float:
        """Seconds."""
        due = min(self._fork_at, *self._turns.values())
        return max(0, due - time.monotonic())

    def step(self) -> None:
        """Do what is due."""
        now = time.monotonic()
        for process, due in list(self._turns.items()):
            if due <= now:
                self._turn(process, now)
        if self._fork_at <= now:
            self._fork_at = now + self._rng.uniform(*BETWEEN_FORKS)
            fork(self._server, self._rng.uniform(*CHILD_LIVES))
            self._result.forks += 1

    def _turn(self, process: Process, now: float) -> None:
        since = self._stopped.pop(process, None)
        if since is None:
            os.kill(process.pid, signal.SIGSTOP)
            self._stopped[process] = now
            self._result.stops += 1
            pause = STOPPED
        else:
            os.kill(process.pid, signal.SIGCONT)
            self._result.stopped += now - since
            pause = BETWEEN_STOPS
        self._turns[process] = now + self._rng.uniform(*pause)


def fork(server: Process, seconds: float) -> int:
    """Have *server* fork a child that lives for so long; return its process id."""
    child: int = server.ask("fork", seconds)["child"]
    return child
