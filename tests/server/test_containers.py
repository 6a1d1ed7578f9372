"""Servers as PID 1 of a namespace without an init, as in a container: docs/containers.md.

PID 1 has no default actions of signals: pid_namespaces(7).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_readme import connect, free_port
from test_serve_processes import (
    EXAMPLES,
    Process,
    call,
    echoes,
    example,
    finish,
    loops,
    read_to_end,
    running,
)
from test_workers import COUNT, PROGRAM, ask, both_end, port_of, reports, workers

from anyio_rst import PeerClose

from serving import LONG, Seen

NAMESPACE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
if os.geteuid():
    NAMESPACE += ["--user", "--map-root-user"]


def can_unshare() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode == 0


needs_namespaces = pytest.mark.skipif(not can_unshare(), reason="no PID namespaces")


def children_of(parent: int) -> dict[int, str]:
    """Their states, by number: proc_pid_stat(5)."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            before, _, rest = stat.read_text().rpartition(") ")
        except (FileNotFoundError, ProcessLookupError):
            continue
        state, ppid, *_ = rest.split()
        if int(ppid) == parent:
            found[int(before.split()[0])] = state
    return found


def first_of(process: Process) -> int:
    """The number outside of the one that is PID 1 inside."""
    (number,) = children_of(process.pid)
    return number


PAGE = (EXAMPLES.parent / "docs" / "containers.md").read_text()


def command_of_the_page() -> list[str]:
    """What the image runs."""
    ((found,)) = re.findall(r"^CMD (\[.*\])$", PAGE, re.MULTILINE)
    python, name, *options = json.loads(found)
    assert (python, name) == ("python", PROGRAM.name)
    return [sys.executable, str(PROGRAM), *options]


@needs_namespaces
def test_pid_1_of_the_page() -> None:
    command = command_of_the_page()
    command[command.index("8000")] = "0"
    with running([*NAMESPACE, *command]) as process:
        port = port_of(process)
        with call(port) as idle, call(port) as asking:
            ask(idle)
            ask(asking)
            asking.sendall(b"half ")
            os.kill(first_of(process), signal.SIGTERM)
            both_end(idle, asking)
        rest = process.communicate(timeout=LONG)
        assert (process.returncode, *rest) == (0, "", "")


@needs_namespaces
@loops
def test_pid_1_restarts_and_reaps(loop: str) -> None:
    with workers(loop, prefix=NAMESPACE) as (_, process):
        first = first_of(process)
        old = children_of(first)
        assert len(old) == COUNT
        dying = next(iter(old))
        os.kill(dying, signal.SIGKILL)
        assert re.fullmatch(r"worker \d+ died: -9", reports(process))
        os.kill(first, signal.SIGHUP)
        assert reports(process) == "restarted"
        there = children_of(first)
        assert len(there) == COUNT
        assert "Z" not in there.values()
        assert not old.keys() & there.keys()
        os.kill(first, signal.SIGTERM)
        rest = process.communicate(timeout=LONG)
        assert (process.returncode, *rest) == (0, "", "")


@needs_namespaces
@loops
def test_pid_1_of_one_process(loop: str) -> None:
    port = free_port()
    command = example("graceful.py", loop, port=port)
    with running([*NAMESPACE, *command]) as process:
        with connect(port, process) as sock:
            echoes(sock, b"before")
            os.kill(first_of(process), signal.SIGTERM)
            echoes(sock, b"after")
            finish(sock)
        _, errors = process.communicate(timeout=LONG)
        assert (process.returncode, errors) == (0, "")


@needs_namespaces
def test_pid_1_without_a_handler_is_deaf() -> None:
    port = free_port()
    program = example("own_listener.py", "asyncio", port=port)
    with running([*NAMESPACE, *program]) as process, connect(port, process) as sock:
        first = first_of(process)
        os.kill(first, signal.SIGTERM)
        sock.sendall(b"Ada")
        assert read_to_end(sock) == Seen(b"Hello, ADA", PeerClose.FIN)
        os.kill(first, signal.SIGKILL)
        process.wait(LONG)
