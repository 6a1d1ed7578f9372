"""The states of a connection, from open to ended.

It is *open* until the verdict falls. An RST ends it in the same instant. After a FIN it
is *finishing* until the drain is over, and only then has *ended*. Nothing leads back,
and nothing that happens after the verdict changes it:

================  ==========================  =================================
event             open                        finishing
================  ==========================  =================================
verdict is FIN    send the FIN: finishing     wait for the end
verdict is RST    send the RST: ended         cut the drain short: ended
`detach()`        ended, the socket is open   `anyio.ClosedResourceError`
================  ==========================  =================================
"""

from __future__ import annotations

from contextlib import suppress
from threading import get_ident
from time import monotonic
from typing import TYPE_CHECKING
from weakref import WeakSet

from anyio import BrokenResourceError, CancelScope, ClosedResourceError, Event
from anyio.lowlevel import checkpoint

from ._ending import KIND_OF, Cause, CloseKind, Ending, cause_of_exit, verdict
from ._tls import SecureStream

if TYPE_CHECKING:
    from types import SimpleNamespace
    from typing import Any

    from anyio.streams.buffered import BufferedByteReceiveStream
    from outcome import Error, Value

    from ._idle import Stoppable
    from ._limits import Drain
    from ._native import NativeStream


class Lifecycle:
    """Shared by all :class:`Connection` objects on one connection.

    *native* is its TCP connection, and the record of it. *stream* is what carries the
    users' bytes: the same, or a TLS session over it.
    """

    __slots__ = (
        "_is_sending_fin",
        "_over",
        "_skips_drain",
        "buffers",
        "cause",
        "ending",
        "kind",
        "leaving",
        "native",
        "server",
        "state",
        "stream",
        "thread",
    )

    def __init__(
        self, native: NativeStream, stream: NativeStream | SecureStream | None = None
    ) -> None:
        self.native: NativeStream = native
        self.stream: NativeStream | SecureStream = native if stream is None else stream
        self.cause: Cause | None = None
        """The verdict, once it has fallen."""
        self.kind: CloseKind | None = None
        """What came of it."""
        self.leaving: tuple[Cause, Drain | None] | None = None
        """What it will be, while a wrapper closes itself because its scope is left."""
        self.ending: Ending | None = None
        self.buffers: WeakSet[BufferedByteReceiveStream] | None = None
        """The wrappers whose buffers can be seen."""
        self.state: SimpleNamespace | None = None
        """What users keep with the connection."""
        self.server: Stoppable | None = None
        """Who has accepted the connection."""
        self.thread: int = get_ident()
        """Where its event loop runs."""
        self._is_sending_fin = False
        self._skips_drain = False
        self._over: Event | None = None

    def add_buffer(self, buffer: BufferedByteReceiveStream) -> None:
        if self.buffers is None:
            self.buffers = WeakSet()
        self.buffers.add(buffer)

    async def start_tls(self, **options: Any) -> None:
        """A session for all who share the connection, who are refused until it stands.

        Raises:
          anyio.BrokenResourceError: plaintext is waiting in a buffer.
          ssl.SSLError, and what the connection raises: the handshake failed.
        """
        for buffer in self.buffers or ():
            if buffer.buffer:
                raise BrokenResourceError(
                    f"{len(buffer.buffer)} bytes of plaintext came before the TLS "
                    "handshake, and would look as if TLS had protected them"
                )
        session = SecureStream(self.native)
        self.stream = session
        await session.start(**options)

    def reset(self, cause: Cause, outcome: Value[object] | Error | None) -> None:
        """The verdict is RST, if none has fallen before. Synchronous."""
        if self.cause is None:
            self.cause = cause
        elif cause is Cause.CANCELLED and self._is_sending_fin:
            self._skips_drain = True  # which is about to be done, and is no waiting
            return
        self.close(outcome)

    async def finish(
        self, cause: Cause, outcome: Value[object] | Error | None, drain: Drain | None
    ) -> None:
        """The verdict is FIN. However this is left, the connection has ended then."""
        if self.cause is not None:
            try:
                await self.wait()
            finally:
                with CancelScope(shield=True):
                    while self._is_sending_fin:
                        await checkpoint()  # a TLS session needs some to end
                self.close(outcome)
            return
        if self.leaving is not None:
            cause, drain = self.leaving
        try:
            self.cause = cause
            self._is_sending_fin = True
            await self.stream.send_fin()
            self._is_sending_fin = False
            if drain is not None and not self._skips_drain:
                with suppress(ClosedResourceError):  # another task cut it short
                    await self.native.drain(drain)
        except BaseException as exc:
            if not (self.native.fin_is_out() or self.native.mid_send):
                self.cause = cause_of_exit(exc, ())  # a signal handler's
            raise
        finally:
            self._is_sending_fin = False
            self.close(outcome)

    def close(self, outcome: Value[object] | Error | None) -> None:
        """Finishing or not: this is the end.

        It may be interrupted anywhere by an exception of a signal handler, and is
        completed then by another call.
        """
        if self.ending is None:
            assert self.cause is not None
            native = self.native
            if KIND_OF[self.cause] is CloseKind.FIN:
                native.close()
                self.kind = CloseKind.FIN if native.fin_has_left else CloseKind.RST
                if not native.fin_has_left:
                    # Its last words, a close_notify, were cut short; or it was gone.
                    self.cause = verdict(self.cause, torn=native.mid_send)
            else:
                if self.kind is None:
                    both = native.both_finished()
                    self.kind = CloseKind.FIN if both else CloseKind.RST
                native.reset()
            self._end(self.kind, outcome)
        if self._over is not None:
            self._over.set()

    def detach(self) -> None:
        self.cause = Cause.DETACHED
        self._end(CloseKind.DETACHED, None)

    async def wait(self) -> None:
        """Until the end."""
        if self.ending is None:
            if self._over is None:
                self._over = Event()
            await self._over.wait()

    def _end(self, kind: CloseKind, outcome: Value[object] | Error | None) -> None:
        assert self.cause is not None
        native = self.native
        self.ending = Ending(
            kind=kind,
            cause=self.cause,
            outcome=outcome,
            peer=native.peer,
            remote_address=native.remote_address,
            discarded=native.discarded,
            unacknowledged=native.unacknowledged,
            fin_sent_before_reset=kind is CloseKind.RST and native.fin_has_left,
            duration=monotonic() - native.began,
            sent=self.stream.sent,
            received=self.stream.received,
            tls=self.stream.session,
        )
