"""The programs on the pages of docs/ do what the pages say, judged by plain sockets."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_pytest_plugin import ANYIO, CONFTEST
from test_readme import ROOT, ask, connect, free_port, on, running

import anyio_rst

import shown
from serving import LONG

DOCS = ROOT / "docs"
EXAMPLES = ROOT / "examples"

loops = pytest.mark.parametrize("loop", ["asyncio", "uvloop", "trio"])


def changed(program: str, old: str, new: str) -> str:
    assert program.count(old) == 1
    return program.replace(old, new)


def test_the_programs_shown_are_those_that_are_tested() -> None:
    """If not: `python docs/shown.py`. test_pytest_plugin.py runs those of one page."""
    for page in shown.PAGES:
        text = page.read_text()
        assert text == shown.with_programs(text)
        assert "literalinclude" not in text
    unmarked = re.compile(r"(?<! -->\n)^```python$", re.MULTILINE)
    pages = {page.name for page in DOCS.glob("*.md") if unmarked.search(page.read_text())}
    assert pages == {"testing.md"}


# The tutorial, in terminals.

TUTORIAL = (DOCS / "tutorial.md").read_text()
CLIENTS = ("python ask.py", "python add.py")
TESTS = "python -m pytest -q test_progress.py"


def commands(section: str) -> list[tuple[str, str]]:
    """Each command of the section, and what it prints."""
    blocks = re.findall(r"```console\n(.*?)```", section, re.DOTALL)
    return [
        (command, output)
        for block in blocks
        for command, output in re.findall(r"\$ (.*)\n((?:(?!\$ ).*\n)*)", block)
    ]


SECTIONS = {
    section.partition("\n")[0]: commands(section) for section in TUTORIAL.split("\n## ")
}
STEPS = [
    title
    for title, told in SECTIONS.items()
    if any(command.startswith(CLIENTS) for command, _ in told)
]


def test_the_tutorial_has_steps() -> None:
    assert len(STEPS) == 5
    (told,) = SECTIONS["6. Tests"]
    assert told[0] == TESTS


def is_as_told(told: str, output: str) -> bool:
    """But for port numbers, and where `...` leaves something out."""
    told, output = (
        re.sub(r"with (::ffff:)?127\.0\.0\.1:\d+", "with a client", text)
        for text in (told, output)
    )
    return doctest.OutputChecker().check_output(told, output, doctest.ELLIPSIS)


def set_up(directory: Path, loop: str, port: int) -> None:
    for path in (EXAMPLES / "tutorial").glob("*.py"):
        program = path.read_text().replace("8000", str(port))
        if "anyio.run(" in program:
            program = on(loop, program)
        if path.name == "timeouts.py":
            program, count = re.subn(r"fail_after\(3\)", "fail_after(0.5)", program)
            assert count == 1
        (directory / path.name).write_text(program)


def argv(command: str) -> list[str]:
    python, *arguments = command.split()
    assert python == "python"
    return [sys.executable, "-u", *arguments]


@contextlib.contextmanager
def server_in(directory: Path, command: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        argv(command),
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as server:
        try:
            yield server
        finally:
            server.kill()


def client_in(directory: Path, command: str) -> str:
    client = subprocess.run(
        argv(command),
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LONG,
    )
    return client.stdout


def printed_by(server: subprocess.Popen[str], told: str) -> str:
    """All that *server* printed, once that is *told*."""
    assert server.stdout is not None
    output = ""
    give_up = threading.Timer(LONG, server.kill)
    give_up.start()
    while not is_as_told(told, output) and (line := server.stdout.readline()):
        output += line
    give_up.cancel()
    server.kill()
    return output + server.stdout.read()


@loops
@pytest.mark.parametrize("title", STEPS)
def test_tutorial(title: str, loop: str, tmp_path: Path) -> None:
    set_up(tmp_path, loop, free_port())
    told = SECTIONS[title]
    asked = [one for one in told if one[0].startswith(CLIENTS)]
    ((command, told_by_server),) = [one for one in told if one not in asked]
    with server_in(tmp_path, command) as server:
        for command, told_by_client in asked:
            output = client_in(tmp_path, command)
            while "ConnectionRefusedError" in output:  # the server does not yet listen
                assert server.poll() is None, server.communicate()
                output = client_in(tmp_path, command)
            assert is_as_told(told_by_client, output), output
        output = printed_by(server, told_by_server)
    assert is_as_told(told_by_server, output), output


@pytest.mark.skipif(
    sys.version_info < (3, 11), reason="anyio.run() raises CancelledError there"
)
@pytest.mark.parametrize("title", STEPS)
def test_ctrl_c_stops_each_server_of_the_tutorial(title: str, tmp_path: Path) -> None:
    port = free_port()
    set_up(tmp_path, "asyncio", port)
    command = next(one for one, _ in SECTIONS[title] if not one.startswith(CLIENTS))
    with server_in(tmp_path, command) as server:
        connect(port, server).close()
        server.send_signal(signal.SIGINT)
        output, _ = server.communicate(timeout=LONG)
        assert server.returncode == 0
    assert "Traceback" not in output


def run_tests(directory: Path) -> str:
    set_up(directory, "asyncio", free_port())
    alone = " ".join([*ANYIO, "-p no:cacheprovider"])
    tests = subprocess.run(
        argv(TESTS),
        cwd=directory,
        env={**os.environ, "PYTEST_ADDOPTS": alone, "COLUMNS": "80"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=5 * LONG,  # ten tests
    )
    return re.sub(r"in [\d.]+s", "in N s", tests.stdout)


def test_tests_of_the_tutorial(tmp_path: Path) -> None:
    ((_, told),) = SECTIONS["6. Tests"]
    assert run_tests(tmp_path) == re.sub(r"in [\d.]+s", "in N s", told)


def test_tests_of_the_tutorial_on_each_loop(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(textwrap.dedent(CONFTEST))
    assert "\n9 passed in" in run_tests(tmp_path)


# An exception that is a normal end.


FINISH_ON = re.findall(
    r"^\| ((?:`\w+`,? ?)+)(.*) \| ((?:`\w+`, )+)(FIN|RST)",
    (DOCS / "finish_on.md").read_text(),
    re.MULTILINE,
)


def lines_of(cell: str) -> str:
    return "".join(f"{word}\n" for word in re.findall(r"`(\w+)`", cell))


@loops
def test_finish_on(loop: str) -> None:
    assert len(FINISH_ON) == 3
    with running(on(loop, (EXAMPLES / "finish_on.py").read_text())) as (port, server):
        for sent, _, got, close in FINISH_ON:
            answer = lines_of(got).encode()
            assert ask(port, server, lines_of(sent)) == (answer, close)


@loops
def test_what_incomplete_read_leaves_in_the_buffer(loop: str) -> None:
    program = changed(
        (EXAMPLES / "finish_on.py").read_text(),
        'await lines.receive_until(b"\\n", 100)',
        "await tell(lines)",
    )
    tell = """
async def tell(lines: BufferedByteReceiveStream) -> bytes:
    try:
        return await lines.receive_until(b"\\n", 100)
    except anyio.IncompleteRead:
        print(lines.buffer, flush=True)
        raise

class Quit("""
    program = on(loop, changed(program, "class Quit(", tell))
    with running(program) as (port, server):
        assert server.stdout is not None
        ask(port, server, "hello\n")
        assert server.stdout.readline() == "b''\n"
        ask(port, server, "hello\nqui")
        assert server.stdout.readline() == "b'qui'\n"


# Servers: one's own listener, and those to move from.

HALF = b"Hello, "
ANSWER = b"Hello, ADA"


def ask_all(program: str) -> dict[str, tuple[bytes, str]]:
    """What clients of the greeting get, and how it ends."""
    with running(program) as (port, server):
        assert ask(port, server, "Ada") == (ANSWER, "FIN")
        raised = ask(port, server, "Zoë")
        assert ask(port, server, "Ada") == (ANSWER, "FIN")  # the server goes on
        return {"raised": raised, "uploading": upload(port, server)}


def upload(port: int, server: subprocess.Popen[str]) -> tuple[bytes, str]:
    """Send much more than a handler receives at once, before looking at the answer."""
    with connect(port, server) as sock:
        answer = b""
        try:
            sock.sendall(b"a" * 8_000_000)
            with contextlib.suppress(OSError):  # it may have been reset already
                sock.shutdown(socket.SHUT_WR)
            while chunk := sock.recv(65536):
                answer += chunk
        except (BrokenPipeError, ConnectionResetError):
            return b"", "RST"
        assert set(answer[len(HALF) :]) == set(b"A")
        return answer[: len(HALF)] + b"...", "FIN"


TRUE = {"raised": (HALF, "RST"), "uploading": (HALF + b"...", "FIN")}


@loops
@pytest.mark.parametrize(
    "name", ["own_listener", "migrating/anyio_after", "migrating/twisted_after"]
)
def test_servers_of_anyio(name: str, loop: str) -> None:
    assert ask_all(on(loop, (EXAMPLES / f"{name}.py").read_text())) == TRUE


@pytest.mark.parametrize(
    "name",
    [
        "own_trio_listener",
        "migrating/trio_after",
        "migrating/trio_scoped",
        "migrating/asyncio_after",
    ],
)
def test_servers_of_one_loop(name: str) -> None:
    assert ask_all((EXAMPLES / f"{name}.py").read_text()) == TRUE


MIGRATING = (DOCS / "migrating.md").read_text()
CELL = {"nothing": b"", "half": HALF, "the answer": HALF + b"..."}


def told_of(server: str) -> dict[str, tuple[bytes, str]]:
    """The row of the table."""
    ((raised, uploading),) = re.findall(
        rf"^\| {server} \| (.*) \| (.*) \|$", MIGRATING, re.MULTILINE
    )

    def seen(cell: str) -> tuple[bytes, str]:
        data, _, close = cell.rpartition(", ")
        return CELL[data or "nothing"], close

    return {"raised": seen(raised), "uploading": seen(uploading)}


def test_the_table_tells_of_anyio_rst() -> None:
    assert told_of("`anyio_rst`") == TRUE


@pytest.mark.parametrize("server", ["AnyIO", "Trio", "asyncio", "Twisted"])
def test_what_one_moves_from(server: str) -> None:
    assert ask_all(before(server.lower())) == told_of(server)


def test_one_line_for_a_program_on_asyncios_streams() -> None:
    page = (DOCS / "asyncio_streams.md").read_text()
    scoped = "start_server(asyncio_streams.scoped(greet), port"
    assert scoped in page
    program = changed(before("asyncio"), "start_server(greet, port", scoped)
    assert ask_all("from anyio_rst import asyncio_streams\n" + program) == TRUE


def before(library: str) -> str:
    return (EXAMPLES / "migrating" / f"{library}_before.py").read_text()


@pytest.mark.parametrize("library", ["anyio", "trio"])
def test_exception_ends_the_server(library: str) -> None:
    program = changed(before(library), "except Exception:", "except EOFError:")
    with running(program) as (port, server):
        ask(port, server, "Zoë")
        _, errors = server.communicate(timeout=LONG)
        assert server.returncode == 1
        assert "UnicodeDecodeError" in errors


def test_abort_of_asyncio_is_no_reset() -> None:
    program = changed(before("asyncio"), "writer.close()", "writer.transport.abort()")
    with running(program) as (port, server):
        assert ask(port, server, "Ada") == (ANSWER, "FIN")


def test_abort_of_twisted_is_a_reset() -> None:
    program = changed(before("twisted"), "callLater(60,", "callLater(0.1,")
    with running(program) as (port, server), connect(port, server) as sock:
        with pytest.raises(ConnectionResetError):
            sock.recv(100)


@loops
def test_timeout_instead_of_the_abort_of_twisted(loop: str) -> None:
    after = (EXAMPLES / "migrating" / "twisted_after.py").read_text()
    program = on(loop, changed(after, "fail_after(60)", "fail_after(0.1)"))
    with running(program) as (port, server), connect(port, server) as sock:
        with pytest.raises(ConnectionResetError):
            sock.recv(100)


def test_how_twisted_tells_of_a_client_s_end() -> None:
    head = "def connectionLost(self, reason):\n"
    tell = head + "        print(reason.type.__name__, flush=True)\n"
    with running(changed(before("twisted"), head, tell)) as (port, server):
        assert server.stdout is not None
        connect(port, server).close()
        assert server.stdout.readline() == "ConnectionDone\n"
        with connect(port, server) as sock:
            option = struct.pack("ii", 1, 0)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, option)
        assert server.stdout.readline() == "ConnectionLost\n"


def test_reference_has_every_public_name() -> None:
    text = (DOCS / "reference.md").read_text()
    directive = r"^\.\. (currentmodule|auto(?!module)\w+):: ([\w.]+)"
    found: dict[str, list[str]] = {}
    module = ""
    for kind, name in re.findall(directive, text, re.MULTILINE):
        if kind == "currentmodule":
            module = name
        else:
            found.setdefault(module, []).append(name)
    for module, names in found.items():
        assert sorted(names) == sorted(importlib.import_module(module).__all__)
    assert anyio_rst.__name__ in found
