"""Listening sockets, bound here or passed in, and accepting from them."""

from __future__ import annotations

import enum
import socket
import ssl
from typing import TYPE_CHECKING

from anyio import create_tcp_listener
from anyio.abc import SocketAttribute

from . import _forking, _sockets, _tcp_info

if TYPE_CHECKING:
    from ipaddress import IPv4Address, IPv6Address

# As AnyIO; the kernel cuts it to what it allows (net.core.somaxconn, listen(2)).
DEFAULT_BACKLOG = 65536


async def listen(
    host: str | IPv4Address | IPv6Address | None,
    port: int,
    backlog: int,
    reuse_port: bool,
) -> list[socket.socket]:
    try:
        bound = await create_tcp_listener(
            local_host=host, local_port=port, backlog=backlog, reuse_port=reuse_port
        )
    except OSError as exc:
        where = f"port {port}" if host is None else f"{host}, port {port}"
        raise type(exc)(exc.errno, f"cannot listen on {where}: {exc}") from exc
    return [listener.extra(SocketAttribute.raw_socket) for listener in bound.listeners]


def check_sockets(sockets: object, port: int) -> list[socket.socket]:
    """The listening sockets that the caller has brought, looked at and not changed."""
    if not isinstance(sockets, (list, tuple)):
        raise TypeError(f"sockets must be a list or tuple of sockets, not {sockets!r}")
    if not sockets:
        raise ValueError("sockets is empty: there is nothing to serve on")
    checked: dict[int, str] = {}
    for index, sock in enumerate(sockets):
        name = f"sockets[{index}]"
        if isinstance(sock, int):
            raise TypeError(
                f"{name} must be a socket, not {sock!r}; if that is a descriptor: "
                f"socket.socket(fileno={sock!r})"
            )
        if not isinstance(sock, socket.socket):
            raise TypeError(f"{name} must be a socket.socket, not {sock!r}")
        if isinstance(sock, ssl.SSLSocket):
            raise TypeError(f"{name} is an SSLSocket: pass a plain socket")
        _refuse_unless_listening(sock, name)
        if sock.fileno() in checked:
            raise ValueError(f"{name} is the same as {checked[sock.fileno()]}")
        checked[sock.fileno()] = name
        bound = sock.getsockname()[1]
        if port not in (0, bound):
            raise ValueError(f"port is {port}, but {name} listens on {bound}")
    return list(sockets)


def _refuse_unless_listening(sock: socket.socket, name: str) -> None:
    """Check that *sock*, called *name* in messages, is a listening TCP socket.

    Raises:
      TypeError: it is a socket of another kind; the message says which.
      ValueError: it is closed, or not listening.
    """
    if sock.fileno() == -1:
        raise ValueError(f"{name} is closed")
    try:
        # Ask the kernel: what *sock* believes came with whoever made it of a descriptor.
        with _sockets.blocking_kept(sock.fileno()):
            actual = socket.socket(fileno=sock.fileno())
    except OSError as exc:
        raise ValueError(f"{name} is not an open socket: {exc}") from exc
    try:
        if not _sockets.is_tcp(actual):
            family = getattr(actual.family, "name", actual.family)
            kind = getattr(actual.type, "name", actual.type)
            raise TypeError(
                f"{name} is not a TCP socket: it is {family}, {kind}, "
                f"protocol {actual.proto}"
            )
        if _sockets.is_listening(actual) is False:
            raise ValueError(f"{name} is not listening: call its listen()")
    finally:
        actual.detach()


def check_reuse_port(reuse_port: object) -> None:
    if not isinstance(reuse_port, bool):
        raise TypeError(f"reuse_port must be True or False, not {reuse_port!r}")
    if reuse_port and not _sockets.CAN_REUSE_PORT:
        raise ValueError("reuse_port must be False: this platform has no SO_REUSEPORT")


class Inherited(enum.Enum):
    """Whether accepted connections are armed, because their listening socket is."""

    NO = enum.auto()
    NOT_YET = enum.auto()  # who waits may have connected before the socket was armed
    UNKNOWN = enum.auto()  # the next connection shows whether the kernel does it at all
    YES = enum.auto()


class Listener:
    """A listening socket of a server."""

    __slots__ = ("_inherited", "_keepalive", "sock", "waiting")

    def __init__(
        self, sock: socket.socket, keepalive: float | None, *, is_own: bool
    ) -> None:
        self.sock = sock
        self.waiting: int | None = None
        """Once the server stops: how many are still to be accepted."""
        self._keepalive = keepalive
        arms = _sockets.prepare_listener(sock, keepalive, is_own=is_own)
        self._inherited = Inherited.NOT_YET if arms else Inherited.NO

    def accept(self) -> tuple[socket.socket, tuple[str, int] | None] | None:
        """The next connection, armed, and its peer's address; None if nobody waits.

        A client that has reset by now has no address on macOS.

        Raises:
          OSError: for want of a descriptor or memory (CAPACITY_ERRNOS), or the connection
            was lost while it waited (LOST_CLIENT_ERRNOS); see accept(2).
        """
        try:
            with _forking.lock:
                sock, address = self.sock.accept()
                _forking.own(sock)
        except BlockingIOError:
            if self._inherited is Inherited.NOT_YET:
                self._inherited = Inherited.UNKNOWN
            return None
        if self.waiting:
            self.waiting -= 1
        if self._inherited is Inherited.UNKNOWN:
            does = _sockets.has_inherited(sock, self.sock)
            self._inherited = Inherited.YES if does else Inherited.NO
        if self._inherited is not Inherited.YES:
            try:
                _sockets.prepare_accepted(sock, self._keepalive)
            except OSError:
                # macOS and FreeBSD take no options of what the client has reset by now.
                # The handler is told of that.
                if _sockets.remote_address(sock) is not None:
                    raise
        return sock, _sockets.host_and_port(address) if address else None

    def count_waiting(self) -> None:
        """From now on nobody but those who have connected is to be accepted."""
        size = _tcp_info.backlog(self.sock)
        self.waiting = socket.SOMAXCONN if size is None else size
