"""A connection over TLS for a test, however TLS comes about, and the peer that judges it.

The peer is a plain blocking socket, and OpenSSL beside it: it sees the records of TLS and
what TCP does below them, and can be anything but well-behaved.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import pytest
import trio
import trustme
from anyio.streams.buffered import BufferedByteStream
from anyio.streams.tls import TLSStream
from conftest import BACKENDS

from anyio_rst import Connection, Ending, connect_tcp, connection_scope, serve_tcp

from serving import LONG, Peer, accepted

AUTHORITY = trustme.CA()
CERTIFICATE = AUTHORITY.issue_cert("localhost")
LATEST = ssl.TLSVersion.TLSv1_3
VERSIONS = [ssl.TLSVersion.TLSv1_2, LATEST]
PROTOCOL = "truth/1"

# What ends a session that ends well.
CLEAN = ["close_notify", "FIN"]


def server_context(version: ssl.TLSVersion = LATEST) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    CERTIFICATE.configure_cert(context)
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols([PROTOCOL])
    return context


def client_context(version: ssl.TLSVersion = LATEST) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # without the system's authorities
    AUTHORITY.configure_trust(context)
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols([PROTOCOL])
    return context


def client_hello() -> bytes:
    out = ssl.MemoryBIO()
    session = client_context().wrap_bio(ssl.MemoryBIO(), out, server_hostname="localhost")
    with suppress(ssl.SSLWantReadError):
        session.do_handshake()
    return out.read()


# How TLS can come about: by serve_tcp() and connect_tcp() themselves ("own"), by
# start_tls(), and by the user: AnyIO's TLSStream, bare ("wrapped") or with a buffer
# around it, or a trio.SSLStream. On either side.
WAYS = ["own", "start_tls", "wrapped", "buffered", "trio"]
SIDES = ["server", "client"]


def each(
    *ways: str, sides: list[str] = SIDES, backends: list[Any] = BACKENDS
) -> pytest.MarkDecorator:
    """Each of *ways* on each side, on each event loop that it can be had on."""
    return pytest.mark.parametrize(
        ("anyio_backend", "way", "side"),
        [
            pytest.param(backend.values[0], way, side, id=f"{backend.id}-{way}-{side}")
            for backend in backends
            for way in ways or WAYS
            for side in sides
            if way != "trio" or backend.id == "trio"
        ],
        indirect=["anyio_backend"],
    )


each_way = each()
each_way_of_a_server = each(sides=["server"])
each_version = pytest.mark.parametrize("version", VERSIONS, ids=str)


class TLSPeer:
    """A plain blocking socket with a session over it. Its calls run in threads."""

    def __init__(self, peer: Peer, context: ssl.SSLContext, *, server_side: bool) -> None:
        self.raw = peer
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(
            self.incoming,
            self.outgoing,
            server_side=server_side,
            server_hostname=None if server_side else "localhost",
        )
        self.has_fin = False

    def _run(self, call: Callable[..., Any], *args: Any) -> Any:
        sock = self.raw.sock
        while True:
            try:
                result = call(*args)
            except ssl.SSLWantReadError:
                self._flush()
                data = sock.recv(65536)
                if data:
                    self.incoming.write(data)
                else:
                    self.has_fin = True
                    self.incoming.write_eof()
            else:
                self._flush()
                return result

    def _flush(self) -> None:
        if self.outgoing.pending:
            self.raw.sock.sendall(self.outgoing.read())

    async def handshake(self) -> None:
        await anyio.to_thread.run_sync(self._run, self.tls.do_handshake)

    async def send(self, data: bytes) -> None:
        await anyio.to_thread.run_sync(self._run, self.tls.write, data)

    def hello(self) -> bytes:
        """The ClientHello of this session, for the test to send."""
        with pytest.raises(ssl.SSLWantReadError):
            self.tls.do_handshake()
        return self.outgoing.read()

    def encrypted(self, data: bytes) -> bytes:
        """The records that *data* is sent in, for the test to send."""
        self.tls.write(data)
        return self.outgoing.read()

    async def receive(self, size: int) -> bytes:
        """Exactly *size* bytes."""

        def read() -> bytes:
            data = bytearray()
            while len(data) < size:
                chunk = self._run(self.tls.read, size - len(data))
                assert chunk, f"the end after {len(data)} bytes"
                data += chunk
            return bytes(data)

        return await anyio.to_thread.run_sync(read)

    def say_close_notify(self) -> None:
        with suppress(ssl.SSLWantReadError):  # ours, which is not waited for
            self.tls.unwrap()
        self._flush()

    async def end(self) -> tuple[bytes, list[str]]:
        """What is still received, and what ends it: alerts, and FIN or RST."""
        return await anyio.to_thread.run_sync(self._read_to_end)

    def _read_to_end(self) -> tuple[bytes, list[str]]:
        data = bytearray()
        said = []
        try:
            while chunk := self._run(self.tls.read, 65536):
                data += chunk
        except ConnectionResetError:
            return bytes(data), ["RST"]
        except ssl.SSLEOFError:
            return bytes(data), ["FIN"]
        except ssl.SSLZeroReturnError:  # where we have said it before
            said.append("close_notify")
        except ssl.SSLError as exc:
            said.append(str(exc.reason))
        else:
            if self.has_fin:  # which OpenSSL may be told to take for a close_notify
                return bytes(data), ["FIN"]
            said.append("close_notify")
        try:
            while self.raw.sock.recv(65536):
                pass
        except ConnectionResetError:
            return bytes(data), [*said, "RST"]
        return bytes(data), [*said, "FIN"]


async def shake_hands(
    raw: Peer, *, server_side: bool = False, version: ssl.TLSVersion = LATEST
) -> TLSPeer:
    """The session of a client, or of a server, over *raw*."""
    context = (server_context if server_side else client_context)(version)
    peer = TLSPeer(raw, context, server_side=server_side)
    await peer.handshake()
    return peer


Body = Callable[[Connection], Awaitable[object]]
Script = Callable[[TLSPeer], Awaitable[object]]


@dataclass
class Talk:
    """What became of our side of a connection."""

    connection: Connection
    raised: Exception | None = None

    @property
    def ending(self) -> Ending:
        assert self.connection.ending is not None
        return self.connection.ending


async def talk(
    way: str,
    side: str,
    body: Body,
    script: Script,
    *,
    version: ssl.TLSVersion = LATEST,
    standard_compatible: bool = True,
    buffer: int = 0,
    expecting: type[Exception] | tuple[type[Exception], ...] = (),
    **options: Any,
) -> Talk:
    """Run *body* on a connection over TLS, and *script* on the peer at its other end.

    The peer's socket stays open until both are over.

    Args:
      buffer: the peer's SO_RCVBUF.
      expecting: what may leave the body.
      options: those of `connection_scope`.
    """
    talks: list[Talk] = []
    over = anyio.Event()

    async def observed(conn: Connection) -> None:
        it = Talk(conn)
        talks.append(it)
        try:
            await body(conn)
        except Exception as exc:
            it.raised = exc
            raise

    async def ours(port: int) -> None:
        try:
            async with secured(
                way, side, port, version, standard_compatible, **options
            ) as conn:
                await observed(conn)
        except Exception as exc:
            if not talks or exc is not talks[0].raised:
                raise
        over.set()

    with socket.create_server(("127.0.0.1", 0)) as listener, anyio.fail_after(LONG):
        async with anyio.create_task_group() as tg:
            if way == "own" and side == "server":
                serve = partial(
                    serve_tcp,
                    observed,
                    host="127.0.0.1",
                    ssl_context=server_context(version),
                    on_ending=lambda _: over.set(),
                    **options,
                )
                server = await tg.start(serve)
                raw = Peer(server.port, buffer=buffer)
            else:
                if buffer:
                    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
                tg.start_soon(ours, listener.getsockname()[1])
                raw = await anyio.to_thread.run_sync(accepted, listener)
            with raw:
                await script(
                    await shake_hands(raw, server_side=side == "client", version=version)
                )
                await over.wait()
            tg.cancel_scope.cancel()
    (it,) = talks
    if it.raised is not None and not isinstance(it.raised, expecting):
        raise it.raised
    return it


@asynccontextmanager
async def secured(
    way: str,
    side: str,
    port: int,
    version: ssl.TLSVersion,
    standard_compatible: bool = True,
    **options: Any,
) -> AsyncIterator[Connection]:
    """A connection to *port*, and a session over it whose *side* is ours."""
    is_server = side == "server"
    context = (server_context if is_server else client_context)(version)
    tls: dict[str, Any] = {
        "ssl_context": context,
        "server_side": is_server,
        "hostname": None if is_server else "localhost",
        "standard_compatible": standard_compatible,
    }
    if way == "own":
        async with connect_tcp(
            "127.0.0.1",
            port,
            ssl_context=context,
            tls_hostname="localhost",
            tls_standard_compatible=standard_compatible,
            **options,
        ) as conn:
            yield conn
    elif way == "start_tls":
        async with connect_tcp("127.0.0.1", port, **options) as conn:
            await conn.start_tls(**tls)
            yield conn
    else:
        stream = await session(way, port, tls)
        async with connection_scope(stream, **options) as conn:
            yield conn


async def session(way: str, port: int, tls: dict[str, Any]) -> Any:
    """A session of the user's own."""
    if way == "trio":
        stream = trio.SSLStream(
            await trio.open_tcp_stream("127.0.0.1", port),
            tls["ssl_context"],
            server_hostname=tls["hostname"],
            server_side=tls["server_side"],
            https_compatible=not tls["standard_compatible"],
        )
        await stream.do_handshake()  # else it is a part of what the body does first
        return stream
    secure = await TLSStream.wrap(await anyio.connect_tcp("127.0.0.1", port), **tls)
    return BufferedByteStream(secure) if way == "buffered" else secure
