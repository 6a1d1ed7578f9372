"""Does a flood of new connections keep an established one from its answers?

`python bench/fairness.py [LOOP ...]`: a client plays ping-pong with an echo server, 64
bytes at a time, while another process opens connections to that server and closes them
again. Server, flood and client are processes of their own. It prints the round trips of
the ping-pong in milliseconds, without the flood and with it, and how many of the
connections a second the server has dealt with.
"""

from __future__ import annotations

import socket
import statistics
import subprocess
import sys
import time
from typing import Any

import anyio
from anyio.abc import ByteStream, SocketAttribute

from anyio_rst import Connection, serve_tcp

LOOPS: dict[str, tuple[str, dict[str, Any]]] = {
    "asyncio": ("asyncio", {"use_uvloop": False}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}
SERVERS = ("anyio", "anyio_rst")
RATE = 5000  # connections a second, at most
SECONDS = 3.0
ROUNDS = 2  # of each server, alternating
PING = b"." * 64


async def echo(stream: ByteStream) -> None:
    global served
    async for chunk in stream:
        await stream.send(chunk)
    served += 1
    if served % 1000 == 0:
        print(served, time.monotonic(), flush=True)


served = 0


async def serve(kind: str) -> None:
    if kind == "anyio_rst":

        async def handler(conn: Connection) -> None:
            await echo(conn)

        async with anyio.create_task_group() as tg:
            server = await tg.start(
                lambda **kw: serve_tcp(handler, host="127.0.0.1", **kw)
            )
            print(server.port, flush=True)
    else:

        async def closing(stream: ByteStream) -> None:
            async with stream:
                await echo(stream)

        async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
            print(listener.extra(SocketAttribute.local_port), flush=True)
            await listener.serve(closing)


def flood(port: int) -> None:
    """Open and close connections, no faster than RATE, until killed."""
    start = time.monotonic()
    opened = 0
    while True:
        ahead = opened / RATE - (time.monotonic() - start)
        if ahead > 0:
            time.sleep(ahead)
        for _ in range(10):
            with socket.create_connection(("127.0.0.1", port)):
                opened += 1


def round_trips(sock: socket.socket, seconds: float) -> list[float]:
    """In milliseconds."""
    found = []
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        sock.sendall(PING)
        left = len(PING)
        while left:
            left -= len(sock.recv(left))
        found.append((time.perf_counter() - start) * 1000)
    return found


def measure(loop: str, kind: str) -> tuple[list[float], list[float], float]:
    """Round trips without and with the flood, and connections a second."""
    this = [sys.executable, __file__]
    with subprocess.Popen([*this, "serve", loop, kind], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        try:
            port = int(server.stdout.readline())
            with socket.create_connection(("127.0.0.1", port)) as sock:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                alone = round_trips(sock, 1.0)
                with subprocess.Popen([*this, "flood", str(port)]) as load:
                    try:
                        round_trips(sock, 0.5)  # until it is under way
                        crowded = round_trips(sock, SECONDS)
                    finally:
                        load.kill()
        finally:
            server.kill()
        progress = [line.split() for line in server.stdout.read().splitlines()]
    first, *_, last = [(int(count), float(moment)) for count, moment in progress]
    return alone, crowded, (last[0] - first[0]) / (last[1] - first[1])


def summary(times: list[float]) -> str:
    p99 = statistics.quantiles(times, n=100)[98]
    return f"{statistics.median(times):8.2f}{p99:8.2f}{max(times):8.1f}"


def main(loops: list[str]) -> None:
    head = f"{'median':>8}{'p99':>8}{'max':>8}"
    print(f"{'':20}{'alone, ms':>24}{'flooded, ms':>24}{'conn/s':>9}")
    print(f"{'':20}{head}{head}")
    for loop in loops:
        results: dict[str, list[tuple[list[float], list[float], float]]] = {}
        for _ in range(ROUNDS):
            for kind in SERVERS:
                results.setdefault(kind, []).append(measure(loop, kind))
        for kind, rounds in results.items():
            alone = [trip for trips, _, _ in rounds for trip in trips]
            crowded = [trip for _, trips, _ in rounds for trip in trips]
            rate = statistics.mean(rate for _, _, rate in rounds)
            row = f"{loop:10}{kind:10}{summary(alone)}{summary(crowded)}"
            print(f"{row}{rate:9,.0f}", flush=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", loop, kind]:
            backend, options = LOOPS[loop]
            anyio.run(serve, kind, backend=backend, backend_options=options)
        case ["flood", port]:
            flood(int(port))
        case loops:
            main(loops or list(LOOPS))
