"""Streams made by somebody else: AnyIO's own, wrappers around them, Trio's.

They keep their own I/O. Their sends are watched, and at the end the socket under them
is taken over.
"""

from __future__ import annotations

import errno
import sys
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, cast

import anyio
from anyio import (
    BrokenResourceError,
    BusyResourceError,
    ClosedResourceError,
    EndOfStream,
)
from anyio.abc import ByteStream, SocketAttribute, SocketStream
from anyio.lowlevel import (
    cancel_shielded_checkpoint,
    checkpoint,
    checkpoint_if_cancelled,
)
from anyio.streams.buffered import BufferedByteReceiveStream
from anyio.streams.tls import TLSAttribute, TLSStream

from . import _sockets
from ._native import NativeStream
from ._peer import PeerClose
from ._stream import RECEIVE_SIZE, EndableStream

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator, Mapping
    from typing import TypeAlias

    import trio

    from ._drain import Drain

    Attributes: TypeAlias = Mapping[Any, Callable[[], Any]]
    TrioTLS: TypeAlias = trio.SSLStream[trio.SocketStream]


# How often a stream may suspend in the clean-up of an `aclose()` that is dropped.
SUSPENSIONS = 10


class ForeignStream(EndableStream):
    """The I/O of the byte stream *stream*, and the ending of the socket under it."""

    __slots__ = (
        "_is_over",
        "_keeps_input",
        "_original",
        "_owned",
        "_stream",
        "_taken",
    )

    def __init__(
        self, stream: ByteStream, original: object, attributes: Attributes
    ) -> None:
        remote_address = attributes.get(SocketAttribute.remote_address, lambda: None)
        super().__init__(remote_address())
        self._stream = stream
        self._original = original
        self._owned: _sockets.SocketLike = attributes[SocketAttribute.raw_socket]()
        self._taken: NativeStream | None = None
        self._is_over = False
        # A receive may find its data in there, without a checkpoint.
        self._keeps_input = isinstance(stream, (BufferedByteReceiveStream, TLSStream))

    @property
    def extra_attributes(self) -> Attributes:
        return self._stream.extra_attributes

    @property
    def _raw_socket(self) -> socket.socket:
        return self._stream.extra(SocketAttribute.raw_socket)

    @property
    def buffered(self) -> int:
        if isinstance(self._stream, BufferedByteReceiveStream):
            return len(self._stream.buffer)
        return 0

    async def receive(self, max_bytes: int = RECEIVE_SIZE) -> bytes:
        if max_bytes < 1 or self._closed or self._receiving:
            await self._refuse_to_receive(max_bytes)
        self._receiving = True
        try:
            if self._keeps_input:
                await checkpoint()
                self._refuse_if_closed()
            try:
                data = await self._stream.receive(max_bytes)
            except EndOfStream:
                data = b""
            except BrokenResourceError as exc:
                self._refuse_if_closed()
                raise self._lost(exc.__cause__ or exc) from exc
            self._refuse_if_closed()
        except ClosedResourceError:
            await checkpoint_if_cancelled()  # which may be why it was closed
            raise
        finally:
            self._receiving = False
        if not data:
            self._raise_end()
        return data

    async def send(self, item: bytes) -> None:
        if self._sending:
            raise BusyResourceError("writing to")
        self._sending = True
        try:
            if self._closed or self.eof_sent or self.mid_send or self._loss is not None:
                await checkpoint()
                self._refuse_to_send()
            if not isinstance(item, (bytes, bytearray)):
                # Of bytes, which not every stream sees to.
                item = cast("bytes", memoryview(item).cast("B"))
            if not item:
                await checkpoint()  # AnyIO's stream on Trio has none for an empty send
            # Until it has returned, nobody can tell how much of it went out.
            self.mid_send = bool(item)
            try:
                await self._stream.send(item)
            except BrokenResourceError as exc:
                self._refuse_if_closed()
                raise self._lost(exc.__cause__ or exc) from exc
            self._refuse_if_closed()  # AnyIO before 4.16 returns from a send cut short
            self.mid_send = False
        except ClosedResourceError:
            await checkpoint_if_cancelled()  # which may be why it was closed
            raise
        finally:
            self._sending = False

    async def _send_eof(self) -> None:
        with self._borrowed() as sock:
            loss = _sockets.loss(sock)
        if loss is not None:
            raise self._lost(loss) from loss
        await self._stream.send_eof()
        with self._borrowed() as sock:
            self.eof_sent = _sockets.fin_is_out(sock)
        if self.eof_sent:
            return
        # uvloop does it in its next turn. If it were done here before that, uvloop's own
        # would fail once the peer has finished, too, and the unread input be lost.
        await cancel_shielded_checkpoint()
        self._refuse_if_closed()
        with self._borrowed() as sock:
            loss = _sockets.send_fin(sock)
        self.eof_sent = True
        if loss is not None and loss.errno != errno.ENOTCONN:  # that is: both finished
            raise self._lost(loss) from loss

    @contextmanager
    def _borrowed(self) -> Iterator[socket.socket]:
        try:
            with _sockets.borrowed(self._owned) as sock:
                yield sock
        except OSError as exc:  # the stream closed it
            raise self._lost(exc) from exc

    async def aclose(self) -> None:
        await self._stream.aclose()

    def arm(self) -> None:
        if self._owned.fileno() == -1:
            raise OSError(errno.EBADF, "the stream has closed its socket")
        _sockets.arm(self._owned)

    def reset(self) -> None:
        self._closed = True
        with suppress(OSError), _sockets.borrowed(self._owned) as sock:
            self._measure(sock)
            _sockets.reset(sock)
        self._close_stream()

    async def send_fin(self, last: bytes = b"") -> None:
        self._closed = True
        with suppress(OSError), _sockets.borrowed(self._owned) as sock:
            if self.eof_sent and self.peer is PeerClose.NONE and not self._receiving:
                # By the peer's FIN, or by a reset that a transport has noticed already:
                # the stream stays open to be asked which.
                self._is_over = _sockets.is_over(sock)
            last = self._finish(sock, last)
            self._measure(sock)
            if self._is_over:
                return
            if self._loss is None and (last or self.peer is PeerClose.NONE):
                taken = self._take_over(sock)
                if last:
                    # The stream stays open: closed, AnyIO's before 4.16 sends the FIN.
                    await taken.send_fin(last)
                    return
        self._close_stream()

    async def drain(self, limits: Drain) -> None:
        if self._taken is not None:
            try:
                await self._taken.drain(limits)
            finally:
                self.peer = self._taken.peer
                self.discarded = self._taken.discarded
                self.eof_sent = self._taken.eof_sent
                self.mid_send = self._taken.mid_send
        elif self._is_over:
            await self._drain_stream(limits)

    async def _drain_stream(self, limits: Drain) -> None:
        """The drain, by the stream itself: what is to come of it is there already."""
        most = limits.max_bytes
        while most is None or self.discarded < most:
            size = RECEIVE_SIZE if most is None else most - self.discarded
            try:
                self.discarded += len(await self._stream.receive(size))
            except EndOfStream:
                self.peer = PeerClose.FIN
                return
            except BrokenResourceError as exc:
                self._lost(exc.__cause__ or exc)
                return

    def _take_over(self, sock: socket.socket) -> NativeStream:
        """Let the socket live on in a copy, for the drain.

        The stream would answer unread input with an RST when it is closed, and one that
        stays open may go on reading by itself, as uvloop's do.

        Raises:
          OSError: EMFILE, no descriptor is to be had for that; there is no drain then.
        """
        taken = NativeStream(_sockets.duplicate(sock), None)
        taken.eof_sent = self.eof_sent
        taken.peer = self.peer
        taken._loss = self._loss
        self._taken = taken
        return taken

    def close(self) -> None:
        if self._taken is not None:
            self._taken.close()
            self.unacknowledged = self._taken.unacknowledged
        if self._owned.fileno() != -1:  # left open for the last words, or for the drain
            self._close_stream()

    def release(self) -> object:
        with suppress(OSError), _sockets.borrowed(self._owned) as sock:
            _sockets.disarm(sock)
        return self._original

    def _close_stream(self) -> None:
        """Run the stream's `aclose()` up to its first suspension, and drop the rest.

        AnyIO's and Trio's streams are closed by then. So an ending needs no checkpoint:
        not under cancellation, and not in a coroutine that is being closed, where there
        must not be one. What another stream leaves open is dissolved on Linux, and its
        descriptor goes when the stream does.
        """
        closing = self._stream.aclose()
        with suppress(Exception):  # StopIteration, if there was no suspension
            closing.send(None)
        # A wrapper that waits again in its own clean-up has to be told again.
        for _ in range(SUSPENSIONS):
            try:
                closing.close()
                return
            except RuntimeError:  # "coroutine ignored GeneratorExit"
                continue
            except Exception:
                return


class TrioStream(SocketStream):
    """A stream of Trio over *below*, with AnyIO's names and exceptions."""

    def __init__(
        self, stream: trio.abc.HalfCloseableStream | TrioTLS, below: trio.SocketStream
    ) -> None:
        self._stream = stream
        self._below = below

    @property
    def _raw_socket(self) -> socket.socket:
        # Trio's socket object: the same methods, those that may block asynchronous.
        return cast("socket.socket", self._below.socket)

    async def receive(self, max_bytes: int = RECEIVE_SIZE) -> bytes:
        with _trio_exceptions_translated():
            data = await self._stream.receive_some(max_bytes)
        if not data:
            raise EndOfStream
        return bytes(data)

    async def send(self, item: bytes) -> None:
        with _trio_exceptions_translated():
            await self._stream.send_all(item)

    async def send_eof(self) -> None:
        send_eof = getattr(self._stream, "send_eof", None)
        if send_eof is None:
            raise NotImplementedError(
                f"{type(self._stream).__qualname__} has no half-close"
            )
        with _trio_exceptions_translated():
            await send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()


@contextmanager
def _trio_exceptions_translated() -> Iterator[None]:
    loaded_trio = sys.modules["trio"]
    try:
        yield
    except loaded_trio.BrokenResourceError as exc:
        raise BrokenResourceError(str(exc)) from exc.__cause__
    except loaded_trio.ClosedResourceError as exc:
        raise anyio.ClosedResourceError(str(exc)) from None
    except loaded_trio.BusyResourceError:
        raise anyio.BusyResourceError("using") from None


def trio_class(name: str) -> type[object] | tuple[()]:
    """For isinstance() and `is`: whoever has one of Trio's has imported it.

    Another thread may be in the middle of that, and the name still be missing.
    """
    found: type[object] | tuple[()] = getattr(sys.modules.get("trio"), name, ())
    return found


def foreign(stream: object) -> tuple[ForeignStream, Attributes]:
    """*stream*, checked and ready to be armed, and its attributes.

    Those it makes anew, with system calls, whenever they are asked for.

    Raises:
      TypeError: not a byte stream over TCP; the message says what is missing.
      anyio.ClosedResourceError: it is closed.
      RuntimeError: it could not be reset on this platform.
    """
    adapted = stream
    if isinstance(stream, trio_class("SocketStream")):
        socket_stream = cast("trio.SocketStream", stream)
        adapted = TrioStream(socket_stream, socket_stream)
    if not isinstance(adapted, ByteStream):
        raise TypeError(
            "connection_scope() takes a byte stream over TCP (anyio.abc.ByteStream or "
            f"trio.SocketStream), not {type(stream).__qualname__}"
        )
    try:
        attributes = cast("Attributes", adapted.extra_attributes)
    except AttributeError:
        # A closed transport of uvloop shows no socket, and AnyIO asks it all the same.
        raise anyio.ClosedResourceError("the stream is closed already") from None
    if TLSAttribute.ssl_object in attributes:
        raise TypeError(
            f"{type(stream).__qualname__} speaks TLS: connection_scope() would end its "
            "TCP connection without a close_notify"
        )
    if SocketAttribute.raw_socket not in attributes:
        raise TypeError(
            f"{type(stream).__qualname__} is not a TCP connection: it has no "
            "SocketAttribute.raw_socket"
        )
    _sockets.refuse_unless_tcp(
        attributes[SocketAttribute.raw_socket](),
        stream,
        connected=SocketAttribute.remote_address in attributes,
    )
    reason = _sockets.why_not_resettable()
    if reason is not None:
        raise RuntimeError(f"connection_scope() cannot reset this stream: {reason}")
    return ForeignStream(adapted, stream, attributes), attributes
