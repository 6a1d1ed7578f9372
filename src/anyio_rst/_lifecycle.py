"""A connection's way from open to ended.

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
from typing import TYPE_CHECKING

from anyio import ClosedResourceError, Event

from ._ending import Cause, CloseKind, Ending, verdict

if TYPE_CHECKING:
    from outcome import Error, Value

    from ._drain import Drain
    from ._stream import EndableStream


class Lifecycle:
    """Shared by all :class:`Connection` objects on one connection."""

    __slots__ = ("_over", "cause", "ending", "stream")

    def __init__(self, stream: EndableStream) -> None:
        self.cause: Cause | None = None
        """The verdict, once it has fallen."""
        self.ending: Ending | None = None
        self.stream: EndableStream = stream
        self._over: Event | None = None

    @property
    def is_open(self) -> bool:
        return self.cause is None

    @property
    def torn(self) -> bool:
        return self.stream.mid_send

    def reset(self, cause: Cause, outcome: Value[object] | Error | None) -> None:
        """The verdict is RST. Synchronous."""
        if self.cause is None:
            self.cause = cause
            fin_sent = self.stream.eof_sent
            self.stream.reset()
            self._end(CloseKind.RST, outcome, fin_sent_before_reset=fin_sent)
        else:
            self.cut_short(outcome)

    async def finish(
        self, cause: Cause, outcome: Value[object] | Error | None, drain: Drain | None
    ) -> None:
        """The verdict is FIN. However this is left, the connection has ended then."""
        if self.cause is not None:
            try:
                await self.wait()
            finally:
                self.cut_short(outcome)
            return
        self.cause = cause
        await self.stream.send_fin()
        try:
            if drain is not None:
                with suppress(ClosedResourceError):  # another task cut it short
                    await self.stream.drain(drain)
        finally:
            self.cut_short(outcome)

    def cut_short(self, outcome: Value[object] | Error | None) -> None:
        """Finishing or not: this is the end."""
        if self.ending is None:
            self.stream.close()
            if self.stream.eof_sent:
                self._end(CloseKind.FIN, outcome)
            else:
                assert self.cause is not None
                # Its last words, a close_notify, were cut short; or it was gone before.
                self.cause = verdict(self.cause, torn=self.stream.mid_send)
                self._end(CloseKind.RST, outcome)

    def detach(self) -> None:
        self.cause = Cause.DETACHED
        self._end(CloseKind.DETACHED, None)

    async def wait(self) -> None:
        """Until the end."""
        if self.ending is None:
            if self._over is None:
                self._over = Event()
            await self._over.wait()

    def _end(
        self,
        kind: CloseKind,
        outcome: Value[object] | Error | None,
        *,
        fin_sent_before_reset: bool = False,
    ) -> None:
        assert self.cause is not None
        self.ending = Ending(
            kind=kind,
            cause=self.cause,
            outcome=outcome,
            peer=self.stream.peer,
            remote_address=self.stream.remote_address,
            discarded=self.stream.discarded,
            unacknowledged=self.stream.unacknowledged,
            fin_sent_before_reset=fin_sent_before_reset,
        )
        if self._over is not None:
            self._over.set()
