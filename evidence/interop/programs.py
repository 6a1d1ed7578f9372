"""Servers that are programs: found, run, and ended."""

from __future__ import annotations

import glob
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from evidence.sockets import HOST

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PATIENCE = 30.0  # seconds, for a program to listen
POLL = 0.01  # seconds

# Where Debian has programs that PATH does not have.
ELSEWHERE = ("/usr/sbin", "/usr/lib/postgresql/*/bin")


class Unavailable(Exception):
    """What there would have to be for a server to run."""


def find(program: str) -> str | None:
    found = shutil.which(program)
    for directory in ELSEWHERE:
        for path in sorted(glob.glob(f"{directory}/{program}")):
            found = found or path
    return found


@contextmanager
def running(command: Sequence[str], ports: Sequence[int]) -> Iterator[None]:
    """*command* in the foreground, listening on all *ports*, until the end of the block.

    Raises:
      Unavailable: it does not run; with what it says.
    """
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(command, stdout=said, stderr=said) as process,
    ):
        try:
            for port in ports:
                deadline = time.monotonic() + PATIENCE
                while not listens(port):
                    if process.poll() is not None or time.monotonic() > deadline:
                        said.seek(0)
                        raise Unavailable(f"{command[0]} does not run: {said.read()}")
                    time.sleep(POLL)
            yield
        finally:
            process.terminate()


def listens(port: int) -> bool:
    with suppress(ConnectionRefusedError):
        socket.create_connection((HOST, port), PATIENCE).close()
        return True
    return False
