"""A server that dies, for test_process_death.py.

`python dying.py LOOP KIND DEATH CERTIFICATE PHASE...` prints a port for each phase that a
connection may be in, and waits for one connection to each, and a line. When they are in
their phases, it prints which of them are open and which finishing. From then on it stands
still, so that nothing more is received, until the next line; and dies.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import os
import resource
import signal
import socket
import ssl
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import trio
from anyio.abc import SocketAttribute, TaskStatus

from anyio_rst import Connection, Drain, Server, _sockets, connection_scope, serve_tcp

from serving import LONG, fill_buffers, settled

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

REQUEST = b"?"
HALF = b"half"
WHOLE = HALF + b" and half"
# Too much for a small receive buffer, but not for the send buffer. (Trio wants less than
# 16 KiB in there that wait to be sent.)
LONG_ANSWER = bytes(16384)
# Too much for both.
ENDLESS_ANSWER = bytes(2**20)

LOCALHOST = "127.0.0.1"

# A limit that nothing here reaches.
ENDLESS = 10 * LONG


class Failure(Exception):
    pass


def announce(what: object) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def die(death: str) -> None:
    """Every death has an exit status of its own. Some are up to main()."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if death == "os._exit":
        os._exit(7)
    elif death == "abort":
        os.abort()
    elif death == "SIGSEGV":
        ctypes.string_at(0)
    elif death.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[death])
    elif death == "sys.exit":
        sys.exit(5)
    elif death == "KeyboardInterrupt":
        raise KeyboardInterrupt
    elif death == "exception":
        raise Failure


def die_at_the_fin() -> None:
    """Let the shutdown() of a clean end be the last system call."""
    send_fin = _sockets.send_fin

    def send_fin_and_die(sock: socket.socket) -> None:
        send_fin(sock)
        die("SIGKILL")

    _sockets.send_fin = send_fin_and_die


class DyingServer:
    """Connections of one kind, each in a phase of its own."""

    def __init__(self, kind: str, death: str, certificate: str) -> None:
        self.kind = kind
        self.death = death
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(certificate)
        self.connections: dict[str, Connection] = {}
        self.in_phase: set[str] = set()
        self.doomed = anyio.Event()
        self.returning = anyio.Event()

    async def serve(self, phases: list[str]) -> None:
        async with anyio.create_task_group() as tg:
            ports: dict[str, int] = {}
            handshakes: dict[str, Server] = {}
            for phase in phases:
                started: Any = await tg.start(self.serve_phase, phase)
                if isinstance(started, Server):
                    if phase in HANDSHAKES:
                        handshakes[phase] = started
                    started = started.port
                ports[phase] = started
            announce(ports)
            await anyio.to_thread.run_sync(sys.stdin.readline)
            while self.in_phase != set(phases) - {BACKLOG}:
                for phase, server in handshakes.items():
                    for conn in server.connections:
                        self.connections[phase] = conn
                        self.in_phase.add(phase)
                await anyio.lowlevel.checkpoint()
            await settled()
            self.doomed.set()

    async def serve_phase(self, phase: str, *, task_status: TaskStatus[Any]) -> None:
        secure = phase in HANDSHAKES or phase.startswith("TLS")

        async def handler(conn: Any) -> None:
            self.connections[phase] = conn
            if phase == "half sent":
                await conn.send(HALF)
                self.in_phase.add(phase)
                await self.die_when_told()
            else:
                await HANDLERS[phase](conn, partial(self.in_phase.add, phase))

        async def in_scope(stream: Any) -> None:
            if secure and self.kind == "trio":
                stream = trio.SSLStream(stream, self.context, server_side=True)
            async with connection_scope(stream, drain=Drain(ENDLESS)) as conn:
                if phase in HANDSHAKES:
                    self.connections[phase] = conn
                    self.in_phase.add(phase)
                if secure and self.kind == "trio":
                    await stream.do_handshake()
                elif secure:
                    await conn.start_tls(self.context)
                await handler(conn)

        if self.kind == "native":
            await serve_tcp(
                handler,
                host=LOCALHOST,
                drain=Drain(ENDLESS),
                propagate_errors=True,
                ssl_context=self.context if secure else None,
                handshake_timeout=ENDLESS,
                task_status=task_status,
            )
            return
        listener = await listen(self.kind)
        task_status.started(port_of(listener))
        async with listener:
            if self.kind == "trio":
                await trio.serve_listeners(in_scope, [listener])
            else:
                await listener.serve(handler if self.kind == "plain" else in_scope)

    async def die_when_told(self) -> None:
        await self.doomed.wait()
        announce(
            {
                phase: "finishing" if "(finishing)" in repr(conn) else "open"
                for phase, conn in self.connections.items()
            }
        )
        sys.stdin.readline()
        if self.death == "return from main":
            self.returning.set()
        die(self.death)
        await anyio.sleep_forever()


InPhase = Callable[[], None]


async def hold(conn: Any, in_phase: InPhase) -> None:
    in_phase()
    await anyio.sleep_forever()


async def sending(conn: Any, in_phase: InPhase) -> None:
    # Set by hand, the buffer does not grow by itself: tcp(7), tcp_wmem.
    raw = conn.extra(SocketAttribute.raw_socket)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)
    in_phase()
    await conn.send(ENDLESS_ANSWER)
    raise AssertionError("there was room for all of it")


async def tls_half_sent(conn: Any, in_phase: InPhase) -> None:
    await conn.send(HALF)
    await hold(conn, in_phase)


def half_closed(answer: bytes) -> Callable[[Any, InPhase], Awaitable[None]]:
    async def handler(conn: Any, in_phase: InPhase) -> None:
        await conn.send(answer)
        await conn.send_eof()
        await hold(conn, in_phase)

    return handler


def finished(answer: bytes) -> Callable[[Any, InPhase], Awaitable[None]]:
    async def handler(conn: Any, in_phase: InPhase) -> None:
        await conn.send(answer)
        in_phase()

    return handler


async def tls_close_without_room(conn: Any, in_phase: InPhase) -> None:
    await conn.send(HALF)
    fill_buffers(conn.extra(SocketAttribute.raw_socket))
    in_phase()


# What leads into the phases. In "half sent" is the one that dies.
BACKLOG = "in the backlog"
HANDSHAKES = ["half a ClientHello", "ClientHello answered"]
HANDLERS: dict[str, Callable[[Any, InPhase], Awaitable[None]]] = {
    BACKLOG: hold,  # if it is accepted after all
    "accepted": hold,
    "sending": sending,
    "half-closed": half_closed(WHOLE),
    "half-closed, answer under way": half_closed(LONG_ANSWER),
    "drain": finished(WHOLE),
    "drain, unread input": finished(WHOLE),
    "drain, answer under way": finished(LONG_ANSWER),
    "drain, answer under way, unread input": finished(LONG_ANSWER),
    "drain, answer under way, input after the death": finished(LONG_ANSWER),
    "TLS half sent": tls_half_sent,
    "TLS close": finished(WHOLE),
    "TLS close without room": tls_close_without_room,
}


async def forget(kind: str) -> None:
    """Enter a scope by hand, forget all about it, and go on living."""
    stream = await accept(kind)
    conn = await connection_scope(stream).__aenter__()
    assert await conn.receive() == REQUEST
    # What asyncio's loop is reading is no garbage: the loop holds it. AnyIO lets it read
    # an accepted stream until a receive() has waited.
    with anyio.move_on_after(0):
        await conn.receive()
    await conn.send(HALF)
    del stream, conn
    for _ in range(5):  # as PyPy finalizes, from the owner to the owned
        gc.collect()
    await anyio.to_thread.run_sync(sys.stdin.read)


async def accept(kind: str) -> Any:
    if kind == "native":
        detached: list[Any] = []

        async def handler(conn: Connection) -> None:
            detached.append(conn.detach())
            server.stop()

        async with anyio.create_task_group() as tg:
            server = await tg.start(partial(serve_tcp, handler, host=LOCALHOST))
            announce({"forgotten": server.port})
        return detached.pop()
    async with await listen(kind) as listener:
        announce({"forgotten": port_of(listener)})
        return await listener.accept()


async def listen(kind: str) -> Any:
    if kind == "trio":
        (listener,) = await trio.open_tcp_listeners(0, host=LOCALHOST)
        return listener
    bound = await anyio.create_tcp_listener(local_host=LOCALHOST)
    (one,) = bound.listeners
    return one


def port_of(listener: Any) -> Any:
    if isinstance(listener, trio.SocketListener):
        return listener.socket.getsockname()[1]
    return listener.extra(SocketAttribute.local_port)


async def main(kind: str, death: str, certificate: str, phases: list[str]) -> None:
    if death == "forgotten":
        await forget(kind)
        return
    if death == "at the FIN":
        die_at_the_fin()
    server = DyingServer(kind, death, certificate)
    if death != "return from main":
        await server.serve(phases)
    elif anyio.get_cancelled_exc_class() is asyncio.CancelledError:
        # The server runs in a task that nobody waits for.
        task = asyncio.ensure_future(server.serve(phases))
        await server.returning.wait()
        assert not task.done()
    else:
        trio.lowlevel.spawn_system_task(server.serve, phases)
        await server.returning.wait()


def run(loop: str, kind: str, death: str, certificate: str, *phases: str) -> None:
    arguments = (kind, death, certificate, list(phases))
    try:
        if loop == "trio":
            trio.run(main, *arguments)
        else:
            options = {"use_uvloop": loop == "uvloop"}
            anyio.run(main, *arguments, backend_options=options)
    except asyncio.CancelledError:
        if sys.version_info >= (3, 11) or death != "SIGINT":
            raise
        # It cancelled the main task, and there is no uncancel() yet.
        raise KeyboardInterrupt from None
    except BaseExceptionGroup as group:
        # The exit status of a group is 1, whatever is in it.
        exc: BaseException = group
        while isinstance(exc, BaseExceptionGroup):
            (exc,) = exc.exceptions
        raise exc from None


if __name__ == "__main__":
    run(*sys.argv[1:])
