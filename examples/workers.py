"""An echo server of several processes: SIGHUP replaces them, SIGTERM ends them.

    python workers.py --port 8000 --workers 4

Each worker is a new interpreter that inherits a listening socket. So SIGHUP starts new
code, nothing has to survive a fork, and the socket outlives all workers: clients that
connect while they change wait in its backlog.
"""

import argparse
import os
import signal
import socket
import sys
from contextlib import suppress
from functools import partial
from typing import Any

import anyio
from anyio.abc import TaskGroup, TaskStatus

from anyio_rst import Connection, serve_tcp

FIRST, KEEP_ALIVE = 10.0, 30.0  # seconds, for the first line and for the next
GRACE = 8.0  # seconds, for lines under way; Docker kills after 10
START = 20.0  # seconds, for a worker to serve
PAUSE = 1.0  # seconds, from the start of a worker that died to the next start

STDIN = 0
LOOPS: dict[str, dict[str, Any]] = {
    "asyncio": {"backend": "asyncio"},
    "uvloop": {"backend": "asyncio", "backend_options": {"use_uvloop": True}},
    "trio": {"backend": "trio"},
}


# A worker.


async def answer(conn: Connection) -> None:
    """Answer each line with the number of this process and the line."""
    line = b""
    with anyio.move_on_after(FIRST):  # it is on its way, so this is not idle
        line = await anext(conn, b"")
    while line:
        while not line.endswith(b"\n"):
            line += await conn.receive()
        await conn.send(b"%d %b" % (os.getpid(), line))
        with conn.idle(KEEP_ALIVE) as idle:
            line = await anext(conn, b"")
        if idle.ended:
            return


async def work(listener: socket.socket, parent: socket.socket) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM) as signals:
        async with anyio.create_task_group() as watching:
            async with anyio.create_task_group() as tg:
                server = await tg.start(partial(serve_tcp, answer, sockets=[listener]))
                parent.send(b"+")
                watching.start_soon(end_with, parent)
                async for _ in signals:
                    break
                server.stop()  # idle connections and those that are done: FIN
                tg.cancel_scope.deadline = anyio.current_time() + GRACE  # the rest: RST
            watching.cancel_scope.cancel()


async def end_with(parent: socket.socket) -> None:
    await anyio.wait_readable(parent)  # it sends nothing: it has closed, or is gone
    signal.raise_signal(signal.SIGTERM)


# The parent.


class DidNotStart(Exception):
    pass


class Worker:
    """A process that serves *listener*, and its successor if it dies."""

    def __init__(self, listener: socket.socket, loop: str) -> None:
        self._listener = listener
        self._loop = loop
        self._channel: socket.socket | None = None
        self._retired = False
        self.gone = anyio.Event()

    async def keep(self, *, task_status: TaskStatus[None]) -> None:
        """Raises DidNotStart if the first process did not start."""
        try:
            while not self._retired:
                next_start = anyio.current_time() + PAUSE
                try:
                    await self._run(task_status)
                except DidNotStart as exc:
                    if task_status is not anyio.TASK_STATUS_IGNORED:
                        raise
                    report(exc)
                task_status = anyio.TASK_STATUS_IGNORED
                if not self._retired:
                    await anyio.sleep_until(next_start)
        finally:
            self.gone.set()

    async def _run(self, task_status: TaskStatus[None]) -> None:
        """Run a process to its end; kill it if this is cancelled."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                fd = self._listener.fileno()
                process = await anyio.open_process(
                    [sys.executable, __file__, "--loop", self._loop, "--serve", f"{fd}"],
                    stdin=theirs.fileno(),
                    stdout=None,
                    stderr=None,
                    pass_fds=[fd],
                    start_new_session=True,  # Ctrl-C is for the parent
                )
            async with process:
                self._channel = ours
                if self._retired:
                    self.retire()
                with anyio.move_on_after(START) as starting:
                    await anyio.wait_readable(ours)
                if starting.cancelled_caught:
                    process.kill()
                serves = not starting.cancelled_caught and bool(ours.recv(1))
                if serves:
                    task_status.started()
                code = await process.wait()
                if not serves:
                    raise DidNotStart(f"worker {process.pid} did not start: {code}")
                if not self._retired:
                    report(f"worker {process.pid} died: {code}")

    def retire(self) -> None:
        """Let the process drain, without a successor."""
        self._retired = True
        if self._channel is not None:
            with suppress(OSError):  # it is gone
                self._channel.shutdown(socket.SHUT_WR)


class Pool:
    def __init__(self, tg: TaskGroup, loop: str) -> None:
        self._tg = tg
        self._loop = loop
        self._workers: dict[Worker, socket.socket] = {}
        self._restarting = anyio.Lock()
        self._stopping = False

    async def add(self, listener: socket.socket) -> None:
        """Return when it serves."""
        worker = Worker(listener, self._loop)
        self._workers[worker] = listener
        try:
            await self._tg.start(worker.keep)
        except DidNotStart:
            del self._workers[worker]
            raise

    async def restart(self) -> None:
        """Replace each worker by a new one. If that does not start, the old ones stay."""
        async with self._restarting:
            for old, listener in list(self._workers.items()):
                try:
                    await self.add(listener)
                except DidNotStart as exc:
                    if not self._stopping:
                        report(exc)
                    return
                if self._stopping:
                    return
                del self._workers[old]
                old.retire()
                await old.gone.wait()
            report("restarted")

    def stop(self) -> None:
        self._stopping = True
        for worker in self._workers:
            worker.retire()


def report(what: object) -> None:
    print(what, file=sys.stderr, flush=True)


async def supervise(listeners: list[socket.socket], loop: str) -> None:
    signals = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
    with anyio.open_signal_receiver(*signals) as received:
        async with anyio.create_task_group() as tg:
            pool = Pool(tg, loop)
            for listener in listeners:
                await pool.add(listener)
            print("serving on", listeners[0].getsockname()[1], flush=True)
            async for number in received:
                if number != signal.SIGHUP:
                    break
                tg.start_soon(pool.restart)
            pool.stop()
            tg.cancel_scope.deadline = anyio.current_time() + GRACE + 1  # then: SIGKILL


def listen(port: int, workers: int, reuse_port: bool) -> list[socket.socket]:
    """A socket for each worker: the same one, or one of its own with SO_REUSEPORT.

    The parent holds those, too. Otherwise the end of a worker would reset the connections
    in the backlog of its socket, and those in the middle of their handshake.
    """
    create = partial(socket.create_server, backlog=4096, reuse_port=reuse_port)
    first = create(("", port))
    if not reuse_port:
        return [first] * workers
    return [first, *(create(first.getsockname()) for _ in range(workers - 1))]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--reuse-port", action="store_true")
    parser.add_argument("--loop", choices=LOOPS, default="asyncio")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)  # a worker's socket
    options = parser.parse_args()
    loop = LOOPS[options.loop]
    if options.serve is None:
        listeners = listen(options.port, options.workers, options.reuse_port)
        try:
            anyio.run(supervise, listeners, options.loop, **loop)
        finally:
            for listener in listeners:
                listener.close()
    else:
        inherited = socket.socket(fileno=options.serve)
        with socket.socket(fileno=STDIN) as parent:
            anyio.run(work, inherited, parent, **loop)


if __name__ == "__main__":
    main()
