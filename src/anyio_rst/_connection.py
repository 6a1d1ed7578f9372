"""The connection: a stream, and the way it ends.

A connection is *open* until its verdict falls. An RST ends it in the same instant.
After a FIN it is *finishing* until the drain is over, and only then has *ended*. Nothing
leads back, and nothing that happens after the verdict changes it:

============  ===========================  ============================
              open                         finishing
============  ===========================  ============================
a FIN cause   send FIN: finishing          wait for the end
an RST cause  send RST: ended              cut the drain short: ended
`detach()`    hand the stream back: ended  `anyio.ClosedResourceError`
============  ===========================  ============================
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from anyio import (
    BusyResourceError,
    ClosedResourceError,
    Event,
    TypedAttributeSet,
    typed_attribute,
)
from anyio.abc import SocketAttribute, SocketStream
from anyio.lowlevel import checkpoint
from outcome import Error, Value

from ._ending import KIND_OF, Cause, CloseKind, Ending, cause_of_exit, verdict
from ._foreign import LayeredStream, foreign
from ._stream import RECEIVE_SIZE
from ._task_group import ConnectionTaskGroup

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable, Mapping
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

    def __init__(
        self,
        stream: EndableStream,
        *,
        finish_on: tuple[type[BaseException], ...],
        drain: Drain | None,
        outer: Connection | None = None,
    ) -> None:
        self._stream = stream
        self._finish_on = finish_on
        self._drain = drain
        self._outer = outer
        self._cause: Cause | None = None
        self._fin_sent = False
        self._outcome: Value[object] | Error | None = None
        self._ending: Ending | None = None
        self._ended: Event | None = None

    def __repr__(self) -> str:
        if self._ending is not None:
            state = f"{self._ending.kind.value}, {self._ending.cause.value}"
        else:
            state = "open" if self._cause is None else "finishing"
        address = self._stream.remote_address
        peer = "an unknown peer" if address is None else f"{address[0]}:{address[1]}"
        return f"<Connection with {peer} ({state})>"

    @property
    def ending(self) -> Ending | None:
        """How the connection ended; None until then."""
        return self._ending

    @property
    def _raw_socket(self) -> socket.socket:
        return self._stream._raw_socket

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        attributes = dict(self._stream.extra_attributes)
        attributes[ConnectionAttribute.connection] = lambda: self
        if self._stream.remote_address is not None:
            # Known to the end, which is where it goes into a log.
            attributes[SocketAttribute.remote_address] = lambda: (
                self._stream.remote_address
            )
        return attributes

    async def receive(self, max_bytes: int = RECEIVE_SIZE) -> bytes:
        """Receive at most *max_bytes* bytes, and at least one.

        Raises:
          anyio.EndOfStream: the peer sent its FIN.
          PeerReset: the peer reset the connection.
          anyio.BrokenResourceError: the connection was lost in another way.
          anyio.ClosedResourceError: it was ended here.
          anyio.BusyResourceError: another task is receiving.
          ValueError: *max_bytes* is less than 1.
        """
        if self._cause is Cause.DETACHED:
            await self._refuse_detached()
        return await self._stream.receive(max_bytes)

    async def send(self, item: bytes) -> None:
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
        if self._cause is Cause.DETACHED:
            await self._refuse_detached()
        await self._stream.send(item)

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
        if self._cause is Cause.DETACHED:
            await self._refuse_detached()
        await self._stream.send_eof()

    async def aclose(self) -> None:
        """Finish now: FIN, drain, close. The explicit success.

        What happens after it in the body cannot change the ending. If a send was cut
        short before, the connection is reset all the same. Cancelled, it stops draining
        and closes at once.
        """
        if self._cause is None:
            await self._end(Cause.CLOSED)
        elif self._ending is None:
            await self._wait_for_end()
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
        if self._cause is not None:
            raise ClosedResourceError
        if self._stream.busy:
            raise BusyResourceError("using")
        self._cause = Cause.DETACHED
        self._record(CloseKind.DETACHED)
        if self._outer is not None and self._outer._stream is self._stream:
            return self._outer
        return self._stream.release()

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
        if self._cause is None:
            await self._end(cause_of_exit(exc_val, self._finish_on))

    async def _end(self, cause: Cause) -> None:
        """The verdict falls: *cause*, unless a send was torn."""
        cause = verdict(cause, torn=self._stream.torn)
        if KIND_OF[cause] is CloseKind.RST:
            self._reset(cause)
            return
        self._cause = cause
        self._fin_sent = self._stream.send_fin()
        try:
            if self._drain is not None and self._fin_sent:
                with suppress(ClosedResourceError):  # another task cut it short
                    await self._stream.drain(self._drain)
        finally:
            self._complete()

    def _reset(self, cause: Cause) -> None:
        if self._cause is None:
            self._cause = cause
            fin_sent = self._stream.eof_sent
            self._stream.reset()
            self._record(CloseKind.RST, fin_sent_before_reset=fin_sent)
        else:
            self._complete()

    def _complete(self) -> None:
        if self._ending is None:
            self._stream.close()
            self._record(CloseKind.FIN if self._fin_sent else CloseKind.RST)

    def _record(self, kind: CloseKind, *, fin_sent_before_reset: bool = False) -> None:
        assert self._cause is not None
        stream = self._stream
        self._set_ending(
            Ending(
                kind=kind,
                cause=self._cause,
                outcome=self._outcome,
                peer=stream.peer,
                remote_address=stream.remote_address,
                discarded=stream.discarded,
                unacknowledged=stream.unacknowledged,
                fin_sent_before_reset=fin_sent_before_reset,
            )
        )

    def _set_ending(self, ending: Ending) -> None:
        self._ending = ending
        if self._ended is not None:
            self._ended.set()
        outer = self._outer
        if (
            outer is not None
            and outer._ending is None
            and ending.kind is not CloseKind.DETACHED
        ):
            outer._cause = ending.cause
            outer._set_ending(replace(ending, outcome=outer._outcome))

    def _set_outcome(self, outcome: Value[object] | Error) -> None:
        self._outcome = outcome
        if self._ending is not None:
            self._ending = replace(self._ending, outcome=outcome)

    async def _wait_for_end(self) -> None:
        if self._ended is None:
            self._ended = Event()
        await self._ended.wait()

    async def _refuse_detached(self) -> None:
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
    wrapped: EndableStream
    if isinstance(stream, Connection):
        outer = stream
        wrapped = outer._stream
    else:
        wrapped = foreign(stream)
        outer = wrapped.extra(ConnectionAttribute.connection, None)
        if outer is not None:
            wrapped = LayeredStream(wrapped, outer._stream)
    if outer is not None and outer._cause is not None:
        raise ClosedResourceError("the connection has ended")
    return Connection(wrapped, finish_on=finish_on, drain=drain, outer=outer)


def arm(connection: Connection) -> None:
    """From here on every end but a FIN verdict is an RST."""
    try:
        connection._stream.arm()
    except OSError:
        raise ClosedResourceError from None


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
        await conclude(connection, Error(exc))
        raise
    await conclude(connection, Value(result))


async def conclude(connection: Connection, outcome: Value[object] | Error) -> None:
    """The body is left: end the connection accordingly, unless that was done before.

    A reset is over without a checkpoint.
    """
    exc = outcome.error if isinstance(outcome, Error) else None
    connection._set_outcome(outcome)
    if connection._cause is None:
        await connection._end(cause_of_exit(exc, connection._finish_on))
    elif connection._ending is None:  # in the aclose() of another task
        try:
            if exc is None:
                await connection._wait_for_end()
        finally:
            connection._complete()


def cut_short(connection: Connection) -> None:
    """A cancellation of everything: reset what is open, wait no more for the rest."""
    connection._reset(Cause.CANCELLED)
