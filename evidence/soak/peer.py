"""One peer: a plain socket, what is done with it, and what was seen of it."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, ClassVar, TypeAlias

from evidence.sockets import RESET_ON_CLOSE

from .plans import DRAIN_TIMEOUT, KIB, SIP, SIP_EVERY, Manner, Plan, Work
from .records import left_of, name_of
from .wire import FLOOD, PATTERN, REQUEST, request
from .wire import place as place_of

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from .tls import TLSSocket

# What a peer yields: None to wait for an event, seconds to sleep, or PARKED.
Pause: TypeAlias = "float | None"
Steps: TypeAlias = "Generator[Pause, None, None]"
PARKED = -1.0  # until there is nothing left to wait for

RECEIVE_SIZE = 256 * KIB


class Peer:
    """One connection, and what was seen of it."""

    def __init__(
        self,
        plan: Plan,
        address: tuple[str, int],
        sock: socket.socket,
        tls: TLSSocket | None,
    ) -> None:
        self.plan = plan
        self.address = address
        self.sock = sock
        self._tls = tls
        # With which it sends, reads, and shuts down.
        self._wire = sock if tls is None else tls
        self._before_upload = 0  # encrypted bytes
        self.steps = self.BEHAVIOURS[plan.kind](self)
        self.connected = False
        self.close = "NONE"
        self.received = 0
        self.sent = 0  # behind the request
        self.wrong = False
        self.pause = 0.0
        self.sleeping = self.parked = False
        self._place = place_of(plan.number)

    def line(self) -> str:
        """The fields of `judge.Seen`."""
        plan, tls = self.plan, self._tls
        fields = (
            plan.number,
            plan.kind,
            plan.work,
            plan.manner.value,
            plan.size,
            plan.lossy,
            plan.way.value,
            *self.address,
            self.connected,
            self.close,
            self.received,
            self.sent if tls is None else tls.sent - self._before_upload,
            self.wrong,
            tls is not None and tls.close_notify,
            self.pause,
            left_of(self.sock) if self.close == "NONE" else "",
        )
        return json.dumps(fields) + "\n"

    # How the kinds of peers behave.

    def good(self) -> Steps:
        yield from self._send(request(self.plan))
        yield from self._read_to_end()

    def slow(self) -> Steps:
        yield from self._send(request(self.plan))
        if self.plan.manner is Manner.LATE:
            yield DRAIN_TIMEOUT * 1.5
        for _ in range(10):
            yield 0.01
            if self._read(4 * KIB):
                return
        yield from self._read_to_end()

    def sipping(self) -> Steps:
        """What it sends would be answered by an RST, once the server has closed."""
        yield from self._send(request(self.plan))
        before = time.monotonic()
        while True:
            yield SIP_EVERY
            ended = self._sip()
            now = time.monotonic()
            self.pause = max(self.pause, now - before)
            before = now
            if ended:
                return
            self.sent += self._wire.send(b".")

    def failing(self) -> Steps:
        yield from self._send(request(self.plan))
        if self.plan.work is Work.TORN:  # in the middle of it, so it has to begin
            yield from self._read_to_end(at_most=1)
            self.sent += self._wire.send(b"!")
            yield PARKED
        yield from self._read_to_end()

    def flooding(self) -> Steps:
        plan = self.plan
        yield from self._send(request(plan))
        endless = plan.manner is Manner.ENDLESS
        ended = False
        while endless or self.sent < plan.upload:
            before = self.received
            if not ended:
                ended = self._read(RECEIVE_SIZE)
                if ended and (plan.manner is Manner.STOPPING or self.close != "FIN"):
                    return
            try:
                piece = FLOOD if endless else FLOOD[: plan.upload - self.sent]
                self.sent += self._wire.send(piece)
                if endless:
                    yield 0.05
            except BlockingIOError:
                if self.received == before:  # an event tells of what is new, only
                    yield None
            except OSError as exc:
                yield from self._read_behind(exc, ended=ended)
                return
        if not ended:
            yield from self._read_to_end()

    def half_closing(self) -> Steps:
        yield from self._send(request(self.plan))
        try:
            while self.sent < self.plan.upload:
                try:
                    self.sent += self._wire.send(FLOOD[: self.plan.upload - self.sent])
                except BlockingIOError:
                    yield None
            while not self._finished():
                yield None
        except OSError as exc:
            yield from self._read_behind(exc, ended=False)
            return
        yield from self._read_to_end()

    def resetting(self) -> Steps:
        plan = self.plan
        header = request(plan)
        if plan.manner is Manner.BEFORE_REQUEST:
            header = b""
        elif plan.manner is Manner.IN_REQUEST:
            header = header[: REQUEST.size // 2]
        yield from self._send(header)
        if plan.manner is Manner.WAITING:
            yield 0.01
        elif plan.manner is Manner.IN_ANSWER:
            yield from self._read_to_end(at_most=8 * KIB)
        elif plan.manner is Manner.AFTER_END:
            yield from self._read_to_end()
        self.sock.setsockopt(*RESET_ON_CLOSE)
        self.close = "RESET" if self.close in ("NONE", "FIN") else self.close

    def vanishing(self) -> Steps:
        """On loopback nothing can get lost: it stays, and does nothing any more."""
        manner = self.plan.manner
        yield from self._send(
            b"" if manner is Manner.BEFORE_REQUEST else request(self.plan)
        )
        if not self.plan.lossy:
            yield PARKED
        yield from self._read_to_end()

    BEHAVIOURS: ClassVar[dict[str, Callable[[Peer], Steps]]] = {
        "good": good,
        "failing": failing,
        "slow": slow,
        "sipping": sipping,
        "holding": good,
        "flooding": flooding,
        "half-closing": half_closing,
        "resetting": resetting,
        "vanishing": vanishing,
    }

    # What they do it with.

    def _send(self, data: bytes) -> Steps:
        """The first thing that is sent. Raises OSError if nobody can be reached."""
        while not self.connected:
            error = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                # One that nobody accepts is refused; this one had been made before.
                self.connected = error == errno.ECONNRESET
                raise OSError(error, os.strerror(error))
            try:
                self.sock.getpeername()
                self.connected = True
            except OSError:
                yield None
        if self._tls is not None and self.plan.shakes_hands:
            yield from self._shake_hands(self._tls)
        if data and self._wire.send(data) != len(data):
            raise AssertionError("a send buffer that does not hold a request")

        if self._tls is not None:
            self._before_upload = self._tls.sent

    def _shake_hands(self, tls: TLSSocket) -> Steps:
        while True:
            try:
                tls.do_handshake()
            except BlockingIOError:
                yield None
            else:
                return

    def _finished(self) -> bool:
        try:
            self._wire.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            return False
        return True

    def read_what_is_left(self) -> None:
        """Of a peer that is out of time, and may not have come to its reading."""
        while self.connected and self.close == "NONE":
            before = self.received
            if self._read(RECEIVE_SIZE) or self.received == before:
                return

    def say_goodbye(self) -> None:
        """Over TLS some answer a close_notify before they close."""
        if self._tls is not None and self.close == "FIN" and self.plan.says_goodbye:
            with suppress(OSError):
                self._finished()

    def _read(self, size: int) -> bool:
        """Read once; True at the end."""
        try:
            data = self._wire.recv(size)
        except BlockingIOError:
            return False
        except OSError as exc:
            self.close = name_of(exc)
            return True
        if not data:
            self.close = "FIN"
            return True
        start = self._place + self.received
        self.received += len(data)
        # What lies behind the end of the answer is in the pattern too.
        if PATTERN[start : start + len(data)] != data or self.received > self.plan.size:
            self.wrong = True
        return False

    def _sip(self) -> bool:
        """True at the end."""
        before, at_most = -1, self.received + SIP
        while before < self.received < at_most:
            before = self.received
            if self._read(at_most - before):
                return True
        return False

    def _read_to_end(self, at_most: int = sys.maxsize) -> Steps:
        while self.received < at_most:
            before = self.received
            if self._read(min(RECEIVE_SIZE, at_most)):
                return
            if self.received == before:
                yield None

    def _read_behind(self, exc: OSError, *, ended: bool) -> Steps:
        """Sending failed with *exc*; what there was before that can still be read.

        The error has been told, and the end looks like a FIN now. It is one if the
        error is EPIPE, and not ECONNRESET: tcp_reset() in net/ipv4/tcp_input.c.
        """
        if not ended:
            yield from self._read_to_end()
            if exc.errno != errno.EPIPE:
                self.close = name_of(exc)
