"""What a type checker knows of a program that uses httpx. It is never run.

It is checked against the sources alone: the wheel is checked where there is no httpx.
"""

from __future__ import annotations

import ssl

import httpx
from typing_extensions import assert_type

from anyio_rst.httpx import AsyncHTTPTransport


async def use_httpx(context: ssl.SSLContext) -> None:
    transport = AsyncHTTPTransport(
        verify=context,
        http2=True,
        limits=httpx.Limits(max_connections=10),
        proxy="http://localhost:3128",
        retries=1,
        socket_options=[(1, 9, 1)],
    )
    base: httpx.AsyncBaseTransport = transport
    async with transport as entered:
        assert_type(entered, AsyncHTTPTransport)
    async with httpx.AsyncClient(transport=base) as client:
        assert_type(await client.get("http://localhost/"), httpx.Response)
