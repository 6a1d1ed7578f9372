"""The programs of the benchmark, as a plain socket on the other side sees them."""

from __future__ import annotations

import select
import shutil
import socket
import subprocess
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

from evidence import bench
from evidence.bench.servers import ANYIO_LOOPS, is_available
from evidence.processes import Process, module
from evidence.sockets import HOST, RESET_ON_CLOSE

LOAD = Path(bench.__file__).with_name("load")
MESSAGE = 64
DOWNLOAD = 4 * 2**20
CLIENTS = 3
LATER = 0.2  # seconds, in which a message that is on its way would have come
PATIENCE = 20.0


# The rules by hand: a comparison is worth something if both sides do what is compared.


@contextmanager
def client(loop: str, workload: str) -> Iterator[tuple[socket.socket, Process]]:
    if not is_available("by_hand", loop):
        pytest.skip(f"{loop} is not here")
    with Process("by_hand", module("bench.servers", "by_hand", loop, workload)) as server:
        address = HOST, int(server.line())
        with socket.create_connection(address, timeout=PATIENCE) as sock:
            sock.sendall(b"x" * MESSAGE)
            assert sock.recv(MESSAGE, socket.MSG_WAITALL) == b"x" * MESSAGE
            yield sock, server


@pytest.mark.parametrize("loop", ANYIO_LOOPS)
class TestByHand:
    def test_failure_resets(self, loop: str) -> None:
        with client(loop, "rst") as (sock, _), pytest.raises(ConnectionResetError):
            sock.recv(1)

    def test_cancellation_resets(self, loop: str) -> None:
        with client(loop, "echo") as (sock, server):
            server.tell()
            with pytest.raises(ConnectionResetError):
                sock.recv(1)

    def test_death_resets(self, loop: str) -> None:
        with client(loop, "echo") as (sock, server):
            server.kill()
            with pytest.raises(ConnectionResetError):
                sock.recv(1)

    def test_fin_stays_a_fin_with_a_client_still_uploading(self, loop: str) -> None:
        with client(loop, "fin") as (sock, _):
            sock.sendall(b"x" * 100_000)
            assert sock.recv(1) == b""
            sock.sendall(b"x" * 100_000)  # an RST would answer this if it were closed
            sock.shutdown(socket.SHUT_WR)
            assert sock.recv(1) == b""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_download_of_the_protocol_ends_without_a_complaint(
    loop: str, capfd: pytest.CaptureFixture[str]
) -> None:
    if not is_available("asyncio_protocol", loop):
        pytest.skip(f"{loop} is not here")
    row = "asyncio_protocol", loop, "download"
    with Process("protocol", module("bench.servers", *row)) as server:
        address = HOST, int(server.line())
        for _ in range(10):
            with socket.create_connection(address, timeout=PATIENCE) as sock:
                sock.sendall(b"%d" % DOWNLOAD)
                size = sum(map(len, iter(lambda: sock.recv(65536), b"")))
                assert size == DOWNLOAD
    assert capfd.readouterr().err == ""


# The load: its two patterns.


@pytest.fixture(scope="module")
def load_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None or not hasattr(select, "epoll"):
        pytest.skip("the load is a program in C for Linux")
    result = tmp_path_factory.mktemp("load") / "load"
    warnings = ["-Wall", "-Wextra", "-Werror"]
    sources = sorted(LOAD.glob("*.c"))
    subprocess.run([compiler, *warnings, "-o", result, *sources], check=True)
    return result


def take(sock: socket.socket) -> bytes:
    return sock.recv(MESSAGE, socket.MSG_WAITALL)


def is_silent(sock: socket.socket) -> bool:
    sock.settimeout(LATER)
    try:
        sock.recv(1, socket.MSG_PEEK)
    except TimeoutError:
        return True
    finally:
        sock.settimeout(PATIENCE)
    return False


@contextmanager
def connected(
    load_program: Path, mode: str, amount: int
) -> Iterator[tuple[list[socket.socket], Process]]:
    """The server's ends of the load's connections, with a message under way on each."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server((HOST, 0)))
        port = listener.getsockname()[1]
        command = load_program, mode, port, CLIENTS, amount
        load = stack.enter_context(Process("load", command))
        listener.settimeout(PATIENCE)
        socks = [stack.enter_context(listener.accept()[0]) for _ in range(CLIENTS)]
        for sock in socks:
            sock.settimeout(PATIENCE)
            sock.sendall(take(sock))  # the one that says that it is open
        assert load.line() == "open"
        load.tell()
        yield socks, load


def test_clients_in_lock_step_wait_for_each_other(load_program: Path) -> None:
    with connected(load_program, "lockstep", 2 * CLIENTS) as (socks, _):
        messages = [take(sock) for sock in socks]
        for sock, message in zip(socks[:-1], messages, strict=False):
            sock.sendall(message)
        assert is_silent(socks[0])
        socks[-1].sendall(messages[-1])
        assert all(take(sock) for sock in socks)


def test_independent_clients_do_not_wait_for_each_other(load_program: Path) -> None:
    with connected(load_program, "pingpong", 2 * CLIENTS) as (socks, _):
        messages = [take(sock) for sock in socks]
        socks[0].sendall(messages[0])
        assert take(socks[0]) != messages[0]


@pytest.mark.parametrize("mode", ["lockstep", "pingpong"])
def test_load_sees_the_endings_after_the_last_answer(
    load_program: Path, mode: str
) -> None:
    with connected(load_program, mode, CLIENTS) as (socks, load):
        for sock in socks:
            sock.sendall(take(sock))
        assert '"done": 3, "fin": 0, "rst": 0, "other": 0' in load.line()
        assert is_silent(socks[0])  # not ended yet
        load.tell()
        for sock in socks:
            assert sock.recv(1) == b""
        socks[0].setsockopt(*RESET_ON_CLOSE)
        for sock in socks:
            sock.close()
        assert '"fin": 2, "rst": 1, "other": 0, "wrong": 0' in load.line()


@pytest.mark.parametrize("mode", ["lockstep", "pingpong"])
def test_load_counts_an_end_before_the_answer_as_neither(
    load_program: Path, mode: str
) -> None:
    with connected(load_program, mode, CLIENTS) as (socks, load):
        take(socks[0])
        socks[0].close()
        for sock in socks[1:]:
            sock.sendall(take(sock))
        assert '"done": 2, "fin": 0, "rst": 0, "other": 1' in load.line()
        load.tell()
        for sock in socks[1:]:
            assert sock.recv(1) == b""
            sock.close()
        assert '"fin": 2, "rst": 0, "other": 1, "wrong": 0' in load.line()
