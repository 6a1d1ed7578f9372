"""Receiving, sending and TLS on a connection, shared by all of its scopes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

from anyio import (
    BusyResourceError,
    ClosedResourceError,
    TypedAttributeSet,
    typed_attribute,
)
from anyio.abc import SocketStream
from anyio.lowlevel import checkpoint

from ._ending import Cause, cause_of_exit
from ._origin import RECEIVE_SIZE
from ._tls import SecureStream, check_tls

if TYPE_CHECKING:
    import socket
    import ssl
    from collections.abc import Callable, Coroutine, Mapping

    from anyio.abc import ByteStream
    from anyio.streams.buffered import BufferedByteReceiveStream

    from ._lifecycle import Lifecycle


class Conversation(SocketStream):
    """The stream that a :class:`Connection` is; the end of it is not decided here."""

    __slots__ = ("_life", "_sink", "_source")

    def __init__(self, life: Lifecycle) -> None:
        self._life = life
        # Where a wrapper is in between: who receives, and who sends and is to be closed.
        self._source: BufferedByteReceiveStream | ByteStream | None = None
        self._sink: ByteStream | None = None

    def _reset(self, cause: Cause) -> None:
        raise NotImplementedError

    @property
    def remote_address(self) -> tuple[str, int] | None:
        """(host, port) of the peer; None if the peer was gone before it could be read.

        May be set, for example to the client's address that a proxy has sent. Then
        `repr()`, the log, :attr:`Ending.remote_address` and
        `extra(SocketAttribute.remote_address)` have it.
        """
        return self._life.native.remote_address

    @remote_address.setter
    def remote_address(self, address: tuple[str, int]) -> None:
        host, port = address
        self._life.native.remote_address = host, port

    @property
    def state(self) -> SimpleNamespace:
        """A place for your own attributes of the connection.

        All scopes on the connection share it, and *on_ending* of :func:`serve_tcp` sees
        what the handler has set.
        """
        life = self._life
        if life.state is None:
            life.state = SimpleNamespace()
        return life.state

    @property
    def _raw_socket(self) -> socket.socket:
        return self._life.native._raw_socket

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        stream = self._life.stream if self._source is None else self._source
        return {**stream.extra_attributes, ConnectionAttribute.connection: lambda: self}

    # Not async themselves: one coroutine more would be 2 % of a short message, and 3 % of
    # the memory of an idle connection. To Pyright an async function returns more than a
    # Coroutine, to Mypy it does not.

    def receive(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, max_bytes: int = RECEIVE_SIZE
    ) -> Coroutine[Any, Any, bytes]:
        """Receive at most *max_bytes* bytes, and at least one.

        Raises:
          anyio.EndOfStream: the peer sent its FIN.
          PeerReset: the peer reset the connection.
          anyio.BrokenResourceError: the connection was lost in another way.
          anyio.ClosedResourceError: it was ended here.
          anyio.BusyResourceError: another task is receiving.
          ValueError: *max_bytes* is less than 1.
        """
        life = self._life
        if life.cause is not None:
            return _refuse()
        stream = life.stream if self._source is None else self._source
        return stream.receive(max_bytes)

    def send(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, item: bytes
    ) -> Coroutine[Any, Any, None]:
        """Send all of *item*, any bytes-like object.

        If this is interrupted after some of the bytes, the connection is torn: it can
        only end with an RST, and nothing more can be sent on it.

        Raises:
          PeerReset: the peer reset the connection.
          anyio.BrokenResourceError: it was lost in another way, or an earlier send was
            interrupted.
          anyio.ClosedResourceError: it was ended here, or `send_eof()` was called.
          anyio.BusyResourceError: another task is sending.
          TypeError: *item* is not bytes-like.
        """
        life = self._life
        if life.cause is not None:
            return _refuse()
        stream = life.stream if self._sink is None else self._sink
        return stream.send(item)

    async def send_eof(self) -> None:
        """Send the FIN and go on receiving (half-close, RFC 9293, 3.6).

        The FIN cannot be taken back. A peer on Linux that only reads does not learn of a
        later failure; see :attr:`Ending.fin_sent_before_reset`.

        Raises:
          anyio.BrokenResourceError: an earlier send was interrupted.
          anyio.ClosedResourceError: the connection was ended here.
          anyio.BusyResourceError: another task is sending.
        """
        life = self._life
        if life.cause is not None:
            await _refuse()
        await (life.stream if self._sink is None else self._sink).send_eof()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext | None = None,
        *,
        server_side: bool | None = None,
        hostname: str | None = None,
        standard_compatible: bool = True,
    ) -> None:
        """Upgrade to TLS in place (STARTTLS), by AnyIO's `TLSStream`.

        From then on a close_notify goes before a FIN, but not before an RST. A peer's
        FIN without a close_notify raises :exc:`anyio.BrokenResourceError`. `send_eof()`
        raises :exc:`NotImplementedError`. A handshake that fails or is cancelled resets
        the connection. If it fails on this side, the peer first gets the TLS alert that
        says why (RFC 8446, 6.2).

        All scopes on the connection use the session. Other tasks that send or receive
        during the handshake get :exc:`anyio.BusyResourceError`.

        Args:
          ssl_context: required on the server's side, with a certificate; on the
            client's side, None for the default context of :mod:`ssl`.
          server_side: which side this is; None to decide by the context, or by whether
            there is a *hostname*.
          hostname: on the client's side, the name to check the peer's certificate for.
          standard_compatible: False, as in AnyIO, for protocols that delimit their
            messages themselves: no close_notify is sent, and the peer's FIN without one
            is :exc:`anyio.EndOfStream`.

        Raises:
          ssl.SSLError: the handshake failed.
          PeerReset: the peer reset the connection during the handshake.
          anyio.BrokenResourceError: the connection was lost in another way; or a buffer
            holds plaintext from before the handshake, which would look protected after
            it (CVE-2011-0411). Then the connection is reset as well.
          anyio.BusyResourceError: a task is waiting in the connection.
          anyio.ClosedResourceError: the connection has ended.
          TypeError, ValueError: the arguments contradict each other, or one that this
            side needs is missing.
          RuntimeError: TLS has already been started.
        """
        server_side = check_tls(ssl_context, server_side, hostname)
        life = self._life
        if life.cause is not None:
            await _refuse()
        if isinstance(life.stream, SecureStream):
            raise RuntimeError("TLS has been started on this connection")
        if life.stream.busy:
            raise BusyResourceError("using")
        try:
            await life.start_tls(
                ssl_context=ssl_context,
                server_side=server_side,
                hostname=hostname,
                standard_compatible=standard_compatible,
            )
        except BaseException as exc:
            self._reset(cause_of_exit(exc, ()))
            raise


async def _refuse() -> NoReturn:
    await checkpoint()
    raise ClosedResourceError


class ConnectionAttribute(TypedAttributeSet):
    """How a scope finds the connection inside of a wrapper around it."""

    connection: Conversation = typed_attribute()
