"""asyncio's streams, with the one line of anyio_rst that gives them truthful ends."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

from anyio_rst import asyncio_streams
from evidence.sockets import HOST

from . import BACKLOG
from .on_asyncio import HANDLERS, start, transports

if TYPE_CHECKING:
    from asyncio import StreamReader, StreamWriter


async def serve(workload: str) -> asyncio.Server:
    handler = HANDLERS[workload]

    async def kept(reader: StreamReader, writer: StreamWriter) -> None:
        transport = cast("asyncio.Transport", writer.transport)
        transports.add(transport)
        try:
            await handler(reader, writer)
        finally:
            transports.discard(transport)

    # Of each failure asyncio would write a traceback. The plain streams write none.
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    scoped = asyncio_streams.scoped(kept)
    return await asyncio.start_server(scoped, HOST, 0, backlog=BACKLOG)


def run(contender: str, loop: str, workload: str) -> None:
    start(serve, loop, workload)
