"""The command line: `anyio-rst`, or `python -m anyio_rst`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from .commands import demo, probe

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that *argv* (default: the command line) names.

    Returns:
      The exit status.

    Raises:
      SystemExit: the command line asks for help, or is wrong (status 2).
    """
    parser = argparse.ArgumentParser(
        prog="anyio-rst", description="TCP connections that end truthfully."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo_parser = commands.add_parser(
        "demo",
        help="show how each way out of a handler ends, without and with anyio_rst",
        description=demo.__doc__,
    )
    demo.add_arguments(demo_parser)
    demo_parser.set_defaults(run=demo.run)
    probe_parser = commands.add_parser(
        "probe",
        help="show how a server ends its connections",
        description=probe.__doc__,
    )
    probe.add_arguments(probe_parser)
    probe_parser.set_defaults(run=probe.run)
    arguments = parser.parse_args(argv)
    status: int = arguments.run(arguments)
    return status


if __name__ == "__main__":
    sys.exit(main())
