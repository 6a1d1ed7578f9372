"""How far a run is, for who waits for it."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .results import Result


class Progress:
    """A bar on a terminal, and a line now and then elsewhere."""

    WIDTH = 30
    STEP = 0.1

    def __init__(self, loop: str) -> None:
        self._loop = loop
        self._start = time.monotonic()
        self._told = 0.0
        self._is_terminal = sys.stderr.isatty()

    def show(self, part: float, result: Result, under_way: int = 0) -> None:
        part = min(part, 1.0)
        if not self._is_terminal:
            if part < self._told + self.STEP and (part < 1 or self._told >= 1):
                return
            self._told = part
        done = result.connections + under_way
        rate = done / max(time.monotonic() - self._start, 0.001)
        bar = "#" * int(part * self.WIDTH)
        text = (
            f"{self._loop:8}[{bar:{self.WIDTH}}] {part:4.0%} {done:>9,} connections, "
            f"{rate:6,.0f} a second, {result.disagreements()} disagreements"
        )
        end = "" if self._is_terminal else "\n"
        start = "\r" if self._is_terminal else ""
        print(start + text, end=end, file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._is_terminal:
            print(file=sys.stderr)
