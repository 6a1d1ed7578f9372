"""The README and the docs say what is so."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import pytest
from test_demo import table

from anyio_rst._ending import KIND_OF

from serving import LONG

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)

GREETING, SCOPE, SERVER, CLIENT = BLOCKS
GRACEFUL = (ROOT / "examples" / "graceful.py").read_text()


def reserved() -> Iterator[int]:
    """Ports for this process alone: until its end it has a socket on the first of them.

    Others run these tests as well. The kernel gives none of them to whoever asks for any:
    ip_local_port_range of ip(7).
    """
    for first in range(5000, 10000, 50):  # of four digits, as those on the pages
        with contextlib.suppress(OSError):
            socket.create_server(("", first)).detach()
            return cycle(range(first + 1, first + 50))
    raise AssertionError("all ports are reserved")


PORTS = reserved()


def free_port() -> int:
    """A port that nobody has, nor gets before the program that it is for."""
    for port in PORTS:
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port
    raise AssertionError("PORTS never end")


def connect(port: int, server: subprocess.Popen[str]) -> socket.socket:
    while True:
        with contextlib.suppress(ConnectionRefusedError):  # not yet listening
            return socket.create_connection(("127.0.0.1", port), timeout=LONG)
        assert server.poll() is None


@contextlib.contextmanager
def running(block: str) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """The block as a program, on a port that is free."""
    port = free_port()
    program = [sys.executable, "-c", block.replace("8000", str(port))]
    with subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield port, process
        finally:
            process.kill()


def on(loop: str, program: str) -> str:
    """The text of a program, changed to run on *loop*."""
    options = {
        "asyncio": "",
        "uvloop": ', backend_options={"use_uvloop": True}',
        "trio": ', backend="trio"',
    }
    changed, count = re.subn(
        r"(?m)^( *anyio\.run\(.*)\)(?=$|  #)", rf"\1{options[loop]})", program
    )
    assert count == 1
    return changed


def ask(port: int, server: subprocess.Popen[str], word: str) -> tuple[bytes, str]:
    """What *server* answers to *word*, and with what it ends."""
    with connect(port, server) as sock:
        sock.sendall(word.encode())
        with contextlib.suppress(OSError):  # it may have been reset already
            sock.shutdown(socket.SHUT_WR)
        answer = b""
        try:
            while chunk := sock.recv(100):
                answer += chunk
        except ConnectionResetError:
            return answer, "RST"
        return answer, "FIN"


def test_the_ten_lines_do_what_they_say() -> None:
    assert len(GREETING.strip().splitlines()) <= 10
    with running(GREETING) as (port, server):
        assert ask(port, server, "Ada") == (b"Hello, ADA", "FIN")
        assert ask(port, server, "Zoë") == (b"Hello, ", "RST")
        assert ask(port, server, "Eve") == (b"Hello, EVE", "FIN")


def test_the_scope_does_what_it_says() -> None:
    with running(SCOPE) as (port, server):
        assert ask(port, server, "Ada") == (b"Ada", "FIN")
        server.send_signal(signal.SIGCONT)  # it still runs


def test_the_server_does_what_it_says() -> None:
    with running(SERVER) as (port, server):
        assert ask(port, server, "Ada") == (b"Ada", "FIN")
        assert server.stdout is not None
        assert f"{port})" in server.stdout.readline()
        assert "Ending(kind=<CloseKind.FIN: 'FIN'>" in server.stdout.readline()
    short_lived = SERVER.replace("live_for, 60", "live_for, 0.1")
    with running(short_lived) as (port, server), connect(port, server) as sock:
        with pytest.raises(ConnectionResetError):
            sock.recv(100)


@pytest.mark.parametrize(
    ("linger", "verdict"), [(None, "complete: b'Hello'"), (0, "truncated")]
)
def test_the_client_does_what_it_says(linger: int | None, verdict: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        block = CLIENT.replace("8000", str(listener.getsockname()[1]))
        block = block.replace("localhost", "127.0.0.1")
        with subprocess.Popen(
            [sys.executable, "-c", block], stdout=subprocess.PIPE, text=True
        ) as client:
            listener.settimeout(LONG)
            sock, _ = listener.accept()
            with sock:
                assert sock.recv(100) == b"Ada"
                sock.sendall(b"Hello")
                if linger is not None:
                    option = struct.pack("ii", 1, linger)
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, option)
            assert client.stdout is not None
            assert client.stdout.read() == f"{verdict}\n"


@pytest.mark.parametrize("loop", ["asyncio", "uvloop", "trio"])
@pytest.mark.parametrize("server", [GREETING, SCOPE, SERVER, GRACEFUL])
def test_each_of_the_servers_answers_the_client(server: str, loop: str) -> None:
    with running(on(loop, server)) as (port, process):
        answer, _ = ask(port, process, "Ada")  # it serves
        client = on(loop, CLIENT.replace("8000", str(port)))
        command = [sys.executable, "-c", client]
        told = subprocess.check_output(command, text=True, timeout=LONG)
        assert told == f"complete: {answer!r}\n"


def test_the_table_is_that_of_the_demo() -> None:
    """But for the numbers of bytes, which are not always the same."""

    def without_numbers(output: str) -> dict[str, list[str]]:
        return {
            name: [re.sub(r"[\d,]*\d", "N", cell) for cell in cells]
            for name, cells in table(output).items()
        }

    (printed,) = re.findall(r"```text\n(.*?)```", README.read_text(), re.DOTALL)
    demo = subprocess.run(
        [sys.executable, "-m", "anyio_rst", "demo"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    rows = without_numbers(printed)
    assert rows
    assert rows == without_numbers(demo.stdout)


def test_the_table_of_causes_is_that_of_the_code() -> None:
    text = (ROOT / "docs" / "endings.md").read_text()
    rows = re.findall(r"^\| `([A-Z_]+)` \| .* \| (FIN|RST|nothing)", text, re.MULTILINE)
    told = {cause: kind.replace("nothing", "DETACHED") for cause, kind in rows}
    assert told == {cause.name: kind.name for cause, kind in KIND_OF.items()}
