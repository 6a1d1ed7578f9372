"""Applications for test_frameworks.py: the same ways to answer in ASGI and in aiohttp.

The path says which: an answer with a length or without, and what happens half way.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
import socket
import ssl
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
from aiohttp import web
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

import aiohttp_server
from asgi import true_endings
from asgi_hypercorn import reset_by_address
from asgi_uvicorn import CONNECTION, Http, Known

HALF = b"half"
WHOLE = b"half and half"
BIG = b"0123456789abcdef" * 2**18  # 4 MiB: more than any buffers hold

Write = Callable[[bytes], Awaitable[object]]


class Failure(Exception):
    pass


async def act(way: str, write: Write) -> bool:
    """Write a body; False if it is to be left as it is."""
    if way == "big":
        await write(BIG)
        return True
    await write(HALF)
    if way == "raises":
        raise Failure
    if way == "returns":
        return False
    if way == "times_out":
        with anyio.fail_after(0.01):
            await anyio.sleep_forever()
    if way == "cancelled":
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await anyio.sleep_forever()
    if way == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if way == "waits":
        await anyio.sleep_forever()
    await write(WHOLE[len(HALF) :])
    return True


def headers_of(way: str, length: str) -> dict[str, str]:
    size = len(BIG if way == "big" else WHOLE)
    return {"content-length": str(size)} if length == "length" else {}


async def cases(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        raise NotImplementedError
    _, length, way = scope["path"].split("/")
    if way == "refuses":
        raise Failure
    headers = [(k.encode(), v.encode()) for k, v in headers_of(way, length).items()]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    if way == "at_once":
        await send({"type": "http.response.body", "body": WHOLE})
        return

    async def write(data: bytes) -> None:
        await send({"type": "http.response.body", "body": data, "more_body": True})

    if await act(way, write):
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def aiohttp_cases(request: web.Request) -> web.StreamResponse:
    length, way = request.match_info["length"], request.match_info["way"]
    if way == "refuses":
        raise Failure
    if way == "at_once":
        return web.Response(body=WHOLE)
    response = web.StreamResponse(headers=headers_of(way, length))
    await response.prepare(request)
    await act(way, response.write)
    return response


class HttpTools(Known, HttpToolsProtocol):
    pass


H11 = Http
armed = true_endings(cases, CONNECTION.get)
by_address = reset_by_address(cases)


def serve_aiohttp(kind: str, listener: str, loop: str, grace: str, tls: str) -> None:
    app = web.Application()
    if kind == "armed":
        app.middlewares.append(aiohttp_server.true_endings)
        app.on_response_prepare.append(aiohttp_server.note)
    app.router.add_get("/{length}/{way}", aiohttp_cases)
    context = None
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls)
    web.run_app(
        app,
        sock=socket.socket(fileno=int(listener)),
        loop=importlib.import_module(loop).new_event_loop(),
        ssl_context=context,
        shutdown_timeout=float(grace),
    )


if __name__ == "__main__":
    serve_aiohttp(*sys.argv[1:])
