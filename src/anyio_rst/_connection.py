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
    :func:`serve_tcp`, :func:`connect_tcp` or :func:`scoped`. Receiving and sending work
    as in AnyIO, with these exceptions in addition:

    - :exc:`PeerReset` (an :exc:`anyio.BrokenResourceError`) when the peer has reset the
      connection, and for every receive after that;
    - :exc:`anyio.BrokenResourceError` from `send()` and `send_eof()` after a `send()`
      that was interrupted after some of its bytes;
    - :exc:`anyio.ClosedResourceError` after the verdict, and in tasks that were waiting
      in the connection when it fell.

    As a context manager, the connection ends when that block does, by the rules of
    :func:`connection_scope`.
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

        :meth:`Server.stop` ends the wait, and so do *timeout* seconds. Without a server
        only *timeout* does. Return then: the peer gets FIN, and nothing is logged. If a
        request has arrived, a receive in the block returns it all the same. The peer's
        FIN is :exc:`anyio.EndOfStream`, as always; *finish_on* makes that a clean end.

        Do not wait for the first request of a connection in here. It is on its way when
        the connection is accepted, and a server that stops may leave it without an
        answer.

        Raises:
          RuntimeError: from `with`, if the connection is idle already.
          TypeError, ValueError: *timeout* is no number of seconds.
        """
        if timeout is not None:
            check_seconds("timeout", timeout)
        return Idle(self._life, timeout)

    def is_stale(self) -> bool:
        """Whether the connection is known to be unusable for another request.

        For a connection in a pool that no task uses at the moment. Not a coroutine: it
        looks at what has arrived by now, waits for nothing and consumes nothing.

        True if the peer has finished, has reset the connection, or has sent something
        that would be taken for the answer to the next request. That includes the
        buffers that :func:`connection_scope` was given, but not a buffer around the
        Connection. Also true if the connection was lost, has ended here, was detached or
        torn, or if `send_eof()` was called.

        Over TLS a close_notify is the end, and a session ticket (RFC 8446, 4.6.1) is not
        input.

        False is no guarantee. The peer's end may still be under way, and a machine that
        is gone sends nothing; see *keepalive* of :func:`connection_scope`.

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

        What the body does afterwards cannot change the ending. If a send was cut short
        before, the connection is reset all the same. If a call is cancelled while the
        connection drains, the connection closes at once, even if another task called
        `aclose()` first.

        In a scope that is already cancelled, as with :func:`anyio.aclose_forcefully` or
        `finally: await conn.aclose()` in a cancelled handler, it resets with
        :attr:`Cause.CANCELLED`. Under a shield it finishes.
        """
        cause = Cause.CLOSED
        if current_effective_deadline() == -math.inf and not is_stopped(self._life):
            cause = Cause.CANCELLED
        await self._end(cause)
        await checkpoint()

    def abort(self) -> None:
        """Reset the connection now.

        Never blocks. May be called from any task of the event loop, and more than once.
        Tasks that wait in the connection get :exc:`anyio.ClosedResourceError`. If a FIN
        has already been sent, when the body returned or by `aclose()`, this only cuts
        the drain short.

        Raises:
          RuntimeError: in a thread other than that of the event loop.
        """
        check_thread(self._life.thread, "Connection.abort()")
        self._reset(Cause.ABORTED)

    def detach(self) -> Any:
        """Let go of the connection, and return the wrapped stream, disarmed and open.

        In a :func:`connection_scope`, that is the stream that the scope was given. It is
        still armed if another scope around this one owns it. In :func:`serve_tcp`, it is
        an AnyIO :class:`~anyio.abc.SocketStream`. The caller has to close it.

        Raises:
          anyio.BusyResourceError: a task is waiting in the connection.
          anyio.ClosedResourceError: the connection has ended.
          RuntimeError: in a thread other than that of the event loop; or
            :meth:`is_stale` has found input over TLS. Receive it first, because a byte
            of it would be missing in the stream.
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

        If a child or the body of the group fails, or the group is cancelled from outside,
        the connection is reset at that moment, and not after the other children have
        finished their shielded clean-up. To cancel the group itself, as one does to stop
        the other children, is not a failure. Neither are the exceptions of *finish_on*.
        """
        return ConnectionTaskGroup(self._life, self._reset, self._finish_on)

    @classmethod
    async def from_socket(cls, sock_or_fd: socket.socket | int) -> NoReturn:
        """Not supported, because a connection needs a scope to end with.

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
