"""The record of what has happened on a TCP connection."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from anyio import BrokenResourceError, ClosedResourceError

from . import _sockets, _tcp_info
from ._peer import ConnectionLost, PeerClose, PeerReset

if TYPE_CHECKING:
    import socket

    from ._origin import Origin


class Record:
    """What was sent and received on *sock*, what the peer did, and how it was lost."""

    __slots__ = (
        "_closed",
        "_has_tried_fin",
        "_loss",
        "_origin",
        "_sock",
        "eof_sent",
        "mid_send",
        "peer",
        "received",
        "remote_address",
        "sent",
    )

    def __init__(
        self,
        sock: socket.socket,
        remote_address: tuple[str, int] | None,
        *,
        origin: Origin | None,
        torn: bool,
        eof_sent: bool,
        loss: BaseException | None,
    ) -> None:
        self.remote_address: tuple[str, int] | None = remote_address
        self.peer: PeerClose = PeerClose.NONE
        self.mid_send: bool = torn  # some bytes of a send went out, others did not
        self.eof_sent: bool = eof_sent
        self.received: int = 0  # bytes
        self.sent: int = 0
        self._sock = sock
        self._origin = origin
        self._closed = False
        self._has_tried_fin = False
        self._loss: BaseException | None = None
        if loss is not None:
            self._lost(loss)

    def _send_fin(self) -> None:
        self._has_tried_fin = True
        loss = _sockets.send_fin(self._sock)
        # Somebody else may have sent it before, and the peer its own since.
        if loss is None or (
            _tcp_info.is_unknown(loss) and _tcp_info.both_finished(self._sock)
        ):
            self.eof_sent = True
        else:
            self._lost(loss)
            self._ask_origin()

    def fin_is_out(self) -> bool:
        """Whether our FIN has been sent, by whomever."""
        if self.eof_sent or _tcp_info.fin_is_out(self._sock):
            return True
        # A signal handler's exception may have come before the kernel's answer.
        tried = self._has_tried_fin and self._loss is None
        return tried and _tcp_info.both_finished(self._sock)

    def _input_ended(self) -> None:
        """By the peer's FIN, or a loss: the kernel tells of that only once."""
        self._ask_origin()
        if self._loss is None and self.peer is PeerClose.NONE:
            why = _tcp_info.false_end(self._sock)
            if why is None:
                self.peer = PeerClose.FIN
            elif _tcp_info.is_unknown(why):
                self._lost(why)

    def _ask_origin(self) -> None:
        """The kernel may have told a loss to the stream that was taken over."""
        loss = self._loss
        if self._origin is None or (loss is not None and not _tcp_info.is_unknown(loss)):
            return
        if (loss := self._origin.loss()) is not None:
            self._loss = None
            self._lost(loss)

    def _fail(self, exc: OSError) -> BrokenResourceError | ClosedResourceError:
        """What a failed call on the socket means."""
        if exc.errno in _sockets.CLOSED_ERRNOS and self._loss is None:
            self._closed = True  # by whoever has the socket object as well
            return ClosedResourceError("other code has closed the socket")
        if exc.errno == errno.EPIPE and self._loss is None:
            if self.fin_is_out():
                self.eof_sent = True
                return ClosedResourceError("other code has half-closed the stream")
            # As Linux does by itself (sk_stream_error() of net/core/stream.c), and the
            # BSDs and macOS do not.
            exc = _sockets.pending_error(self._sock) or exc
        return self._lost(exc)

    def _lost(self, exc: BaseException) -> BrokenResourceError:
        """Remember the first loss, and make the exception that tells of it."""
        if self._loss is None:
            self._loss = exc.with_traceback(None)  # whose frames refer to this stream
            if _tcp_info.is_peers_reset(self._sock, exc):
                self.peer = PeerClose.RST
            elif getattr(exc, "errno", None) in _sockets.UNREACHABLE_ERRNOS:
                self.peer = PeerClose.LOST
        if self.peer is PeerClose.RST:
            return PeerReset(f"the peer reset the connection ({self._loss})")
        return ConnectionLost(f"the connection was lost ({self._loss})")
