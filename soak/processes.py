"""The processes of a soak: how they are started and spoken to, and what they leave."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from typing_extensions import Self

ROOT = Path(__file__).parents[1]
POLL = 0.05  # seconds
PATIENCE = 120.0  # seconds, for one step of a round

# One core for the server, the others for the rest.
CORES = sorted(os.sched_getaffinity(0))
SERVER_CORES, OTHER_CORES = CORES[-1:], CORES[:-1] or CORES


class Stuck(Exception):
    """Something does not come to its end."""


PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent() -> None:
    """In a process that may be stopped, and then does not see that its input ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Process:
    def __init__(
        self, module: str, *arguments: object, cores: list[int], keep: Sequence[int] = ()
    ) -> None:
        self._name = module
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.{module}", *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            pass_fds=keep,
            start_new_session=True,  # Ctrl-C is for us; they end with their input
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        os.sched_setaffinity(self._process.pid, cores)
        self._read = b""

    @property
    def pid(self) -> int:
        return self._process.pid

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
        """The lines that are there, after waiting for the first."""
        data = os.read(self.fileno(), 2**20)
        if not data:
            raise Stuck(f"the process of soak.{self._name} has died")
        *lines, self._read = (self._read + data).split(b"\n")
        return [line.decode() for line in lines]

    def ask(self, *words: object) -> Any:
        if words:
            self.tell(*words)
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            if select.select([self], [], [], POLL)[0] and (lines := self.arrived()):
                (line,) = lines
                return json.loads(line)
        raise Stuck(f"soak.{self._name} does not answer")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # What could not be said to a process that has died does not matter any more.
        with contextlib.suppress(BrokenPipeError), self._process:
            self._process.kill()


class Lines:
    """What a process appends to a file, as it comes."""

    def __init__(self, path: Path) -> None:
        path.touch()
        self._file = path.open()

    def new(self) -> Iterator[Any]:
        for line in self._file:
            yield json.loads(line)

    def close(self) -> None:
        self._file.close()
