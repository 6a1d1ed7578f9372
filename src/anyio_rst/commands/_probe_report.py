"""What the probe found out: the ends there are, the report, how it is read."""

from __future__ import annotations

import enum
import ssl
import textwrap
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from anyio import BrokenResourceError

from ._output import WIDTH

if TYPE_CHECKING:
    from anyio_rst._peer import PeerClose


class End(enum.Enum):
    """How it ended: the exit status, what the report calls it, and what it means."""

    FIN = (
        0,
        "FIN",
        "complete, as far as TCP can tell: a crashed program sends FIN too",
    )
    CLOSE_NOTIFY = (0, "close_notify", "complete: the server ended its TLS session")
    RST = (3, "RST", "broken off: the connection was reset")
    TRUNCATED = (
        4,
        "FIN without close_notify",
        "perhaps truncated: anybody on the path could have sent that FIN",
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


def shown(report: Report) -> str:
    lines = [
        line("not connected", f"{failed['address']}: {failed['error']}")
        for failed in report.failed_addresses
    ]
    lines.append(line("connected", f"{report.address}{within(report.connect_seconds)}"))
    if report.tls:
        names = report.tls_certificate_names or []
        parts = [report.tls_version, report.tls_cipher, " ".join(names)]
        session = ", ".join(part for part in parts if part)
        lines.append(line("TLS", f"{session}{within(report.tls_handshake_seconds)}"))
    not_all = ", not all" if report.sent_all is False else ""
    lines.append(line("sent", f"{report.sent_bytes:,} bytes{not_all}"))
    first = report.first_byte_seconds
    first_byte = "" if first is None else f", the first{after(first)}"
    lines.append(line("received", f"{report.received_bytes:,} bytes{first_byte}"))
    end = End[report.end or ""]
    how = f"{end.shown}{after(report.end_seconds)}"
    if report.error is not None:
        how = f"{how}: {report.error}"
    if end is End.CLOSE_NOTIFY:
        tcp_end = f"{report.tcp_end or 'no end of TCP'}{after(report.tcp_end_seconds)}"
        how = f"{how}, then {tcp_end}"
    lines.append(line("end", how))
    lines.append(line("verdict", report.verdict or ""))
    return "\n".join(lines)


def within(seconds: float | None) -> str:
    return "" if seconds is None else f" in {seconds:.3f} s"


def after(seconds: float | None) -> str:
    return "" if seconds is None else f" after {seconds:.3f} s"


def line(label: str, text: str) -> str:
    return textwrap.fill(
        f"{label:13}  {text}",
        WIDTH,
        subsequent_indent=" " * 15,
        break_long_words=False,
        break_on_hyphens=False,
    )


# What programs read.


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    """To microseconds: more digits would be noise."""
    return {
        key: round(value, 6) if isinstance(value, float) else value
        for key, value in values.items()
    }
