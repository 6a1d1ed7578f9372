"""`proxy`: does your client notice a truncated answer?

Pass TCP connections on to UPSTREAM_HOST: FIN as FIN, in each direction separately,
and RST as RST. With --cut, cut them at the byte that you choose.
"""

from __future__ import annotations

import queue
import signal
from argparse import ArgumentTypeError
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, get_args

from anyio_rst.testing._lane import Direction, Kind
from anyio_rst.testing._proxy import LOOPBACK, Proxy
from anyio_rst.testing._relay import reason_of

from ._arguments import host_name, port_number, seconds
from ._interruption import Interrupted, interruption
from ._output import NOT_READ, NOT_WRITTEN, USAGE, complain
from ._proxy_report import Lines

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from anyio_rst.testing import ProxyConnection

# More bytes than will ever pass.
MOST = 2**62


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "listen",
        metavar="LISTEN",
        type=listening_address,
        help="port to listen on, at 127.0.0.1, or HOST:PORT; 0 for any free port",
    )
    parser.add_argument(
        "host", metavar="UPSTREAM_HOST", type=host_name, help="name or address"
    )
    parser.add_argument(
        "port", metavar="UPSTREAM_PORT", type=port_number, help="TCP port"
    )
    cut = parser.add_argument_group("to cut connections")
    cut.add_argument(
        "--cut",
        choices=get_args(Direction),
        help="cut this direction: up to the upstream, or down to the client",
    )
    cut.add_argument(
        "--after",
        metavar="BYTES",
        type=whole(0),
        help="cut after this many bytes (default: 0, at once)",
    )
    cut.add_argument(
        "--close-notify",
        action="store_true",
        help="cut before the close_notify that ends a TLS session, instead of --after",
    )
    cut.add_argument(
        "--with",
        dest="kind",
        choices=get_args(Kind),
        help="how to cut: by fin (default), which looks like a complete answer, rst or "
        "silence",
    )
    cut.add_argument(
        "--every",
        metavar="N",
        type=whole(1),
        help="cut every Nth connection only",
    )
    slow = parser.add_argument_group("to slow connections down, in each direction")
    slow.add_argument(
        "--delay",
        metavar="S",
        type=seconds,
        default=0.0,
        help="delay everything by S seconds, including the end",
    )
    slow.add_argument(
        "--rate", metavar="BYTES_PER_S", type=whole(1), help="pass on at most this much"
    )
    slow.add_argument(
        "--chunk",
        metavar="BYTES",
        type=whole(1),
        help="send this many bytes at a time, each in its own segment",
    )
    parser.add_argument(
        "--json", action="store_true", help="print a JSON object for each line"
    )
    parser.epilog = f"""\
Example, with a client in another terminal:

    anyio-rst proxy 9000 example.org 80 --cut down --after 1000 --with fin
    curl --header "Host: example.org" http://127.0.0.1:9000/; echo "status $?"

Exit status: 130 Ctrl-C, 143 SIGTERM, {USAGE} wrong usage or cannot listen,
{NOT_WRITTEN} the output could not be written, {NOT_READ} nobody read it.
"""


def listening_address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    try:
        number = int(port)
    except ValueError:
        number = -1
    if not 0 <= number <= 65535 or (":" in host and not host.startswith("[")):
        raise ArgumentTypeError(
            "must be a port from 0 to 65535, or a host and a port such as 0.0.0.0:9000 "
            f"or [::1]:9000, not {text!r}"
        )
    return (host_name(host) if colon else LOOPBACK), number


def whole(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = -1
        if not least <= value <= MOST:
            raise ArgumentTypeError(
                f"must be a whole number, at least {least}, not {text!r}"
            )
        return value

    return number


def run(arguments: argparse.Namespace) -> int:
    """Run the proxy until it is interrupted.

    Returns:
      The exit status: see :func:`add_arguments`.
    """
    wrong = what_does_not_go_together(arguments)
    if wrong is not None:
        tell(wrong)
        return USAGE
    proxy = Proxy(arguments.host, arguments.port, listen=arguments.listen)
    if arguments.cut is not None:
        proxy.cut(
            after=arguments.after or 0,
            kind=arguments.kind or "fin",
            direction=arguments.cut,
            every=arguments.every or 1,
            close_notify=arguments.close_notify,
        )
    proxy.slow(delay=arguments.delay, rate=arguments.rate, chunk=arguments.chunk)
    lines = Lines(arguments.json)
    try:
        with interruption.caught(signal.SIGTERM):
            pass_on(proxy, arguments, lines)
    except Interrupted as exc:
        lines.end()
        return exc.status
    return USAGE


def what_does_not_go_together(arguments: argparse.Namespace) -> str | None:
    if arguments.close_notify and arguments.after is not None:
        return "--close-notify and --after cannot be combined"
    if arguments.cut is None:
        given = {
            "--after": arguments.after is not None,
            "--close-notify": arguments.close_notify,
            "--with": arguments.kind is not None,
            "--every": arguments.every is not None,
        }
        for name, is_given in given.items():
            if is_given:
                return f"{name} needs --cut up or --cut down"
    return None


def pass_on(proxy: Proxy, arguments: argparse.Namespace, lines: Lines) -> None:
    """Print a line for each connection as it ends. Returns if it cannot listen.

    The proxy is in another thread: what waits here, for whoever reads the output, does
    not hold it up.

    Raises:
      Interrupted: when all is over.
    """
    ended: queue.SimpleQueue[ProxyConnection] = queue.SimpleQueue()
    proxy._on_end = ended.put
    try:
        with running(proxy):
            lines.begin(proxy.address, joined(arguments.host, arguments.port))
            while True:
                lines.add(ended.get())
    except OSError as exc:
        where = joined(*arguments.listen)
        tell(f"cannot listen on {where}: {reason_of(exc)}")
    except UnicodeError:
        tell(f"{arguments.listen[0]!r} is not a valid host name")
    except Interrupted:
        while not ended.empty():
            lines.add(ended.get(), last=True)
        raise


@contextmanager
def running(proxy: Proxy) -> Iterator[None]:
    """Let no signal strike where it starts and where it ends."""
    with ExitStack() as stack:
        with interruption.held():
            stack.enter_context(proxy)
        try:
            yield
        finally:
            with interruption.held():
                stack.close()


def joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def tell(line: str) -> None:
    complain(f"anyio-rst proxy: {line}")
