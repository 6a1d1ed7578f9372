"""`demo`: what a client sees of each way out of a handler, without and with anyio_rst.

Each answer comes from a process of its own, because some ways out of a handler end the
process. The handlers are the same on both sides. The clients are a blocking socket and
curl, and do not use anyio_rst.
"""

from __future__ import annotations

import importlib.util
import shutil
import signal
from contextlib import ExitStack
from typing import TYPE_CHECKING

from ._demo_cases import HTTP_WAYS, WAYS
from ._demo_clients import Seen, see_by_curl, see_by_socket
from ._demo_processes import NotMeasured, all_ended
from ._demo_servers import LOOPS, OURS, SIDES, running_server
from ._interruption import interruption
from ._output import NOT_READ, NOT_WRITTEN, USAGE, complain, put

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

    from ._demo_cases import Way
    from ._demo_clients import Client
    from ._demo_processes import Process

# What the client saw on each of SIDES.
Row = dict[str, Seen]


# Exit statuses, besides those of _output.py.
LIED = 1
UNKNOWN = 3


def measure(loop: str, way: Way, see: Client) -> Row:
    with ExitStack() as stack:
        # Both start at once: that takes the most time by far.
        servers = {
            side: stack.enter_context(running_server(loop, side, way)) for side in SIDES
        }
        return {side: look(way, side, server, see) for side, server in servers.items()}


def look(way: Way, side: str, server: Process, see: Client) -> Seen:
    try:
        seen = see(way, server)
        if way.exits and not server.has_ended():
            raise NotMeasured("the server has not ended")
        if not way.exits and not server.is_there():
            raise NotMeasured("the server has ended")
    except NotMeasured as exc:
        tell(f"{way.name}, {side}: {exc}")
        return Seen("not measured", None)
    return seen


def show(loop: str) -> list[Row]:
    """Measure every way out on *loop*, and print the table row by row."""
    put_line(loop, "answer", *SIDES)
    rows = show_rows(loop, "the handler ...", "the client got", WAYS, see_by_socket)
    if shutil.which("curl") is None:
        put("curl is not installed: its rows are left out")
    else:
        rows += show_rows(
            loop, "the HTTP handler ...", "curl got", HTTP_WAYS, see_by_curl
        )
    for side in SIDES:
        truths = [row[side].true for row in rows]
        told = f"{side} told the truth in {truths.count(True)} of {len(truths)} rows"
        unknown = truths.count(None)
        put(f"{told}, {unknown} not measured" if unknown else told)
    return rows


def show_rows(
    loop: str, label: str, heading: str, ways: Iterable[Way], see: Client
) -> list[Row]:
    put_line(label, "in bytes", *(heading for _ in SIDES))
    rows: list[Row] = []
    for way in ways:
        row = measure(loop, way, see)
        put_line(way.name, f"{len(way.answer):,}", *(cell(seen) for seen in row.values()))
        rows.append(row)
    return rows


def cell(seen: Seen) -> str:
    return f"{seen.text:14}  {VERDICTS[seen.true]}"


VERDICTS: dict[bool | None, str] = {True: "true", False: "LIE", None: "?"}


def put_line(label: str, size: str, *cells: str) -> None:
    columns = (f"{label:24}", f"{size:>9}", *(f"{text:20}" for text in cells))
    put("  ".join(columns).rstrip())


def exit_status(rows: Iterable[Row]) -> int:
    """Of anyio_rst: whether it lied anywhere, or it is not known."""
    truths = {row[OURS].true for row in rows}
    if False in truths:
        return LIED
    return UNKNOWN if None in truths else 0


# The command.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--loop",
        choices=[*LOOPS, "all"],
        default="asyncio",
        help="event loop of the servers (default: %(default)s)",
    )

    parser.epilog = f"""\
Example:

    anyio-rst demo --loop all

Exit status: 0 anyio_rst told the truth, {LIED} it lied, {USAGE} wrong usage or a loop
that is not installed, {UNKNOWN} something could not be measured, {NOT_WRITTEN} the table
could not be written, {NOT_READ} nobody read it, 130 Ctrl-C, 143 SIGTERM.
"""


def run(arguments: argparse.Namespace) -> int:
    """Run the demo.

    Returns:
      The exit status: see :func:`add_arguments`.
    """
    rows: list[Row] = []
    with interruption.caught(signal.SIGTERM), all_ended():
        for loop in LOOPS if arguments.loop == "all" else [arguments.loop]:
            if importlib.util.find_spec(loop) is not None:
                rows += show(loop)
            elif arguments.loop == "all":
                put(f"{loop} is left out: {not_installed(loop)}")
            else:
                tell(not_installed(loop))
                return USAGE
    return exit_status(rows)


def not_installed(loop: str) -> str:
    # The extras have the names of the loops.
    return f"{loop} is not installed; pip install 'anyio_rst[{loop}]'"


def tell(line: str) -> None:
    complain(f"anyio-rst demo: {line}")
