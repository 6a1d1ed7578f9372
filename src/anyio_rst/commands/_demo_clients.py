"""The clients of the demo, a blocking socket and curl: whether they hear the truth."""

from __future__ import annotations

import socket
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from anyio_rst._peer import PeerClose

from ._demo_cases import Way, next_line
from ._demo_servers import LOOPBACK

# Seconds that a client waits for an end of any kind.
PATIENCE = 10


@dataclass(frozen=True)
class Seen:
    """What a client saw of an answer, and whether that was true."""

    text: str
    true: bool


Client = Callable[[Way, subprocess.Popen[str]], Seen]


def is_true(*, claimed: bool, finished: bool, whole: bool) -> bool:
    """Whether a client was told the truth.

    Args:
      claimed: it was told that it has the whole answer.
      finished: the handler finished the answer.
      whole: the client has all of it.
    """
    if claimed:
        return finished and whole
    return not finished


def see_by_socket(way: Way, server: subprocess.Popen[str]) -> Seen:
    """Read to the end, and tell by which kind of end it was."""
    data = bytearray()
    close = PeerClose.FIN
    port = int(next_line(server))
    with socket.create_connection((LOOPBACK, port), timeout=PATIENCE) as sock:
        try:
            try:
                sock.sendall(b"request")
                if way.before_reading is not None:
                    way.before_reading(sock, server)
            except (BrokenPipeError, ConnectionResetError):
                # The kernel tells once. What had arrived before can still be read, and
                # then comes an end like any other.
                close = PeerClose.RST
            while chunk := sock.recv(65536):
                data += chunk
        except ConnectionResetError:
            close = PeerClose.RST
        except TimeoutError:
            close = PeerClose.NONE
    end = "no end" if close is PeerClose.NONE else close.value
    claimed = close is PeerClose.FIN
    return judge(way, bytes(data), end, claimed=claimed)


def see_by_curl(way: Way, server: subprocess.Popen[str]) -> Seen:
    """Download with curl, and tell by its exit status."""
    url = f"http://{LOOPBACK}:{int(next_line(server))}/"
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "answer")
        # --disable: no ~/.curlrc.
        command = ["curl", "--disable", "--silent", "--noproxy", "*"]
        command += ["--max-time", str(PATIENCE), "--output", str(file), url]
        status = subprocess.run(command, check=False).returncode
        data = file.read_bytes() if file.exists() else b""
    return judge(way, data, f"exit {status}", claimed=status == 0)


def judge(way: Way, data: bytes, end: str, *, claimed: bool) -> Seen:
    true = is_true(claimed=claimed, finished=way.finishes, whole=data == way.answer)
    return Seen(f"{len(data):,} of {len(way.answer):,} B, {end}", true)
