"""The connection: a stream, and the way it ends."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

from anyio import (
    BusyResourceError,
    ClosedResourceError,
    current_effective_deadline,
)
from anyio.lowlevel import checkpoint
from anyio.streams.buffered import BufferedByteReceiveStream
from outcome import Error, Value

from ._conversation import Conversation
from ._ending import (
    KIND_OF,
    Cause,
    CloseKind,
    Ending,
    cause_of_exit,
    exception_leaving,
    verdict,
)
from ._idle import Idle
from ._lifecycle import Lifecycle
from ._limits import check_seconds, check_thread
from ._takeover import put_under
from ._task_group import ConnectionTaskGroup, is_stopped

if TYPE_CHECKING:
    import socket
    from types import TracebackType

    from anyio.abc import ByteStream, TaskGroup
    from typing_extensions import Self

    from ._limits import Drain
    from ._native import NativeStream

__all__ = ["Connection"]


class Connection(Conversation):
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
        "_outcome",
    )

    def __init__(
        self,
        native: NativeStream,
        *,
        finish_on: tuple[type[BaseException], ...],
        drain: Drain | None,
        shared: Lifecycle | None = None,
    ) -> None:
        super().__init__(Lifecycle(native) if shared is None else shared)
        self._finish_on = finish_on
        self._drain = drain
        self._lent: object = None  # in a scope within a scope: what it was given
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

    def idle(self, timeout: float | None = None) -> Idle:
        """Wait for the next request, for as long as the server is not stopping.

        ::

            async def handler(conn: Connection) -> None:
                while True:
                    with conn.idle(30) as idle:
                        request = await conn.receive()
                    if idle.ended:
                        return
                    await conn.send(answer(request))

        Not a request that takes long, but the wait for it is ended: by
        :meth:`Server.stop`, or after *timeout* seconds. To return then is FIN, and
        nothing is logged. Without a server only the time-out counts. A receive in it
        prefers what has arrived: it is the request that counts. The peer's FIN is
        :exc:`anyio.EndOfStream`, as always; *finish_on* makes that a clean end.

        The first request of a connection is on its way when that is accepted. If it, too,
        is waited for in here, a server that stops may leave it without an answer.

        Raises:
          RuntimeError: from `with`, if the connection is idle already.
          TypeError, ValueError: *timeout* is no number of seconds.
        """
        if timeout is not None:
            check_seconds("timeout", timeout)
        return Idle(self._life, timeout)

    def is_stale(self) -> bool:
        """Whether the connection is no good for another request, as far as one can see.

        For a pool, of a connection that nobody uses at the moment. Not a coroutine: it
        looks at what has arrived by now, and waits for nothing. Nothing is consumed
        either: a receive still gets, or raises, whatever it would have.

        True, if the peer has finished, reset the connection or sent something that would
        be taken for the answer to the next request, in the buffers that
        :func:`connection_scope` was given as well; if the connection was lost; and if it
        has ended here, was detached or torn, or `send_eof()` was called.

        Over TLS a close_notify is the end, and a session ticket (RFC 8446, 4.6.1) is no
        input. What is in a buffer around the Connection is known to that buffer alone.

        False is no promise. What the peer did may be under way still, and a machine that
        is gone says nothing; see *keepalive* of :func:`connection_scope`.

        Raises:
          anyio.BusyResourceError: a task is receiving or sending, or TLS is being
            started.
          RuntimeError: in a thread other than that of the event loop.
        """
        life = self._life
        check_thread(life.thread, "Connection.is_stale()")
        if life.cause is not None:
            return True
        if life.stream.busy:
            raise BusyResourceError("using")
        if any(buffer.buffer for buffer in life.buffers or ()):
            return True
        return life.stream.is_stale()

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

        Raises:
          RuntimeError: in a thread other than that of the event loop.
        """
        check_thread(self._life.thread, "Connection.abort()")
        self._reset(Cause.ABORTED)

    def detach(self) -> Any:
        """Let go of the connection, and hand the wrapped stream back: disarmed, open.

        For :func:`connection_scope` that is the stream it was given, armed still if
        another scope around this one owns it; for :func:`serve_tcp` an AnyIO
        :class:`~anyio.abc.SocketStream`. The caller closes it.

        Raises:
          anyio.BusyResourceError: a task is waiting in the connection.
          anyio.ClosedResourceError: the connection has ended.
          RuntimeError: in a thread other than that of the event loop; or
            :meth:`is_stale` has found input over TLS, which is to be received before,
            or a byte of it would be missing in the stream.
        """
        life = self._life
        check_thread(life.thread, "Connection.detach()")
        if life.cause is not None:
            raise ClosedResourceError
        if life.stream.busy:
            raise BusyResourceError("using")
        if self._lent is not None:
            # Only this scope lets go; the life that it shares goes on.
            self._life = Lifecycle(life.native, life.stream)
            self._life.detach()
            return self._lent
        stream = life.stream.release()
        life.detach()
        if isinstance(self._source, BufferedByteReceiveStream):
            put_under(self._source, stream)
            return self._source
        return stream

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
            exc = exception_leaving(exc_val, self._at_entry)
            self._at_entry = None
            await self._end(cause_of_exit(exc, self._finish_on))
        except BaseException as exc:
            self._end_after(exc)
            raise

    def _is_over(self) -> bool:
        return self._life.cause is not None

    def _forget_counts(self) -> None:
        for stream in (self._life.native, self._life.stream):
            stream.sent = stream.received = 0

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
