"""What the platform does to a TCP socket: every option, ioctl and errno.

With `_tcp_info`, this is the one place that knows on which platform it runs.
"""

from __future__ import annotations

import asyncio
import errno
import math
import os
import select
import socket
import struct
import sys
from contextlib import suppress
from typing import Any, Protocol

import anyio

# The connection is gone because the peer reset it. Linux says ECONNRESET, once; after
# that, and for a reset that follows the peer's FIN, it says EPIPE (tcp_reset() in
# net/ipv4/tcp_input.c). Windows calls the first WSAECONNRESET.
RESET_ERRNOS = frozenset({errno.ECONNRESET, errno.EPIPE})

# The peer's machine is gone, or the way to it: tcp(7), ip(7).
UNREACHABLE_ERRNOS = frozenset(
    {errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN}
)

# The descriptor is none any more. Windows says WSAENOTSOCK.
CLOSED_ERRNOS = frozenset({errno.EBADF, errno.ENOTSOCK})

# accept() failed for want of a resource: what waits in the backlog can be had later.
CAPACITY_ERRNOS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

# accept() failed for the one connection it was about to return: take the next one.
# "Linux accept() passes already-pending network errors on the new socket as an error
# code from accept()": accept(2), Error handling. EPERM: a firewall forbids it.
LOST_CLIENT_ERRNOS = frozenset(
    getattr(errno, name)
    for name in (
        "ECONNABORTED",
        "ECONNRESET",
        "EHOSTDOWN",
        "EHOSTUNREACH",
        "ENETDOWN",
        "ENETUNREACH",
        "ENONET",
        "ENOPROTOOPT",
        "EOPNOTSUPP",
        "EPERM",
        "EPROTO",
        "ETIMEDOUT",
    )
    if hasattr(errno, name)
)

# Keep the last words for the segment of the FIN: send(2). A peer that has closed answers
# a segment of their own with an RST, and that could come before the FIN is sent.
MSG_MORE: int = getattr(socket, "MSG_MORE", 0)

# One call that does not block, whatever has become of the socket's O_NONBLOCK: recv(2).
# A child process that shares the socket may clear that. Not on Windows.
DONTWAIT: int = getattr(socket, "MSG_DONTWAIT", 0)

# What SO_TIMESTAMPING and the like report: recv(2). Until it is read, epoll reports an
# error, over and over. Linux alone has it.
ERRQUEUE: int = getattr(socket, "MSG_ERRQUEUE", 0)

# Look at what has arrived, and leave it there: recv(2).
PEEK = socket.MSG_PEEK

# Whether accepted sockets have the listening socket's SO_LINGER and TCP_NODELAY.
# Measured on Linux; elsewhere each accepted socket is armed by itself.
ACCEPTED_SOCKETS_INHERIT = sys.platform == "linux"

# Whether processes may share a port, each with a socket of its own. Not on Windows.
CAN_REUSE_PORT = hasattr(socket, "SO_REUSEPORT")

# struct linger: two ints (socket(7)), on Windows two unsigned shorts (winsock2.h).
_LINGER = struct.Struct("HH" if sys.platform == "win32" else "ii")
_LINGER_RESET = _LINGER.pack(1, 0)
_LINGER_OFF = _LINGER.pack(0, 0)


class SocketLike(Protocol):
    """What asyncio, uvloop and Trio show of a socket that is theirs."""

    @property
    def family(self) -> Any: ...
    @property
    def type(self) -> Any: ...
    @property
    def proto(self) -> int: ...
    def fileno(self) -> int: ...
    def getsockopt(self, level: int, optname: int, /) -> int: ...


def host_and_port(address: tuple[Any, ...]) -> tuple[str, int]:
    """(host, port) of a socket address; an IPv6 scope becomes a part of the host."""
    host, port = address[:2]
    if len(address) == 4 and address[3]:
        host = f"{host.split('%')[0]}%{address[3]}"
    return host, port


def local_address(sock: socket.socket) -> tuple[str, int]:
    """(host, port) on this side."""
    return host_and_port(sock.getsockname())


def remote_address(sock: Any) -> tuple[str, int] | None:
    """(host, port) of the peer; None if it has gone."""
    try:
        return host_and_port(sock.getpeername())
    except OSError:
        return None


def prepare_listener(
    sock: socket.socket, keepalive: float | None, *, is_own: bool
) -> bool:
    """Let accept() not block, and pass on what a connection needs if *sock* is our own.

    Options and O_NONBLOCK are those of all processes that have the socket (fcntl(2)). To
    one that armed nothing, an armed listening socket would make a reset of every close.

    Returns:
      Whether what it accepts is armed, from the next connection to it on.
    """
    sock.setblocking(False)
    if is_own and ACCEPTED_SOCKETS_INHERIT:
        prepare_accepted(sock, keepalive)
        return True
    return False


def prepare_accepted(sock: socket.socket, keepalive: float | None = None) -> None:
    """Arm *sock* and send small segments at once (TCP_NODELAY, tcp(7))."""
    arm(sock)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if keepalive is not None:
        keep_alive(sock, keepalive)


def arm(sock: socket.socket) -> None:
    """Let whatever closes *sock*, the end of the process included, send an RST.

    SO_LINGER {1, 0}: socket(7), and "abortive close" of RFC 9293, 3.10.5.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)


def disarm(sock: socket.socket) -> None:
    """Take :func:`arm` back: closing sends a FIN again."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_OFF)


def never_block(sock: socket.socket) -> None:
    """Make *sock* non-blocking, also to Python, which with a time-out waits by itself.

    :data:`DONTWAIT` is for what others do to the descriptor after that.
    """
    if sock.gettimeout() != 0:
        sock.setblocking(False)


def is_listening(sock: SocketLike) -> bool:
    """Whether connections can be accepted from it."""
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def refuse_unless_tcp(owned: SocketLike, stream: object) -> None:
    """Check that *owned*, found under *stream*, is the socket of a TCP connection.

    Raises:
      TypeError: it is a socket of another kind; the message says which.
    """
    name = type(stream).__qualname__
    family = owned.family
    inet = socket.AF_INET, socket.AF_INET6
    if family not in inet and hasattr(socket, "SO_DOMAIN"):
        # What was accepted from a socket.fromfd() has the family that was given there.
        family = owned.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN)
    if family not in inet:
        family = getattr(owned.family, "name", family)
        raise TypeError(
            f"{name} is not a TCP connection: its socket is {family}, and only TCP "
            "(AF_INET or AF_INET6) has an RST"
        )
    if owned.type != socket.SOCK_STREAM:
        kind = getattr(owned.type, "name", owned.type)
        raise TypeError(f"{name} is not a TCP connection: its socket is {kind}")


def is_writable(sock: socket.socket) -> bool:
    """Whether a send would take something, or fail, without waiting."""
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(sock, select.POLLOUT)
        return bool(poll.poll(0))
    return bool(select.select([], [sock], [], 0)[1])  # Windows: any number of sockets


def duplicate(sock: SocketLike) -> socket.socket:
    """A second descriptor for the connection of *sock*.

    Raises:
      OSError: EBADF, *sock* is closed; EMFILE or ENFILE, there are no descriptors left.
    """
    return socket.fromfd(sock.fileno(), sock.family, sock.type, sock.proto)


def send_fin(sock: socket.socket) -> OSError | None:
    """Send the FIN behind everything that was sent: shutdown(2).

    Returns:
      None, or why there was no connection left to send it on: the error that ended it,
      ENOTCONN if both sides had finished before.
    """
    try:
        sock.shutdown(socket.SHUT_WR)
    except OSError as exc:
        return pending_error(sock) or exc
    return None


def pending_error(sock: socket.socket) -> OSError | None:
    """The error that no call has been told yet: SO_ERROR of socket(7)."""
    code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return OSError(code, os.strerror(code)) if code else None


def reset(sock: socket.socket) -> None:
    """Send the RST. The descriptor stays with its owner, who closes it afterwards.

    On Linux the RST goes out in this call, even while another process holds a copy of
    the descriptor or an asyncio transport sits on it. Elsewhere it goes out when the
    last copy is closed. A connection that is gone already is left alone.
    """
    with suppress(OSError):
        if not _dissolve(sock):
            arm(sock)


if sys.platform == "linux":
    import ctypes

    _connect = ctypes.CDLL(None).connect
    _connect.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    # struct sockaddr {sa_family = AF_UNSPEC}; the socket module cannot spell it.
    _UNSPECIFIED = struct.pack("H14x", socket.AF_UNSPEC)

    def _dissolve(sock: socket.socket) -> bool:
        # connect(2): "TCP sockets may dissolve the association by connecting to an
        # address with the sa_family member set to AF_UNSPEC". It resets the connection.
        failed: int = _connect(sock.fileno(), _UNSPECIFIED, len(_UNSPECIFIED))
        return not failed

    RESETS_UNDER_A_TRANSPORT = True
else:

    def _dissolve(sock: socket.socket) -> bool:
        """Only Linux documents it; the linger option resets on close."""
        return False

    RESETS_UNDER_A_TRANSPORT = False


def keep_alive(sock: socket.socket, seconds: float) -> None:
    """Notice after about *seconds* that the machine of the peer is gone.

    While nothing is under way by probes, of which several may be lost (SO_KEEPALIVE of
    socket(7), TCP_KEEPIDLE and the like of tcp(7); RFC 9293, 3.8.4); while something is,
    by what is not acknowledged (TCP_USER_TIMEOUT; RFC 5482), where there is that. To
    Linux that includes what cannot be sent to a closed window (tcp(7)).
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    third = max(1, round(seconds / 3))
    for name, value in (
        ("TCP_KEEPALIVE", third),  # as macOS calls the next one
        ("TCP_KEEPIDLE", third),
        ("TCP_KEEPINTVL", third),
        ("TCP_KEEPCNT", 2),
        ("TCP_USER_TIMEOUT", math.ceil(seconds * 1000)),
    ):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def why_not_resettable() -> str | None:
    """Why a stream of the running event loop could not be reset, or None.

    Where a connection cannot be dissolved under an asyncio transport, the RST depends
    on how the transport is closed.
    """
    proactor = getattr(asyncio, "ProactorEventLoop", None)
    if (
        RESETS_UNDER_A_TRANSPORT
        or proactor is None
        or anyio.get_cancelled_exc_class() is not asyncio.CancelledError
        or not isinstance(asyncio.get_running_loop(), proactor)
    ):
        return None
    return "asyncio's ProactorEventLoop sends a FIN before it closes a socket"
