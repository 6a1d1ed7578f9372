"""Does a flood of new connections keep an established one from its answers?

`python -m evidence.bench.fairness [LOOP ...]`: a client plays ping-pong with an echo
server, 64 bytes at a time, while another process opens connections to that server and
closes them again. Server, flood and client are processes of their own. It prints the
round trips of the ping-pong in milliseconds, without the flood and with it, and how many
of the connections a second the server has dealt with.
"""

from __future__ import annotations

import socket
import statistics
import sys
import time
from typing import TYPE_CHECKING

from evidence.loops import LOOPS
from evidence.processes import Process, module
from evidence.sockets import HOST

from .contenders import on_anyio

if TYPE_CHECKING:
    from anyio.abc import ByteStream

SERVERS = ("anyio", "anyio_rst")
RATE = 5000  # connections a second, at most
SECONDS = 3.0
ROUNDS = 2  # of each server, alternating
PING = b"." * 64

served = 0


async def counted(stream: ByteStream) -> None:
    global served
    await on_anyio.echo(stream)
    served += 1
    if served % 1000 == 0:
        print(served, time.monotonic(), flush=True)


def flood(port: int) -> None:
    """Open and close connections, no faster than RATE, until killed."""
    start = time.monotonic()
    opened = 0
    while True:
        ahead = opened / RATE - (time.monotonic() - start)
        if ahead > 0:
            time.sleep(ahead)
        for _ in range(10):
            with socket.create_connection((HOST, port)):
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
    this = "bench.fairness"
    with Process(f"{kind} on {loop}", module(this, "serve", loop, kind)) as server:
        port = int(server.line())
        with socket.create_connection((HOST, port)) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            alone = round_trips(sock, 1.0)
            with Process("the flood", module(this, "flood", port)):
                round_trips(sock, 0.5)  # until it is under way
                crowded = round_trips(sock, SECONDS)
        progress = [line.split() for line in server.arrived()]
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
            on_anyio.HANDLERS["counted"] = counted
            on_anyio.run(kind, loop, "counted")
        case ["flood", port]:
            flood(int(port))
        case loops:
            main(loops or list(LOOPS))
