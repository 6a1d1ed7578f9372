"""`probe`: how a server ends its connections.

Connect, send what there is to send, read to the end, and tell what that was: FIN, RST,
TLS with or without a close_notify, or nothing of that in time.
"""

from __future__ import annotations

import asyncio
import enum
import errno
import json
import math
import queue
import select
import socket
import ssl
import sys
import threading
import time
from argparse import ArgumentTypeError
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from io import FileIO
from typing import TYPE_CHECKING, Any, cast

import anyio
from anyio import (
    BrokenResourceError,
    CancelScope,
    EndOfStream,
    create_task_group,
    current_time,
    fail_after,
    move_on_after,
    wait_readable,
    wait_writable,
)
from anyio.streams.tls import TLSAttribute

from . import _sockets
from ._connection import Connection, arm
from ._drain import Drain
from ._native import NativeStream
from ._peer import PeerClose, PeerReset

if TYPE_CHECKING:
    import argparse

# Bytes of one send, the most that TLS has in a record. What was sent is counted by them.
CHUNK = 16384

# Seconds that a server has, after its close_notify, to end TCP before it gets ours. If
# that came while it is closing, the close would reset the connection: our doing.
QUIET = 0.5

# Seconds that the input has to end after the server did. A server may be done before the
# program that wrote the request has exited.
INPUT_ENDS = 0.5

# The longest --timeout, in seconds.
DAY = 86400.0

# What OpenSSL says of an answer that is not TLS.
NOT_TLS = {"WRONG_VERSION_NUMBER", "PACKET_LENGTH_TOO_LONG"}

# The exit status of a command line that cannot be run, as argparse has it.
USAGE = 2


class End(enum.Enum):
    """How it ended: the exit status, what the report calls it, and what it means."""

    FIN = (
        0,
        "FIN",
        "complete, as far as TCP can tell: a program that crashed sends a FIN as well",
    )
    CLOSE_NOTIFY = (0, "close_notify", "complete: the server ended its TLS session")
    RST = (3, "RST", "broken off: the connection was reset")
    TRUNCATED = (
        4,
        "FIN without close_notify",
        "perhaps truncated: anybody on the way could have sent that FIN",
    )
    SILENCE = (5, "none", "no end: nothing happened for {timeout:g} s")
    NOT_CONNECTED = (6, "none", "not connected")
    TLS_FAILED = (7, "TLS failed", "broken off: TLS failed")
    LOST = (8, "lost", "broken off: the connection was lost")
    INTERRUPTED = (130, "none", "no end: interrupted")

    def __init__(self, status: int, shown: str, verdict: str) -> None:
        self.status = status
        self.shown = shown
        self.verdict = verdict


@dataclass
class Report:
    """What became known. The fields are the keys of `--json`, and None is null."""

    host: str
    port: int
    tls: bool
    timeout_seconds: float
    end: str | None = None
    exit_status: int | None = None
    verdict: str | None = None
    error: str | None = None
    address: str | None = None
    failed_addresses: list[dict[str, str]] = field(default_factory=list)
    connect_seconds: float | None = None
    tls_handshake_seconds: float | None = None
    tls_version: str | None = None
    tls_cipher: str | None = None
    tls_certificate_names: list[str] | None = None
    sent_bytes: int | None = None
    sent_all: bool | None = None
    received_bytes: int | None = None
    first_byte_seconds: float | None = None
    end_seconds: float | None = None
    tcp_end: str | None = None
    tcp_end_seconds: float | None = None

    def conclude(self, end: End, error: str | None = None) -> None:
        self.end = end.name
        self.exit_status = end.status
        self.verdict = end.verdict.format(timeout=self.timeout_seconds)
        self.error = error

    def tcp_ended(self, peer: PeerClose, seconds: float) -> None:
        self.tcp_end = peer.name
        # Below TLS it may take longer, or was found only when the rest was read.
        self.tcp_end_seconds = seconds if self.tls else self.end_seconds

    @property
    def where(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


class Failure(Exception):
    """There was no conversation: how that is called, and the line that says why."""

    def __init__(self, end: End, line: str) -> None:
        super().__init__(line)
        self.end = end


class Unreadable(Exception):
    """What there is to send cannot be read."""


# Before the conversation.


def resolve(report: Report) -> list[Any]:
    """What `socket.getaddrinfo` answers.

    It runs in a thread that nothing waits for: one that hangs can be left behind.

    Raises:
      Failure: no address, or no answer in time.
    """
    answers: queue.SimpleQueue[list[Any] | OSError | UnicodeError] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(
                socket.getaddrinfo(report.host, report.port, type=socket.SOCK_STREAM)
            )
        except (OSError, UnicodeError) as exc:
            answers.put(exc)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=report.timeout_seconds)
    except queue.Empty:
        reason = f"no answer within {report.timeout_seconds:g} s"
    else:
        if isinstance(answer, list):
            return answer
        if isinstance(answer, UnicodeError):
            reason = "it has not the form of a host name"
        else:
            reason = reason_of(answer)
    raise Failure(End.NOT_CONNECTED, f"cannot resolve {report.host!r}: {reason}")


async def connect(addresses: list[Any], report: Report) -> NativeStream:
    """Connect to the first of *addresses* that lets us, one after another.

    The socket is ours alone: a transport of asyncio would drop what has arrived when
    a send finds that the connection was reset.

    Raises:
      Failure: none did.
    """
    for family, kind, protocol, _, address in addresses:
        host, _ = _sockets.host_and_port(address)
        start = time.perf_counter()
        stream = None
        try:
            with move_on_after(report.timeout_seconds):
                stream = await connect_to(family, kind, protocol, address)
            reason = f"no answer within {report.timeout_seconds:g} s"
        except OSError as exc:
            reason = reason_of(exc)
        if stream is not None:
            report.address = host
            report.connect_seconds = time.perf_counter() - start
            return stream
        report.failed_addresses.append({"address": host, "error": reason})
    reasons = "; ".join(
        f"{failed['address']}: {failed['error']}" for failed in report.failed_addresses
    )
    raise Failure(End.NOT_CONNECTED, f"cannot connect to {report.where} ({reasons})")


async def connect_to(family: int, kind: int, protocol: int, address: Any) -> NativeStream:
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setblocking(False)
        with suppress(BlockingIOError):
            sock.connect(address)
        await wait_writable(sock)
        stream = NativeStream(sock, _sockets.host_and_port(address))
        loss = _sockets.loss(sock)
        # A server that resets at once has not refused: that is ECONNREFUSED. EPIPE is
        # its reset after its FIN, which is there to be read.
        if loss is not None and loss.errno == errno.ECONNRESET:
            stream._lost(loss)
        elif loss is not None and loss.errno != errno.EPIPE:
            raise loss
    except BaseException:
        sock.close()
        raise
    return stream


def client_context() -> ssl.SSLContext:
    """The default of :mod:`ssl`, and a FIN is no end of a session."""
    context = ssl.create_default_context()
    context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    return context


async def secure(
    conn: Connection, stream: NativeStream, context: ssl.SSLContext, report: Report
) -> None:
    """Do the TLS handshake.

    Raises:
      Failure: it failed.
    """
    where = report.where
    start = time.perf_counter()
    try:
        with fail_after(report.timeout_seconds):
            await conn.start_tls(context, server_side=False, hostname=report.host)
    except TimeoutError:
        line = f"no TLS handshake with {where} within {report.timeout_seconds:g} s"
    except ssl.SSLCertVerificationError as exc:
        reason = exc.verify_message.rstrip(".")
        line = f"the certificate of {where} is not valid: {reason}"
    except ssl.SSLError as exc:
        line = f"no TLS with {where}: {reason_of(exc)}"
        if exc.reason in NOT_TLS:
            line += " (what it sent is not TLS)"
    except PeerReset:
        line = f"{where} reset the connection in the TLS handshake"
    except BrokenResourceError as exc:
        if stream.peer is PeerClose.FIN:
            line = f"{where} closed the connection in the TLS handshake"
        else:
            line = f"no TLS with {where}: {reason_of(exc)}"
    except UnicodeError:
        line = f"no certificate can be for {report.host!r}"
    else:
        report.tls_handshake_seconds = time.perf_counter() - start
        report.tls_version = conn.extra(TLSAttribute.tls_version)
        report.tls_cipher = conn.extra(TLSAttribute.cipher)[0]
        certificate = cast("Any", conn.extra(TLSAttribute.peer_certificate))
        names = certificate.get("subjectAltName", ())
        report.tls_certificate_names = [name for _, name in names]
        return
    raise Failure(End.TLS_FAILED, line)


# The conversation.


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
    drain = Drain(timeout=report.timeout_seconds)
    async with Connection(stream, finish_on=(), drain=drain) as conn:
        arm(conn)
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


class Conversation:
    """Send and receive at the same time, until the server ends it or is silent."""

    def __init__(self, conn: Connection, stream: NativeStream, report: Report) -> None:
        self._conn = conn
        self._stream = stream
        self._report = report
        self._start = time.perf_counter()
        self._silence = CancelScope()
        self._sending_is_over = anyio.Event()
        self._input_is_due = False
        self._unreadable: OSError | None = None
        self._sent = 0
        self._received = 0
        report.sent_bytes = report.received_bytes = 0

    def elapsed(self) -> float:
        """Seconds since the connection, and TLS on it, was ready."""
        return time.perf_counter() - self._start

    async def run(self, source: FileIO | None, *, half_close: bool) -> None:
        """Conclude the report.

        Raises:
          Unreadable: *source* failed.
        """
        report = self._report
        report.conclude(End.SILENCE)  # unless there is another end in time
        try:
            with self._silence:
                self._put_off()
                async with create_task_group() as tg:
                    tg.start_soon(self._send, source, half_close, tg.cancel_scope)
                    report.conclude(*await self._read_to_end())
                    report.end_seconds = self.elapsed()
                    with move_on_after(INPUT_ENDS):
                        await self._sending_is_over.wait()
                    tg.cancel_scope.cancel()
        finally:
            if report.end_seconds is None:
                report.end_seconds = self.elapsed()
        if self._unreadable is not None:
            raise Unreadable(reason_of(self._unreadable))

    def _put_off(self) -> None:
        """Something happened: silence begins anew, but not while it is our turn."""
        if self._input_is_due:
            self._silence.deadline = math.inf
        else:
            self._silence.deadline = current_time() + self._report.timeout_seconds

    async def _read_to_end(self) -> tuple[End, str | None]:
        report = self._report
        try:
            while True:
                data = await self._conn.receive()
                if not self._received:
                    report.first_byte_seconds = self.elapsed()
                self._received += len(data)
                report.received_bytes = self._received
                self._put_off()
        except EndOfStream:
            return (End.CLOSE_NOTIFY if report.tls else End.FIN), None
        except PeerReset:
            return End.RST, None
        except ssl.SSLError as exc:
            return End.TLS_FAILED, reason_of(exc)
        except BrokenResourceError as exc:
            if self._stream.peer is PeerClose.FIN:
                return End.TRUNCATED, None
            return End.LOST, reason_of(exc)

    async def _send(
        self, source: FileIO | None, half_close: bool, conversation: CancelScope
    ) -> None:
        # A connection that was lost may still have something to be read, and then
        # _read_to_end() tells.
        with suppress(BrokenResourceError, ssl.SSLError):
            if source is not None:
                self._report.sent_all = False
                self._report.sent_all = await self._send_all(source)
                if self._unreadable is not None:
                    conversation.cancel()
            if half_close:
                await self._conn.send_eof()
        self._sending_is_over.set()

    async def _send_all(self, source: FileIO) -> bool:
        """Send *source*; False if that was cut short by its failure or by the server."""
        ours, theirs = socket.socketpair()

        def pump() -> None:
            with theirs:
                try:
                    copy(source, theirs)
                except OSError as exc:
                    self._unreadable = exc

        with ours:
            ours.setblocking(False)
            # Nothing can interrupt a read from a terminal, and nothing waits for it.
            threading.Thread(target=pump, daemon=True).start()
            while True:
                self._input_is_due = True
                self._put_off()
                await wait_readable(ours)
                self._input_is_due = False
                self._put_off()
                chunk = ours.recv(CHUNK)
                if not chunk:
                    return self._unreadable is None
                if self._report.end_seconds is not None:
                    return False
                await self._conn.send(chunk)
                self._sent += len(chunk)
                self._report.sent_bytes = self._sent
                self._put_off()


def copy(source: FileIO, into: socket.socket) -> None:
    """Copy *source* to its end, for as long as somebody reads what goes *into*.

    Raises:
      OSError: reading failed.
    """
    while chunk := read(source):
        try:
            into.sendall(chunk)
        except OSError:
            return


def read(source: FileIO) -> bytes:
    while (chunk := source.read(CHUNK)) is None:  # it is in non-blocking mode
        select.select([source], [], [])
    return chunk


# What people read.


def reason_of(exc: BaseException) -> str:
    """Why, without the numbers of errors and lines."""
    if isinstance(exc, BrokenResourceError) and exc.__cause__ is not None:
        exc = exc.__cause__
    if isinstance(exc, ssl.SSLError) and exc.reason:
        return exc.reason.replace("_", " ").lower()
    if isinstance(exc, OSError) and exc.strerror:
        return exc.strerror
    return str(exc)


def show(report: Report) -> None:
    for failed in report.failed_addresses:
        print_line("not connected", f"{failed['address']}: {failed['error']}")
    print_line("connected", f"{report.address}{within(report.connect_seconds)}")
    if report.tls:
        names = report.tls_certificate_names or []
        parts = [report.tls_version, report.tls_cipher, " ".join(names)]
        shown = ", ".join(part for part in parts if part)
        print_line("TLS", f"{shown}{within(report.tls_handshake_seconds)}")
    not_all = ", not all" if report.sent_all is False else ""
    print_line("sent", f"{report.sent_bytes:,} bytes{not_all}")
    first = report.first_byte_seconds
    first_byte = "" if first is None else f", the first{after(first)}"
    print_line("received", f"{report.received_bytes:,} bytes{first_byte}")
    end = End[report.end or ""]
    shown = f"{end.shown}{after(report.end_seconds)}"
    if report.error is not None:
        shown = f"{shown}: {report.error}"
    if end is End.CLOSE_NOTIFY:
        tcp_end = f"{report.tcp_end or 'no end of TCP'}{after(report.tcp_end_seconds)}"
        shown = f"{shown}, then {tcp_end}"
    print_line("end", shown)
    print_line("verdict", report.verdict or "")


def within(seconds: float | None) -> str:
    return "" if seconds is None else f" in {seconds:.3f} s"


def after(seconds: float | None) -> str:
    return "" if seconds is None else f" after {seconds:.3f} s"


def print_line(label: str, text: str) -> None:
    print(f"{label:13}  {text}")


def complain(line: str) -> None:
    print(f"anyio-rst probe: {line}", file=sys.stderr)


# The command.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("host", metavar="HOST", type=host_name, help="name or address")
    parser.add_argument("port", metavar="PORT", type=port_number, help="TCP port")
    parser.add_argument(
        "--tls",
        action="store_true",
        help="speak TLS, and check the certificate for HOST",
    )
    parser.add_argument(
        "--send",
        metavar="FILE",
        help="send what is in FILE, or comes from the standard input if it is -",
    )
    parser.add_argument(
        "--half-close",
        action="store_true",
        help="send a FIN behind that, for servers that wait for one (not with --tls)",
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
    parser.epilog = f"Exit status: {statuses}; {USAGE} wrong usage."


def host_name(text: str) -> str:
    host = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if not host:
        raise ArgumentTypeError("must not be empty")
    return host


def port_number(text: str) -> int:
    try:
        port = int(text)
    except ValueError:
        port = 0
    if not 1 <= port <= 65535:
        raise ArgumentTypeError(f"must be a number from 1 to 65535, not {text!r}")
    return port


def seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number <= DAY:
        raise ArgumentTypeError(
            f"must be a number of seconds above 0, and a day at most, not {text!r}"
        )
    return number


def run(arguments: argparse.Namespace) -> int:
    """Run the probe.

    Returns:
      The exit status: that of an :class:`End`, or 2.
    """
    report = Report(arguments.host, arguments.port, arguments.tls, arguments.timeout)
    if arguments.tls and arguments.half_close:
        complain("--half-close is not for --tls: no half-close there")
        return USAGE
    try:
        with ExitStack() as stack:
            source = None
            if arguments.send is not None:
                source = stack.enter_context(open_source(arguments.send))
            anyio.run(
                partial(
                    probe,
                    resolve(report),
                    source,
                    report,
                    half_close=arguments.half_close,
                ),
                backend="asyncio",
            )
    except Unreadable as exc:
        complain(f"cannot read {arguments.send}: {exc}")
        return USAGE
    except Failure as exc:
        report.conclude(exc.end, str(exc))
    except (KeyboardInterrupt, asyncio.CancelledError):
        # AnyIO has its own way for Ctrl-C before Python 3.11, and that ends in this.
        report.conclude(End.INTERRUPTED)
    if arguments.json:
        print(json.dumps(rounded(asdict(report))))
    elif report.end_seconds is not None:
        show(report)
    if report.end_seconds is None:
        complain(report.error or "interrupted")
    assert report.exit_status is not None
    return report.exit_status


def open_source(name: str) -> FileIO:
    """What is to be sent, opened before there is a socket to get its descriptor.

    Raises:
      Unreadable: there is none.
    """
    try:
        if name == "-":
            return FileIO(0, closefd=False)
        return FileIO(name)
    except OSError as exc:
        raise Unreadable(reason_of(exc)) from exc


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    """To microseconds: more digits would be noise."""
    return {
        key: round(value, 6) if isinstance(value, float) else value
        for key, value in values.items()
    }
