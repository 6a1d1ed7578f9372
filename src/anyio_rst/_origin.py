"""The stream that a socket was taken over from.

On asyncio and uvloop its transport may have read ahead, and may have something to send.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakSet

from anyio import BrokenResourceError, CancelScope, EndOfStream, get_cancelled_exc_class

from . import _forking, _sockets

if TYPE_CHECKING:
    import socket
    from collections.abc import Coroutine

    from anyio.abc import SocketStream

# One read at the most: what AnyIO and Trio take.
RECEIVE_SIZE = 65536

# Checkpoints that a coroutine of AnyIO's streams may pass before it really waits. In a
# cancelled scope it would go on to pass them for ever.
MOST_CHECKPOINTS = 3


_resting: WeakSet[object] = WeakSet()


def is_resting(stream: object) -> bool:
    """Whether its socket has been taken over."""
    return stream in _resting


def why_not_resettable() -> str | None:
    """Why a stream of the running event loop could not be reset, or None.

    Where a connection cannot be dissolved under an asyncio transport, the RST depends
    on how the transport is closed.
    """
    proactor = getattr(asyncio, "ProactorEventLoop", None)  # on Windows, which cannot
    if (
        proactor is None
        or get_cancelled_exc_class() is not asyncio.CancelledError
        or not isinstance(asyncio.get_running_loop(), proactor)
    ):
        return None
    return "asyncio's ProactorEventLoop sends a FIN before it closes a socket"


class Unblocked:
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


class Origin:
    """A stream of AnyIO's or Trio's that rests."""

    def __init__(
        self,
        stream: Any,
        *,
        transport_socket: _sockets.SocketLike | None = None,
        knows_more: bool = False,
        is_at_rest: bool = True,
    ) -> None:
        self.shares_socket: bool = transport_socket is None
        self.is_at_rest: bool = is_at_rest
        """Whether nothing is registered for its descriptor once it has been closed."""
        self._stream = stream
        self._transport_socket = transport_socket
        self._knows_more = knows_more
        _resting.add(stream)
        if transport_socket is not None:
            _forking.own(self)

    def fileno(self) -> int:
        """The transport's descriptor; -1 once it has closed that."""
        sock = self._transport_socket
        return -1 if sock is None else sock.fileno()

    def loss(self) -> BaseException | None:
        # A transport says what it was told in the turn after that.
        return read_ahead(self._stream).loss if self._knows_more else None

    def close(self) -> None:
        _resting.discard(self._stream)
        # Closed before its first checkpoint, for which there is no time in a reset.
        with suppress(Exception):
            _run_to_wait(self._stream.aclose())

    def give_back(self) -> SocketStream:
        _resting.discard(self._stream)
        _forking.disown(self)
        stream: SocketStream = self._stream
        return stream


def forgets_at_once() -> bool:
    """Whether a transport that is aborted takes back at once what it has registered.

    asyncio's do. Those of uvloop go on waiting to send, until they close a turn later,
    and libuv ends the process if a descriptor is no socket any more then
    (uv__epoll_ctl_prep() in its unix/linux.c).
    """
    return isinstance(asyncio.get_running_loop(), asyncio.SelectorEventLoop)


class _Ahead(NamedTuple):
    """What a transport has read, and whether it has come to an end, or how."""

    data: bytes
    has_ended: bool = False
    loss: BaseException | None = None


def read_ahead(stream: SocketStream) -> _Ahead:
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


def look_at_sending(stream: SocketStream) -> _Sending:
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
