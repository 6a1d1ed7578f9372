"""Programs that are run: spoken to by lines, and killed when they are left."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import ROOT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Self

PATIENCE = 120.0  # seconds, for an answer

# One core for the server, the others for the rest.
CORES = sorted(os.sched_getaffinity(0))
SERVER_CORES, OTHER_CORES = CORES[-1:], CORES[:-1] or CORES


class Stuck(Exception):
    """Something does not come to its end."""


class Process:
    """A command a line on its input, an answer a line on its output."""

    def __init__(
        self, name: str, command: Sequence[object], *, keep: Sequence[int] = ()
    ) -> None:
        """*keep*: the descriptors that it inherits."""
        self.name = name
        self._process = subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            pass_fds=keep,
            start_new_session=True,  # Ctrl-C is for us; they end with their input
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._read = b""
        self.proc = Path("/proc", str(self.pid))

    @property
    def pid(self) -> int:
        return self._process.pid

    def pin(self, cores: list[int]) -> None:
        """All of its threads."""
        for task in (self.proc / "task").iterdir():
            os.sched_setaffinity(int(task.name), cores)

    def kill(self) -> None:
        """Until it is dead."""
        self._process.kill()
        self._process.wait()

    def fileno(self) -> int:
        return self._stdout.fileno()

    def tell(self, *words: object) -> None:
        self._stdin.write(" ".join(map(str, words)).encode() + b"\n")
        self._stdin.flush()

    def arrived(self) -> list[str]:
        """The lines that are there, after waiting for some."""
        data = os.read(self.fileno(), 2**20)
        if not data:
            raise Stuck(f"{self.name} has died")
        *lines, self._read = (self._read + data).split(b"\n")
        return [line.decode() for line in lines]

    def line(self) -> str:
        """The one that comes next, and alone."""
        until = time.monotonic() + PATIENCE
        while (left := until - time.monotonic()) > 0:
            if select.select([self], [], [], left)[0] and (lines := self.arrived()):
                (line,) = lines
                return line
        raise Stuck(f"{self.name} does not answer")

    def answer(self) -> Any:
        """The next line, which is JSON."""
        return json.loads(self.line())

    def ask(self, *words: object) -> Any:
        self.tell(*words)
        return self.answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # What could not be said to a process that has died does not matter any more.
        with contextlib.suppress(BrokenPipeError), self._process:
            self._process.kill()


def module(name: str, *arguments: object) -> list[object]:
    """The command that runs a module of ours."""
    return [sys.executable, "-m", f"evidence.{name}", *arguments]
