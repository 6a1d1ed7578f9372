"""A network backend for httpcore on our connections, and how they end."""

from __future__ import annotations

import math
import sys
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import anyio
import httpcore
from anyio import BrokenResourceError, ClosedResourceError, EndOfStream
from anyio.abc import SocketAttribute
from anyio.streams.tls import TLSAttribute, TLSStream

from ._connect import connect_tcp
from ._ending import exception_leaving
from ._limits import Drain

if TYPE_CHECKING:
    import socket
    import ssl
    from collections.abc import Iterable, Iterator, Mapping

    from ._connection import Connection

# The client has all that it asked for: it need not wait for the server's FIN, and httpx
# does not. What has arrived unasked must not make an RST of ours.
NO_WAIT = Drain(timeout=0)


@contextmanager
def translated(errors: Mapping[type[Exception], type[Exception]]) -> Iterator[None]:
    try:
        yield
    except Exception as exc:
        for theirs, ours in errors.items():
            if isinstance(exc, theirs):
                raise ours(str(exc)) from exc
        raise


class Exchange:
    """A request and its response, and the connections that it has used.

    It is more than one where a server refuses a request on the first.
    """

    def __init__(self) -> None:
        # What the event loop calls back has the context, and in it the exchange: that
        # must not keep a connection which everybody else has forgotten.
        self._streams: WeakSet[NetworkStream] = WeakSet()

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """What is sent in here is sent for this exchange."""
        before = _exchange.get()
        _exchange.set(self)
        try:
            yield
        finally:
            _exchange.set(before)

    def use(self, stream: NetworkStream) -> None:
        if stream not in self._streams:
            self._streams.add(stream)
            stream.unfinished += 1

    def finish(self) -> None:
        for stream in self._streams:
            stream.unfinished -= 1
        self._streams.clear()

    def hand_over(self) -> None:
        """HTTP is over: what goes on, another protocol, whoever closes has to know."""
        for stream in self._streams:
            stream.change_owner()
        self.finish()

    def reset(self) -> None:
        """Reset what is of no use to others: an HTTP/1.1 connection after a failure."""
        for stream in self._streams:
            tls = stream.get_extra_info("ssl_object")
            if tls is None or tls.selected_alpn_protocol() != "h2":
                stream.connection.abort()


_exchange: ContextVar[Exchange | None] = ContextVar("_exchange", default=None)


class NetworkBackend(httpcore.AsyncNetworkBackend):
    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        with translated(_CONNECT_ERRORS), anyio.fail_after(timeout):
            scope = connect_tcp(host, port, local_host=local_address, drain=NO_WAIT)
            stream = NetworkStream(await scope.__aenter__())
            for option in socket_options or ():
                stream.sock.setsockopt(*option)
        return stream

    async def sleep(self, seconds: float) -> None:
        await anyio.sleep(seconds)


class NetworkStream(httpcore.AsyncNetworkStream):
    """One connection. Forgotten, it is reset."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.unfinished = 0  # exchanges
        self._stream: Connection | TLSStream = connection
        self._is_ours = True
        self._at_change: BaseException | None = None
        self._used()

    @property
    def sock(self) -> socket.socket:
        return self.connection._life.native._sock

    def _used(self) -> None:
        exchange = _exchange.get()
        if exchange is not None:
            exchange.use(self)

    def change_owner(self) -> None:
        self._is_ours = False
        self._at_change = sys.exc_info()[1]

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        with translated(_READ_ERRORS), anyio.fail_after(timeout):
            try:
                return await self._stream.receive(max_bytes)
            except EndOfStream:
                return b""

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._used()
        if not buffer:
            return
        with translated(_WRITE_ERRORS), anyio.fail_after(timeout):
            try:
                await self._stream.send(buffer)
            except BaseException:
                self.unfinished += 1  # for good, though a response may come
                raise

    async def aclose(self) -> None:
        if self.unfinished or not (self._is_ours or self._is_success()):
            self.connection.abort()
        await self.connection.aclose()  # waits for nothing; httpcore shields it

    def _is_success(self) -> bool:
        """Whether whoever closes it now is not just giving up."""
        is_cancelled = anyio.current_effective_deadline() == -math.inf
        return not is_cancelled and exception_leaving(None, self._at_change) is None

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.AsyncNetworkStream:
        with translated(_CONNECT_ERRORS), anyio.fail_after(timeout):
            if self.get_extra_info("ssl_object") is None:
                await self.connection.start_tls(
                    ssl_context, server_side=False, hostname=server_hostname
                )
            else:
                await self._start_inner_tls(ssl_context, server_hostname)
        return self

    async def _start_inner_tls(
        self, ssl_context: ssl.SSLContext, hostname: str | None
    ) -> None:
        """A session through the one with a proxy."""
        try:
            self._stream = await TLSStream.wrap(
                self.connection,
                server_side=False,
                hostname=hostname,
                ssl_context=ssl_context,
                standard_compatible=False,  # else its end would wait for the server's
            )
        except BaseException:
            self.connection.abort()
            raise

    def get_extra_info(self, info: str) -> Any:
        if info == "connection":
            return self.connection
        if info == "is_readable":
            return self.connection.is_stale()
        if info in _ATTRIBUTES:
            return self._stream.extra(_ATTRIBUTES[info], None)
        return None


_ATTRIBUTES: dict[str, Any] = {
    "ssl_object": TLSAttribute.ssl_object,
    "client_addr": SocketAttribute.local_address,
    "server_addr": SocketAttribute.remote_address,
    "socket": SocketAttribute.raw_socket,
}


def _errors(
    timeout: type[Exception], error: type[Exception]
) -> dict[type[Exception], type[Exception]]:
    """What the failures of a connection are to httpcore. An SSLError is an OSError."""
    failures = OSError, BrokenResourceError, ClosedResourceError, EndOfStream
    return {TimeoutError: timeout, **dict.fromkeys(failures, error)}


_CONNECT_ERRORS = _errors(httpcore.ConnectTimeout, httpcore.ConnectError)
_READ_ERRORS = _errors(httpcore.ReadTimeout, httpcore.ReadError)
_WRITE_ERRORS = _errors(httpcore.WriteTimeout, httpcore.WriteError)
