"""Forked children, for test_forking.py; and a server of which one is forked.

`python forking.py LOOP KIND WAY CONTROL` prints its port. Once a connection has come, and
it has sent b"half" on that, it forks by WAY, and the child prints its number and how many
of its descriptors are the connection. It does nothing then but to answer what it reads
from the descriptor CONTROL, until that ends.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
from anyio.abc import SocketAttribute

from serving import serve

if TYPE_CHECKING:
    from anyio_rst import Connection

# What a child exits with if it raises.
RAISED = 99


def fork(child: Callable[[], int]) -> int:
    """Fork a child that exits with the result of *child*; its number."""
    with warnings.catch_warnings():
        # Python 3.12 warns of threads.
        warnings.simplefilter("ignore", DeprecationWarning)
        number = os.fork()
    if number:
        return number
    status = RAISED
    try:
        status = child()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def forked(child: Callable[[], int]) -> int:
    """What a forked *child* returns."""
    _, status = os.waitpid(fork(child), 0)
    return os.waitstatus_to_exitcode(status)


def forked_in_a_thread(child: Callable[[], int]) -> int:
    """The same, where no event loop is running."""
    returned: list[int] = []
    thread = threading.Thread(target=lambda: returned.append(forked(child)))
    thread.start()
    thread.join()
    return returned[0]


def inode_of(conn: Any) -> int:
    descriptor: int = conn.extra(SocketAttribute.raw_socket).fileno()
    return os.fstat(descriptor).st_ino


def descriptors_of(inode: int) -> int:
    """How many of this process' descriptors are that socket."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the one that listdir() used
            found += os.stat(f"/proc/self/fd/{name}").st_ino == inode
    return found


def connected_to(port: int) -> int:
    """How many of this process' descriptors are accepted connections of *port*."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError), socket.socket(fileno=os.dup(int(name))) as sock:
            if sock.family is socket.AF_INET and sock.getsockname()[1] == port:
                found += bool(sock.getpeername())
    return found


def live(inode: int, control: int) -> int:
    """A child that answers."""
    os.write(1, json.dumps([os.getpid(), descriptors_of(inode)]).encode() + b"\n")
    while said := os.read(control, 100):
        os.write(1, said)
    return 0


def by_way(way: str, child: Callable[[], int]) -> Any:
    """Fork; what it returns is to be kept."""
    if way == "fork":
        return fork(child)
    if way == "thread":
        thread = threading.Thread(target=fork, args=(child,))
        thread.start()
        thread.join()
        return thread
    forking = multiprocessing.get_context("fork")
    if way == "process":
        process = forking.Process(target=child)
        process.start()
        return process
    assert way == "pool"
    pool = ProcessPoolExecutor(1, mp_context=forking)
    return pool, pool.submit(child)


async def main(kind: str, way: str, control: int) -> None:
    async def handler(conn: Connection) -> None:
        await conn.send(b"half")
        kept = by_way(way, partial(live, inode_of(conn), control))
        await anyio.sleep_forever()
        del kept

    async with serve(kind, handler) as service:
        os.write(1, f"{service.port}\n".encode())
        await anyio.sleep_forever()


if __name__ == "__main__":
    loop, kind, way, control = sys.argv[1:]
    anyio.run(
        main,
        kind,
        way,
        int(control),
        backend="trio" if loop == "trio" else "asyncio",
        backend_options={"use_uvloop": True} if loop == "uvloop" else {},
    )
