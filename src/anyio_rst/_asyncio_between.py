"""The reader and writer of asyncio's streams, between the user and the transport.

The transport goes on doing the I/O. What is here hears what becomes of it, and hands the
endings that its user asks for on to whoever decides.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol, cast

from ._forking import own
from ._origin import forgets_at_once

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ._limits import Drain
    from ._native import NativeStream


class Decider(Protocol):
    """Who decides how the connection ends."""

    is_closing: bool

    def close(self) -> None: ...
    async def wait_closed(self) -> None: ...
    def abort(self) -> None: ...
    def lost(self) -> None: ...


class Between(asyncio.Protocol):
    """Between the transport and asyncio's own protocol, to hear what the one says.

    It also is what a :class:`NativeStream` was taken over from.
    """

    shares_socket = False

    def __init__(self, decider: Decider, writer: asyncio.StreamWriter) -> None:
        self.transport = cast("asyncio.Transport", writer.transport)
        self.protocol = cast(
            "asyncio.StreamReaderProtocol", self.transport.get_protocol()
        )
        self.received = 0  # bytes, after decryption
        self.has_ended = False  # the input
        self.is_closing = False  # by us
        self.is_reset = False
        self.is_at_rest = False  # as of an Origin: known at the close
        self._forgets = forgets_at_once()
        self.lost = asyncio.Event()
        self._loss: BaseException | None = None
        self._decider = decider
        self._may_write = asyncio.Event()
        self._discarding: tuple[NativeStream, Drain] | None = None
        self.transport.set_protocol(self)
        own(self)

    def move(self, transport: asyncio.WriteTransport) -> None:
        """Another transport has been put over the one that was known."""
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_protocol(self)

    def waiting(self) -> int:
        """Bytes that the transport has to send still."""
        if self.lost.is_set() or self.is_closing:
            return 0
        try:
            return self.transport.get_write_buffer_size()
        except AttributeError:  # of a TLS transport of asyncio's that was closed twice
            return 0

    def is_over(self) -> bool:
        """Whether what is written is dropped."""
        return self.lost.is_set() or self.transport.is_closing()

    async def sent_all(self) -> None:
        if self.waiting():
            self._may_write.clear()
            self.transport.set_write_buffer_limits(0)
            await self._may_write.wait()

    def discard(self, native: NativeStream, limits: Drain) -> None:
        """Let what comes be discarded from now on."""
        self._discarding = native, limits
        if not self.is_over():
            self.transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        if self._discarding is None:
            self.received += len(data)
            self.protocol.data_received(data)
            return
        native, limits = self._discarding
        native.discarded += len(data)
        if limits.max_bytes is not None and native.discarded >= limits.max_bytes:
            self.transport.pause_reading()

    def eof_received(self) -> bool | None:
        self.has_ended = True
        return self.protocol.eof_received()

    def pause_writing(self) -> None:
        self.protocol.pause_writing()

    def resume_writing(self) -> None:
        self._may_write.set()
        self.protocol.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._loss = exc
        self.lost.set()
        self._may_write.set()
        if not self.is_closing:
            self._decider.lost()
        if exc is None and self.is_reset:  # which is no end of the input
            exc = ConnectionAbortedError("the connection was reset here")
        self.protocol.connection_lost(exc)

    def loss(self) -> BaseException | None:
        """As of an :class:`Origin`."""
        return self._loss

    def close_tls(self) -> None:
        """Let the session send its close_notify."""
        self.is_closing = True
        if not self.is_over():
            self.transport.close()

    def fileno(self) -> int:
        sock = self.transport.get_extra_info("socket")
        return -1 if sock is None else int(sock.fileno())

    def close(self) -> None:
        """Let go of the socket. What is not sent by now is dropped."""
        # Below a TLS session it is not known what is left to send.
        has_sent_all = not (self.transport.get_extra_info("ssl_object") or self.waiting())
        self.is_at_rest = self._forgets or has_sent_all
        self.is_closing = True
        with suppress(RuntimeError):  # the event loop is closed
            self.transport.abort()


class Writer(asyncio.StreamWriter):
    """asyncio's, whose endings are those of the scope."""

    def __init__(
        self,
        decider: Decider,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        between: Between,
    ) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(writer.transport, between.protocol, reader, loop)
        self._between = between
        self._decider = decider
        self.written = 0  # bytes
        self.has_dropped = False  # what was written when it could not be sent any more

    @property
    def transport(self) -> asyncio.WriteTransport:
        return cast(
            "asyncio.WriteTransport", _Transport(self._decider, super().transport)
        )

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._decider.is_closing:
            return
        if self._between.is_over():
            self.has_dropped = self.has_dropped or bool(len(data))
        super().write(data)
        self.written += memoryview(data).nbytes

    def writelines(self, data: Iterable[bytes | bytearray | memoryview]) -> None:
        self.write(b"".join(data))

    def is_closing(self) -> bool:
        return self._decider.is_closing or self._between.is_over()

    def close(self) -> None:
        self._decider.close()

    async def wait_closed(self) -> None:
        await self._decider.wait_closed()

    if sys.version_info >= (3, 11):

        async def start_tls(self, *args: Any, **options: Any) -> None:
            await super().start_tls(*args, **options)
            self._between.move(super().transport)


class _Transport:
    """The transport for whoever wants to have it: all but its endings is its own."""

    def __init__(self, decider: Decider, transport: asyncio.WriteTransport) -> None:
        self._decider = decider
        self._transport = transport

    def abort(self) -> None:
        self._decider.abort()

    def close(self) -> None:
        self._decider.close()

    def is_closing(self) -> bool:
        return self._decider.is_closing or self._transport.is_closing()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
