"""Truthful endings for httpx.

::

    async with httpx.AsyncClient(transport=AsyncHTTPTransport()) as client:
        ...

An exchange is finished when all of the request was sent and httpx has read the response
to its end. A connection all of whose exchanges are finished ends with FIN, any other with
RST: a cancelled or failed upload, a download that is given up.
"""

from __future__ import annotations

import math
import ssl
import sys
from collections.abc import AsyncIterable
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import anyio
import httpcore
import httpx
from anyio.abc import SocketAttribute
from anyio.streams.tls import TLSAttribute, TLSStream

from . import _sockets
from ._connect import connect_tcp
from ._ending import left_by
from ._limits import Drain

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Iterable, Iterator, Mapping

    from ._connection import Connection

__all__ = ["AsyncHTTPTransport"]

# The client has all that it asked for: it need not wait for the server's FIN, and httpx
# does not. What has arrived unasked must not make an RST of ours.
NO_WAIT = Drain(timeout=0)

# Those of httpx.AsyncHTTPTransport.
LIMITS = httpx.Limits(max_connections=100, max_keepalive_connections=20)


class AsyncHTTPTransport(httpx.AsyncBaseTransport):
    """:class:`httpx.AsyncHTTPTransport`, on connections that end truthfully.

    ::

        httpx.AsyncClient(transport=AsyncHTTPTransport(http2=True))

    The pool, the protocols and the proxies are those of httpcore. `AsyncClient` ignores
    its own `verify`, `cert`, `http1`, `http2`, `limits` and the proxies of the
    environment when it is given a transport: they are arguments of this one.

    `response.extensions["network_stream"].get_extra_info("connection")` is the
    :class:`~anyio_rst.Connection`, whose `ending` tells how it ended.

    Args:
      verify, cert, trust_env, http1, http2, limits, proxy, local_address, retries,
        socket_options: those of :class:`httpx.AsyncHTTPTransport`.
      uds: refused.

    Raises:
      TypeError: *uds* was given: a UNIX socket has no RST.
      ValueError: *proxy* has a scheme that is not "http", "https", "socks5" or "socks5h".
      RuntimeError: *proxy* is for SOCKS, and `socksio` is not installed.
    """

    def __init__(
        self,
        verify: ssl.SSLContext | str | bool = True,
        cert: Any = None,
        trust_env: bool = True,
        http1: bool = True,
        http2: bool = False,
        limits: httpx.Limits = LIMITS,
        proxy: httpx.Proxy | httpx.URL | str | None = None,
        uds: None = None,
        local_address: str | None = None,
        retries: int = 0,
        socket_options: Iterable[Any] | None = None,
    ) -> None:
        if uds is not None:
            raise TypeError("uds is refused: a UNIX socket has no RST")
        self._only_http2 = http2 and not http1
        options: dict[str, Any] = {
            "ssl_context": httpx.create_ssl_context(
                verify=verify, cert=cert, trust_env=trust_env
            ),
            "max_connections": limits.max_connections,
            "max_keepalive_connections": limits.max_keepalive_connections,
            "keepalive_expiry": limits.keepalive_expiry,
            "http1": http1,
            "http2": http2,
            "network_backend": _NetworkBackend(),
        }
        self._pool: httpcore.AsyncConnectionPool
        if proxy is None:
            self._pool = httpcore.AsyncConnectionPool(
                local_address=local_address,
                retries=retries,
                socket_options=socket_options,
                **options,
            )
            return
        if not isinstance(proxy, httpx.Proxy):
            proxy = httpx.Proxy(proxy)
        options["proxy_url"] = _url(proxy.url)
        options["proxy_auth"] = proxy.raw_auth
        if proxy.url.scheme in ("socks5", "socks5h"):
            self._pool = httpcore.AsyncSOCKSProxy(**options)
        else:
            self._pool = httpcore.AsyncHTTPProxy(
                proxy_headers=proxy.headers.raw,
                proxy_ssl_context=proxy.ssl_context,
                socket_options=socket_options,
                **options,
            )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """See :meth:`httpx.AsyncBaseTransport.handle_async_request`."""
        assert isinstance(request.stream, httpx.AsyncByteStream)
        core_request = httpcore.Request(
            method=request.method,
            url=_url(request.url),
            headers=request.headers.raw,
            content=request.stream,
            extensions=request.extensions,
        )
        exchange = _Exchange()
        try:
            with _errors_of_httpx(), exchange.under_way():
                response = await self._pool.handle_async_request(core_request)
        except BaseException:
            if not self._only_http2:
                # httpcore forgets one whose way through a proxy has failed.
                exchange.reset()
            raise
        tunnel = request.method == "CONNECT" and 200 <= response.status < 300
        if response.status == 101 or tunnel:
            exchange.hand_over()
        return httpx.Response(
            status_code=response.status,
            headers=response.headers,
            stream=_ResponseStream(response, exchange),
            extensions=response.extensions,
        )

    async def aclose(self) -> None:
        """End all connections: FIN for those that are idle, RST for the others."""
        await self._pool.aclose()


class _Exchange:
    """A request and its response, and the connections that it has used.

    It is more than one where a server refuses a request on the first.
    """

    def __init__(self) -> None:
        self._streams: set[_NetworkStream] = set()

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """What is sent in here is sent for this exchange."""
        before = _exchange.get()
        _exchange.set(self)
        try:
            yield
        finally:
            _exchange.set(before)

    def use(self, stream: _NetworkStream) -> None:
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


_exchange: ContextVar[_Exchange | None] = ContextVar("_exchange", default=None)


class _ResponseStream(httpx.AsyncByteStream):
    def __init__(self, response: httpcore.Response, exchange: _Exchange) -> None:
        self._response = response
        self._exchange = exchange

    async def __aiter__(self) -> AsyncIterator[bytes]:
        assert isinstance(self._response.stream, AsyncIterable)
        parts = aiter(self._response.stream)
        with _errors_of_httpx():
            while True:
                with self._exchange.under_way():  # HTTP/2 sends for a download, too
                    part = await anext(parts, None)
                if part is None:
                    break
                yield part
        self._exchange.finish()

    async def aclose(self) -> None:
        await self._response.aclose()


class _NetworkBackend(httpcore.AsyncNetworkBackend):
    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        errors = {
            TimeoutError: httpcore.ConnectTimeout,
            OSError: httpcore.ConnectError,
            anyio.BrokenResourceError: httpcore.ConnectError,
        }
        with _translated(errors), anyio.fail_after(timeout):
            scope = connect_tcp(host, port, local_host=local_address, drain=NO_WAIT)
            stream = _NetworkStream(await scope.__aenter__())
            for option in socket_options or ():
                stream.sock.setsockopt(*option)
        return stream

    async def sleep(self, seconds: float) -> None:
        await anyio.sleep(seconds)


class _NetworkStream(httpcore.AsyncNetworkStream):
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
        errors = {
            TimeoutError: httpcore.ReadTimeout,
            anyio.BrokenResourceError: httpcore.ReadError,
            anyio.ClosedResourceError: httpcore.ReadError,
            ssl.SSLError: httpcore.ReadError,
        }
        with _translated(errors), anyio.fail_after(timeout):
            try:
                return await self._stream.receive(max_bytes)
            except anyio.EndOfStream:
                return b""

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._used()
        if not buffer:
            return
        errors = {
            TimeoutError: httpcore.WriteTimeout,
            anyio.BrokenResourceError: httpcore.WriteError,
            anyio.ClosedResourceError: httpcore.WriteError,
            ssl.SSLError: httpcore.WriteError,
        }
        with _translated(errors), anyio.fail_after(timeout):
            try:
                await self._stream.send(buffer)
            except BaseException:
                self.unfinished += 1  # for good, though a response may come
                raise

    async def aclose(self) -> None:
        if self.unfinished or not (self._is_ours or self._is_success()):
            self.connection.abort()
        with anyio.CancelScope(shield=True):  # FIN and close, which wait for nothing
            await self.connection.aclose()

    def _is_success(self) -> bool:
        """Whether whoever closes it now is not just giving up."""
        is_cancelled = anyio.current_effective_deadline() == -math.inf
        return not is_cancelled and left_by(None, self._at_change) is None

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.AsyncNetworkStream:
        errors = {
            TimeoutError: httpcore.ConnectTimeout,
            anyio.BrokenResourceError: httpcore.ConnectError,
            anyio.ClosedResourceError: httpcore.ConnectError,
            anyio.EndOfStream: httpcore.ConnectError,
            ssl.SSLError: httpcore.ConnectError,
        }
        with _translated(errors), anyio.fail_after(timeout):
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
            return self.sock.fileno() == -1 or _sockets.is_readable(self.sock)
        if info in _ATTRIBUTES:
            return self._stream.extra(_ATTRIBUTES[info], None)
        return None


_ATTRIBUTES: dict[str, Any] = {
    "ssl_object": TLSAttribute.ssl_object,
    "client_addr": SocketAttribute.local_address,
    "server_addr": SocketAttribute.remote_address,
    "socket": SocketAttribute.raw_socket,
}

# The most special first.
_HTTPX_ERRORS: dict[type[Exception], type[Exception]] = {
    getattr(httpcore, name): getattr(httpx, name)
    for name in (
        "ConnectTimeout",
        "ReadTimeout",
        "WriteTimeout",
        "PoolTimeout",
        "TimeoutException",
        "ConnectError",
        "ReadError",
        "WriteError",
        "NetworkError",
        "ProxyError",
        "UnsupportedProtocol",
        "LocalProtocolError",
        "RemoteProtocolError",
        "ProtocolError",
    )
}


@contextmanager
def _translated(errors: Mapping[type[Exception], type[Exception]]) -> Iterator[None]:
    try:
        yield
    except Exception as exc:
        for theirs, ours in errors.items():
            if isinstance(exc, theirs):
                raise ours(str(exc)) from exc
        raise


def _errors_of_httpx() -> Any:
    return _translated(_HTTPX_ERRORS)


def _url(url: httpx.URL) -> httpcore.URL:
    return httpcore.URL(
        scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
    )
