"""TLS sessions of AnyIO and Trio, and the transport between them and a connection.

The sessions are AnyIO's `TLSStream` and Trio's `SSLStream`. Their transport keeps what
they send until it is known that the socket takes it, so that a session is not broken by
a send that is interrupted before its first byte, or that fails while input waits.
"""

from __future__ import annotations

import ssl
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from anyio import BrokenResourceError, CancelScope, EndOfStream, Lock
from anyio.abc import ByteStream
from anyio.lowlevel import checkpoint
from anyio.streams.tls import TLSAttribute, TLSStream
from outcome import Value

from ._origin import RECEIVE_SIZE
from ._peer import ConnectionLost
from ._takeover import trio_class

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping
    from typing import TypeAlias

    import trio

    from ._native import NativeStream

    Attributes: TypeAlias = Mapping[Any, Callable[[], Any]]
    TrioTLS: TypeAlias = "trio.SSLStream[trio.SocketStream]"


T = TypeVar("T")

# Of a session of Trio's that reads what has arrived: one for each read, of one record or
# more, and most of them end it.
MOST_CHECKPOINTS = 64


class Engine(Protocol):
    """A TLS session over a :class:`Transport`."""

    @property
    def stream(self) -> object:
        """The stream that users know."""

    @property
    def extra_attributes(self) -> Attributes: ...

    async def handshake(self) -> None:
        """Do it, if it has not been done yet."""

    async def receive(self, max_bytes: int) -> bytes: ...

    # Received from a transport that waits for nothing, for run_at_once().
    async def first_byte(self) -> bytes: ...

    async def encrypt(self, item: memoryview) -> None:
        """Give the transport what *item* becomes on the wire. Not to be cancelled."""

    async def end(self) -> None:
        """Give the transport the close_notify (RFC 8446, 6.1), without waiting.

        Raises:
          Exception: there is no session that could be ended.
        """

    async def alert(self) -> None:
        """Give the transport the alert that says why the session broke, if it can."""

    def set_transport(self, transport: object) -> None: ...


class Transport(ByteStream):
    """What a session sends to and receives from: *native*, and what waits to be sent."""

    def __init__(self, native: NativeStream) -> None:
        self.native = native
        self.tls: TLSStream | None = None
        self.waiting = b""  # to be sent
        self.holds = False  # sends nothing now
        self.is_over = False  # has nothing more to receive
        self.has_received = False
        self.takes_what_is_there = False  # waits for nothing
        self.sending = Lock(fast_acquire=True)

    @property
    def extra_attributes(self) -> Attributes:
        return self.native.extra_attributes

    async def receive(self, max_bytes: int = RECEIVE_SIZE) -> bytes:
        if self.is_over:
            raise EndOfStream
        if self.takes_what_is_there:
            return self.native.receive_nowait(max_bytes)
        data = await self.native.receive(max_bytes)
        self.has_received = True
        return data

    async def send(self, item: bytes) -> None:
        self.waiting += item
        # Who is sending already sends this as well: a receive must not wait for a peer
        # that is waiting for it.
        busy = self.holds or self.takes_what_is_there or self.sending.locked()
        if not busy:
            # A loss is told by the receive that follows, behind what has arrived.
            with suppress(ConnectionLost):
                async with self.sending:
                    await self.flush()

    async def flush(self) -> None:
        while self.waiting:
            await self.native.send_made(self.take)

    async def take(self) -> bytes:
        data, self.waiting = self.waiting, b""
        return data

    async def send_eof(self) -> None:
        raise NotImplementedError("send_eof() is not supported over TLS")

    async def aclose(self) -> None:
        """The end of the connection is not the session's to decide."""
        await checkpoint()

    # The same for Trio, where an end is no exception.

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        try:
            return await self.receive(max_bytes or RECEIVE_SIZE)
        except EndOfStream:
            if self.is_over:
                raise
            return b""

    async def send_all(self, data: bytes) -> None:
        await self.send(data)

    async def wait_send_all_might_not_block(self) -> None:
        await checkpoint()


def _succeed() -> None:
    pass


class AnyIOEngine:
    """AnyIO's `TLSStream`."""

    def __init__(self, stream: TLSStream) -> None:
        self.stream = stream

    @property
    def extra_attributes(self) -> Attributes:
        return self.stream.extra_attributes

    async def handshake(self) -> None:
        pass  # there is no TLSStream without one

    async def receive(self, max_bytes: int) -> bytes:
        return await self.stream.receive(max_bytes)

    async def first_byte(self) -> bytes:
        return await self.receive(1)

    async def encrypt(self, item: memoryview) -> None:
        await self.stream.send(cast("bytes", item))

    async def end(self) -> None:
        if not self.stream.standard_compatible:
            return
        ssl_object = self.stream.extra(TLSAttribute.ssl_object)
        # OpenSSL refuses to end a session in which data waits to be read. As much waits
        # as the transport has given it at once.
        with suppress(ssl.SSLWantReadError):
            while ssl_object.read(RECEIVE_SIZE):
                pass
        # It sends the close_notify, and waits for the peer's, which the transport says
        # will not come: the drain sees to that.
        try:
            await self.stream.unwrap()
        except BrokenResourceError as exc:
            if not isinstance(exc.__cause__, ssl.SSLError):
                raise

    async def alert(self) -> None:
        # The stream sends what OpenSSL has written when a call of it has succeeded.
        ssl_object = self.stream.extra(TLSAttribute.ssl_object)
        with suppress(AttributeError, BrokenResourceError):
            ssl_object.unwrap = _succeed  # type: ignore[method-assign]
            await self.stream.unwrap()

    def set_transport(self, transport: object) -> None:
        self.stream.transport_stream = cast("ByteStream", transport)


class TrioEngine:
    """Trio's `SSLStream`."""

    def __init__(self, stream: TrioTLS) -> None:
        self.stream = stream
        self._has_ended = False
        self._transport = cast("Transport", None)

    @property
    def extra_attributes(self) -> Attributes:
        tls: Any = self.stream
        attributes: dict[Any, Callable[[], Any]] = {
            TLSAttribute.alpn_protocol: lambda: tls.selected_alpn_protocol(),
            TLSAttribute.cipher: lambda: tls.cipher(),
            TLSAttribute.peer_certificate_binary: lambda: tls.getpeercert(True),
            TLSAttribute.server_side: lambda: tls.server_side,
            TLSAttribute.tls_version: lambda: tls.version(),
        }
        return {**self._transport.extra_attributes, **attributes}

    async def handshake(self) -> None:
        await self.stream.do_handshake()

    async def receive(self, max_bytes: int) -> bytes:
        data = b"" if self._has_ended else await self.stream.receive_some(max_bytes)
        if not data:
            self._has_ended = True
            raise EndOfStream
        return bytes(data)

    async def first_byte(self) -> bytes:
        data = b""
        with CancelScope(shield=True):  # it looks whether it is cancelled
            data = await self.receive(1)
        return data  # noqa: RET504 - to Mypy the scope may swallow an exception

    async def encrypt(self, item: memoryview) -> None:
        with CancelScope(shield=True):  # its lock has a checkpoint
            await self.stream.send_all(item)

    async def end(self) -> None:
        self.stream.version()  # NeedHandshakeError, if there was none
        if not self._has_ended:
            await self.stream.do_handshake()  # BrokenResourceError, if it is broken
            # What is decrypted, or only has to be, would keep OpenSSL from ending it.
            with suppress(EndOfStream):
                while await self.stream.receive_some(RECEIVE_SIZE):
                    pass
        await self.stream.aclose()

    async def alert(self) -> None:
        pass  # it keeps that to itself

    def set_transport(self, transport: object) -> None:
        self._transport = cast("Transport", transport)
        self.stream.transport_stream = cast("trio.SocketStream", transport)


class WrappingTLSStream(TLSStream):
    """Known to its transport before the handshake, which may fail."""

    def __init__(self, transport_stream: Transport, **rest: Any) -> None:
        super().__init__(transport_stream, **rest)
        transport_stream.tls = self


def run_at_once(coroutine: Coroutine[Any, Any, T]) -> T | None:
    """The result of *coroutine*, which waits for nothing; None if it does not end.

    AnyIO's session has no checkpoint then. Those of Trio's, for the locks that it takes,
    are passed with what Trio's event loop answers there.
    """
    try:
        coroutine.send(None)
        for _ in range(MOST_CHECKPOINTS):
            coroutine.send(Value(None))
    except StopIteration as stop:
        result: T = stop.value
        return result
    finally:
        coroutine.close()
    return None


def engine_of(stream: object) -> tuple[Engine, object] | None:
    """What runs the TLS session *stream*, and the stream under it; None if it is none.

    Raises:
      RuntimeError: it is in another scope already.
    """
    engine: Engine
    below: object
    if isinstance(stream, TLSStream):
        engine, below = AnyIOEngine(stream), stream.transport_stream
    elif isinstance(stream, trio_class("SSLStream")):
        trio_tls = cast("TrioTLS", stream)
        engine, below = TrioEngine(trio_tls), trio_tls.transport_stream
    else:
        return None
    if isinstance(below, Transport):
        raise RuntimeError(
            f"the {type(stream).__qualname__} is in another connection_scope() already; "
            "pass its Connection to a nested scope"
        )
    return engine, below
