"""The steps of a truthful end, as functions for other libraries and blocking programs.

The functions are synchronous and need no event loop, so they work in blocking programs
and threads.

Each takes an object with a TCP socket: a :class:`socket.socket`; a transport or a
:class:`~asyncio.StreamWriter` of asyncio or uvloop; a stream or listener of AnyIO or
Trio, also over TLS; a socket of Trio; a :class:`~anyio_rst.Connection`. An object without
a TCP socket is refused with :exc:`TypeError`, and a closed one with :exc:`ValueError`.
"""

from __future__ import annotations

import asyncio
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from anyio import TypedAttributeProvider
from anyio.abc import SocketAttribute
from anyio.streams.stapled import MultiListener

from . import _sockets, _tcp_info
from ._connection import Connection
from ._limits import check_keepalive
from ._sockets import is_listening, refuse_unless_tcp
from ._takeover import trio_class

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "arm",
    "disarm",
    "finish",
    "reset",
    "reset_on_failure",
    "set_keepalive",
    "unacknowledged",
]


def arm(sock: object) -> None:
    """Let every close of the socket send an RST, even the death of the process.

    Sets SO_LINGER {1, 0} (socket(7); RFC 9293, 3.10.5). Sockets that a listening socket
    accepts afterwards are armed on Linux, but not in gVisor. A transport of asyncio sends
    a FIN before it closes, so end it by :func:`reset`.
    """
    for owned in _sockets_of(sock):
        _sockets.arm(owned)


def disarm(sock: object) -> None:
    """Undo :func:`arm`: closing sends a FIN again."""
    for owned in _sockets_of(sock):
        _sockets.disarm(owned)


def reset(sock: object) -> None:
    """Send the RST. Afterwards close the socket, or the object around it, as usual.

    On Linux the RST is sent in this call, also under a transport, and while other
    processes have the socket (connect(2), AF_UNSPEC). Where the kernel cannot do that
    (gVisor), it is sent with the last close. A blocking :class:`socket.socket` is closed
    here; anything else is armed, see :func:`arm`. A connection that has already ended is
    left alone.

    Raises:
      ValueError: it is a listening socket.
    """
    for owned in _owned_by(sock):
        if owned.fileno() == -1:
            return
    (owned,) = _sockets_of(sock, connected=True)
    is_sent = _sockets.reset(owned)
    if not is_sent and isinstance(sock, socket.socket) and sock.gettimeout() != 0:
        # As in socketserver, which shuts down first, and so would send a FIN. What blocks
        # is in no event loop.
        _sockets.vacate([sock.fileno()])


def finish(sock: object) -> None:
    """Disarm, and send the FIN after everything that was sent: shutdown(2).

    You can still receive. Read to the end before you close, because a close with unread
    input resets the connection (RFC 2525, 2.17).

    Raises:
      RuntimeError: a transport still has data to send, which the FIN would cut off.
      OSError: the connection was lost, by this error.
      ValueError: it is a listening socket.
    """
    waiting = _waiting_to_be_sent(sock)
    if waiting:
        raise RuntimeError(
            f"{waiting} bytes wait in the transport: call its write_eof(), which sends "
            "the FIN after them"
        )
    (owned,) = _sockets_of(sock, connected=True)
    _sockets.disarm(owned)
    with _sockets.duplicate(owned) as copy:  # what uvloop shows cannot do it
        loss = _sockets.send_fin(copy)
    if loss is not None:
        raise loss


def unacknowledged(sock: object) -> int | None:
    """Bytes that were sent and that the peer's TCP has not acknowledged.

    SIOCOUTQ of tcp(7); None if the kernel cannot tell. 0 proves that everything has
    arrived at the peer's machine. Another number proves nothing, because an
    acknowledgment may be under way.

    Raises:
      ValueError: it is a listening socket.
    """
    (owned,) = _sockets_of(sock, connected=True)
    queued = _tcp_info.queued(owned)
    return queued - 1 if queued and _tcp_info.fin_is_out(owned) else queued


def set_keepalive(sock: object, seconds: float) -> None:
    """Notice after about *seconds*, 1 to 32767, that the machine of the peer is gone.

    Then calls fail with ETIMEDOUT, whether the connection was idle or waited for an
    acknowledgment (SO_KEEPALIVE of socket(7), TCP_USER_TIMEOUT of tcp(7); RFC 5482,
    RFC 9293, 3.8.4). Sockets that a listening socket accepts afterwards have it on Linux,
    but not in gVisor.
    """
    check_keepalive(seconds)
    for owned in _sockets_of(sock):
        _sockets.keep_alive(owned, seconds)


@contextmanager
def reset_on_failure(sock: object) -> Iterator[None]:
    """Arm; disarm if the block returns, and reset if an exception leaves it.

    ::

        with reset_on_failure(sock):
            sock.sendall(answer)
        sock.close()

    The caller closes the socket, and before that reads what the peer still sends.
    """
    arm(sock)
    try:
        yield
    except BaseException:
        reset(sock)
        raise
    disarm(sock)


def _waiting_to_be_sent(given: Any) -> int:
    """Bytes in the buffer of an asyncio transport."""
    if isinstance(given, asyncio.StreamWriter):
        given = given.transport
    elif isinstance(given, TypedAttributeProvider):
        return 0  # AnyIO's send() leaves nothing there when it returns
    size = getattr(given, "get_write_buffer_size", None)
    return size() if size is not None else 0


def _sockets_of(given: object, *, connected: bool = False) -> list[Any]:
    found = list(_owned_by(given))
    name = type(given).__qualname__
    if not found:
        raise TypeError(f"{name} has no socket: {given!r}")
    for sock in found:
        if sock.fileno() == -1:
            raise ValueError(f"{name} is closed")
        refuse_unless_tcp(sock, given)
        if connected and is_listening(sock):
            raise ValueError(f"{name} is listening: pass a connection")
    return found


def _owned_by(given: Any) -> Iterator[Any]:
    """The socket in *given*, or what an event loop shows of it; several of a listener."""
    if isinstance(given, socket.socket) or _is_trios(given, "SocketType", "trio.socket"):
        yield given
    elif isinstance(given, Connection):
        yield given._life.native._sock  # extra() would make a copy
    elif isinstance(given, MultiListener):
        for listener in given.listeners:
            yield from _owned_by(listener)
    elif isinstance(given, TypedAttributeProvider):
        yield from _unless_none(given.extra(SocketAttribute.raw_socket, None))
    elif _is_trios(given, "SSLStream"):
        yield from _owned_by(given.transport_stream)
    elif _is_trios(given, "SSLListener"):
        yield from _owned_by(given.transport_listener)
    elif _is_trios(given, "SocketStream") or _is_trios(given, "SocketListener"):
        yield given.socket
    elif hasattr(given, "get_extra_info"):
        yield from _unless_none(given.get_extra_info("socket"))


def _is_trios(given: object, name: str, module: str = "trio") -> bool:
    return isinstance(given, trio_class(name, module))


def _unless_none(sock: Any) -> list[Any]:
    return [] if sock is None else [sock]
