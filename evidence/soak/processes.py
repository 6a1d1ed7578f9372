"""The processes of a soak: how they are started, and what they leave."""

from __future__ import annotations

import ctypes
import json
import signal
from typing import TYPE_CHECKING, Any

from evidence.processes import Process, module

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

POLL = 0.05  # seconds

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent() -> None:
    """In a process that may be stopped, and then does not see that its input ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def start(
    name: str, *arguments: object, cores: list[int], keep: Sequence[int] = ()
) -> Process:
    process = Process(f"soak.{name}", module(f"soak.{name}", *arguments), keep=keep)
    process.pin(cores)
    return process


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
