"""How the probe gets a connection: a name resolved, TCP, and TLS on it."""

from __future__ import annotations

import errno
import queue
import socket
import ssl
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

from anyio import BrokenResourceError, fail_after, move_on_after, wait_writable
from anyio.streams.tls import TLSAttribute

from anyio_rst import _sockets, _tcp_info
from anyio_rst._native import NativeStream
from anyio_rst._peer import PeerClose, PeerReset

from ._probe_report import End, Failure, reason_of

if TYPE_CHECKING:
    from anyio_rst._connection import Connection

    from ._probe_report import Report

# What OpenSSL says of an answer that is not TLS.
NOT_TLS = {"WRONG_VERSION_NUMBER", "PACKET_LENGTH_TOO_LONG"}


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
            reason = "not a valid host name"
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
        loss = _tcp_info.loss(sock)
        # A server that resets at once has not refused: that is ECONNREFUSED. EPIPE is
        # its reset after its FIN, which is there to be read.
        if loss is not None and loss.errno == errno.EPIPE:
            loss = None
        if loss is not None and loss.errno != errno.ECONNRESET:
            raise loss
    except BaseException:
        sock.close()
        raise
    return NativeStream(sock, _sockets.host_and_port(address), loss=loss)


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
        line = f"a certificate cannot be for {report.host!r}"
    else:
        report.tls_handshake_seconds = time.perf_counter() - start
        report.tls_version = conn.extra(TLSAttribute.tls_version)
        report.tls_cipher = conn.extra(TLSAttribute.cipher)[0]
        certificate = cast("Any", conn.extra(TLSAttribute.peer_certificate))
        names = certificate.get("subjectAltName", ())
        report.tls_certificate_names = [name for _, name in names]
        return
    raise Failure(End.TLS_FAILED, line)
