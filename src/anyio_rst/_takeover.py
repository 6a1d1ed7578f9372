"""Taking the socket over from a stream of AnyIO or Trio.

From then on the stream rests, and is closed when the connection ends, or given back.
"""

from __future__ import annotations

import socket
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from weakref import WeakSet

from anyio import (
    BrokenResourceError,
    CancelScope,
    ClosedResourceError,
    EndOfStream,
    aclose_forcefully,
    get_cancelled_exc_class,
)
from anyio.abc import ByteStream, SocketAttribute, SocketStream
from anyio.streams.buffered import BufferedByteReceiveStream, BufferedByteStream

from . import _forking, _sockets
from ._io import RECEIVE_SIZE
from ._native import NativeStream

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping
    from typing import TypeAlias

    import trio

    Address: TypeAlias = tuple[str, int]

# Checkpoints that a coroutine of AnyIO's streams may pass before it really waits. In a
# cancelled scope it would go on to pass them for ever.
MOST_CHECKPOINTS = 3


def trio_class(name: str) -> type[object] | tuple[()]:
    """For isinstance() and `is`: whoever has one of Trio's has imported it.

    Another thread may be in the middle of that, and the name still be missing.
    """
    found: type[object] | tuple[()] = getattr(sys.modules.get("trio"), name, ())
    return found


def is_trio() -> bool:
    """Whether the running event loop is Trio's."""
    return get_cancelled_exc_class() is trio_class("Cancelled")


class Source:
    """A stream whose socket can be taken over: checked, and not touched yet.

    Raises:
      TypeError: it is not a stream of AnyIO or Trio over TCP; the message says what to
        do.
      anyio.ClosedResourceError: it is closed.
      RuntimeError: it has been taken over already, or this platform could not reset it.
    """

    def __init__(self, stream: object) -> None:
        self.stream = stream
        if isinstance(stream, NativeStream):  # which detach() has given back
            if stream.is_closed:
                raise ClosedResourceError("the stream is closed already")
            _refuse_if_taken(stream)
            return
        owned: Any
        if isinstance(stream, trio_class("SocketStream")):
            owned = cast("trio.SocketStream", stream).socket
            self._address = _sockets.remote_address(owned)
        else:
            owned, self._address = _look_under(stream)
        self._owned = owned
        if owned is not None:
            _refuse_unless_tcp(owned, stream)
        if owned is None or owned.fileno() == -1:
            _refuse_unless_lost(stream)
        _refuse_if_taken(stream)
        reason = _sockets.why_not_resettable()
        if reason is not None:
            raise RuntimeError(f"connection_scope() cannot reset this stream: {reason}")

    def take(self) -> NativeStream:
        """Take the socket over, armed.

        Raises:
          anyio.ClosedResourceError: it is closed.
          anyio.BusyResourceError: a task is receiving or sending.
          OSError: there is no descriptor left for a copy.
        """
        with _forking.lock:
            native = self._take()
        native.arm()
        native.eof_sent = native.fin_is_out()
        return native

    def _take(self) -> NativeStream:
        stream: Any = self.stream
        _refuse_if_taken(stream)
        if isinstance(stream, NativeStream):
            native = stream
            native.take_again()
        elif isinstance(stream, trio_class("SocketStream")):
            native = _from_trio(cast("trio.SocketStream", stream), self._address)
        elif type(stream).__module__ == _ON_TRIO:
            _refuse_if_closed(self._owned)
            sock: Any = _Unblocked(self._owned)
            native = NativeStream(sock, self._address, origin=_Origin(stream))
        else:
            native = _from_asyncio(stream, self._owned, self._address)
        return native


# Where AnyIO's own streams come from. A subclass of somebody else's may do anything.
_ON_ASYNCIO = "anyio._backends._asyncio"
_ON_TRIO = "anyio._backends._trio"

_taken: WeakSet[object] = WeakSet()


def is_anyios(stream: object) -> bool:
    """Whether *stream* is of AnyIO's own classes on sockets."""
    return type(stream).__module__ in (_ON_ASYNCIO, _ON_TRIO)


def attributes_of(stream: ByteStream) -> Mapping[Any, Callable[[], Any]]:
    """Its extra attributes; none if it is closed and cannot even tell."""
    try:
        return stream.extra_attributes
    except AttributeError:  # a closed transport of uvloop shows no socket to AnyIO
        return {}


def _look_under(stream: object) -> tuple[Any, Address | None]:
    """The socket of a stream of AnyIO's, and the peer's address, if there is one.

    Either is None when the stream is closed.
    """
    name = type(stream).__qualname__
    if not isinstance(stream, ByteStream):
        raise TypeError(
            "connection_scope() takes a byte stream over TCP (AnyIO's SocketStream, TLS "
            f"or buffered streams over it, or Trio's), not {name}"
        )
    attributes = attributes_of(stream)
    if not attributes and is_anyios(stream):
        return None, None
    if SocketAttribute.raw_socket not in attributes:
        raise TypeError(
            f"{name} is not a TCP connection: it has no SocketAttribute.raw_socket"
        )
    if not is_anyios(stream):
        raise TypeError(
            f"{name} is a wrapper around a TCP stream, whose own I/O would not be seen: "
            "scope the stream inside of it, and wrap the Connection"
        )
    address = attributes.get(SocketAttribute.remote_address, lambda: None)()
    return attributes[SocketAttribute.raw_socket](), address


def _refuse_unless_tcp(owned: _sockets.SocketLike, stream: object) -> None:
    """Check that *owned*, found under *stream*, is the socket of a TCP connection.

    Raises:
      TypeError: it is a socket of another kind; the message says which.
    """
    name = type(stream).__qualname__
    family = owned.family
    if family not in (socket.AF_INET, socket.AF_INET6):
        family = getattr(family, "name", family)
        raise TypeError(
            f"{name} is not a TCP connection: its socket is {family}, and only TCP "
            "(AF_INET or AF_INET6) has an RST"
        )
    if owned.type != socket.SOCK_STREAM:
        kind = getattr(owned.type, "name", owned.type)
        raise TypeError(f"{name} is not a TCP connection: its socket is {kind}")
    if owned.fileno() != -1 and owned.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise TypeError(f"{name} is not a TCP connection: its socket is listening")


def _refuse_unless_lost(stream: object) -> None:
    """Refuse a stream that was closed, and not one whose peer has gone.

    On asyncio and uvloop a transport that loses the connection closes its socket.
    """
    if type(stream).__module__ == _ON_ASYNCIO:
        try:
            _look_at_sending(cast("SocketStream", stream))
        except ClosedResourceError:
            pass
        else:
            return
    raise ClosedResourceError("the stream is closed already")


def _refuse_if_taken(stream: object) -> None:
    if stream in _taken or (isinstance(stream, NativeStream) and not stream.is_free):
        raise RuntimeError(
            f"the {type(stream).__qualname__} is in another connection_scope() already; "
            "a scope in a scope takes the Connection"
        )


def _refuse_if_closed(sock: _sockets.SocketLike) -> None:
    if sock.fileno() == -1:
        raise ClosedResourceError("the stream is closed already")


class _Unblocked:
    """The socket object of AnyIO's stream on Trio, which its user has as well.

    Given a time-out, it would wait by itself, and the event loop with it.
    """

    __slots__ = ("__weakref__", "_sock")

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def recv(self, size: int, flags: int) -> bytes:
        _sockets.never_block(self._sock)
        return self._sock.recv(size, flags)

    def send(self, data: bytes, flags: int) -> int:
        _sockets.never_block(self._sock)
        return self._sock.send(data, flags)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


class _Origin:
    """A stream of AnyIO's or Trio's that rests."""

    def __init__(
        self,
        stream: Any,
        *,
        transport_socket: _sockets.SocketLike | None = None,
        knows_more: bool = False,
    ) -> None:
        self.shares_socket = transport_socket is None
        self._stream = stream
        self._transport_socket = transport_socket
        self._knows_more = knows_more
        _taken.add(stream)
        if transport_socket is not None:
            _forking.own(self)

    def fileno(self) -> int:
        """The transport's descriptor; -1 once it has closed that."""
        sock = self._transport_socket
        return -1 if sock is None else sock.fileno()

    def loss(self) -> BaseException | None:
        # A transport says what it was told in the turn after that.
        return _read_ahead(self._stream).loss if self._knows_more else None

    def close(self) -> None:
        _taken.discard(self._stream)
        # Closed before its first checkpoint, for which there is no time in a reset.
        with suppress(Exception):
            _run_to_wait(self._stream.aclose())

    def give_back(self) -> Any:
        _taken.discard(self._stream)
        _forking.disown(self)
        return self._stream


def _from_trio(stream: trio.SocketStream, address: Address | None) -> NativeStream:
    old = stream.socket
    _refuse_if_closed(old)
    # Trio does not show its socket object. One that we both have takes its place, so
    # that each sees it when the other closes it.
    sock = socket.socket(old.family, old.type, old.proto, fileno=old.detach())
    stream.socket = sys.modules["trio"].socket.from_stdlib_socket(sock)
    return NativeStream(sock, address, origin=_Origin(stream))


def _from_asyncio(
    stream: SocketStream,
    transport_socket: _sockets.SocketLike | None,
    address: Address | None,
) -> NativeStream:
    """On asyncio and uvloop the stream's transport goes on owning its descriptor.

    It may have read ahead, and may have noticed that the connection is lost.
    """
    sock = None
    if transport_socket is not None and transport_socket.fileno() != -1:
        # The event loop refuses a reader on a descriptor that a transport has.
        sock = _sockets.duplicate(transport_socket)
    try:
        sending = _look_at_sending(stream)  # first: a task may be, and goes on
        ahead = _read_ahead(stream)
        if sock is None:
            if ahead.loss is None:
                raise ClosedResourceError("the stream is closed already")
            sock = socket.socket()
            sock.setblocking(False)
            sock.close()
            return NativeStream(sock, None, ahead=ahead.data, loss=ahead.loss)
        return NativeStream(
            sock,
            address,
            origin=_Origin(
                stream,
                transport_socket=transport_socket,
                knows_more=ahead.has_ended or sending.torn,
            ),
            ahead=ahead.data,
            torn=sending.torn,
            eof_sent=sending.eof_sent,
            loss=ahead.loss,
        )
    except BaseException:
        if sock is not None:
            sock.close()
        raise


class _Ahead(NamedTuple):
    """What a transport has read, and whether it has come to an end, or how."""

    data: bytes
    has_ended: bool = False
    loss: BaseException | None = None


def _read_ahead(stream: SocketStream) -> _Ahead:
    """Receive what does not have to be waited for.

    The receive that would wait is dropped, which pauses the transport.
    """
    chunks: list[bytes] = []
    while True:
        try:
            chunk = _run_to_wait(stream.receive(RECEIVE_SIZE))
        except EndOfStream:
            return _Ahead(b"".join(chunks), has_ended=True)
        except BrokenResourceError as exc:
            return _Ahead(b"".join(chunks), loss=exc.__cause__ or exc)
        if chunk is _WAITS:
            return _Ahead(b"".join(chunks))
        chunks.append(chunk)


class _Sending(NamedTuple):
    torn: bool = False
    eof_sent: bool = False


def _look_at_sending(stream: SocketStream) -> _Sending:
    """What the transport has not sent yet of what it was given, and whether a FIN was."""
    try:
        waits = _run_to_wait(stream.send(b""))
        if waits is _CHECKPOINTS:
            # In a cancelled scope it does not come so far as to wait.
            with CancelScope(shield=True):  # noqa: ASYNC100 - it is run by hand
                waits = _run_to_wait(stream.send(b""))
    except BrokenResourceError:
        return _Sending()
    except RuntimeError:  # "Cannot call write() after write_eof()"
        return _Sending(eof_sent=True)
    return _Sending(torn=waits is _WAITS)


async def discard(stream: Any) -> None:
    """Reset and close *stream*, for which there is no scope."""
    with suppress(Exception):
        _sockets.reset(stream.extra(SocketAttribute.raw_socket))
    await aclose_forcefully(stream)


_WAITS = object()
_CHECKPOINTS = object()


def _run_to_wait(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run *coroutine* as far as it goes without waiting.

    A checkpoint, a bare `yield` on asyncio, is no wait.

    Returns:
      Its result; `_WAITS`; or `_CHECKPOINTS`, after too many of them.
    """
    try:
        for _ in range(MOST_CHECKPOINTS):
            if coroutine.send(None) is not None:
                return _WAITS
    except StopIteration as stop:
        return stop.value
    finally:
        coroutine.close()
    return _CHECKPOINTS


def put_under(buffer: BufferedByteReceiveStream, stream: Any) -> None:
    """Let AnyIO's buffered stream *buffer* receive from, and send to, *stream*."""
    while isinstance(inner := buffer.receive_stream, BufferedByteReceiveStream):
        buffer = inner
    buffer.receive_stream = stream
    if isinstance(buffer, BufferedByteStream):
        # It has no attribute for the stream that it sends to.
        vars(buffer).update(send=stream.send, send_eof=stream.send_eof)
