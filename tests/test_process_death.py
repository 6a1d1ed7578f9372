"""However a process dies, its connections are reset, judged by a plain socket.

The servers are child processes: see dying.py.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from anyio_rst import PeerClose, _sockets

from serving import LONG, Peer, Seen

# As in dying.py.
REQUEST = b"?"
HALF = b"half"

# A way to die, and the exit status that shows that it was this one.
DEATHS = {
    "os._exit": 7,
    "SIGKILL": -signal.SIGKILL,
    "SIGSEGV": -signal.SIGSEGV,
    "sys.exit": 5,
    "KeyboardInterrupt": -signal.SIGINT,
    "exception": 1,
    "return from main": 0,
}

LOOPS_AND_KINDS: list[Any] = [
    pytest.param(loop, kind, id=f"{loop}-{kind}")
    for loop in ("asyncio", "uvloop", "trio")
    for kind in ("native", "foreign", "trio")
    if kind != "trio" or loop == "trio"
]


@contextmanager
def server(loop: str, kind: str, death: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process of dying.py, not dead yet. It ends with the block at the latest."""
    script = Path(__file__).with_name("dying.py")
    with subprocess.Popen(
        [sys.executable, script, loop, kind, death],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def judge(process: subprocess.Popen[bytes]) -> Seen:
    """What a peer of the server sees, from its request to the end."""
    assert process.stdout is not None
    with Peer(int(process.stdout.readline())) as peer:
        peer.sock.sendall(REQUEST)
        return anyio.run(peer.read_to_end)


def exit_status(process: subprocess.Popen[bytes]) -> int:
    """What the process exits with, by itself; its stdin ends."""
    process.communicate(timeout=LONG)
    return process.returncode


@pytest.mark.parametrize("death", DEATHS)
@pytest.mark.parametrize(("loop", "kind"), LOOPS_AND_KINDS)
def test_death_of_the_process_resets(loop: str, kind: str, death: str) -> None:
    with server(loop, kind, death) as process:
        assert judge(process) == Seen(HALF, PeerClose.RST)
        assert exit_status(process) == DEATHS[death]


@pytest.mark.parametrize(("loop", "kind"), LOOPS_AND_KINDS)
def test_forgotten_stream_resets(loop: str, kind: str) -> None:
    if _sockets._anyio_version() < (4, 16) and kind == "foreign" and loop != "trio":
        pytest.skip("the loop goes on reading with this AnyIO: nothing is forgotten")
    with server(loop, kind, "forgotten") as process:
        assert judge(process) == Seen(HALF, PeerClose.RST)
        assert process.poll() is None
        assert exit_status(process) == 0


@pytest.mark.parametrize("loop", ["asyncio", "uvloop", "trio"])
def test_death_without_a_scope_looks_like_a_clean_end(loop: str) -> None:
    """So the judge can tell, and so there is a need for all this."""
    with server(loop, "plain", "SIGKILL") as process:
        assert judge(process) == Seen(HALF, PeerClose.FIN)
        assert exit_status(process) == DEATHS["SIGKILL"]
