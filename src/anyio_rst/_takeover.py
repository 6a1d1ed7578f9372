"""Taking the socket over from a stream of AnyIO or Trio.

From then on the stream rests, and is closed when the connection ends, or given back.
"""

from __future__ import annotations

import socket
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

from anyio import (
    ClosedResourceError,
    aclose_forcefully,
    get_cancelled_exc_class,
)
from anyio.abc import ByteStream, SocketAttribute, SocketStream
from anyio.streams.buffered import BufferedByteReceiveStream, BufferedByteStream

from . import _forking, _sockets
from ._native import NativeStream
from ._origin import (
    Origin,
    Unblocked,
    forgets_at_once,
    is_resting,
    look_at_sending,
    read_ahead,
    why_not_resettable,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import TypeAlias

    import trio

    Address: TypeAlias = tuple[str, int]


def trio_class(name: str, module: str = "trio") -> type[object] | tuple[()]:
    """For isinstance() and `is`: whoever has one of Trio's has imported it.

    Another thread may be in the middle of that, and the name still be missing.
    """
    found: type[object] | tuple[()] = getattr(sys.modules.get(module), name, ())
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
            _sockets.refuse_unless_tcp(owned, stream)
            if owned.fileno() != -1 and _sockets.is_listening(owned):
                raise TypeError(
                    f"{type(stream).__qualname__} is not a TCP connection: "
                    "its socket is listening"
                )
        if owned is None or owned.fileno() == -1:
            _refuse_unless_lost(stream)
        _refuse_if_taken(stream)
        reason = why_not_resettable()
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
            sock: Any = Unblocked(self._owned)
            native = NativeStream(sock, self._address, origin=Origin(stream))
        else:
            native = _from_asyncio(stream, self._owned, self._address)
        return native


# Where AnyIO's own streams come from. A subclass of somebody else's may do anything.
_ON_ASYNCIO = "anyio._backends._asyncio"
_ON_TRIO = "anyio._backends._trio"


def is_anyios(stream: object) -> bool:
    """Whether *stream* is of AnyIO's own classes on sockets."""
    return type(stream).__module__ in (_ON_ASYNCIO, _ON_TRIO)


def attributes_of(stream: ByteStream) -> Mapping[Any, Callable[[], Any]]:
    """Its extra attributes; none if it is closed and cannot even tell."""
    try:
        return stream.extra_attributes
    # A closed transport of uvloop shows AnyIO no socket, or, if the peer reset it, one
    # whose descriptor is -1.
    except (AttributeError, ValueError):
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
            f"{name} is a wrapper around a TCP stream, whose I/O a scope cannot see: "
            "scope the stream inside it, and wrap the Connection"
        )
    address = attributes.get(SocketAttribute.remote_address, lambda: None)()
    return attributes[SocketAttribute.raw_socket](), address


def _refuse_unless_lost(stream: object) -> None:
    """Refuse a stream that was closed, and not one whose peer has gone.

    On asyncio and uvloop a transport that loses the connection closes its socket.
    """
    if type(stream).__module__ == _ON_ASYNCIO:
        try:
            look_at_sending(cast("SocketStream", stream))
        except ClosedResourceError:
            pass
        else:
            return
    raise ClosedResourceError("the stream is closed already")


def _refuse_if_taken(stream: object) -> None:
    if is_resting(stream) or (isinstance(stream, NativeStream) and not stream.is_free):
        raise RuntimeError(
            f"the {type(stream).__qualname__} is in another connection_scope() already; "
            "pass its Connection to a nested scope"
        )


def _refuse_if_closed(sock: _sockets.SocketLike) -> None:
    if sock.fileno() == -1:
        raise ClosedResourceError("the stream is closed already")


def _from_trio(stream: trio.SocketStream, address: Address | None) -> NativeStream:
    old = stream.socket
    _refuse_if_closed(old)
    # Trio does not show its socket object. One that we both have takes its place, so
    # that each sees it when the other closes it.
    sock = socket.socket(old.family, old.type, old.proto, fileno=old.detach())
    stream.socket = sys.modules["trio"].socket.from_stdlib_socket(sock)
    return NativeStream(sock, address, origin=Origin(stream))


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
        sending = look_at_sending(stream)  # first: a task may be, and goes on
        ahead = read_ahead(stream)
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
            origin=Origin(
                stream,
                transport_socket=transport_socket,
                knows_more=ahead.has_ended or sending.torn,
                is_at_rest=not sending.torn or forgets_at_once(),
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


async def discard(stream: Any) -> None:
    """Reset and close *stream*, for which there is no scope."""
    with suppress(Exception):
        _sockets.reset(stream.extra(SocketAttribute.raw_socket))
    await aclose_forcefully(stream)


def put_under(buffer: BufferedByteReceiveStream, stream: Any) -> None:
    """Let AnyIO's buffered stream *buffer* receive from, and send to, *stream*."""
    while isinstance(inner := buffer.receive_stream, BufferedByteReceiveStream):
        buffer = inner
    buffer.receive_stream = stream
    if isinstance(buffer, BufferedByteStream):
        # It has no attribute for the stream that it sends to.
        vars(buffer).update(send=stream.send, send_eof=stream.send_eof)
