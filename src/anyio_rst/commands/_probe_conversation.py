"""What the probe and a server say to each other, and how the server ended it."""

from __future__ import annotations

import math
import select
import socket
import ssl
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import anyio
from anyio import (
    BrokenResourceError,
    CancelScope,
    EndOfStream,
    create_task_group,
    current_time,
    move_on_after,
    wait_readable,
)

from anyio_rst._peer import PeerClose, PeerReset

from ._probe_report import End, reason_of

if TYPE_CHECKING:
    from io import FileIO

    from anyio_rst._connection import Connection
    from anyio_rst._native import NativeStream

    from ._probe_report import Report

# Bytes of one send, the most that TLS has in a record. What was sent is counted by them.
CHUNK = 16384

# Seconds that the input has to end after the server did. A server may be done before the
# program that wrote the request has exited.
INPUT_ENDS = 0.5


class Unreadable(Exception):
    """The request cannot be read from its file."""


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
        except BrokenResourceError as exc:
            if self._stream.peer is PeerClose.FIN:
                return End.TRUNCATED, None
            broken = isinstance(exc.__cause__, ssl.SSLError)
            return End.TLS_FAILED if broken else End.LOST, reason_of(exc)

    async def _send(
        self, source: FileIO | None, half_close: bool, conversation: CancelScope
    ) -> None:
        # A connection that was lost may still have something to be read, and then
        # _read_to_end() tells.
        with suppress(BrokenResourceError):
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
                except ValueError:
                    pass  # it was closed: the probe is over

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
