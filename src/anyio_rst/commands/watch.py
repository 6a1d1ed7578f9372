"""`watch`: how the TCP connections of this machine end, and who ended them.

Print each connection when it ends: FIN or RST, by the client or the server, and how many
bytes were in flight. Totals for each server port follow.
"""

from __future__ import annotations

import select
import signal
import sys
import time
from contextlib import closing, nullcontext
from typing import TYPE_CHECKING

from ._arguments import interface_name, port_number, seconds
from ._interruption import Interrupted, interruption
from ._output import NOT_READ, NOT_WRITTEN, USAGE, complain, discard, is_stuck
from ._watch_capture import FRAMES, Capture, NotPermitted, Unavailable
from ._watch_printer import Printer
from ._watch_segments import Unreadable, parse
from ._watch_table import Table

if TYPE_CHECKING:
    import argparse

# Exit statuses, besides those of _output.py: EX_NOPERM of sysexits.h is the second.
LOST = 3
NOT_CAPTURED = 77

# Seconds between two looks at what the kernel says of lost packets, and two refreshes.
TICK = 0.25

# Seconds to wait for more, since many packets at a time cost less than one by one.
PAUSE = 0.01

# More would not fit the jumps of the kernel's filter.
MOST_PORTS = 100


class Watch:
    """From the packets to the printer."""

    def __init__(self, capture: Capture, table: Table, printer: Printer) -> None:
        self._capture = capture
        self._table = table
        self._printer = printer
        self._tick = 0.0

    def run(self, duration: float | None) -> None:
        """For so many seconds, or until it is interrupted."""
        poll = select.poll()
        poll.register(self._capture, select.POLLIN)
        deadline = None if duration is None else time.monotonic() + duration
        left = TICK
        while left > 0:
            for _, event in poll.poll(min(left, TICK) * 1000):
                if event & select.POLLERR and (error := self._capture.error()):
                    self._printer.tell(error)
            time.sleep(PAUSE)
            self.look()
            if deadline is not None:
                left = deadline - time.monotonic()

    def look(self, *, last: bool = False) -> None:
        """Count the packets that have come by now, and show what has ended."""
        count = lost = 0
        now = time.time()
        # It is interrupted once, and that is over when this is the last look.
        with nullcontext() if last else interruption.held():
            for when, packet, size, tagged in self._capture.packets():
                count += 1
                now = when
                try:
                    segment = parse(packet, size, tagged=tagged)
                except Unreadable:
                    self._printer.unreadable += 1
                    continue
                if segment is not None:
                    self._table.feed(when, segment)
            # What is left of a full ring is older than the clock.
            self._table.expire(now if count == FRAMES else time.time())
            if ticks := last or time.monotonic() >= self._tick:
                self._tick = time.monotonic() + TICK
                lost = self._capture.lost()
                self._printer.lost += lost
        self._printer.connections(self._table.ended)
        if lost:
            self._printer.tell(f"{lost:,} packets lost, because they came too fast")
        if ticks and not last:
            self._printer.refresh(self._table.open)


# The command.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--port",
        metavar="P",
        type=port_number,
        action="append",
        default=[],
        help="only connections from or to this port; may be repeated",
    )
    parser.add_argument(
        "--interface",
        metavar="I",
        type=interface_name,
        help="only packets on this network interface (default: all interfaces)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON objects, one on each line"
    )
    parser.add_argument(
        "--for",
        metavar="S",
        type=seconds,
        dest="duration",
        help="stop after S seconds (default: at Ctrl-C)",
    )
    parser.epilog = f"""\
Example, as root, or with CAP_NET_RAW:

    anyio-rst watch --port 443 --port 80

Exit status: 0 after --for, {LOST} if packets were lost, {USAGE} wrong usage,
{NOT_CAPTURED} not allowed or not able to capture packets, {NOT_WRITTEN} the output could
not be written, {NOT_READ} nobody read it, 130 Ctrl-C, 143 SIGTERM.
"""


def run(arguments: argparse.Namespace) -> int:
    """Run the watch.

    Returns:
      The exit status: see :func:`add_arguments`.
    """
    ports = sorted(set(arguments.port))
    if len(ports) > MOST_PORTS:
        tell(f"too many ports: at most {MOST_PORTS}")
        return USAGE
    try:
        capture = Capture(arguments.interface, ports)
    except NotPermitted as exc:
        tell(f"{exc}: sudo {sys.executable} -m anyio_rst watch")
        return NOT_CAPTURED
    except Unavailable as exc:
        tell(str(exc))
        return NOT_CAPTURED
    printer = Printer(as_json=arguments.json)
    table = Table(frozenset(ports))
    status = 0
    began = time.monotonic()
    with closing(capture), interruption.caught(signal.SIGTERM):
        watch = Watch(capture, table, printer)
        try:
            printer.begin(arguments.interface, ports)
            watch.run(arguments.duration)
        except Interrupted as exc:
            status = exc.status
            if is_stuck():
                discard(sys.stdout)  # else the totals would wait for a reader
        printer.is_over = True
        watch.look(last=True)
        printer.end(table.open, time.monotonic() - began)
    return status or (LOST if printer.lost else 0)


def tell(line: str) -> None:
    complain(f"anyio-rst watch: {line}")
