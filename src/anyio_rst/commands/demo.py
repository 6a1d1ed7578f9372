"""`demo`: what a client sees of each way out of a handler, without and with anyio_rst.

Every answer is served by a process of its own, because some ways out of a handler end
the process. The handlers are the same on both sides. The clients, a blocking socket and
curl, know nothing of either.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

from ._demo_cases import HTTP_WAYS, WAYS
from ._demo_clients import Seen, see_by_curl, see_by_socket
from ._demo_servers import LOOPS, OURS, SIDES, running_server

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

    from ._demo_cases import Way
    from ._demo_clients import Client

# What the client saw on each of SIDES.
Row = dict[str, Seen]


def measure(loop: str, way: Way, see: Client) -> Row:
    with ExitStack() as stack:
        # Both start at once: that takes the most time by far.
        servers = {
            side: stack.enter_context(running_server(loop, side, way)) for side in SIDES
        }
        return {side: see(way, server) for side, server in servers.items()}


def show(loop: str) -> list[Row]:
    """Measure every way out on *loop*, and print the table row by row."""
    print_line(loop, *SIDES)
    rows = show_rows(loop, "the handler ...", "the client got", WAYS, see_by_socket)
    if shutil.which("curl") is None:
        print("curl is not installed: its part is left out")
    else:
        rows += show_rows(
            loop, "the HTTP handler ...", "curl got", HTTP_WAYS, see_by_curl
        )
    for side in SIDES:
        truths = [row[side].true for row in rows]
        print(f"{side} told the truth in {sum(truths)} of {len(truths)} rows", flush=True)
    return rows


def show_rows(
    loop: str, label: str, heading: str, ways: Iterable[Way], see: Client
) -> list[Row]:
    print_line(label, *(heading for _ in SIDES))
    rows: list[Row] = []
    for way in ways:
        row = measure(loop, way, see)
        print_line(way.name, *(cell(seen) for seen in row.values()))
        rows.append(row)
    return rows


def cell(seen: Seen) -> str:
    return f"{seen.text:29}  {'true' if seen.true else 'LIE'}"


def print_line(label: str, *cells: str) -> None:
    columns = (f"{label:24}", *(f"{text:35}" for text in cells))
    print("  ".join(columns).rstrip(), flush=True)


def exit_status(rows: Iterable[Row]) -> int:
    """1 if anyio_rst lied anywhere, otherwise 0."""
    return 0 if all(row[OURS].true for row in rows) else 1


# The command.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--loop",
        choices=[*LOOPS, "all"],
        default="asyncio",
        help="event loop of the servers (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the demo.

    Returns:
      The exit status: 1 if anyio_rst lied, 2 if the loop is not installed, otherwise 0.
    """
    rows: list[Row] = []
    for loop in LOOPS if arguments.loop == "all" else [arguments.loop]:
        if importlib.util.find_spec(loop) is not None:
            rows += show(loop)
        elif arguments.loop == "all":
            print(f"{loop} is not installed, and left out")
        else:
            print(f"anyio-rst demo: {loop} is not installed", file=sys.stderr)
            return 2
    return exit_status(rows)
