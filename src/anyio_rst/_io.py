"""Receiving and sending directly on a TCP socket, on any event loop.

It knows to the byte what the kernel took.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from anyio import (
    BrokenResourceError,
    BusyResourceError,
    ClosedResourceError,
    EndOfStream,
    WouldBlock,
    get_cancelled_exc_class,
)
from anyio.abc import SocketAttribute, SocketStream
from anyio.lowlevel import cancel_shielded_checkpoint, checkpoint, checkpoint_if_cancelled

from . import _sockets
from ._forking import copy_of
from ._origin import RECEIVE_SIZE
from ._peer import PeerClose
from ._record import Record
from ._waiting import is_writable, reader_for, tell_waiters, wait_for_room

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable, Mapping

    from ._idle import Idle
    from ._origin import Origin
    from ._waiting import Reader

# A receive gives what is under way one turn of the loop to arrive, since waiting for the
# socket costs several. After 1, 2, 3 ... in a row that did so in vain, 0, 1, 3 ... others
# wait at once before the next one tries: 15 at the most.
MOST_MISSES = 5


def bytes_in(item: bytes) -> memoryview:
    """The bytes of whatever has the interface of a buffer."""
    view = memoryview(item)
    if view.format == "B" and view.ndim == 1 and view.c_contiguous:
        return view  # of which PyPy copies a slice at once, and of a cast byte by byte
    return view.cast("B")


class SocketIO(Record, SocketStream):
    """The I/O of an `anyio.abc.SocketStream` on *sock*, with AnyIO's exact meanings."""

    __slots__ = (
        "_ahead",
        "_copy",
        "_misses",
        "_reader",
        "_receiving",
        "_sending",
        "_waits",
        "idle",
    )

    mid_send: bool
    received: int
    sent: int

    def __init__(
        self,
        sock: socket.socket,
        remote_address: tuple[str, int] | None,
        *,
        origin: Origin | None = None,
        ahead: bytes = b"",
        torn: bool = False,
        eof_sent: bool = False,
        loss: BaseException | None = None,
    ) -> None:
        _sockets.never_block(sock)
        super().__init__(
            sock, remote_address, origin=origin, torn=torn, eof_sent=eof_sent, loss=loss
        )
        self.idle: Idle | None = None
        self._copy: socket.socket | None = None  # of the socket, for those who ask for it
        self._reader: Reader | None = None
        self._ahead: bytes | memoryview = ahead  # read, and not received yet
        # By hand, not by a guard: an exception of a signal handler may strike in its
        # __exit__(), and leave it taken.
        self._receiving = False
        self._sending = False
        self._misses = 0  # receives in a row that found nothing after one turn
        self._waits = 0  # receives to come that wait at once

    @property
    def is_closed(self) -> bool:
        return self._closed

    @property
    def busy(self) -> bool:
        """Whether a task is waiting in this stream."""
        return self._receiving or self._sending

    @property
    def _raw_socket(self) -> socket.socket:
        # A copy: who waits for a descriptor in an event loop takes it from others who do.
        if self._sock.fileno() == -1:
            return self._sock
        if self._copy is None:
            self._copy = copy_of(self._sock)
        return self._copy

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        sock = self._sock
        attributes: dict[Any, Callable[[], Any]] = {
            SocketAttribute.family: lambda: sock.family,
            SocketAttribute.local_address: lambda: _sockets.local_address(sock),
            SocketAttribute.local_port: lambda: _sockets.local_address(sock)[1],
            SocketAttribute.raw_socket: lambda: self._raw_socket,
        }
        address = self.remote_address
        if address is not None:
            attributes[SocketAttribute.remote_address] = lambda: address
            attributes[SocketAttribute.remote_port] = lambda: address[1]
        return attributes

    async def receive(self, max_bytes: int = RECEIVE_SIZE) -> bytes:
        if max_bytes < 1 or self._closed or self._receiving:
            await self._refuse_to_receive(max_bytes)
        self._receiving = True
        try:
            data = None
            if self._waits and not self._ahead:
                self._waits -= 1
                await checkpoint_if_cancelled()  # uvloop may see the input first
                self.refuse_if_closed()
            else:
                await checkpoint()
                self.refuse_if_closed()
                data = self._read(max_bytes)
                self._learn(hit=data is not None)
            while data is None:
                reader = self._reader or self._new_reader()
                await reader.wait(partial(self._read_ahead, max_bytes))
                self.refuse_if_closed()
                data = self._read(max_bytes)
        except ClosedResourceError:
            await checkpoint_if_cancelled()  # which may be why it was closed
            raise
        except BaseException as exc:
            if not self.prefers_input(exc) or not (data := self._read(max_bytes)):
                raise
        finally:
            self._receiving = False
        if not data:
            self._raise_end()
        self.received += len(data)
        return data

    def receive_nowait(self, max_bytes: int) -> bytes:
        """What has arrived.

        Raises:
          anyio.WouldBlock: nothing, or the end of it.
        """
        data = None if self._closed else self._read(max_bytes)
        if not data:
            if data is not None:
                self._input_ended()
            raise WouldBlock
        self.received += len(data)
        return data

    def prefers_input(self, exc: BaseException) -> bool:
        """Whether *exc* is the end of an :meth:`Connection.idle`, and no failure."""
        idle = self.idle
        if idle is None or not idle._is_over:
            return False
        return isinstance(exc, get_cancelled_exc_class())

    def _learn(self, *, hit: bool) -> None:
        """Of a receive that gave the input one turn to arrive: in vain, or not."""
        if hit:
            self._misses = 0
        else:
            self._misses = min(self._misses + 1, MOST_MISSES)
            self._waits = 2 ** (self._misses - 1) - 1

    def _new_reader(self) -> Reader:
        self._reader = reader_for(self._sock)
        return self._reader

    def _read_ahead(self, max_bytes: int) -> bool:
        """Read for a receive, which may be cancelled before it gets that."""
        try:
            self._ahead = self._sock.recv(max_bytes, _sockets.DONTWAIT)
        except BlockingIOError:
            return False
        except OSError as exc:
            self._fail(exc)
        return True

    def _read(self, max_bytes: int) -> bytes | None:
        """What has arrived; nothing at the end or after a loss; None if not yet."""
        if self._ahead:
            return self._take(max_bytes)
        try:
            return self._sock.recv(max_bytes, _sockets.DONTWAIT)
        except BlockingIOError:
            return None
        except OSError as exc:
            self._fail(exc)
            return b""

    def _take(self, max_bytes: int) -> bytes:
        ahead = self._ahead
        if len(ahead) <= max_bytes:
            self._ahead = b""
            return bytes(ahead)
        ahead = memoryview(ahead)
        self._ahead = ahead[max_bytes:]
        return bytes(ahead[:max_bytes])

    async def send(self, item: bytes) -> None:
        if self._sending:
            raise BusyResourceError("writing to")
        self._sending = True
        try:
            if self._closed or self.eof_sent or self.mid_send or self._loss is not None:
                await checkpoint()
                self._refuse_to_send()
            view = bytes_in(item)
            # Where a checkpoint costs the same after the send as before it, the peer has
            # its answer a turn earlier.
            at_once = self._reader is not None and self._reader.is_trios
            if at_once:
                await checkpoint_if_cancelled()
            else:
                await checkpoint()
            if self._closed:
                await self._closed_meanwhile()
            if view := self._write(view):
                await self._write_rest(view)
            if at_once:
                await cancel_shielded_checkpoint()
        finally:
            self._sending = False

    async def send_made(self, make: Callable[[], Awaitable[bytes]]) -> None:
        """Send what *make* returns, which is called when the socket takes something.

        So what it has made is not kept back by a cancellation before its first byte.
        """
        if self._sending:
            raise BusyResourceError("writing to")
        self._sending = True
        try:
            await checkpoint()
            self._refuse_to_send()
            while not is_writable(self._sock):
                await self._wait_for_room()
            self.mid_send = True  # what is made, and not sent, is missing in the session
            try:
                view = memoryview(await make())
            except EndOfStream:
                self.mid_send = False
                raise
            if self._closed:
                await self._closed_meanwhile()
            if view := self._write(view):
                await self._write_rest(view)
        finally:
            self._sending = False

    async def _write_rest(self, view: memoryview) -> None:
        while view:
            await self._wait_for_room()
            view = self._write(view)

    async def _wait_for_room(self) -> None:
        try:
            await wait_for_room(self._sock)
        except ClosedResourceError:
            await self._closed_meanwhile()
        if self._closed:
            await self._closed_meanwhile()

    async def _closed_meanwhile(self) -> NoReturn:
        await checkpoint_if_cancelled()  # which may be why it was closed
        raise ClosedResourceError

    def _write(self, view: memoryview) -> memoryview:
        """Send what the kernel takes, and return the rest."""
        torn = self.mid_send
        self.mid_send = True  # until the kernel's answer is known, whatever strikes here
        try:
            taken = self._sock.send(view, _sockets.DONTWAIT)
        except BlockingIOError:
            self.mid_send = torn
            return view
        except OSError as exc:
            self.mid_send = torn
            raise self._fail(exc) from exc
        self.sent += taken
        rest = view[taken:]
        self.mid_send = bool(rest)
        return rest

    async def wait_writable(self) -> None:
        """Until a send would take something at once, or fail. It counts as a send."""
        if self._sending:
            raise BusyResourceError("writing to")
        self._sending = True
        try:
            await checkpoint()
            if self._closed or self._sock.fileno() == -1:
                raise ClosedResourceError
            await self._wait_for_room()
        finally:
            self._sending = False

    async def send_eof(self) -> None:
        if self._sending:
            raise BusyResourceError("writing to")
        self._sending = True
        try:
            await checkpoint()
            if not self.eof_sent or self._closed:
                self._refuse_to_send()
                self._send_fin()
                if not self.eof_sent:
                    self._refuse_to_send()
        finally:
            self._sending = False

    def refuse_users(self) -> None:
        """The verdict has fallen: wake the tasks that wait here, and refuse others."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None:
            self._reader.close()
        shared = self._origin is not None and self._origin.shares_socket
        if (self._sending or shared) and self._sock.fileno() != -1:
            tell_waiters(self._sock)  # a second waiter, the drain, would be refused

    def refuse_if_closed(self) -> None:
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
        self.refuse_if_closed()
        self._input_ended()
        if self._loss is not None:
            raise self._lost(self._loss) from self._loss
        if self.peer is PeerClose.NONE:
            raise ClosedResourceError("other code has shut down receiving on this socket")
        raise EndOfStream

    def _refuse_to_send(self) -> None:
        """Raise what forbids a send at the moment."""
        if self._closed or self.eof_sent:
            raise ClosedResourceError
        if self._loss is not None:
            raise self._lost(self._loss) from self._loss
        if self.mid_send:
            raise BrokenResourceError(
                "an earlier send() was cut short after some of its bytes, so nothing can "
                "be sent after them"
            )
