"""Platform facts about TCP sockets: every option, ioctl and errno.

With `_tcp_info`, this is the one place that knows on which platform it runs.
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
import socket
import struct
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# The connection is gone because the peer reset it. Linux says ECONNRESET, once; after
# that, and for a reset that follows the peer's FIN, it says EPIPE (tcp_reset() in
# net/ipv4/tcp_input.c). Windows calls the first WSAECONNRESET.
RESET_ERRNOS = frozenset({errno.ECONNRESET, errno.EPIPE})

# To MPTCP: mptcp_supported_sockopt() of net/mptcp/sockopt.c and those who ask it.
_UNKNOWN_OPTION_ERRNOS = frozenset({errno.ENOPROTOOPT, errno.EOPNOTSUPP})

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
_LOST_CLIENT = (
    "ECONNABORTED ECONNRESET EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH ENONET "
    "ENOPROTOOPT EOPNOTSUPP EPERM EPROTO ETIMEDOUT"
)
LOST_CLIENT_ERRNOS = frozenset(
    getattr(errno, name) for name in _LOST_CLIENT.split() if hasattr(errno, name)
)

# Keep the last words for the segment of the FIN: send(2). A peer that has closed answers
# a segment of their own with an RST, and that could come before the FIN is sent.
# PyPy has no name for what Linux has (linux/socket.h).
MSG_MORE: int = getattr(socket, "MSG_MORE", 0x8000 if sys.platform == "linux" else 0)

# One call that does not block, whatever has become of the socket's O_NONBLOCK: recv(2).
# A child process that shares the socket may clear that. Not on Windows.
DONTWAIT: int = getattr(socket, "MSG_DONTWAIT", 0)

# What SO_TIMESTAMPING and the like report: recv(2). Until it is read, epoll reports an
# error, over and over. Linux alone has it.
ERRQUEUE: int = getattr(socket, "MSG_ERRQUEUE", 0)

# Look at what has arrived, and leave it there: recv(2).
PEEK = socket.MSG_PEEK

# Whether processes may share a port, each with a socket of its own. Not on Windows.
CAN_REUSE_PORT = hasattr(socket, "SO_REUSEPORT")

# struct linger: two ints (socket(7)), on Windows two unsigned shorts (winsock2.h).
_LINGER = struct.Struct("HH" if sys.platform == "win32" else "ii")
_LINGER_RESET = _LINGER.pack(1, 0)
_LINGER_OFF = _LINGER.pack(0, 0)

# macOS takes no options of a socket that is shut in both directions (EINVAL), unless it
# is told: struct so_np_extensions of sys/socket.h, with SONPX_SETOPTSHUT set.
_AFTER_SHUTDOWN: tuple[int, bytes] | None = None
if sys.platform == "darwin":
    _AFTER_SHUTDOWN = 0x1083, struct.pack("II", 1, 1)  # SO_NP_EXTENSIONS

# Multipath TCP, of whose connections a client may make a plain one: RFC 8684.
IPPROTO_MPTCP: int = getattr(socket, "IPPROTO_MPTCP", 262)
_SO_PROTOCOL: int | None = getattr(socket, "SO_PROTOCOL", None)

# By which keep_alive() sets how often the peer is asked, and when it is given up.
_KEEPALIVE_OPTIONS = (
    "TCP_KEEPALIVE",  # as macOS calls the next one
    "TCP_KEEPIDLE",
    "TCP_KEEPINTVL",
    "TCP_KEEPCNT",
    "TCP_USER_TIMEOUT",
)


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
      Whether what it accepts should have that, from the next connection to it on; if the
      kernel does so, :func:`has_inherited` tells.
    """
    sock.setblocking(False)
    if is_own:
        prepare_accepted(sock, keepalive)
    return is_own


def has_inherited(accepted: socket.socket, listener: socket.socket) -> bool:
    """Whether *accepted* has what :func:`prepare_listener` has set on *listener*.

    Nothing promises it. Linux and FreeBSD 14 do so. gVisor does not, and macOS makes
    two minutes of SO_LINGER's zero seconds. What MPTCP sockets lack (see
    :func:`keep_alive`) plain ones that they accept cannot have from them.
    """
    options = [
        (socket.SOL_SOCKET, socket.SO_LINGER),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
        (socket.IPPROTO_TCP, socket.TCP_NODELAY),
    ]
    options += [
        (socket.IPPROTO_TCP, getattr(socket, name))
        for name in _KEEPALIVE_OPTIONS
        if hasattr(socket, name)
    ]
    size = _LINGER.size
    try:
        return all(
            accepted.getsockopt(*option, size) == listener.getsockopt(*option, size)
            for option in options
        )
    except OSError:
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
    if _AFTER_SHUTDOWN is not None:  # for disarm()
        sock.setsockopt(socket.SOL_SOCKET, *_AFTER_SHUTDOWN)
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


def is_multipath(sock: SocketLike) -> bool:
    """Whether *sock* is one of MPTCP, which its Python object need not know."""
    if _SO_PROTOCOL is None:
        return False
    return sock.getsockopt(socket.SOL_SOCKET, _SO_PROTOCOL) == IPPROTO_MPTCP


def is_tcp(sock: SocketLike) -> bool:
    """Whether it speaks TCP, to its user at least, as MPTCP does."""
    return (
        sock.family in (socket.AF_INET, socket.AF_INET6)
        and sock.type == socket.SOCK_STREAM
        and sock.proto in (0, socket.IPPROTO_TCP, IPPROTO_MPTCP)
    )


def is_listening(sock: SocketLike) -> bool | None:
    """Whether connections can be accepted from it; None where macOS does not tell."""
    try:
        return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError as exc:  # ENOTSOCK: vacated
        return None if exc.errno == errno.ENOPROTOOPT else False


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


def duplicate(sock: SocketLike) -> socket.socket:
    """A second descriptor for the connection of *sock*.

    Raises:
      OSError: EBADF, *sock* is closed; EMFILE or ENFILE, there are no descriptors left.
    """
    with blocking_kept(sock.fileno()):
        return socket.fromfd(sock.fileno(), sock.family, sock.type, sock.proto)


@contextmanager
def blocking_kept(descriptor: int) -> Iterator[None]:
    """Let no socket object that is made of *descriptor* change its O_NONBLOCK.

    PyPy clears it, and a default time-out sets it: for all copies of it, fcntl(2).

    Raises:
      OSError: it is closed.
    """
    is_posix = os.name == "posix"
    blocks = is_posix and os.get_blocking(descriptor)
    yield
    if is_posix:
        os.set_blocking(descriptor, blocks)


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


def reset(sock: socket.socket) -> bool:
    """Send the RST, or let the close send it, which is the owner's and comes next.

    Where the kernel can dissolve a connection (Linux), the RST goes out in this call,
    even while another process holds a copy of the descriptor or an asyncio transport sits
    on it. Elsewhere it goes out when the last copy is closed. A connection that is gone
    already is left alone.

    Returns:
      Whether nothing is left for the close to do.
    """
    try:
        if _dissolve(sock.fileno()):
            return True
        arm(sock)
    except OSError:
        return True
    return False


try:
    _connect: Any = ctypes.CDLL(None).connect
    _connect.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
except (OSError, TypeError, AttributeError):  # Windows has none to be found like that
    _connect = None

# struct sockaddr {sa_family = AF_UNSPEC}; the socket module cannot spell it.
_UNSPECIFIED = struct.pack("H14x", socket.AF_UNSPEC)


def _dissolve(descriptor: int) -> bool:
    """End the connection with an RST, if there is one, and the kernel can.

    connect(2): "TCP sockets may dissolve the association by connecting to an address
    with the sa_family member set to AF_UNSPEC". Linux does so; to gVisor it is
    EAFNOSUPPORT, to the BSDs and macOS EISCONN.
    """
    if _connect is None:
        return False
    failed: int = _connect(descriptor, _UNSPECIFIED, len(_UNSPECIFIED))
    return not failed


def can_dissolve() -> bool:
    """Whether this kernel can end a connection like that: asked of a socket with none.

    Raises:
      OSError: EMFILE or ENFILE, there are no descriptors left.
    """
    with socket.socket() as unconnected:
        return _dissolve(unconnected.fileno())


def vacate(descriptors: Iterable[int]) -> None:
    """Close what *descriptors* refer to, whose owners will close them again.

    So the numbers stay in use, by a file that no epoll instance takes: epoll_ctl(2).
    Nothing may be registered for them in an event loop that goes on.
    """
    if os.name == "posix":  # where a socket is a file
        nothing = os.open(os.devnull, os.O_RDWR)
        try:
            for descriptor in descriptors:
                os.dup2(nothing, descriptor, inheritable=False)
        finally:
            os.close(nothing)


def keep_alive(sock: socket.socket, seconds: float) -> None:
    """Notice after about *seconds* that the machine of the peer is gone.

    While nothing is under way by probes, of which several may be lost (SO_KEEPALIVE of
    socket(7), TCP_KEEPIDLE and the like of tcp(7); RFC 9293, 3.8.4); while something is,
    by what is not acknowledged (TCP_USER_TIMEOUT; RFC 5482), where there is that. To
    Linux that includes what cannot be sent to a closed window (tcp(7)). MPTCP has only
    the probes.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    third = max(1, round(seconds / 3))
    values = (third, third, third, 2, math.ceil(seconds * 1000))
    for name, value in zip(_KEEPALIVE_OPTIONS, values, strict=True):
        if hasattr(socket, name):
            try:
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
            except OSError as exc:
                if exc.errno not in _UNKNOWN_OPTION_ERRNOS or not is_multipath(sock):
                    raise
