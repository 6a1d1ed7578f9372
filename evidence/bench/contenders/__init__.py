"""One module for each library, which imports no other: what is imported costs memory.
Each is written as its users would write it, so what they do alike stands in each.

The workloads are what a handler does:

- `fin`: one message back, and a clean end;
- `rst`: one message back, and a failure, so a reset;
- `echo`: everything back until the client's FIN, and a clean end;
- `download`: as many bytes as the client asks for, and a clean end.

A server prints its port, and serves until a line or the end of file comes on stdin. Then
it prints the moment, and resets every connection that is open.
"""

from __future__ import annotations

import time

BACKLOG = 4096
RECEIVE = 65536
CHUNK = bytes(range(256)) * 256

DRAIN = 5.0  # seconds, for the client's FIN


class Failed(Exception):
    """What the handler of `rst` raises."""


def announce_port(port: int) -> None:
    print(port, flush=True)


def announce_reset() -> None:
    print(time.monotonic(), flush=True)
