"""Sends each line of a client to all clients, and resets clients that are too slow.

If lines were left out, or it got a FIN, it would believe that it has everything.
"""

import signal
import sys

import anyio
from anyio.lowlevel import checkpoint
from anyio.streams.buffered import BufferedByteReceiveStream

from anyio_rst import Connection, serve_tcp

MAX_LINE = 4096  # bytes, including the end of the line
MAX_BEHIND = 1000  # lines that wait for one client
PATIENCE = 10.0  # seconds for a client to take what is being sent to it
GRACE = 10.0  # seconds


class TooSlow(Exception):
    """A client is too far behind."""


class Client:
    def __init__(self) -> None:
        self.queue, self.waiting = anyio.create_memory_object_stream[bytes](MAX_BEHIND)
        self.too_slow = anyio.Event()


class Broadcast:
    def __init__(self) -> None:
        self._clients: set[Client] = set()
        self._is_over = False

    async def serve(self, conn: Connection) -> None:
        client = Client()
        with client.queue, client.waiting:
            if self._is_over:
                return
            self._clients.add(client)
            try:
                async with conn.create_task_group() as tg:
                    tg.start_soon(self._read, conn, client)
                    tg.start_soon(self._write, conn, client, tg.cancel_scope)
                    await client.too_slow.wait()
                    raise TooSlow(f"more than {MAX_BEHIND} lines behind")
            finally:
                self._clients.discard(client)

    def publish(self, line: bytes) -> None:
        for client in tuple(self._clients):
            try:
                client.queue.send_nowait(line)
            except anyio.WouldBlock:
                self._clients.remove(client)  # nothing may follow the gap
                client.too_slow.set()

    def close(self) -> None:
        """From now on nothing is published. Clients get what waits for them, then FIN."""
        self._is_over = True
        for client in tuple(self._clients):
            self._let_go(client)

    def _let_go(self, client: Client) -> None:
        self._clients.discard(client)
        client.queue.close()

    async def _read(self, conn: Connection, client: Client) -> None:
        lines = BufferedByteReceiveStream(conn)
        try:
            while True:
                line = await lines.receive_until(b"\n", MAX_LINE)
                if len(line) >= MAX_LINE:  # it came in one piece
                    raise anyio.DelimiterNotFound(MAX_LINE)
                self.publish(line + b"\n")
                await checkpoint()  # let the others write
        except anyio.IncompleteRead:
            if lines.buffer:
                raise  # half a line is not published
        self._let_go(client)  # its FIN

    async def _write(
        self, conn: Connection, client: Client, scope: anyio.CancelScope
    ) -> None:
        async for line in client.waiting:
            more = range(client.waiting.statistics().current_buffer_used)
            rest = [client.waiting.receive_nowait() for _ in more]
            with anyio.fail_after(PATIENCE):
                await conn.send(b"".join([line, *rest]))
        scope.cancel()  # it has got everything: FIN


async def main(port: int) -> None:
    broadcast = Broadcast()
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with anyio.create_task_group() as tg:
            server = await tg.start(serve_tcp, broadcast.serve, port)
            print("serving on", server.port, flush=True)
            async for _ in signals:
                break
            server.stop()
            broadcast.close()
            tg.cancel_scope.deadline = anyio.current_time() + GRACE


if __name__ == "__main__":
    anyio.run(main, int(sys.argv[1]) if len(sys.argv) > 1 else 8000)
