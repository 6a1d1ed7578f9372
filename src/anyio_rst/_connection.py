"""The connection: a stream, and the way it ends."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

from anyio import (
    BusyResourceError,
    ClosedResourceError,
    TypedAttributeSet,
    current_effective_deadline,
    typed_attribute,
)
from anyio.abc import SocketStream
from anyio.lowlevel import checkpoint
from anyio.streams.buffered import BufferedByteReceiveStream
from outcome import Error, Value

from ._ending import (
    KIND_OF,
    Cause,
    CloseKind,
    Ending,
    cause_of_exit,
    left_by,
    verdict,
)
from ._lifecycle import Lifecycle
from ._origin import RECEIVE_SIZE
from ._takeover import put_under
from ._task_group import ConnectionTaskGroup, is_stopped
from ._tls import SecureStream, check_tls

if TYPE_CHECKING:
    import socket
    import ssl
    from collections.abc import Callable, Coroutine, Mapping
    from types import TracebackType

    from anyio.abc import ByteStream, TaskGroup
    from typing_extensions import Self

    from ._limits import Drain
    from ._native import NativeStream

__all__ = ["Connection"]


class Connection(SocketStream):
    """A TCP connection whose end tells the truth.

    An :class:`anyio.abc.SocketStream`, made by :func:`connection_scope`,
    :func:`serve_tcp`, :func:`connect_tcp` or :func:`scoped`. Receiving and sending have
    AnyIO's exact meanings and exceptions, with these in addition:

    - :exc:`PeerReset` (an :exc:`anyio.BrokenResourceError`) when the peer reset the
      connection, and for every receive after that;
    - :exc:`anyio.BrokenResourceError` from `send()` and `send_eof()` after a `send()`
      that was cut short after some of its bytes;
    - :exc:`anyio.ClosedResourceError` after the verdict, and for tasks that were
      waiting in the connection when it fell.

    Used as a context manager, which :class:`anyio.abc.AsyncResource` allows, it ends
    when that block does, by the rules of :func:`connection_scope`.
    """

    __slots__ = (
        "_at_entry",
        "_drain",
        "_ending",
        "_finish_on",
        "_lent",
        "_life",
        "_outcome",
        "_sink",
        "_source",
    )

    def __init__(
        self,
        native: NativeStream,
        *,
        finish_on: tuple[type[BaseException], ...],
        drain: Drain | None,
        shared: Lifecycle | None = None,
    ) -> None:
        self._finish_on = finish_on
        self._drain = drain
        self._life = Lifecycle(native) if shared is None else shared
        self._lent: object = None  # in a scope within a scope: what it was given
        # Where a wrapper is in between: who receives, and who sends and is to be closed.
        self._source: BufferedByteReceiveStream | ByteStream | None = None
        self._sink: ByteStream | None = None
        self._at_entry: BaseException | None = None
        self._outcome: Value[object] | Error | None = None
        self._ending: Ending | None = None

    def __repr__(self) -> str:
        ending = self._life.ending
        if ending is not None:
            state = f"{ending.kind.value}, {ending.cause.value}"
        else:
            state = "open" if self._life.cause is None else "finishing"
        address = self._life.native.remote_address
        peer = "an unknown peer" if address is None else f"{address[0]}:{address[1]}"
        return f"<Connection with {peer} ({state})>"

    @property
    def ending(self) -> Ending | None:
        """How the connection ended; None until then."""
        ending = self._ending or self._life.ending
        if ending is not None and ending.outcome is not self._outcome:
            # Ended before the body was left, or by a scope within this one.
            ending = self._ending = replace(ending, outcome=self._outcome)
        return ending

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

        It commits you: a peer on Linux that only reads takes it for a clean end, and a
        failure after it can no longer be told to that peer. See
        :attr:`Ending.fin_sent_before_reset`.

        Raises:
          anyio.BrokenResourceError: an earlier send was interrupted.
          anyio.ClosedResourceError: the connection was ended here.
          anyio.BusyResourceError: another task is sending.
        """
        life = self._life
        if life.cause is not None:
            await _refuse()
        await (life.stream if self._sink is None else self._sink).send_eof()

    async def aclose(self) -> None:
        """Finish now: FIN, drain, close. The explicit success.

        What happens after it in the body cannot change the ending. If a send was cut
        short before, the connection is reset all the same. Cancelled while it drains,
        it closes at once, also when another task had called it.

        In a scope that is cancelled already it is no success, but the way to give up
        (:func:`anyio.aclose_forcefully`, `finally: await conn.aclose()` in a handler
        that is cancelled): reset, :attr:`Cause.CANCELLED`. Under a shield it finishes.
        """
        cause = Cause.CLOSED
        if current_effective_deadline() == -math.inf and not is_stopped(self._life):
            cause = Cause.CANCELLED
        await self._end(cause)
        await checkpoint()

    def abort(self) -> None:
        """Reset the connection now.

        Never blocks, may be called from any task of the loop, and any number of times.
        Tasks that wait in the connection wake with :exc:`anyio.ClosedResourceError`.
        When a FIN has gone out already, with the return of the body or with `aclose()`,
        this only cuts the drain short.
        """
        self._reset(Cause.ABORTED)

    def detach(self) -> Any:
        """Let go of the connection, and hand the wrapped stream back: disarmed, open.

        For :func:`connection_scope` that is the stream it was given, armed still if
        another scope around this one owns it; for :func:`serve_tcp` an AnyIO
        :class:`~anyio.abc.SocketStream`. The caller closes it.

        Raises:
          anyio.BusyResourceError: a task is waiting in the connection.
          anyio.ClosedResourceError: the connection has ended.
        """
        life = self._life
        if life.cause is not None:
            raise ClosedResourceError
        if life.stream.busy:
            raise BusyResourceError("using")
        if self._lent is not None:
            # Only this scope lets go; the life that it shares goes on.
            self._life = Lifecycle(life.native, life.stream)
            self._life.detach()
            return self._lent
        life.detach()
        stream = life.stream.release()
        if isinstance(self._source, BufferedByteReceiveStream):
            put_under(self._source, stream)
            return self._source
        return stream

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext | None = None,
        *,
        server_side: bool | None = None,
        hostname: str | None = None,
        standard_compatible: bool = True,
    ) -> None:
        """Upgrade to TLS in place (STARTTLS), by AnyIO's `TLSStream`.

        From then on a FIN is preceded by a close_notify, and an RST is not. A peer's FIN
        that no close_notify precedes is :exc:`anyio.BrokenResourceError`. `send_eof()`
        raises :exc:`NotImplementedError`. A handshake that fails or is cancelled resets
        the connection; if it fails here, the peer is sent the TLS alert that says why
        (RFC 8446, 6.2).

        It holds for all scopes on the connection. What others send or receive in the
        meantime is refused with :exc:`anyio.BusyResourceError`.

        Args:
          ssl_context: with a certificate on the server's side, where it is needed; on
            the client's, None for the default context of :mod:`ssl`.
          server_side: which side this is; None to tell it from the context, or from
            whether there is a *hostname*.
          hostname: of the peer, on the client's side, to be checked.
          standard_compatible: False, as in AnyIO, for protocols that delimit
            themselves: no close_notify is sent, and the peer's FIN without one is
            :exc:`anyio.EndOfStream`.

        Raises:
          ssl.SSLError: the handshake failed.
          PeerReset: the peer reset the connection in the middle of it.
          anyio.BrokenResourceError: it was lost in another way; or plaintext that came
            before the handshake is in a buffer, and would surface after it
            (CVE-2011-0411). The connection is reset then as well.
          anyio.BusyResourceError: a task is waiting in the connection.
          anyio.ClosedResourceError: the connection has ended.
          TypeError, ValueError: the arguments do not fit each other, or this side.
          RuntimeError: TLS has been started.
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

    def create_task_group(self) -> TaskGroup:
        """An AnyIO task group that is tied to the connection.

        The first child that fails, a failure of its body, or a cancellation from
        outside resets the connection at that moment, and not after the other children
        have finished their shielded clean-up. Cancelling the group itself, the usual
        way to stop the others, is not a failure, and neither are the exceptions of
        *finish_on*.
        """
        return ConnectionTaskGroup(self._life, self._reset, self._finish_on)

    @classmethod
    async def from_socket(cls, sock_or_fd: socket.socket | int) -> NoReturn:
        """Not for a connection, which needs a scope to end with.

        Raises:
          NotImplementedError: always; *sock_or_fd* is untouched.
        """
        raise NotImplementedError(
            "a Connection needs a scope: "
            "connection_scope(await anyio.abc.SocketStream.from_socket(sock))"
        )

    async def __aenter__(self) -> Self:
        self._at_entry = sys.exc_info()[1]
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        # AsyncResource would call aclose(), which is FIN, however the block was left.
        try:
            exc = left_by(exc_val, self._at_entry)
            self._at_entry = None
            await self._end(cause_of_exit(exc, self._finish_on))
        except BaseException as exc:
            self._end_after(exc)
            raise

    async def _end(self, cause: Cause) -> None:
        """The verdict falls: *cause*, unless a send was torn."""
        cause = verdict(cause, torn=self._life.native.mid_send)
        if KIND_OF[cause] is CloseKind.FIN:
            if self._sink is not None:
                await self._close_wrapper(self._sink, cause)
            await self._life.finish(cause, self._outcome, self._drain)
        else:
            self._reset(cause)

    def _end_after(self, exc: BaseException) -> None:
        """Complete an end that *exc*, a signal handler's, has interrupted anywhere.

        In a nested scope that is left to the scope around it.
        """
        if self._outcome is None:
            self._outcome = Error(exc)
        if self._life.ending is None and self._lent is None:
            self._reset(cause_of_exit(exc, ()))

    async def _close_wrapper(self, wrapper: ByteStream, cause: Cause) -> None:
        """Let *wrapper* send what it has kept back; it closes the connection as well."""
        life = self._life
        if life.cause is not None:
            return
        life.leaving = cause, self._drain
        try:
            await wrapper.aclose()
        except BaseException as exc:
            self._reset(cause_of_exit(exc, ()))
            raise
        finally:
            life.leaving = None

    def _reset(self, cause: Cause) -> None:
        self._life.reset(cause, self._outcome)


async def _refuse() -> NoReturn:
    await checkpoint()
    raise ClosedResourceError


class ConnectionAttribute(TypedAttributeSet):
    """How a scope finds the connection inside of a wrapper around it."""

    connection: Connection = typed_attribute()
