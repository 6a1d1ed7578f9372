"""TLS: a FIN is preceded by a close_notify, and an RST is not.

AnyIO's `TLSStream` does the TLS.
"""

from __future__ import annotations

import ssl
from contextlib import suppress
from typing import TYPE_CHECKING, cast

from anyio import BrokenResourceError, CancelScope, ClosedResourceError, EndOfStream
from anyio.abc import ByteStream
from anyio.lowlevel import checkpoint
from anyio.streams.buffered import BufferedByteReceiveStream
from anyio.streams.tls import TLSAttribute, TLSStream

from ._foreign import ForeignStream, TrioStream, foreign, trio_class
from ._stream import RECEIVE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    import trio

    from ._drain import Drain
    from ._foreign import TrioTLS
    from ._stream import EndableStream


class SecureStream(ForeignStream):
    """The I/O of *stream*, a `TLSStream` or a wrapper around it, and the ending of
    *under*, which carries the encrypted bytes, behind a close_notify.
    """

    def __init__(
        self, stream: ByteStream, original: object, tls: TLSStream, under: EndableStream
    ) -> None:
        super().__init__(stream, original, stream.extra_attributes)
        self.remote_address = under.remote_address
        self._tls = tls
        self._under = under

    async def _send_eof(self) -> None:
        await self._stream.send_eof()  # says that it cannot

    def arm(self) -> None:
        self._under.arm()

    def reset(self) -> None:
        self._closed = True
        self._under.reset()
        self._copy()

    async def send_fin(self, last: bytes = b"") -> None:
        self._closed = True
        close_notify = await self._close_notify()
        if close_notify:
            await self._under.send_fin(close_notify + last)
            self._copy()
        else:  # not everybody takes a FIN alone for the truncation that it is
            self._under.mid_send = True
            self._under.reset()
            self._copy()

    async def _close_notify(self) -> bytes:
        """What ends our side of the session (RFC 8446, 6.1); nothing if it is broken.

        What another task is about to receive is lost. Nothing here waits for the peer.
        """
        # OpenSSL refuses to end a session in which data waits to be read.
        with suppress(ssl.SSLError):
            while self._tls.extra(TLSAttribute.ssl_object).read(65536):
                pass
        # unwrap() sends it, and then waits for the peer's, which is left to the drain.
        paper = _Paper()
        self._tls.transport_stream = paper
        with suppress(Exception):
            await self._tls.unwrap()
        return paper.written

    async def drain(self, limits: Drain) -> None:
        try:
            await self._under.drain(limits)
        finally:
            self._copy()

    def close(self) -> None:
        self._under.close()
        self._copy()

    def release(self) -> object:
        self._under.release()
        return self._original

    def _copy(self) -> None:
        self.peer = self._under.peer
        self.eof_sent = self._under.eof_sent
        self.mid_send = self._under.mid_send
        self.discarded = self._under.discarded
        self.unacknowledged = self._under.unacknowledged


class SecureTrioStream(SecureStream):
    """The same over *trio_tls*, a `trio.SSLStream`."""

    def __init__(
        self, stream: TrioStream, trio_tls: TrioTLS, under: EndableStream
    ) -> None:
        ForeignStream.__init__(self, stream, trio_tls, stream.extra_attributes)
        self._trio_tls = trio_tls
        self._under = under
        self._reading: CancelScope | None = None

    async def receive(self, max_bytes: int = RECEIVE_SIZE) -> bytes:
        with CancelScope() as self._reading:
            return await super().receive(max_bytes)
        raise ClosedResourceError  # interrupted by _close_notify()

    async def _close_notify(self) -> bytes:
        paper = _Paper()
        self._trio_tls.transport_stream = cast("trio.SocketStream", paper)
        with CancelScope(shield=True):
            if self._reading is not None:
                self._reading.cancel()
            while self._receiving:
                await checkpoint()
            with suppress(Exception):
                while await self._trio_tls.receive_some(65536):
                    pass
            with suppress(Exception):
                await self._trio_tls.unwrap()
        return paper.written


def adopt(stream: object) -> tuple[ForeignStream, Mapping[Any, Callable[[], Any]]]:
    """*stream*, checked, with what it takes to end it, and its attributes.

    Raises:
      TypeError, anyio.ClosedResourceError, RuntimeError: see :func:`foreign`.
    """
    tls = stream
    while isinstance(tls, BufferedByteReceiveStream):
        tls = tls.receive_stream
    if isinstance(tls, TLSStream) and isinstance(stream, ByteStream):
        under, attributes = foreign(tls.transport_stream)
        return SecureStream(stream, stream, tls, under), attributes
    if isinstance(stream, trio_class("SSLStream")):
        trio_tls = cast("TrioTLS", stream)
        below = trio_tls.transport_stream
        under, attributes = foreign(below)
        secure = SecureTrioStream(TrioStream(trio_tls, below), trio_tls, under)
        return secure, attributes
    return foreign(stream)


def check_tls(
    ssl_context: ssl.SSLContext | None, server_side: bool | None, hostname: str | None
) -> bool:
    """Whether these arguments are for the server's side.

    Raises:
      TypeError, ValueError: they do not fit each other.
    """
    given: object = ssl_context
    if given is not None and not isinstance(given, ssl.SSLContext):
        raise TypeError(f"ssl_context must be an ssl.SSLContext or None, not {given!r}")
    side = None
    if ssl_context is not None:
        side = _SIDES.get(ssl_context.protocol)
    if server_side is None:
        server_side = hostname is None if side is None else side
    if side is not None and side is not server_side:
        wrong, right = ("server", "client") if side else ("client", "server")
        raise ValueError(f"ssl_context is for the {wrong}'s side; this is the {right}'s")
    if server_side:
        if ssl_context is None:
            raise TypeError("the server's side of TLS needs an ssl_context")
    elif hostname is None and (ssl_context is None or ssl_context.check_hostname):
        raise ValueError("the client's side of TLS needs the hostname to check")
    return server_side


async def handshake(
    under: EndableStream,
    *,
    ssl_context: ssl.SSLContext | None,
    server_side: bool,
    hostname: str | None,
) -> SecureStream:
    """A TLS session over *under*.

    Raises:
      anyio.BrokenResourceError: plaintext is waiting in a buffer.
      ssl.SSLError, and what *under* raises: the handshake failed.
    """
    if under.buffered:
        raise BrokenResourceError(
            f"{under.buffered} bytes of plaintext came before the TLS handshake, and "
            "would be taken for a part of what it protects"
        )
    tls = await TLSStream.wrap(
        under, server_side=server_side, hostname=hostname, ssl_context=ssl_context
    )
    return SecureStream(tls, tls, tls, under)


# The contexts that are for one side only, and whether that is the server's.
_SIDES = {ssl.PROTOCOL_TLS_SERVER: True, ssl.PROTOCOL_TLS_CLIENT: False}


class _Paper(ByteStream):
    """A transport that keeps what is sent, and has nothing to be received."""

    def __init__(self) -> None:
        self.written = b""

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        return {}

    async def receive(self, max_bytes: int = 65536) -> bytes:
        raise EndOfStream

    receive_some = receive  # as Trio calls it; there it leaves the session as it is

    async def send(self, item: bytes) -> None:
        self.written += item

    send_all = send

    async def send_eof(self) -> None: ...

    async def aclose(self) -> None: ...
