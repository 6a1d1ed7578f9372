"""How Ctrl-C and SIGTERM end a command: once, with a line, and not anywhere."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TOLD = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class Interrupted(BaseException):
    """A signal asks the command to end."""

    def __init__(self, number: int) -> None:
        super().__init__(TOLD[signal.Signals(number)])
        self.status = 128 + number  # as shells have it


class Interruption:
    """The signals of this process, of which the first that is caught is raised.

    Those after it are ignored until the command has cleaned up.
    """

    def __init__(self) -> None:
        self._caught: set[int] = set()
        self._struck: int | None = None
        self._held = False
        self._wake: Callable[[], object] | None = None

    @contextmanager
    def caught(self, number: int, *, afterwards: Any = None) -> Iterator[None]:
        """Let signal *number* raise :exc:`Interrupted`, if it is not ignored already.

        Args:
          afterwards: how it is handled afterwards; None for as before.
        """
        before = signal.getsignal(number)
        # Python lets no other thread handle a signal, and knows nothing of C's handlers.
        ours = threading.current_thread() is threading.main_thread()
        if before in (signal.SIG_IGN, None) or not ours:
            yield
            return
        try:
            self._caught.add(number)
            signal.signal(number, self._strike)
            yield
        finally:
            self._caught.discard(number)
            _set_handler(number, before if afterwards is None else afterwards)
            if not self._caught:
                self._struck = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Raise nothing inside, but at its end."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
            if self._struck is not None:
                raise Interrupted(self._struck)

    @contextmanager
    def waking(self, wake: Callable[[], object]) -> Iterator[None]:
        """Call *wake*, in the handler of the signal, to come to the end of what holds."""
        self._wake = wake
        try:
            if self._struck is not None:
                wake()
            yield
        finally:
            self._wake = None

    @contextmanager
    def held_unless(self, stuck: Callable[[], bool]) -> Iterator[None]:
        """As :meth:`held`, but raise at once if it is *stuck*."""

        def wake() -> None:
            if self._struck is not None and stuck():
                raise Interrupted(self._struck)

        with self.held(), self.waking(wake):
            yield

    def _strike(self, number: int, _: object) -> None:
        if self._struck is not None or number not in self._caught:
            return
        self._struck = number
        if not self._held:
            raise Interrupted(number)
        if self._wake is not None:
            self._wake()


def _set_handler(number: int, handler: Any) -> None:
    """Let none come in between: of one that finds no function, Python prints an error."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        signal.signal(number, handler)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


# Of the process, as its signals are.
interruption = Interruption()
