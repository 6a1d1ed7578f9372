"""The connection: a stream, and the way it ends."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

from anyio import (
    BusyResourceError,
    ClosedResourceError,
    TypedAttributeSet,
    typed_attribute,
)
from anyio.abc import SocketAttribute, SocketStream
from anyio.lowlevel import checkpoint
from outcome import Error, Value

from ._ending import KIND_OF, Cause, CloseKind, Ending, cause_of_exit, verdict
from ._lifecycle import Lifecycle
from ._stream import RECEIVE_SIZE
from ._task_group import ConnectionTaskGroup
from ._tls import SecureStream, adopt, check_tls, handshake

if TYPE_CHECKING:
    import socket
    import ssl
    from collections.abc import Awaitable, Callable, Coroutine, Mapping
    from types import TracebackType

    from anyio.abc import TaskGroup

    from ._drain import Drain
    from ._stream import EndableStream

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
        "_drain",
        "_ending",
        "_finish_on",
        "_lender",
        "_life",
        "_outcome",
        "_stream",
    )

    def __init__(
        self,
        stream: EndableStream,
        *,
        finish_on: tuple[type[BaseException], ...],
        drain: Drain | None,
        shared: Lifecycle | None = None,
    ) -> None:
        self._stream = stream
        self._finish_on = finish_on
        self._drain = drain
        self._life = Lifecycle(stream) if shared is None else shared
        self._lender: object = None  # in a scope within a scope: what it was given
        self._outcome: Value[object] | Error | None = None
        self._ending: Ending | None = None

    def __repr__(self) -> str:
        ending = self._life.ending
        if ending is not None:
            state = f"{ending.kind.value}, {ending.cause.value}"
        else:
            state = "open" if self._life.is_open else "finishing"
        address = self._stream.remote_address
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
        return self._stream._raw_socket

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        attributes = dict(self._stream.extra_attributes)
        attributes[ConnectionAttribute.connection] = lambda: self
        remote_address = self._stream.remote_address
        if remote_address is not None:
            # Known to the end, which is where it goes into a log.
            attributes[SocketAttribute.remote_address] = lambda: remote_address
            attributes[SocketAttribute.remote_port] = lambda: remote_address[1]
        return attributes

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
        if not self._life.is_open:
            return _refuse()
        return self._stream.receive(max_bytes)

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
        if not self._life.is_open:
            return _refuse()
        return self._stream.send(item)

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
        if not self._life.is_open:
            await _refuse()
        await self._stream.send_eof()

    async def aclose(self) -> None:
        """Finish now: FIN, drain, close. The explicit success.

        What happens after it in the body cannot change the ending. If a send was cut
        short before, the connection is reset all the same. Cancelled, it stops draining
        and closes at once.
        """
        if self._life.is_open:
            await self._end(Cause.CLOSED)
        else:
            await self._life.wait()
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
        if not self._life.is_open:
            raise ClosedResourceError
        if self._stream.busy:
            raise BusyResourceError("using")
        if self._lender is not None:
            # Only this scope lets go; the life that it shares goes on.
            self._life = Lifecycle(self._stream)
            self._life.detach()
            return self._lender
        self._life.detach()
        return self._stream.release()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext | None = None,
        *,
        server_side: bool | None = None,
        hostname: str | None = None,
    ) -> None:
        """Upgrade to TLS in place (STARTTLS), by AnyIO's `TLSStream`.

        From then on a FIN is preceded by a close_notify, and an RST is not. A peer's FIN
        that no close_notify precedes is :exc:`anyio.BrokenResourceError`. `send_eof()`
        raises :exc:`NotImplementedError`. A handshake that fails or is cancelled resets
        the connection.

        Args:
          ssl_context: with a certificate on the server's side, where it is needed; on
            the client's, None for the default context of :mod:`ssl`.
          server_side: which side this is; None to tell it from the context, or from
            whether there is a *hostname*.
          hostname: of the peer, on the client's side, to be checked.

        Raises:
          ssl.SSLError: the handshake failed.
          PeerReset: the peer reset the connection in the middle of it.
          anyio.BrokenResourceError: it was lost in another way; or plaintext that came
            before the handshake is in a buffer, and would surface after it
            (CVE-2011-0411). The connection is reset then as well.
          anyio.BusyResourceError: a task is waiting in the connection.
          anyio.ClosedResourceError: the connection has ended.
          TypeError, ValueError: the arguments do not fit each other, or this side.
          RuntimeError: TLS has been started, or this is a scope within a scope.
        """
        server_side = check_tls(ssl_context, server_side, hostname)
        if self._lender is not None:
            raise RuntimeError("start_tls() is for the connection of the outermost scope")
        if isinstance(self._stream, SecureStream):
            raise RuntimeError("TLS has been started on this connection")
        if not self._life.is_open:
            await _refuse()
        if self._stream.busy:
            raise BusyResourceError("using")
        try:
            secure = await handshake(
                self._stream,
                ssl_context=ssl_context,
                server_side=server_side,
                hostname=hostname,
            )
        except BaseException as exc:
            self._reset(cause_of_exit(exc, ()))
            raise
        self._stream = self._life.stream = secure

    def create_task_group(self) -> TaskGroup:
        """An AnyIO task group that is tied to the connection.

        The first child that fails, a failure of its body, or a cancellation from
        outside resets the connection at that moment, and not after the other children
        have finished their shielded clean-up. Cancelling the group itself, the usual
        way to stop the others, is not a failure, and neither are the exceptions of
        *finish_on*.
        """
        return ConnectionTaskGroup(self._reset, self._finish_on)

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        # AsyncResource would call aclose(), which is FIN, however the block was left.
        if self._life.is_open:
            await self._end(cause_of_exit(exc_val, self._finish_on))

    async def _end(self, cause: Cause) -> None:
        """The verdict falls: *cause*, unless a send was torn."""
        cause = verdict(cause, torn=self._stream.mid_send or self._life.torn)
        if KIND_OF[cause] is CloseKind.FIN:
            await self._life.finish(cause, self._outcome, self._drain)
        else:
            self._reset(cause)

    def _reset(self, cause: Cause) -> None:
        self._life.reset(cause, self._outcome)


async def _refuse() -> NoReturn:
    await checkpoint()
    raise ClosedResourceError


class ConnectionAttribute(TypedAttributeSet):
    """How a scope finds the connection inside of a wrapper around it."""

    connection: Connection = typed_attribute()


def open_connection(
    stream: object,
    *,
    finish_on: tuple[type[BaseException], ...],
    drain: Drain | None,
) -> Connection:
    """A connection on *stream*, which is checked, and not touched before :func:`arm`.

    Raises:
      TypeError, anyio.ClosedResourceError, RuntimeError: see :func:`connection_scope`.
    """
    outer: Connection | None
    if isinstance(stream, Connection):
        outer = stream
        under = outer._stream
    else:
        under, attributes = adopt(stream)
        outer = attributes.get(ConnectionAttribute.connection, lambda: None)()
        if outer is not None and isinstance(under, SecureStream):
            raise TypeError("a Connection starts TLS itself, by Connection.start_tls()")
    if outer is None:
        return Connection(under, finish_on=finish_on, drain=drain)
    if not outer._life.is_open:
        raise ClosedResourceError("the connection has ended")
    inner = Connection(under, finish_on=finish_on, drain=drain, shared=outer._life)
    inner._lender = stream
    return inner


def arm(connection: Connection) -> None:
    """From here on every end but a FIN verdict is an RST."""
    if connection._lender is None:
        try:
            connection._stream.arm()
        except OSError:
            raise ClosedResourceError from None
    elif not connection._life.is_open:
        raise ClosedResourceError("the connection has ended")


async def run(
    connection: Connection, handler: Callable[[Connection], Awaitable[object]]
) -> None:
    """Run *handler*, and end the connection as its outcome says.

    Raises:
      BaseException: what *handler* raised, after the end of the connection.
    """
    try:
        result = await handler(connection)
    except BaseException as exc:
        await conclude_failed(connection, exc)
        raise
    await conclude(connection, result)


async def conclude(connection: Connection, result: object) -> None:
    """The body has returned: end the connection, if it has not ended before."""
    connection._outcome = Value(result)
    await connection._end(Cause.RETURNED)


async def conclude_failed(connection: Connection, exc: BaseException) -> None:
    """The body has raised *exc*: the same. A reset is over without a checkpoint."""
    connection._outcome = Error(exc)
    await connection._end(cause_of_exit(exc, connection._finish_on))


def cut_short(connection: Connection) -> None:
    """A cancellation of everything: reset what is open, wait no more for the rest."""
    connection._reset(Cause.CANCELLED)
