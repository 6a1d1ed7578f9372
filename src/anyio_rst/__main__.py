"""The command line: `anyio-rst`, or `python -m anyio_rst`."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING

from .commands import demo, probe, proxy, watch
from .commands._interruption import Interrupted, interruption
from .commands._output import NOT_READ, Parser, Unwritable, Version, complain

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from types import ModuleType

PROGRAM = "anyio-rst"

SUMMARIES: dict[ModuleType, str] = {
    demo: "show how each way out of a handler ends, without and with anyio_rst",
    probe: "show how a server ends its connections",
    proxy: "show whether a client notices a connection that is cut",
    watch: "show how the connections of this machine end, and by whom",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that *argv* (default: the command line) names.

    What closes its standard output, fills it, or interrupts it ends a command with a line
    on the standard error at most.

    Returns:
      The exit status.

    Raises:
      SystemExit: the command line asks for help, or is wrong (status 2).
    """
    name = PROGRAM
    # A process that is ours is over when this returns, and its status is settled.
    afterwards = signal.SIG_IGN if argv is None else None
    try:
        with interruption.caught(signal.SIGINT, afterwards=afterwards):
            arguments = parse(argv)
            name = f"{PROGRAM} {arguments.command}"
            status: int = arguments.run(arguments)
            return status
    except Unwritable as exc:
        if exc.status != NOT_READ:
            complain(f"{name}: cannot write the output: {exc}")
        return exc.status
    except Interrupted as exc:
        complain(f"{name}: {exc}")
        return exc.status


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog=PROGRAM,
        description="TCP connections that end truthfully.",
        epilog="Example:\n\n    anyio-rst probe example.org 443 --tls",
    )
    parser.add_argument("--version", action=Version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command, summary in SUMMARIES.items():
        name = command.__name__.rpartition(".")[2]
        added = commands.add_parser(name, help=summary, description=command.__doc__)
        command.add_arguments(added)
        added.set_defaults(run=command.run)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
