"""TLS: a close_notify goes before a FIN, and not before an RST."""

from __future__ import annotations

import ssl
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from anyio import (
    BrokenResourceError,
    BusyResourceError,
    CancelScope,
    ClosedResourceError,
    EndOfStream,
    WouldBlock,
)
from anyio.lowlevel import checkpoint, checkpoint_if_cancelled
from anyio.streams.tls import TLSAttribute

from ._ending import TLSSession
from ._io import bytes_in
from ._origin import RECEIVE_SIZE
from ._peer import ConnectionLost, PeerClose
from ._takeover import trio_class
from ._tls_engines import AnyIOEngine, Transport, WrappingTLSStream, run_at_once

if TYPE_CHECKING:
    from ._native import NativeStream
    from ._tls_engines import Attributes, Engine


class SecureStream:
    """A TLS session over *native*: I/O, and an ending of its own before the FIN."""

    __slots__ = (
        "_ahead",
        "_broken",
        "_engine",
        "_native",
        "_receiving",
        "_sending",
        "_transport",
        "received",
        "sent",
        "session",
    )

    def __init__(self, native: NativeStream, engine: Engine | None = None) -> None:
        self._native = native
        self._transport = Transport(native)
        self._engine = engine
        # Until there is a session, every other use is refused.
        self._receiving = self._sending = engine is None
        # Bytes of the users, those before the session included.
        self.received: int = native.received
        self.sent: int = native.sent
        self._ahead = b""  # decrypted, and not received yet
        self._broken: tuple[str, BaseException] | None = None
        self.session: TLSSession | None = None
        if engine is not None:
            engine.set_transport(self._transport)
            self._note_session()

    @property
    def busy(self) -> bool:
        return self._receiving or self._sending

    @property
    def extra_attributes(self) -> Attributes:
        stream = self._native if self._engine is None else self._engine
        return stream.extra_attributes

    @property
    def given(self) -> object:
        """The stream of the session, as AnyIO or Trio knows it."""
        return None if self._engine is None else self._engine.stream

    def _note_session(self) -> None:
        """While it can tell: once it has ended or is broken, OpenSSL does not."""
        attributes = self.extra_attributes
        with suppress(Exception):  # Trio's before its handshake
            version = attributes[TLSAttribute.tls_version]()
            name, _, _ = attributes[TLSAttribute.cipher]()
            self.session = TLSSession(version, name)

    async def start(self, **options: Any) -> None:
        """The handshake, by `TLSStream.wrap(**options)`.

        Raises:
          ssl.SSLError: it failed. The peer has been sent the alert that says why.
          anyio.BrokenResourceError: the connection was lost.
        """
        transport = self._transport
        try:
            tls = await WrappingTLSStream.wrap(transport, **options)
        except ConnectionLost:
            raise
        except (BrokenResourceError, EndOfStream) as exc:
            when = "in" if transport.has_received else "before"
            raise ConnectionLost(f"the peer closed {when} the TLS handshake") from exc
        except ssl.SSLError:
            if transport.tls is not None:
                await self._send_alert(AnyIOEngine(transport.tls))
            raise
        finally:
            transport.tls = None  # else they refer to each other
        self._engine = AnyIOEngine(tls)
        self._note_session()
        self._receiving = self._sending = False

    async def receive(self, max_bytes: int = RECEIVE_SIZE) -> bytes:
        if max_bytes < 1:
            raise ValueError("max_bytes must be a positive integer")
        if self._receiving:
            raise BusyResourceError("reading from")
        self._receiving = True
        try:
            engine = cast("Engine", self._engine)
            try:
                data = await self._receive(engine, max_bytes)
                self._native.refuse_if_closed()
            except ClosedResourceError:
                await checkpoint_if_cancelled()  # which may be why it was closed
                raise
            if self.session is None:
                self._note_session()
            self.received += len(data)
            return data
        finally:
            self._receiving = False

    async def _receive(self, engine: Engine, max_bytes: int) -> bytes:
        try:
            await checkpoint()  # what is decrypted already comes without one
            self._refuse()
            data, self._ahead = self._ahead, b""
            return data or await engine.receive(max_bytes)
        except EndOfStream:
            self._native.look()
            raise
        except Exception as exc:
            told = await self._translated(exc, engine)
            raise told from told.__cause__ or exc.__cause__
        except BaseException as exc:
            if not self._native.prefers_input(exc):
                raise
            data = await self._receive_arrived(engine, max_bytes)
            if not data:
                raise
            return data

    async def _receive_arrived(self, engine: Engine, max_bytes: int) -> bytes:
        """What has arrived, without waiting for the peer; b"" at the end as well."""
        if self._broken is not None or self.session is None:
            return b""
        data, self._ahead = self._ahead, b""
        if data:
            return data
        self._transport.takes_what_is_there = True
        with CancelScope(shield=True), suppress(Exception):
            data = await engine.receive(max_bytes)
        self._transport.takes_what_is_there = False
        return data

    def is_stale(self) -> bool:
        """As that of :class:`NativeStream`.

        What only the session has to know, as a ticket of TLS 1.3, is no input (RFC 8446,
        4.6). It is told by reading on; the byte that this finds, if any, is kept.
        """
        native = self._native
        if native.has_finished() or self._broken is not None or self._ahead:
            return True
        if self.session is None:  # before the handshake any input is unasked
            return native.look()
        return run_at_once(self._look()) is not False or native.has_lost_peer()

    async def _look(self) -> bool:
        """Whether a first byte, or the end of the session, can be had without waiting."""
        engine = cast("Engine", self._engine)
        self._transport.takes_what_is_there = True
        try:
            self._ahead = await engine.first_byte()
        except WouldBlock:
            return False
        except EndOfStream:
            pass
        except Exception as exc:
            await self._translated(exc, engine)  # for those who receive
        finally:
            self._transport.takes_what_is_there = False
        return True

    async def send(self, item: bytes) -> None:
        if self._sending:
            raise BusyResourceError("writing to")
        self._sending = True
        try:
            engine = cast("Engine", self._engine)
            view = bytes_in(item)
            try:
                await checkpoint_if_cancelled()
                self._refuse()
                await self._send(engine, view)
            except ClosedResourceError:
                await checkpoint_if_cancelled()
                raise
            self.sent += len(view)
        finally:
            self._sending = False

    async def _send(self, engine: Engine, view: memoryview) -> None:
        try:
            await engine.handshake()
            if self.session is None:
                self._note_session()
            async with self._transport.sending:
                await self._transport.flush()
                await self._native.send_made(partial(self._encrypt, engine, view))
                await self._transport.flush()
        except EndOfStream:
            message = "the peer's FIN has ended the TLS session, in both directions"
            raise ConnectionLost(message) from None
        except Exception as exc:
            told = await self._translated(exc, engine)
            raise told from told.__cause__ or exc.__cause__

    async def _encrypt(self, engine: Engine, view: memoryview) -> bytes:
        self._transport.holds = True
        try:
            if view:
                await engine.encrypt(view)
        finally:
            self._transport.holds = False
        return await self._transport.take()

    async def handshake(self) -> None:
        """Do it, if it has not been done yet."""
        engine = cast("Engine", self._engine)
        await checkpoint()
        self._refuse()
        try:
            await engine.handshake()
        except Exception as exc:
            told = await self._translated(exc, engine)
            raise told from told.__cause__ or exc.__cause__
        if self.session is None:
            self._note_session()

    async def wait_writable(self) -> None:
        """As that of :class:`NativeStream`."""
        if self._sending:
            raise BusyResourceError("writing to")
        self._sending = True
        try:
            await checkpoint()
            self._refuse()
            async with self._transport.sending:
                await self._native.wait_writable()
                await self._transport.flush()  # what a receive has left to us
        finally:
            self._sending = False

    async def send_eof(self) -> None:
        if self._sending:
            raise BusyResourceError("writing to")
        await checkpoint()
        raise NotImplementedError("send_eof() is not supported over TLS")

    def _refuse(self) -> None:
        self._native.refuse_if_closed()
        if self._broken is not None:
            message, cause = self._broken
            raise ConnectionLost(message) from cause

    async def _translated(self, exc: Exception, engine: Engine) -> Exception:
        """What the failure of a call of the session's means; its cause stays."""
        if isinstance(exc, trio_class("ClosedResourceError")):
            return ClosedResourceError()
        cause = exc if isinstance(exc, ssl.SSLError) else exc.__cause__
        if not isinstance(cause, ssl.SSLError):
            if isinstance(exc, trio_class("BrokenResourceError")):
                return BrokenResourceError(str(exc))
            return exc
        if self._native.peer is PeerClose.FIN:
            message = "the peer's FIN came without a close_notify: something is missing"
        else:
            message = f"the TLS session is broken ({cause})"
            await self._send_alert(engine)
        self._broken = message, cause
        lost = ConnectionLost(message)
        lost.__cause__ = cause
        return lost

    async def _send_alert(self, engine: Engine) -> None:
        self._transport.holds = self._transport.is_over = True
        await engine.alert()
        self._native.send_now(await self._transport.take())

    async def send_fin(self) -> None:
        """As that of :class:`NativeStream`, behind a close_notify.

        A session that cannot be ended is reset: not everybody takes a FIN alone for the
        truncation that it is.
        """
        native = self._native
        native.refuse_users()
        engine = self._engine
        if engine is not None and self._broken is None:
            with CancelScope(shield=True), suppress(Exception):
                while self.busy:
                    await checkpoint()  # tasks that were woken are on their way out
                self._transport.holds = self._transport.is_over = True
                if not native.mid_send:
                    await engine.end()
                    await native.send_fin(await self._transport.take())
                    return
        native.mid_send = True  # the session's last words are missing
        native.reset()

    def release(self) -> object:
        """As that of :class:`NativeStream`.

        Raises:
          RuntimeError: a byte would be missing in the session that is handed back.
        """
        if self._ahead:
            raise RuntimeError(
                "is_stale() has found input and decrypted its first byte: receive it"
            )
        engine = cast("Engine", self._engine)
        self._native.send_now(self._transport.waiting)
        engine.set_transport(self._native.release())
        return engine.stream


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


# The contexts that are for one side only, and whether that is the server's.
_SIDES = {ssl.PROTOCOL_TLS_SERVER: True, ssl.PROTOCOL_TLS_CLIENT: False}
