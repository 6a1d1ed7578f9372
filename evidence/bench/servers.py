"""The servers that are compared.

`python -m evidence.bench.servers CONTENDER LOOP WORKLOAD` is one of them. See
`contenders/__init__.py` for the workloads, and for what a server does. LOOP is `own` for
those that have only one.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from evidence import loops
from evidence.sockets import allow_descriptors

RULES = (
    "a failure resets, at once",
    "armed: a crash resets",
    "a FIN stays a FIN",
    "nothing torn passes for whole",
    "the end is reported",
)


@dataclass(frozen=True)
class Contender:
    title: str
    module: str
    loops: tuple[str, ...]
    rules: tuple[str, str, str, str, str]  # "yes", "no", and what lies between


ANYIO_LOOPS = loops.LOOPS
LOOPS = (*ANYIO_LOOPS, "own")
EVERY_RULE = ("yes", "yes", "yes", "yes", "yes")

# They take turns in this order. Those that the targets compare are neighbours, since the
# machine changes the less, the shorter the time between two turns.
CONTENDERS = {
    "anyio_rst": Contender("`serve_tcp`", "on_anyio", ANYIO_LOOPS, EVERY_RULE),
    "anyio": Contender(
        "AnyIO",
        "on_anyio",
        ANYIO_LOOPS,
        (
            "by hand",  # `async with stream` sends FIN, whatever happens inside
            "no",
            "no",  # closes with unread input
            "no",  # a send that was cancelled leaves no trace
            "no",
        ),
    ),
    "scope": Contender("`connection_scope`", "on_anyio", ANYIO_LOOPS, EVERY_RULE),
    "by_hand": Contender(
        "AnyIO, rules by hand",
        "on_anyio",
        ANYIO_LOOPS,
        (
            "yes",
            "yes",
            "in part",  # a slow reader that needs longer than the limit gets an RST
            "no",  # a send that was cancelled leaves no trace
            "no",
        ),
    ),
    "trio": Contender(
        "Trio",
        "on_trio",
        ("trio",),
        (
            "by hand",  # serve_tcp closes the stream of a failed handler: FIN
            "no",
            "no",  # closes with unread input
            "no",  # a send_all() that was cancelled leaves no trace
            "no",
        ),
    ),
    "asyncio_streams": Contender(
        "asyncio streams",
        "on_asyncio",
        ("asyncio", "uvloop"),
        (
            "by hand",  # abort() alone is a FIN too
            "no",
            "no",  # closes with unread input
            "yes",  # write() takes all into a buffer, close() sends all of that
            "no",
        ),
    ),
    "asyncio_scoped": Contender(
        "asyncio streams, scoped",
        "on_asyncio_scoped",
        ("asyncio", "uvloop"),
        (
            "yes",
            "in part",  # from the handler's start on
            "yes",
            "yes",
            "yes",
        ),
    ),
    "asyncio_protocol": Contender(
        "asyncio protocol",
        "on_asyncio",
        ("asyncio", "uvloop"),
        (
            "by hand",
            "no",
            "no",
            "yes",
            "in part",  # connection_lost() tells what the peer did
        ),
    ),
    "twisted": Contender(
        "Twisted",
        "on_twisted",
        ("own",),
        (
            "by hand",  # abortConnection() resets; an exception is a FIN
            "no",
            "no",  # closes with unread input
            "yes",  # write() takes all into a buffer, loseConnection() sends all of that
            "in part",  # connectionLost() tells what the peer did
        ),
    ),
    "node": Contender(
        "Node.js",
        "on_node.js",
        ("own",),
        (
            "by hand",  # resetAndDestroy(); an exception ends the process
            "no",
            "without limit",  # end() sends FIN, and reads on until the client's
            "yes",  # write() takes all into a buffer, end() sends all of that
            "in part",  # "error" and "close" tell what the peer did
        ),
    ),
    "epoll": Contender(
        "bare epoll", "on_epoll", ("own",), ("by hand", "no", "no", "no", "no")
    ),
}


OURS = ("anyio_rst", "scope")
# A wrong ending of these makes the run fail, since the targets compare them with ours.
CHECKED = (*OURS, "asyncio_scoped", "anyio", "by_hand")


def title(row: tuple[str, str]) -> str:
    name, loop = row
    contender = CONTENDERS[name]
    return contender.title if len(contender.loops) == 1 else f"{contender.title}, {loop}"


def is_available(contender: str, loop: str) -> bool:
    if contender == "node":
        return shutil.which("node") is not None
    needed = {"twisted": "twisted", "uvloop": "uvloop", "trio": "trio"}
    module = needed.get(contender) or needed.get(loop)
    return module is None or find_spec(module) is not None


def main(contender: str, loop: str, workload: str) -> None:
    allow_descriptors()
    module = CONTENDERS[contender].module
    if module.endswith(".js"):
        script = Path(__file__).parent / "contenders" / module
        os.execvp("node", ["node", str(script), workload])
    library = importlib.import_module(f"{__package__}.contenders.{module}")
    library.run(contender, loop, workload)


if __name__ == "__main__":
    main(*sys.argv[1:])
