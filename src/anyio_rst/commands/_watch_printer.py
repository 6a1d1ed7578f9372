"""Where the lines of the watch go: a terminal, a file, or a program."""

from __future__ import annotations

import json
import os
import select
import shutil
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING

from ._interruption import interruption
from ._output import WIDTH, complain, is_stuck, put
from ._watch_report import Totals, as_dict, shown, table

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager

    from ._watch_connection import Connection

# Ports that a terminal shows; a file gets this many, too.
PORTS = 10

# ECMA-48: erase the display from the cursor on.
ERASE = "\x1b[J"


class Printer:
    """Prints each connection as it ends, and the totals below, or at the end."""

    def __init__(self, *, as_json: bool) -> None:
        self._json = as_json
        is_terminal = sys.stdout is not None and sys.stdout.isatty()
        self._refreshes = (
            is_terminal and not as_json and os.environ.get("TERM") not in (None, "dumb")
        )
        # no-color.org
        self._coloured = self._refreshes and not os.environ.get("NO_COLOR")
        self._totals = Totals()
        self._below = 0  # lines of the table on the terminal
        self._told = ""
        self.is_over = False
        self.lost = 0
        self.unreadable = 0

    def begin(self, interface: str | None, ports: Sequence[int]) -> None:
        """Nothing that begins from now on is missed."""
        if self._json:
            values = {"interface": interface, "ports": ports}
            self._put(json.dumps({"event": "watching", **values}))
            return
        numbers = " or ".join(map(str, ports))
        what = f"TCP connections of port {numbers}" if ports else "TCP connections"
        self._put(f"watching {what} on {interface or 'all interfaces'}")

    def connections(self, ended: list[Connection]) -> None:
        """They have ended. Once they are told of, *ended* is cleared."""
        if not ended:
            return
        with self._held():
            if self._json:
                lines = [json.dumps(as_dict(each)) for each in ended]
            else:
                lines = [shown(each, coloured=self._coloured) for each in ended]
            for piece in pieces(lines):
                self._put(piece)
            for connection in ended:
                self._totals.add(connection)
            ended.clear()

    def refresh(self, still_open: Counter[int]) -> None:
        """The totals, where they can be replaced."""
        if not self._refreshes:
            return
        size = shutil.get_terminal_size((WIDTH, 24))
        most = max(1, min(PORTS, size.lines - 6))
        lines = ["", *self._summary(still_open, most)]
        text = "\n".join(line[: size.columns - 1] for line in lines)
        if text != self._told or not self._below:
            with self._held():
                self._put(text)
                self._below = len(lines)
                self._told = text

    def tell(self, line: str) -> None:
        """Something that is not a connection, on the standard error."""
        if self._below:
            self._put("")
        complain(f"anyio-rst watch: {line}")

    def end(self, still_open: Counter[int], seconds: float) -> None:
        """The totals, for good."""
        if not self._json:
            self._put("\n".join(["", *self._summary(still_open, PORTS)]))
            return
        totals = {
            "event": "totals",
            "seconds": round(seconds, 6),
            "lost_packets": self.lost,
            "unreadable_packets": self.unreadable,
            "ports": self._totals.rows(still_open),
        }
        self._put(json.dumps(totals))

    def _summary(self, still_open: Counter[int], most: int) -> list[str]:
        lines = table(self._totals.rows(still_open), most)
        if self.lost:
            lines.append(f"{self.lost:,} packets lost, which are not counted")
        if self.unreadable:
            lines.append(f"{self.unreadable:,} packets could not be read")
        return lines

    def _held(self) -> AbstractContextManager[None]:
        """Let an interruption tear no line, as long as somebody reads."""
        if self.is_over:  # there was one, or there may be
            return nullcontext()
        return interruption.held_unless(is_stuck)

    def _put(self, text: str) -> None:
        """Above the table, which has to be put again."""
        if self._below:
            text = f"\x1b[{self._below}A\r{ERASE}{text}"
            self._below = 0
        put(text)


def pieces(lines: Sequence[str]) -> Iterator[str]:
    """As many at a time as a pipe takes whole.

    Of more, a signal leaves a part, and Python's standard output drops the rest of that
    if it is unbuffered.
    """
    piece: list[str] = []
    size = 0
    for line in lines:
        size += len(line) + 1
        if piece and size > select.PIPE_BUF:
            yield "\n".join(piece)
            piece, size = [], len(line) + 1
        piece.append(line)
    yield "\n".join(piece)
