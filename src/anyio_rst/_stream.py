"""What a connection needs of the stream under it: I/O, and the parts of an ending."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, NoReturn

from anyio import (
    BrokenResourceError,
    BusyResourceError,
    ClosedResourceError,
    EndOfStream,
)
from anyio.abc import SocketStream
from anyio.lowlevel import checkpoint

from . import _sockets
from ._peer import ConnectionLost, PeerClose, PeerReset

if TYPE_CHECKING:
    import socket

    from ._drain import Drain

# One read at the most: what AnyIO and Trio take.
RECEIVE_SIZE = 65536


class EndableStream(SocketStream):
    """A TCP byte stream that remembers what matters for its ending.

    The public half has AnyIO's exact meanings. An ending is :meth:`reset`, or
    :meth:`send_fin`, :meth:`drain` and :meth:`close` in this order. A :meth:`close`
    before the FIN is out is a reset.
    """

    __slots__ = (
        "_closed",
        "_loss",
        "_receiving",
        "_sending",
        "discarded",
        "eof_sent",
        "mid_send",
        "peer",
        "remote_address",
        "unacknowledged",
    )

    def __init__(self, remote_address: tuple[str, int] | None) -> None:
        self.remote_address: tuple[str, int] | None = remote_address
        self.peer: PeerClose = PeerClose.NONE
        self.mid_send: bool = False  # some bytes of a send went out, others did not
        self.eof_sent: bool = False
        self.discarded: int = 0
        self.unacknowledged: int | None = None
        self._closed = False
        self._receiving = False
        self._sending = False
        self._loss: BaseException | None = None

    @property
    def buffered(self) -> int:
        """How many bytes that were received wait in a buffer that can be seen."""
        return 0

    @property
    def busy(self) -> bool:
        """Whether a task is waiting in this stream."""
        return self._receiving or self._sending

    # receive() and send() are whole in either subclass: a coroutine more for each costs
    # a tenth of a short message.

    async def send_eof(self) -> None:
        if self._sending:
            raise BusyResourceError("writing to")
        self._sending = True
        try:
            await checkpoint()
            if not self.eof_sent or self._closed:
                self._refuse_to_send()
                await self._send_eof()
        finally:
            self._sending = False

    @abstractmethod
    async def _send_eof(self) -> None:
        """Shut down writing, and set :attr:`eof_sent` as soon as that is done."""

    @abstractmethod
    def arm(self) -> None:
        """Let every end but :meth:`send_fin` be an RST."""

    @abstractmethod
    def reset(self) -> None:
        """Send the RST and close. Synchronous, and good without an event loop."""

    @abstractmethod
    async def send_fin(self, last: bytes = b"") -> None:
        """Close to the users, and send *last* and the FIN behind what they sent.

        It waits for nothing, and is not cut short by a cancellation. What the socket
        does not take at once is left to :meth:`drain`. When the FIN is out,
        :attr:`eof_sent` is true, and the socket disarmed; it never is if the connection
        was gone.
        """

    @abstractmethod
    async def drain(self, limits: Drain) -> None:
        """Read and discard until the peer's FIN or a limit; complete :meth:`send_fin`.

        What is found goes to :attr:`discarded` and :attr:`peer`.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the socket as it is, armed or disarmed."""

    @abstractmethod
    def release(self) -> object:
        """Disarm, and return the stream that the next owner knows."""

    def _finish(self, sock: socket.socket, last: bytes) -> bytes:
        """Send *last* and the FIN as far as *sock* takes them; see :meth:`send_fin`.

        Returns:
          The rest of *last*; nothing if the connection was gone.
        """
        try:
            while last:
                last = last[sock.send(last, _sockets.MSG_MORE) :]
        except BlockingIOError:
            self.mid_send = True
            return last
        except OSError as exc:
            self._lost(exc)
            return b""
        self.mid_send = False
        # Before the FIN: one that waits behind an answer would be lost with the process.
        _sockets.disarm(sock)
        if not self.eof_sent:
            loss = _sockets.send_fin(sock)
            if loss is not None:
                self._lost(loss)
                return b""
            self.eof_sent = True
        return b""

    def _measure(self, sock: socket.socket) -> None:
        self.unacknowledged = _sockets.unacknowledged(sock, fin_sent=self.eof_sent)

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise ClosedResourceError

    async def _refuse_to_receive(self, max_bytes: int) -> None:
        """Raise what forbids a receive at the moment."""
        if max_bytes < 1:
            raise ValueError("max_bytes must be a positive integer")
        if self._closed:
            await checkpoint()
            raise ClosedResourceError
        if self._receiving:
            raise BusyResourceError("reading from")

    def _raise_end(self) -> NoReturn:
        """Raise what the end of the input means."""
        self._refuse_if_closed()
        if self._loss is not None:
            # The kernel tells of a loss once, and then of an end like any other.
            raise self._lost(self._loss) from self._loss
        self.peer = PeerClose.FIN
        raise EndOfStream

    def _refuse_to_send(self) -> None:
        if self._closed or self.eof_sent:
            raise ClosedResourceError
        if self._loss is not None:
            raise self._lost(self._loss) from self._loss
        if self.mid_send:
            raise BrokenResourceError(
                "an earlier send() was cut short after some of its bytes: whatever "
                "followed would be garbage to the peer"
            )

    def _lost(self, exc: BaseException) -> BrokenResourceError:
        """Remember the first loss, and make the exception that tells of it."""
        if self._loss is None:
            self._loss = exc
            if isinstance(exc, OSError) and exc.errno in _sockets.RESET_ERRNOS:
                self.peer = PeerClose.RST
        if self.peer is PeerClose.RST:
            return PeerReset(f"the peer reset the connection ({self._loss})")
        return ConnectionLost(f"the connection was lost ({self._loss})")
