"""What a terminal shows while the probe waits."""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from ._output import WIDTH

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ._probe_report import Report

# Seconds: what takes less needs no explanation.
INTERVAL = 1.0

# Go to the beginning of the line, and erase it: ECMA-48.
ERASE = "\r\x1b[K"


@contextmanager
def waiting(report: Report) -> Iterator[None]:
    """Say on the standard error, if that is a terminal, what is being waited for."""
    if sys.stderr is None or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield
        return
    over = threading.Event()
    thread = threading.Thread(target=show, args=(report, over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def show(report: Report, over: threading.Event) -> None:
    start = time.monotonic()
    shown = False
    with suppress(OSError):  # nothing depends on it
        while not over.wait(INTERVAL):
            line = f"{time.monotonic() - start:.0f} s: {waits_for(report)}"
            print(f"{ERASE}{line[: WIDTH - 1]}", end="", file=sys.stderr, flush=True)
            shown = True
        if shown:
            print(ERASE, end="", file=sys.stderr, flush=True)


def waits_for(report: Report) -> str:
    if report.address is None:
        return f"waiting for a connection to {report.where}"
    if report.tls and report.tls_handshake_seconds is None:
        return f"waiting for TLS with {report.where}"
    sent, received = report.sent_bytes or 0, report.received_bytes or 0
    return f"{sent:,} bytes sent, {received:,} received, waiting for the end"
