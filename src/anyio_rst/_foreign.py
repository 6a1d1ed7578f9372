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
from anyio import BrokenResourceError, EndOfStream
from anyio.abc import ByteStream, SocketAttribute, SocketStream
from anyio.lowlevel import checkpoint
from anyio.streams.buffered import BufferedByteReceiveStream
from anyio.streams.tls import TLSAttribute

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

    TrioTLS: TypeAlias = trio.SSLStream[trio.SocketStream]


# How often a stream may suspend in the clean-up of an `aclose()` that is dropped.
SUSPENSIONS = 10


class ForeignStream(EndableStream):
    """The I/O of the byte stream *stream*, and the ending of the socket under it."""

    def __init__(self, stream: ByteStream, original: object) -> None:
        remote_address = stream.extra(SocketAttribute.remote_address, None)
        super().__init__(cast("tuple[str, int] | None", remote_address))
        self._stream = stream
        self._original = original
        self._owned: _sockets.SocketLike = stream.extra(SocketAttribute.raw_socket)
        self._taken: NativeStream | None = None

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        return self._stream.extra_attributes

    @property
    def _raw_socket(self) -> socket.socket:
        return self._stream.extra(SocketAttribute.raw_socket)

    @property
    def buffered(self) -> int:
        if isinstance(self._stream, BufferedByteReceiveStream):
            return len(self._stream.buffer)
        return 0

    async def _receive(self, max_bytes: int) -> bytes:
        try:
            return await self._stream.receive(max_bytes)
        except EndOfStream:
            return b""
        except BrokenResourceError as exc:
            raise self._lost(exc.__cause__ or exc) from exc

    async def _send(self, item: bytes) -> None:
        view = memoryview(item).cast("B")
        if not view:
            await checkpoint()  # AnyIO's stream on Trio has none for an empty send
        # Until it has returned, nobody can tell how much of it went out.
        self.mid_send = bool(view)
        if not isinstance(item, (bytes, bytearray)):
            item = cast("bytes", view)  # of bytes, which not every stream sees to
        try:
            await self._stream.send(item)
        except BrokenResourceError as exc:
            raise self._lost(exc.__cause__ or exc) from exc
        self._refuse_if_closed()  # AnyIO before 4.16 returns from a send that was cut
        self.mid_send = False

    async def _send_eof(self) -> None:
        with self._borrowed() as sock:
            loss = _sockets.loss(sock)
        if loss is not None:
            raise self._lost(loss) from loss
        await self._stream.send_eof()
        # uvloop has only made a note of it then.
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
        with _sockets.borrowed(self._owned) as sock:
            _sockets.arm(sock)

    def reset(self) -> None:
        self._closed = True
        with suppress(OSError), _sockets.borrowed(self._owned) as sock:
            self.unacknowledged = _sockets.unacknowledged(sock, fin_sent=self.eof_sent)
            _sockets.reset(sock)
        self._close_stream()

    async def send_fin(self, last: bytes = b"") -> None:
        self._closed = True
        # The stream would answer unread input with an RST when it is closed, so its
        # socket lives on in a copy, for the drain. With no descriptor to be had for
        # that (EMFILE) there is no drain.
        with suppress(OSError), _sockets.borrowed(self._owned) as sock:
            last = self._finish(sock, last)
            self.unacknowledged = _sockets.unacknowledged(sock, fin_sent=self.eof_sent)
            if self._loss is None and (last or self.peer is PeerClose.NONE):
                self._taken = NativeStream(_sockets.duplicate(sock), None)
                self._taken.eof_sent = self.eof_sent
                self._taken.peer = self.peer
                await self._taken.send_fin(last)
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

    def close(self) -> None:
        if self._taken is not None:
            self._taken.close()
            self.unacknowledged = self._taken.unacknowledged

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


def foreign(stream: object) -> ForeignStream:
    """*stream*, checked and ready to be armed.

    Raises:
      TypeError: not a byte stream over TCP; the message says what is missing.
      anyio.ClosedResourceError: it is closed.
      RuntimeError: it could not be reset on this platform.
    """
    adapted = stream
    loaded_trio = sys.modules.get("trio")  # whoever has a stream of it has imported it
    if loaded_trio is not None and isinstance(stream, loaded_trio.SocketStream):
        socket_stream = cast("trio.SocketStream", stream)
        adapted = TrioStream(socket_stream, socket_stream)
    if not isinstance(adapted, ByteStream):
        raise TypeError(
            "connection_scope() takes a byte stream over TCP (anyio.abc.ByteStream or "
            f"trio.SocketStream), not {type(stream).__qualname__}"
        )
    try:
        owned = adapted.extra(SocketAttribute.raw_socket, None)
    except AttributeError:
        # A closed transport of uvloop shows no socket, and AnyIO asks it all the same.
        raise anyio.ClosedResourceError("the stream is closed already") from None
    if adapted.extra(TLSAttribute.ssl_object, None) is not None:
        raise TypeError(
            f"{type(stream).__qualname__} speaks TLS: connection_scope() would end its "
            "TCP connection without a close_notify"
        )
    if owned is None:
        raise TypeError(
            f"{type(stream).__qualname__} is not a TCP connection: it has no "
            "SocketAttribute.raw_socket"
        )
    _sockets.refuse_unless_tcp(owned, stream)
    reason = _sockets.why_not_resettable()
    if reason is not None:
        raise RuntimeError(f"connection_scope() cannot reset this stream: {reason}")
    return ForeignStream(adapted, stream)
