"""asyncio's streams, and its protocols and transports."""

from __future__ import annotations

import asyncio
import sys
from asyncio import StreamReader, StreamWriter
from typing import TYPE_CHECKING, cast

from evidence.sockets import HOST, RESET_ON_CLOSE

from . import (
    BACKLOG,
    CHUNK,
    RECEIVE,
    Failed,
    announce_port,
    announce_reset,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

# Every open connection, for the reset of all.
transports: set[asyncio.Transport] = set()


def reset(transport: asyncio.WriteTransport) -> None:
    transport.get_extra_info("socket").setsockopt(*RESET_ON_CLOSE)
    transport.abort()  # alone, that is a close: FIN


# Streams


async def fin(reader: StreamReader, writer: StreamWriter) -> None:
    writer.write(await reader.read(RECEIVE))
    await writer.drain()


async def rst(reader: StreamReader, writer: StreamWriter) -> None:
    await fin(reader, writer)
    raise Failed


async def echo(reader: StreamReader, writer: StreamWriter) -> None:
    while data := await reader.read(RECEIVE):
        writer.write(data)
        await writer.drain()


async def download(reader: StreamReader, writer: StreamWriter) -> None:
    left = int(await reader.read(RECEIVE))
    while left > 0:
        writer.write(CHUNK[:left])
        await writer.drain()
        left -= len(CHUNK)


HANDLERS: dict[str, Callable[[StreamReader, StreamWriter], Awaitable[None]]] = {
    "fin": fin,
    "rst": rst,
    "echo": echo,
    "download": download,
}


async def serve_streams(workload: str) -> asyncio.Server:
    handler = HANDLERS[workload]

    async def by_hand(reader: StreamReader, writer: StreamWriter) -> None:
        transport = cast("asyncio.Transport", writer.transport)
        transports.add(transport)
        try:
            await handler(reader, writer)
        except Failed:
            reset(transport)
        finally:
            transports.discard(transport)
            writer.close()

    return await asyncio.start_server(by_hand, HOST, 0, backlog=BACKLOG)


# Protocols


class Echo(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        transports.add(self.transport)

    def connection_lost(self, exc: Exception | None) -> None:
        transports.discard(self.transport)

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)

    def pause_writing(self) -> None:
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()


class Fin(Echo):
    def data_received(self, data: bytes) -> None:
        self.transport.write(data)
        self.transport.close()


class Rst(Echo):
    def data_received(self, data: bytes) -> None:
        self.transport.write(data)
        reset(self.transport)


class Download(Echo):
    def data_received(self, data: bytes) -> None:
        self.left = int(data)
        self.resume_writing()

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        while self.left > 0 and not self.paused:
            chunk = CHUNK[: self.left]
            self.left -= len(chunk)
            self.transport.write(chunk)
        if not self.left:
            # Within resume_writing(), asyncio's transport would end the connection
            # twice: python/cpython#156512.
            asyncio.get_running_loop().call_soon(self.transport.close)


PROTOCOLS: dict[str, type[Echo]] = {
    "fin": Fin,
    "rst": Rst,
    "echo": Echo,
    "download": Download,
}


async def serve_protocol(workload: str) -> asyncio.Server:
    loop = asyncio.get_running_loop()
    return await loop.create_server(PROTOCOLS[workload], HOST, 0, backlog=BACKLOG)


async def main(serve: Callable[[str], Awaitable[asyncio.Server]], workload: str) -> None:
    loop = asyncio.get_running_loop()
    command = asyncio.Event()
    loop.add_reader(sys.stdin, command.set)
    server = await serve(workload)
    announce_port(server.sockets[0].getsockname()[1])
    await command.wait()
    loop.remove_reader(sys.stdin)
    announce_reset()
    server.close()
    for transport in list(transports):
        reset(transport)
    await asyncio.sleep(1)  # the handlers end


def run(contender: str, loop: str, workload: str) -> None:
    start(
        serve_streams if contender == "asyncio_streams" else serve_protocol,
        loop,
        workload,
    )


def start(
    serve: Callable[[str], Awaitable[asyncio.Server]], loop: str, workload: str
) -> None:
    if loop == "uvloop":
        import uvloop

        uvloop.run(main(serve, workload))
    else:
        asyncio.run(main(serve, workload))
