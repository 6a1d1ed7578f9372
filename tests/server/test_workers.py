"""examples/workers.py, a server of several processes."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from test_serve_processes import (
    EXAMPLES,
    Process,
    call,
    finish,
    line,
    loops,
    read_to_end,
    running,
)

from anyio_rst import PeerClose

from loading import loaded
from serving import LONG, Seen

PROGRAM = EXAMPLES / "workers.py"
COUNT = 2
FIN = Seen(b"", PeerClose.FIN)

# Restarts under load, and how many requests of either kind are answered meanwhile. 5 and
# 5000 take a quarter of a minute.
RESTARTS, REQUESTS = map(int, os.environ.get("WORKERS_LOAD", "1 500").split())

# One listening socket for all, on each loop; and on one of them a socket for each.
kinds = pytest.mark.parametrize(
    ("loop", "option"),
    [("asyncio", []), ("uvloop", []), ("trio", []), ("asyncio", ["--reuse-port"])],
    ids=["asyncio-one", "uvloop-one", "trio-one", "asyncio-each"],
)


@contextmanager
def workers(
    loop: str, *options: str, program: Path = PROGRAM, prefix: list[str] | None = None
) -> Iterator[tuple[int, Process]]:
    command = [*(prefix or []), sys.executable, str(program), "--port", "0"]
    command += ["--workers", str(COUNT), "--loop", loop, *options]
    with running(command, start_new_session=True) as process:
        yield port_of(process), process


def port_of(process: Process) -> int:
    assert process.stdout is not None
    said = process.stdout.readline()
    assert said.startswith("serving on "), process.communicate(timeout=LONG)
    return int(said.split()[-1])


def reports(process: Process) -> str:
    assert process.stderr is not None
    return process.stderr.readline().rstrip("\n")


def ask(sock: socket.socket, text: str = "hello") -> int:
    """Who answers *text*, the end of a line."""
    sock.sendall(f"{text}\n".encode())
    number, _, said = line(sock).partition(" ")
    assert said.endswith(text)
    return int(number)


def who(port: int) -> int:
    with call(port) as sock:
        number = ask(sock)
        finish(sock)
    return number


def all_of(port: int) -> set[int]:
    """The workers: the kernel gives each of them some connection in the end."""
    found: set[int] = set()
    deadline = time.monotonic() + LONG
    while len(found) < COUNT:
        assert time.monotonic() < deadline, found
        with ExitStack() as stack:  # at once, so that not always the same one is free
            several = [stack.enter_context(call(port)) for _ in range(20)]
            found |= {ask(sock) for sock in several}
    return found


def both_end(idle: socket.socket, asking: socket.socket) -> None:
    with idle:
        assert read_to_end(idle) == FIN
    ask(asking, "line")
    with asking:
        assert read_to_end(asking) == FIN


def restart(process: Process) -> None:
    process.send_signal(signal.SIGHUP)
    assert reports(process) == "restarted"


def end(process: Process) -> None:
    process.terminate()
    rest = process.communicate(timeout=LONG)
    assert (process.returncode, *rest) == (0, "", "")


@kinds
def test_restarts_lose_nothing(loop: str, option: list[str]) -> None:
    with workers(loop, *option) as (port, process):
        with loaded(port) as load:
            load.wait_for(100)
            for _ in range(RESTARTS):
                restart(process)
                load.wait_for(REQUESTS // RESTARTS)
        assert not load.lost
        end(process)


@kinds
def test_restart_replaces_all(loop: str, option: list[str]) -> None:
    with workers(loop, *option) as (port, process), ExitStack() as stack:
        old = all_of(port)
        asking = stack.enter_context(call(port))
        server = ask(asking)
        asking.sendall(b"half ")
        while True:
            idle = stack.enter_context(call(port))
            if ask(idle) == server:
                break
            idle.close()
        process.send_signal(signal.SIGHUP)
        with idle:
            assert read_to_end(idle) == FIN  # so the worker of both has been told
        assert ask(asking, "line") == server  # and "half line" was one request
        with asking:
            assert read_to_end(asking) == FIN
        assert reports(process) == "restarted"
        assert not old & all_of(port)
        end(process)


@loops
def test_sigterm_drains_all(loop: str) -> None:
    with workers(loop) as (port, process), ExitStack() as stack:
        idle = [stack.enter_context(call(port)) for _ in range(20)]
        asking = [stack.enter_context(call(port)) for _ in range(20)]
        for sock in [*idle, *asking]:
            ask(sock)
        for sock in asking:
            sock.sendall(b"half ")
        process.terminate()
        for sock in idle:
            with sock:
                assert read_to_end(sock) == FIN
        for sock in asking:
            ask(sock, "line")
            with sock:
                assert read_to_end(sock) == FIN
        rest = process.communicate(timeout=LONG)
        assert (process.returncode, *rest) == (0, "", "")


def test_deadline_resets_the_rest(tmp_path: Path) -> None:
    program = changed("GRACE = 8.0", "GRACE = 0.2", tmp_path)
    with workers("asyncio", program=program) as (port, process), call(port) as sock:
        ask(sock)
        sock.sendall(b"half ")
        process.terminate()
        assert read_to_end(sock) == Seen(b"", PeerClose.RST)
        rest = process.communicate(timeout=LONG)
        assert (process.returncode, *rest) == (0, "", "")


def changed(old: str, new: str, directory: Path) -> Path:
    program = PROGRAM.read_text()
    assert program.count(old) == 1
    path = directory / "workers.py"
    path.write_text(program.replace(old, new))
    return path


def test_worker_that_hangs_is_killed_in_the_end(tmp_path: Path) -> None:
    program = changed("GRACE = 8.0", "GRACE = 0.2", tmp_path)
    hangs = "    __import__('time').sleep(60)\n"
    text = program.read_text().replace(
        "        with conn.idle", f"    {hangs}        with conn.idle"
    )
    program.write_text(text)
    with workers("asyncio", program=program) as (port, process), call(port) as sock:
        ask(sock)
        process.terminate()
        assert read_to_end(sock) == Seen(b"", PeerClose.RST)
        assert process.wait(LONG) == 0


@kinds
def test_worker_that_dies_is_replaced(loop: str, option: list[str]) -> None:
    with workers(loop, *option) as (port, process):
        others = all_of(port)
        with call(port) as sock:
            dying = ask(sock)
            others.remove(dying)
            os.kill(dying, signal.SIGSTOP)
            sockets = [call(port) for _ in range(20)]  # its share is in the backlog
            os.kill(dying, signal.SIGKILL)
            assert read_to_end(sock) == Seen(b"", PeerClose.RST)
            assert reports(process) == f"worker {dying} died: -9"
        for waiting in sockets:
            with waiting:
                assert ask(waiting) != dying
                finish(waiting)
        assert others < all_of(port)
        end(process)


def test_workers_that_die_are_not_replaced_in_a_hurry(tmp_path: Path) -> None:
    program = changed("    while line:\n", "    os._exit(3)\n    while line:\n", tmp_path)
    begin = time.monotonic()
    with workers("asyncio", program=program) as (port, process):
        deaths = 0
        while deaths < 2 * COUNT:
            with call(port) as sock:
                sock.sendall(b"hello\n")
                assert read_to_end(sock) == Seen(b"", PeerClose.RST)
            deaths += 1
        # Each worker's first process, and then one a second.
        assert deaths <= COUNT * (1 + (time.monotonic() - begin) / 1.0)
        process.terminate()
        _, errors = process.communicate(timeout=LONG)
        assert process.returncode == 0
        assert re.fullmatch(r"(worker \d+ died: 3\n)+", errors)


def test_restart_brings_new_code(tmp_path: Path) -> None:
    program = changed('b"%d %b"', 'b"%d old %b"', tmp_path)
    with workers("asyncio", program=program) as (port, process), call(port) as sock:
        sock.sendall(b"line\n")
        assert line(sock).endswith(" old line")
        old = all_of(port)
        working = program.read_text()
        program.write_text("raise SystemExit(5)")
        process.send_signal(signal.SIGHUP)
        assert re.fullmatch(r"worker \d+ did not start: 5", reports(process))
        assert all_of(port) == old
        sock.sendall(b"line\n")  # the connection is still there
        assert line(sock).endswith(" old line")
        finish(sock)
        program.write_text(working.replace(" old ", " new "))
        restart(process)
        with call(port) as late:
            late.sendall(b"line\n")
            assert line(late).endswith(" new line")
        end(process)


@loops
def test_workers_drain_when_the_parent_is_killed(loop: str) -> None:
    with workers(loop) as (port, process), call(port) as idle, call(port) as asking:
        ask(idle)
        ask(asking)
        asking.sendall(b"half ")
        process.kill()
        both_end(idle, asking)
        process.communicate(timeout=LONG)  # they have its pipes until they are gone
        with pytest.raises(ConnectionRefusedError):
            call(port)


@loops
def test_ctrl_c_ends_it_once(loop: str) -> None:
    """It goes to all processes of a terminal: here, of a process group."""
    with workers(loop) as (port, process), call(port) as sock:
        ask(sock)
        os.killpg(process.pid, signal.SIGINT)
        with sock:
            assert read_to_end(sock) == FIN
        rest = process.communicate(timeout=LONG)
        assert (process.returncode, *rest) == (0, "", "")
