"""docs/ladders/*.svg: the segments of each kind of ending, captured and drawn.

`python docs/ladders.py`, with CAP_NET_RAW and CAP_NET_ADMIN, plays each scene on
loopback and writes what passed. Nothing is drawn that was not captured or observed,
except for the words that say what the server does.
"""

from __future__ import annotations

import logging
import socket
import ssl
import sys
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

import anyio
import trustme
from anyio.abc import ByteStream, SocketAttribute

from anyio_rst import CloseKind, Connection, PeerClose, serve_tcp
from anyio_rst.testing import (
    Direction,
    Peer,
    Segment,
    TCPFlag,
    capture_segments,
    connect_peer,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from anyio_rst.testing import Capture

DIRECTORY = Path(__file__).with_name("ladders")

LOOPBACK = "127.0.0.1"
REQUEST = b"request"
ANSWER = b"Hello, Ada"
HALF = ANSWER[:5]
MORE = bytes(1000)

# More than the receive buffer of a client that does not read, and less than the send
# buffer of the server: the kernel still has a part of it when its sender is done.
LONG_ANSWER = bytes(200_000)
RECEIVE_BUFFER = 16_384

# Seconds that a plain server waits for what its kernel is sure to do.
PATIENCE = 10

# From linux/tcp.h. Needs CAP_NET_ADMIN.
TCP_REPAIR = 19

ENDS = {
    PeerClose.FIN: "end of stream",
    PeerClose.RST: "ECONNRESET",
    PeerClose.NONE: "nothing in time",
}


class Failure(Exception):
    """A handler failed."""


# What passed, and what the two sides did.


@dataclass(frozen=True)
class Row:
    """An arrow, if there are flags, or else what a side does, or both."""

    at_server: bool | None
    """Where the arrow starts, or who does it; None for both."""

    text: str
    flags: TCPFlag | None = None


class Ladder:
    """The segments of one connection, and what both sides did between them."""

    def __init__(self, whole: int | None = None) -> None:
        """*whole*: size of an answer that travels in pieces, whose sizes vary."""
        self.whole = whole
        self.meanings: dict[bool, list[str]] = {True: [], False: []}
        """What each segment with data has to say, from the server and to it, if TLS
        hides that."""
        self.over = anyio.Event()
        """The server has ended the connection."""
        self._capture: Capture | None = None
        self._done: list[tuple[int, Row]] = []
        self._first = 0

    @contextmanager
    def capturing(self, port: int) -> Iterator[None]:
        with capture_segments(port) as self._capture:
            yield

    @property
    def _segments(self) -> tuple[Segment, ...]:
        assert self._capture is not None
        return self._capture.segments

    def server(self, does: str) -> None:
        self._done.append((len(self._segments), Row(True, does)))

    def client(self, does: str) -> None:
        self._done.append((len(self._segments), Row(False, does)))

    def both(self, do: str) -> None:
        """*do* is what all segments up to now were for. They are not shown."""
        self._first = len(self._segments)
        self._done.append((self._first, Row(None, do)))

    def amount(self, size: int) -> str:
        if self.whole is not None and 0 < size < self.whole:
            return f"a part of {self.whole:,} B"
        return f"{size:,} B"

    def rows(self) -> list[Row]:
        """All of it in order.

        Without the three-way handshake, acknowledgements of data (no SYN, FIN, RST or
        data), and what has been sent before.
        """
        rows: list[Row] = []
        done = list(self._done)
        meanings = {at_server: iter(said) for at_server, said in self.meanings.items()}
        sent = {True: 0, False: 0}
        following: dict[bool, int] = {}
        for index, segment in enumerate(self._segments):
            while done and done[0][0] <= index:
                rows.append(done.pop(0)[1])
            at_server = segment.direction is Direction.FROM_PORT
            if TCPFlag.SYN in segment.flags:
                following[at_server] = segment.sequence + 1
                continue
            new = segment.sequence == following[at_server]
            finishes = TCPFlag.FIN in segment.flags
            if new:
                following[at_server] += segment.length + finishes
                following[at_server] %= 2**32
            if index < self._first:
                continue
            if TCPFlag.RST in segment.flags:
                rows.append(Row(at_server, "", segment.flags))
            elif new and (segment.length or finishes):
                sent[at_server] += segment.length
                if at_server and self.whole is not None:
                    text = self._piece(sent[True], segment.length)
                    if text is None:
                        continue
                    flags = segment.flags & ~TCPFlag.PSH
                else:
                    text = f"{segment.length:,} B" if segment.length else ""
                    flags = segment.flags
                if segment.length and self.meanings[at_server]:
                    text += f": {next(meanings[at_server])}"
                rows.append(Row(at_server, text, flags))
        rows.extend(row for _, row in done)
        return rows

    def _piece(self, sent: int, length: int) -> str | None:
        """How the first and the last piece of the whole are called, and no other."""
        if sent == length:
            return self.amount(sent)
        return f"the rest of {self.whole:,} B" if sent == self.whole else None


# The two sides.

Handler = Callable[[Connection], Awaitable[object]]


@asynccontextmanager
async def served(
    ladder: Ladder,
    handler: Handler,
    *,
    ssl_context: ssl.SSLContext | None = None,
    receive_buffer: int | None = None,
) -> AsyncIterator[Peer]:
    """A plain socket, connected to `serve_tcp`. The server is done after the block."""

    def ended(conn: Connection) -> None:
        ending = conn.ending
        assert ending is not None
        if ending.kind is CloseKind.FIN:
            discarded = f"discards {ending.discarded:,} B, " if ending.discarded else ""
            ladder.server(f"{discarded}sees the {ending.peer.value}, closes")
        ladder.over.set()

    listener = socket.create_server((LOOPBACK, 0))
    port = listener.getsockname()[1]
    serve = partial(
        serve_tcp, handler, sockets=[listener], ssl_context=ssl_context, on_ending=ended
    )
    with listener, ladder.capturing(port):
        async with anyio.create_task_group() as tg:
            server = await tg.start(serve)
            async with connect_peer(port, receive_buffer=receive_buffer) as peer:
                yield peer
            server.stop()


async def read_to_end(ladder: Ladder, peer: Peer) -> None:
    """What a client does: read to the end, and close."""
    seen = await peer.read_to_end()
    ladder.client(f"reads {ladder.amount(len(seen.data))}, then {ENDS[seen.close]}")
    peer.close()


class TLSClient:
    """The client's side of TLS, which takes one record at a time, to say what it is."""

    def __init__(self, ladder: Ladder, peer: Peer, context: ssl.SSLContext) -> None:
        self._ladder = ladder
        self._peer = peer
        self._received = ssl.MemoryBIO()
        self._to_send = ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._received, self._to_send, server_hostname=LOOPBACK
        )

    async def handshake(self) -> None:
        shaken = False
        while not shaken:
            try:
                self._tls.do_handshake()
                shaken = True
            except ssl.SSLWantReadError:
                pass
            if to_send := self._to_send.read():
                await self._peer.send(to_send)
            if not shaken:
                await self._receive_record()
        self._ladder.both(f"{str(self._tls.version()).replace('v', ' ')} handshake")

    async def _receive_record(self) -> None:
        header = await self._peer.receive_exactly(5)  # RFC 8446, 5.1
        size = int.from_bytes(header[3:], "big")
        self._received.write(header + await self._peer.receive_exactly(size))

    async def receive(self) -> str:
        """What the next record says."""
        await self._receive_record()
        size = len(self._tls.read())
        meaning = f"{size:,} B of data" if size else "close_notify"
        self._ladder.meanings[True].append(meaning)
        return meaning

    async def send(self, data: bytes) -> None:
        self._tls.write(data)
        await self._send(f"{len(data):,} B of data")

    async def send_close_notify(self) -> None:
        self._tls.unwrap()
        await self._send("close_notify")

    async def _send(self, meaning: str) -> None:
        self._ladder.meanings[False].append(meaning)
        await self._peer.send(self._to_send.read())


def tls_contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Of the server and of a client that trusts it."""
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(LOOPBACK).configure_cert(server)
    server.minimum_version = ssl.TLSVersion.TLSv1_3
    server.num_tickets = 0  # which would come at a time of their own
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(client)
    return server, client


# The scenes.


async def clean_end(ladder: Ladder) -> None:
    async def handler(conn: Connection) -> None:
        await conn.receive()
        await conn.send(ANSWER)
        ladder.server("the handler returns")

    async with served(ladder, handler) as peer:
        await peer.send(REQUEST)
        await read_to_end(ladder, peer)


async def failure(ladder: Ladder) -> None:
    async def handler(conn: Connection) -> None:
        await conn.receive()
        await conn.send(HALF)
        ladder.server("the handler raises")
        raise Failure

    async with served(ladder, handler) as peer:
        await peer.send(REQUEST)
        await read_to_end(ladder, peer)


async def unread_input(ladder: Ladder) -> None:
    with socket.create_server((LOOPBACK, 0)) as listener:
        port = listener.getsockname()[1]
        with ladder.capturing(port):
            async with connect_peer(port, receive_buffer=RECEIVE_BUFFER) as peer:
                server, _ = listener.accept()
                with server:
                    server.settimeout(PATIENCE)
                    await peer.send(REQUEST)
                    server.recv(len(REQUEST))
                    server.sendall(LONG_ANSWER)
                    ladder.server("sendall() has returned")
                    await peer.send(MORE)
                    ladder.server("close(), with unread input")
                await read_to_end(ladder, peer)


async def drain(ladder: Ladder) -> None:
    returns = anyio.Event()

    async def handler(conn: Connection) -> None:
        await conn.receive()
        await conn.send(LONG_ANSWER)
        ladder.server("the handler returns")
        returns.set()

    async with served(ladder, handler, receive_buffer=RECEIVE_BUFFER) as peer:
        await peer.send(REQUEST)
        await returns.wait()
        await peer.send(MORE)
        await read_to_end(ladder, peer)


async def crash(ladder: Ladder, side: str) -> None:
    command = [sys.executable, __file__, side]
    async with await anyio.open_process(command, stderr=None) as server:
        try:
            assert server.stdout is not None
            port = int(await server.stdout.receive())
            with ladder.capturing(port):
                async with connect_peer(port) as peer:
                    await peer.send(REQUEST)
                    half = await peer.receive_exactly(len(HALF))
                    ladder.server("SIGKILL")
                    server.kill()
                    seen = await peer.read_to_end()
                    size = len(half + seen.data)
                    ladder.client(f"reads {size} B, then {ENDS[seen.close]}")
        finally:
            with suppress(ProcessLookupError):  # as the scene has it
                server.kill()


async def half_close(ladder: Ladder) -> None:
    async def handler(conn: Connection) -> None:
        size = sum([len(chunk) async for chunk in conn])
        ladder.server(f"reads {size} B, then end of stream")
        await conn.send(ANSWER)
        ladder.server("the handler returns")

    async with served(ladder, handler) as peer:
        await peer.send(REQUEST)
        ladder.client("shutdown(SHUT_WR), and reads on")
        peer.send_eof()
        await ladder.over.wait()
        await read_to_end(ladder, peer)


async def reset_after_eof(ladder: Ladder) -> None:
    read = anyio.Event()

    async def handler(conn: Connection) -> None:
        await conn.receive()
        await conn.send(HALF)
        ladder.server("send_eof()")
        await conn.send_eof()
        await read.wait()
        ladder.server("the handler raises")
        raise Failure

    async with served(ladder, handler) as peer:
        await peer.send(REQUEST)
        seen = await peer.read_to_end()
        ladder.client(f"reads {len(seen.data)} B, then {ENDS[seen.close]}")
        read.set()
        await ladder.over.wait()
        assert peer.socket.recv(1) == b""
        ladder.client("reads again: end of stream")


async def lost_reset(ladder: Ladder) -> None:
    with socket.create_server((LOOPBACK, 0)) as listener:
        port = listener.getsockname()[1]
        with ladder.capturing(port):
            async with connect_peer(port) as peer:
                server, _ = listener.accept()
                with server:
                    server.settimeout(PATIENCE)
                    await peer.send(REQUEST)
                    server.recv(len(REQUEST))
                    server.sendall(HALF)
                    # Closed in this mode, it sends nothing; to the client it is as if
                    # the RST had been lost.
                    server.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
                    ladder.server("is gone, and nobody told")
                half = await peer.receive_exactly(len(HALF))
                with suppress(BlockingIOError):
                    raise AssertionError(f"expected nothing; got {peer.socket.recv(1)!r}")
                ladder.client(f"reads {len(half)} B, and waits")
                await peer.send(MORE)
                seen = await peer.read_to_end()
                ladder.client(ENDS[seen.close])


async def tls_clean_end(ladder: Ladder) -> None:
    async def handler(conn: Connection) -> None:
        await conn.receive()
        await conn.send(ANSWER)
        ladder.server("the handler returns")

    server_context, client_context = tls_contexts()
    async with served(ladder, handler, ssl_context=server_context) as peer:
        client = TLSClient(ladder, peer, client_context)
        await client.handshake()
        await client.send(REQUEST)
        read = [await client.receive(), await client.receive()]
        seen = await peer.read_to_end()
        ladder.client(f"reads {', '.join(read)}, {ENDS[seen.close]}")
        await client.send_close_notify()
        peer.close()


async def tls_failure(ladder: Ladder) -> None:
    async def handler(conn: Connection) -> None:
        await conn.receive()
        await conn.send(HALF)
        ladder.server("the handler raises")
        raise Failure

    server_context, client_context = tls_contexts()
    async with served(ladder, handler, ssl_context=server_context) as peer:
        client = TLSClient(ladder, peer, client_context)
        await client.handshake()
        await client.send(REQUEST)
        read = await client.receive()
        seen = await peer.read_to_end()
        ladder.client(f"reads {read}, then {ENDS[seen.close]}")


def announce(port: int) -> None:
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()


async def serve_half(side: str) -> None:
    """The server of :func:`crash`: print the port, and send half of an answer."""

    async def handler(stream: ByteStream) -> None:
        await stream.receive()
        await stream.send(HALF)
        await anyio.sleep_forever()

    if side == "plain":
        async with await anyio.create_tcp_listener(local_host=LOOPBACK) as listener:
            announce(listener.extra(SocketAttribute.local_port))
            await listener.serve(handler)
    else:
        async with anyio.create_task_group() as tg:
            server = await tg.start(partial(serve_tcp, handler, host=LOOPBACK))
            announce(server.port)


@dataclass(frozen=True)
class Scene:
    title: str
    play: Callable[[Ladder], Awaitable[None]]
    whole: int | None = None


SCENES = {
    "clean-end": Scene("A clean end", clean_end),
    "failure": Scene("A failure", failure),
    "unread-input": Scene(
        "A plain close() with unread input", unread_input, len(LONG_ANSWER)
    ),
    "drain": Scene("A clean end while the client uploads", drain, len(LONG_ANSWER)),
    "crash-plain": Scene("A crash, plain AnyIO", partial(crash, side="plain")),
    "crash": Scene("A crash, anyio_rst", partial(crash, side="anyio_rst")),
    "half-close": Scene("A half-close by the client", half_close),
    "reset-after-fin": Scene("A failure after send_eof()", reset_after_eof),
    "lost-reset": Scene("A reset that is lost", lost_reset),
    "tls-clean-end": Scene("A clean end of TLS", tls_clean_end),
    "tls-failure": Scene("A failure in TLS", tls_failure),
}


# The drawing.

# In the units of the drawing, which are pixels at its full width.
WIDTH = 440
CLIENT, MIDDLE, SERVER = 40, 220, 400
HEAD = 64
ARROW = 40
SLOPE = 9
DOING = 26
TAIL = 22

NAMESPACE = "http://www.w3.org/2000/svg"

# As docs/benchmark.svg has them. A page that knows better sets `color-scheme` on <img>.
STYLE = """
  svg { font: 14px system-ui, sans-serif } .page { fill: #ffffff }
  text { fill: #1f2328 } .dim { fill: #59636e }
  .title, .end { font-weight: 600 }
  line { stroke: #8b949e } .arrow { stroke: #1f2328; stroke-width: 1.5 }
  .head, circle { fill: #1f2328 }
  .FIN { stroke: #1a7f37; fill: #1a7f37 } .RST { stroke: #cf222e; fill: #cf222e }
  tspan.FIN, tspan.RST { stroke: none; font-weight: 600 }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117 } text { fill: #e6edf3 } .dim { fill: #9198a1 }
    line { stroke: #6e7681 } .arrow { stroke: #e6edf3 }
    .head, circle { fill: #e6edf3 }
    .FIN { stroke: #3fb950; fill: #3fb950 } .RST { stroke: #ff7b72; fill: #ff7b72 }
  }
"""


def draw(scene: Scene, rows: list[Row]) -> str:
    """The SVG of *rows*: time runs down, and its distances mean nothing."""
    shapes: list[str] = []
    y = HEAD
    for row in rows:
        if row.flags is None:
            y += DOING
            shapes += draw_doing(row, y)
        else:
            y += ARROW
            shapes += draw_arrow(row, row.flags, y)
    height = y + TAIL
    size = f'width="{WIDTH}" height="{height}"'
    told = "; ".join(in_words(row) for row in rows)
    return "\n".join(
        [
            f'<svg xmlns="{NAMESPACE}" viewBox="0 0 {WIDTH} {height}" {size} role="img">',
            f"<title>{escape(scene.title)}</title>",
            f"<desc>{escape(told)}.</desc>",
            f"<style>{STYLE}</style>",
            f'<rect {size} rx="6" class="page"/>',
            text(MIDDLE, 24, escape(scene.title), "title"),
            text(CLIENT, HEAD - 16, "client", "dim"),
            text(SERVER, HEAD - 16, "server", "dim"),
            line(CLIENT, HEAD - 10, CLIENT, height - 8),
            line(SERVER, HEAD - 10, SERVER, height - 8),
            *shapes,
            "</svg>\n",
        ]
    )


def draw_arrow(row: Row, flags: TCPFlag, y: int) -> list[str]:
    start, end, back = (SERVER, CLIENT, 9) if row.at_server else (CLIENT, SERVER, -9)
    kind = next((name for name in ("RST", "FIN") if TCPFlag[name] in flags), "")
    names = [
        f'<tspan class="{name}">{name}</tspan>' if name == kind else name
        for name in names_of(flags)
    ]
    label = " ".join(names) + (f", {escape(row.text)}" if row.text else "")
    return [
        line(start, y - SLOPE, end, y, f"arrow {kind}"),
        f'<path d="M{end} {y}l{back} -5.5v10z" class="head {kind}"/>',
        text(MIDDLE, y - 12, label),
    ]


def draw_doing(row: Row, y: int) -> list[str]:
    if row.at_server is None:
        return [text(MIDDLE, y, escape(row.text), "dim")]
    x, inward, anchor = (SERVER, -10, "end") if row.at_server else (CLIENT, 10, "start")
    return [
        f'<circle cx="{x}" cy="{y - 5}" r="3.5"/>',
        text(x + inward, y, escape(row.text), "dim", anchor),
    ]


def text(x: int, y: int, content: str, kind: str = "", anchor: str = "middle") -> str:
    place = f'x="{x}" y="{y}" text-anchor="{anchor}"'
    return f'<text {place} class="{kind}">{content}</text>'


def line(x1: int, y1: int, x2: int, y2: int, kind: str = "") -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" class="{kind}"/>'


def in_words(row: Row) -> str:
    """For those who do not see it."""
    who, other = ("server", "client") if row.at_server else ("client", "server")
    if row.flags is None:
        return f"{'both' if row.at_server is None else who}: {row.text}"
    segment = " ".join(names_of(row.flags)) + (f", {row.text}" if row.text else "")
    return f"{who} to {other}: {segment}"


def names_of(flags: TCPFlag) -> list[str]:
    """In the order of tcpdump(8)."""
    order = (TCPFlag.FIN, TCPFlag.RST, TCPFlag.PSH, TCPFlag.ACK)
    return [str(flag.name) for flag in order if flag in flags]


async def drawn(name: str) -> str:
    """Play the scene *name*, and draw it."""
    scene = SCENES[name]
    ladder = Ladder(scene.whole)
    await scene.play(ladder)
    return draw(scene, ladder.rows())


if __name__ == "__main__":
    if sys.argv[1:]:
        anyio.run(serve_half, sys.argv[1])
    else:
        logging.disable()  # the failures are deliberate
        DIRECTORY.mkdir(exist_ok=True)
        for name in SCENES:
            (DIRECTORY / f"{name}.svg").write_text(anyio.run(drawn, name))
