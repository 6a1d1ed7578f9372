"""The commands where their output is closed or full, and where a signal ends them."""

from __future__ import annotations

import os
import pty
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import pytest

from anyio_rst import __main__
from anyio_rst.commands._interruption import Interrupted, interruption
from anyio_rst.commands._output import WIDTH

from serving import LONG

PROGRAM = [sys.executable, "-m", "anyio_rst"]

COMMANDS = ["demo", "probe", "proxy", "watch"]

HELP = [["--help"], *([command, "--help"] for command in COMMANDS)]

FULL = Path("/dev/full")


def run(
    argv: list[str],
    redirections: str,
    stdout: int = subprocess.PIPE,
    *,
    buffered: bool = True,
) -> tuple[int, str, str]:
    """The status of the program, and what it says on both of its outputs."""
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {redirections}', "sh", *PROGRAM, *argv],
        env={**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1", "COLUMNS": "80"},
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        timeout=LONG,
        check=False,
    )
    return done.returncode, (done.stdout or b"").decode(), done.stderr.decode()


@contextmanager
def nobody_reads() -> Iterator[int]:
    """A pipe whose other end is closed."""
    receive, send = os.pipe()
    os.close(receive)
    try:
        yield send
    finally:
        os.close(send)


@contextmanager
def answered(argv: list[str]) -> Iterator[list[str]]:
    """*argv*, with a server that answers it if it is to probe one."""
    if argv != ["probe"]:
        yield argv
        return

    def answer() -> None:
        with listener.accept()[0] as sock:
            sock.sendall(b"x")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(LONG)
        answering = threading.Thread(target=answer)
        answering.start()
        yield [*argv, *map(str, listener.getsockname())]
        answering.join(LONG)


PROXY = ["proxy", "0", "127.0.0.1", "1"]

each_output = pytest.mark.parametrize(
    "argv",
    [["--help"], ["probe", "--help"], ["--version"], ["demo"], ["probe"], PROXY],
    ids=" ".join,
)


@each_output
@pytest.mark.parametrize(
    ("redirections", "reason", "buffered"),
    [
        (">/dev/full", "No space left on device", True),
        (">/dev/full", "No space left on device", False),
        (">&-", "Bad file descriptor", True),
        (">/dev/full 2>/dev/full", "", True),
        ("<&- >&- 2>&-", "", True),
    ],
)
def test_output_that_cannot_be_written_is_status_74(
    argv: list[str], redirections: str, reason: str, buffered: bool
) -> None:
    if "full" in redirections and not FULL.exists():
        pytest.skip("no /dev/full")
    with answered(argv) as command:
        done = run(command, redirections, buffered=buffered)
    named = argv[0] in COMMANDS and "--help" not in argv
    name = f"anyio-rst {argv[0]}" if named else "anyio-rst"
    line = f"{name}: cannot write the output: {reason}\n" if reason else ""
    assert done == (74, "", line)


@pytest.mark.parametrize("buffered", [True, False])
@each_output
def test_output_that_nobody_reads_is_status_141(argv: list[str], buffered: bool) -> None:
    with answered(argv) as command, nobody_reads() as pipe:
        assert run(command, "", pipe, buffered=buffered) == (141, "", "")


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-"])
@pytest.mark.parametrize(
    ("argv", "status"),
    [
        ([], 2),
        (["dance"], 2),
        (["probe", "host", "http"], 2),
        (["probe", "127.0.0.1", "1", "--send", "/no/such/file"], 2),
        (["probe", "127.0.0.1", "1"], 6),
    ],
    ids=str,
)
def test_complaint_that_cannot_be_written_changes_nothing(
    argv: list[str], status: int, redirection: str
) -> None:
    if "full" in redirection and not FULL.exists():
        pytest.skip("no /dev/full")
    assert run(argv, redirection) == (status, "", "")


@pytest.mark.parametrize("argv", HELP, ids=" ".join)
def test_help_fits_a_terminal(argv: list[str]) -> None:
    status, out, err = run(argv, "")
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= WIDTH


@pytest.mark.parametrize("argv", HELP, ids=" ".join)
def test_help_has_an_example_that_can_be_typed(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exited:
        __main__.main(argv)
    assert exited.value.code == 0
    (line,) = re.findall(r"^    .*anyio-rst (.*)$", capsys.readouterr().out, re.MULTILINE)
    example = __main__.parse(shlex.split(line))
    assert example.command == (argv[0] if len(argv) > 1 else "probe")


def test_version() -> None:
    assert run(["--version"], "") == (0, f"anyio-rst {version('anyio_rst')}\n", "")


def test_nothing_is_coloured_but_on_a_terminal() -> None:
    """From Python 3.14 on, argparse looks at one of the outputs only."""
    ours, theirs = pty.openpty()
    try:
        status, _, err = run(["dance"], "", theirs)
    finally:
        os.close(theirs)
        os.close(ours)
    assert status == 2
    assert "\x1b" not in err


def refusal(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the standard error gets of a command line that is wrong."""
    with pytest.raises(SystemExit) as exited:
        __main__.main(argv)
    assert exited.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


# Signals.


def test_interruption_is_held_back() -> None:
    passed = []
    with interruption.caught(signal.SIGINT):
        with pytest.raises(Interrupted):
            with interruption.held():
                signal.raise_signal(signal.SIGINT)
                passed.append("the first")
        signal.raise_signal(signal.SIGINT)
        passed.append("the second")  # one is enough
    assert passed == ["the first", "the second"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_signal_of_an_outer_one_is_not_raised_after_that_of_an_inner_one() -> None:
    with interruption.caught(signal.SIGINT):
        with pytest.raises(Interrupted), interruption.caught(signal.SIGTERM):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)


def test_interruption_wakes_what_holds_it_back() -> None:
    woken = []
    with interruption.caught(signal.SIGINT):
        with pytest.raises(Interrupted):
            with interruption.held():
                with interruption.waking(lambda: woken.append("in time")):
                    signal.raise_signal(signal.SIGINT)
                with interruption.waking(lambda: woken.append("too late")):
                    pass
    assert woken == ["in time", "too late"]


def test_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruption.caught(signal.SIGINT):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_commands_run_in_any_thread() -> None:
    statuses = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
    argv = ["probe", "127.0.0.1", port]
    thread = threading.Thread(target=lambda: statuses.append(__main__.main(argv)))
    thread.start()
    thread.join(LONG)
    assert statuses == [6]
