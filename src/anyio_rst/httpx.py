"""Truthful endings for httpx.

::

    async with httpx.AsyncClient(transport=AsyncHTTPTransport()) as client:
        ...

An exchange is finished when the complete request was sent and httpx has read the response
to its end. If all exchanges of a connection are finished, it ends with FIN. Otherwise it
ends with RST, for example after a cancelled upload or a download that was given up.
"""

from __future__ import annotations

from collections.abc import AsyncIterable
from typing import TYPE_CHECKING, Any

import httpcore
import httpx

from ._httpx_network import Exchange, NetworkBackend, translated

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Iterable

__all__ = ["AsyncHTTPTransport"]

# Those of httpx.AsyncHTTPTransport.
LIMITS = httpx.Limits(max_connections=100, max_keepalive_connections=20)


class AsyncHTTPTransport(httpx.AsyncBaseTransport):
    """:class:`httpx.AsyncHTTPTransport`, on connections that end truthfully.

    ::

        httpx.AsyncClient(transport=AsyncHTTPTransport(http2=True))

    The pool, the protocols and the proxies are those of httpcore. An `AsyncClient` with a
    transport ignores its own `verify`, `cert`, `http1`, `http2`, `limits` and the proxies
    of the environment. Pass them to the transport.

    `response.extensions["network_stream"].get_extra_info("connection")` is the
    :class:`~anyio_rst.Connection`, whose `ending` says how it ended.

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
            "network_backend": NetworkBackend(),
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
        exchange = Exchange()
        try:
            with translated(_HTTPX_ERRORS), exchange.under_way():
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
        """End all connections: idle ones with FIN, and the others with RST."""
        await self._pool.aclose()


class _ResponseStream(httpx.AsyncByteStream):
    def __init__(self, response: httpcore.Response, exchange: Exchange) -> None:
        self._response = response
        self._exchange = exchange

    async def __aiter__(self) -> AsyncIterator[bytes]:
        assert isinstance(self._response.stream, AsyncIterable)
        parts = aiter(self._response.stream)
        with translated(_HTTPX_ERRORS):
            while True:
                with self._exchange.under_way():  # HTTP/2 sends for a download, too
                    try:
                        part = await anext(parts)
                    except StopAsyncIteration:
                        break
                yield part
        self._exchange.finish()

    async def aclose(self) -> None:
        await self._response.aclose()


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


def _url(url: httpx.URL) -> httpcore.URL:
    return httpcore.URL(
        scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
    )
