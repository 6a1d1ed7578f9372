"""`probe`: how a server ends its connections.

Connect, send a request if there is one, read to the end, and say what the end was: FIN,
RST, TLS with or without a close_notify, or none in time.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import sys
from contextlib import ExitStack, suppress
from dataclasses import asdict
from functools import partial
from io import FileIO
from typing import TYPE_CHECKING, Any

import anyio
from anyio import BrokenResourceError, CancelScope, EndOfStream, move_on_after

from anyio_rst._connection import Connection
from anyio_rst._limits import Drain
from anyio_rst._peer import PeerClose

from ._arguments import host_name, port_number, seconds
from ._interruption import Interrupted, interruption
from ._output import NOT_READ, NOT_WRITTEN, USAGE, complain, put
from ._probe_connect import client_context, connect, resolve, secure
from ._probe_conversation import Conversation, Unreadable
from ._probe_report import End, Failure, Report, reason_of, rounded, shown
from ._probe_waiting import waiting

if TYPE_CHECKING:
    import argparse

# Seconds that a server has, after its close_notify, to end TCP before it gets ours. If
# that came while it is closing, the close would reset the connection: our doing.
QUIET = 0.5


async def probe(
    addresses: list[Any], source: FileIO | None, report: Report, *, half_close: bool
) -> None:
    """Connect, talk, and conclude *report*.

    Raises:
      Failure: there was no conversation.
      Unreadable: *source* failed.
    """
    context = client_context() if report.tls else None  # before the clock runs
    stream = await connect(addresses, report)
    stream.arm()
    drain = Drain(timeout=report.timeout_seconds)
    async with Connection(stream, finish_on=(), drain=drain) as conn:
        if context is not None:
            await secure(conn, stream, context, report)
        conversation = Conversation(conn, stream, report)
        await conversation.run(source, half_close=half_close)
        if report.end == End.CLOSE_NOTIFY.name:
            with move_on_after(QUIET), suppress(EndOfStream, BrokenResourceError):
                while True:
                    await stream.receive()
        # Now, since our own close_notify is answered by an RST if it comes to nobody.
        if stream.peer is not PeerClose.NONE:
            report.tcp_ended(stream.peer, conversation.elapsed())
        if report.end == End.SILENCE.name or report.sent_all is False:
            conn.abort()  # a FIN would tell the server that this is all right
    assert conn.ending is not None
    if report.tcp_end is None and conn.ending.peer is not PeerClose.NONE:
        report.tcp_ended(conn.ending.peer, conversation.elapsed())


async def probe_until_interrupted(
    addresses: list[Any], source: FileIO | None, report: Report, *, half_close: bool
) -> None:
    """As :func:`probe`. The loop cannot be trusted to survive an exception anywhere."""
    loop = asyncio.get_running_loop()
    with CancelScope() as scope:
        with interruption.waking(lambda: loop.call_soon_threadsafe(scope.cancel)):
            await probe(addresses, source, report, half_close=half_close)


# The command.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("host", metavar="HOST", type=host_name, help="name or address")
    parser.add_argument("port", metavar="PORT", type=port_number, help="TCP port")
    parser.add_argument(
        "--tls",
        action="store_true",
        help="use TLS, and check that the certificate is for HOST",
    )
    parser.add_argument(
        "--send",
        metavar="FILE",
        help="send FILE, or the standard input if FILE is -",
    )
    parser.add_argument(
        "--half-close",
        action="store_true",
        help="then send a FIN, for servers that wait for one (not with --tls)",
    )
    parser.add_argument(
        "--timeout",
        metavar="S",
        type=seconds,
        default=10.0,
        help="give up after S seconds without progress (default: %(default)g)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of lines"
    )
    statuses = ", ".join(f"{end.status} {end.name}" for end in End)
    parser.epilog = f"""\
Example:

    printf 'GET / HTTP/1.0\\r\\n\\r\\n' | anyio-rst probe example.org 80 --send -

Exit status: {statuses}; {USAGE} wrong usage, {NOT_WRITTEN} the output could not be
written, {NOT_READ} nobody read it.
"""


def run(arguments: argparse.Namespace) -> int:
    """Run the probe.

    Returns:
      The exit status: that of an :class:`End`, or 2.
    """
    report = Report(arguments.host, arguments.port, arguments.tls, arguments.timeout)
    if arguments.tls and arguments.half_close:
        tell("--half-close cannot be combined with --tls")
        return USAGE
    try:
        with ExitStack() as stack:
            source = None
            if arguments.send is not None:
                source = stack.enter_context(open_source(arguments.send))
            stack.enter_context(waiting(report))
            addresses = resolve(report)
            with interruption.held():
                anyio.run(
                    partial(
                        probe_until_interrupted,
                        addresses,
                        source,
                        report,
                        half_close=arguments.half_close,
                    ),
                    backend="asyncio",
                )
    except Unreadable as exc:
        tell(f"cannot read {arguments.send}: {exc}")
        return USAGE
    except Failure as exc:
        report.conclude(exc.end, str(exc))
    except Interrupted:
        report.conclude(End.INTERRUPTED)
    if arguments.json:
        put(json.dumps(rounded(asdict(report))))
    elif report.end_seconds is not None:
        put(shown(report))
    if report.end_seconds is None:
        tell(report.error or "interrupted")
    assert report.exit_status is not None
    return report.exit_status


def open_source(name: str) -> FileIO:
    """What is to be sent, opened before there is a socket to get its descriptor.

    Raises:
      Unreadable: there is none.
    """
    try:
        if name == "-":
            if sys.__stdin__ is None:  # and a library may have opened its descriptor
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            return FileIO(0, closefd=False)
        return FileIO(name)
    except OSError as exc:
        raise Unreadable(reason_of(exc)) from exc


def tell(line: str) -> None:
    complain(f"anyio-rst probe: {line}")
