"""The processes of the demo: started, listened to with patience, ended for certain."""

from __future__ import annotations

import os
import select
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ._interruption import interruption

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# Seconds. What takes longer will not come, on the slowest of machines.
PATIENCE = 30.0

# What a server answers to anything on its standard input.
HERE = "here"


class NotMeasured(Exception):
    """What a row was to show did not come about, and the reason."""


class Process:
    """A process that says what it has to say on its standard output.

    Its standard input stays open for as long as the demo lives, and no longer. Ctrl-C in
    the terminal of the demo is not for it.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
        self._said = b""

    def next_line(self) -> str:
        """Wait for the next line.

        Raises:
          NotMeasured: there is none.
        """
        assert self._process.stdout is not None
        deadline = time.monotonic() + PATIENCE
        while b"\n" not in self._said:
            left = max(0, deadline - time.monotonic())
            if not select.select([self._process.stdout], [], [], left)[0]:
                raise NotMeasured(f"the server said nothing within {PATIENCE:g} s")
            chunk = os.read(self._process.stdout.fileno(), 4096)
            if not chunk:
                raise NotMeasured(f"the server is gone: {self._last_words()}")
            self._said += chunk
        line, _, self._said = self._said.partition(b"\n")
        return line.decode()

    def _last_words(self) -> str:
        """The end of a traceback says most."""
        _, errors = self._process.communicate()
        lines = errors.decode(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line), "without a message")

    def rest(self) -> tuple[int, bytes]:
        """Wait for it to exit: its status, and all that it said.

        Raises:
          NotMeasured: it does not.
        """
        try:
            said, _ = self._process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            raise NotMeasured(f"no end within {PATIENCE:g} s") from None
        return self._process.returncode, said

    def has_ended(self) -> bool:
        """Whether it ends, given time."""
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            return False
        return True

    def is_there(self) -> bool:
        """Whether it answers: one that is just ending has not exited, but does not."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b"?")
            while self.next_line() != HERE:
                pass
        except (BrokenPipeError, NotMeasured):
            return False
        return True

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()


def say(line: str) -> None:
    """Say what :meth:`Process.next_line` reads: whole, whichever thread it is."""
    os.write(1, f"{line}\n".encode())


_running: set[Process] = set()


@contextmanager
def running(command: Sequence[str]) -> Iterator[Process]:
    """A process that runs *command*. It is killed at the end.

    Raises:
      NotMeasured: it cannot be started.
    """
    try:
        with interruption.held():
            process = Process(command)
            _running.add(process)
    except OSError as exc:
        raise NotMeasured(f"cannot run {command[0]}: {exc.strerror}") from exc
    try:
        yield process
    finally:
        process.end()
        _running.discard(process)


@contextmanager
def all_ended() -> Iterator[None]:
    """End the processes also if an interruption kept :func:`running` from it.

    There is no other by then.
    """
    try:
        yield
    finally:
        for process in _running:
            process.end()
        _running.clear()
