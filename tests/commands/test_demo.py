"""The demo: every row is measured, and a lie of anyio_rst is an exit status."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from test_commands import refusal

from anyio_rst import __main__
from anyio_rst.commands import _demo_clients, _demo_processes, demo
from anyio_rst.commands._demo_cases import BUFFER, HTTP_WAYS, WAYS, Way, cut_the_send
from anyio_rst.commands._demo_clients import Seen, is_true, see_by_curl, see_by_socket
from anyio_rst.commands._demo_processes import NotMeasured, Process, running
from anyio_rst.commands._demo_servers import OURS, PLAIN, running_server
from anyio_rst.commands._output import WIDTH

from serving import DISSOLVES

# Only a demo that hangs takes so long.
LONG = 120

LOOPS = ["asyncio", "uvloop", "trio"]

RAISES, CUT, KILLED = (
    next(way for way in WAYS if way.name == name)
    for name in ("raises an exception", "cuts a send short", "is killed by SIGKILL")
)


def table(output: str) -> dict[str, list[str]]:
    """The cells of each line that is a row, by its first one."""
    rows = {}
    for line in output.splitlines():
        assert len(line) <= WIDTH
        name, *cells = re.split("  +", line)
        if len(cells) == 5 and cells[0] != "answer":
            rows[name] = cells
    return rows


@pytest.mark.parametrize("loop", LOOPS)
def test_demo_measures_every_way_out_and_anyio_rst_tells_the_truth(loop: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "anyio_rst", "demo", "--loop", loop],
        capture_output=True,
        text=True,
        timeout=LONG,
        check=False,
    )
    assert (done.returncode, done.stderr if DISSOLVES else "") == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].split("  ")[0] == loop

    with_curl = shutil.which("curl") is not None
    assert ("curl is not installed" in done.stdout) is not with_curl
    ways = [*WAYS, *(HTTP_WAYS if with_curl else ())]
    rows = table(done.stdout)
    assert list(rows) == [way.name for way in ways]
    for way in ways:
        size, _, plain_verdict, seen, verdict = rows[way.name]
        assert size == f"{len(way.answer):,}"
        # In gVisor, as a rule, nobody tells a client that its upload is in vain.
        assert plain_verdict in (("true", "LIE") if DISSOLVES else ("true", "LIE", "?"))
        assert verdict == "true"
        if way.finishes:
            assert seen == f"{size}, FIN"
        elif way in WAYS:
            assert seen.endswith(", RST")
        else:
            assert re.search(", exit [1-9]", seen)

    plain_truths = sum(cells[2] == "true" for cells in rows.values())
    assert [lines[-2].partition(", ")[0], lines[-1]] == [
        f"plain AnyIO told the truth in {plain_truths} of {len(rows)} rows",
        f"anyio_rst told the truth in {len(rows)} of {len(rows)} rows",
    ]


def test_demo_needs_neither_an_input_nor_a_place_for_complaints() -> None:
    program = [sys.executable, "-m", "anyio_rst", "demo"]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" <&- 2>&-', "sh", *program],
        stdout=subprocess.PIPE,
        text=True,
        timeout=LONG,
        check=False,
    )
    assert done.returncode == 0
    assert len(table(done.stdout)) >= len(WAYS)


@pytest.fixture
def only_one_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough where it matters what the demo makes of its rows, not what they are."""
    monkeypatch.setattr(demo, "WAYS", (RAISES,))
    monkeypatch.setattr(demo, "HTTP_WAYS", ())


@pytest.mark.usefixtures("only_one_way")
def test_lie_of_anyio_rst_is_exit_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def plain_on_both_sides(
        loop: str, side: str, way: Way
    ) -> AbstractContextManager[Process]:
        return running_server(loop, PLAIN, way)

    monkeypatch.setattr(demo, "running_server", plain_on_both_sides)
    assert __main__.main(["demo"]) == 1
    output = capsys.readouterr().out
    assert table(output) == {RAISES.name: ["2,000", *["1,000, FIN", "LIE"] * 2]}
    assert "anyio_rst told the truth in 0 of 1 rows" in output


@pytest.mark.parametrize(
    ("claimed", "finished", "whole", "true"),
    [
        (True, True, True, True),
        (True, True, False, False),
        (True, False, True, False),
        (True, False, False, False),
        (False, True, True, False),
        (False, True, False, False),
        (False, False, True, True),
        (False, False, False, True),
    ],
)
def test_truth(claimed: bool, finished: bool, whole: bool, true: bool) -> None:
    assert is_true(claimed=claimed, finished=finished, whole=whole) is true


@pytest.mark.parametrize("liar", [PLAIN, OURS])
def test_one_lie_of_anyio_rst_among_truths_is_exit_status_1(liar: str) -> None:
    truth, lie = Seen("", true=True), Seen("", true=False)
    truths = {PLAIN: truth, OURS: truth}
    assert demo.exit_status([truths]) == 0
    rows = [truths, {**truths, liar: lie}, truths]
    assert demo.exit_status(rows) == (1 if liar == OURS else 0)


def test_without_curl_its_part_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "WAYS", (RAISES,))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert __main__.main(["demo"]) == 0
    output = capsys.readouterr().out
    assert list(table(output)) == [RAISES.name]
    assert "curl is not installed: its rows are left out" in output.splitlines()


@pytest.mark.usefixtures("only_one_way")
def test_all_is_every_loop_that_is_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert __main__.main(["demo", "--loop", "all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "  answer  " in line] == [
        "asyncio",
        "trio",
    ]
    left_out = (
        "uvloop is left out: uvloop is not installed; pip install 'anyio_rst[uvloop]'"
    )
    assert left_out in lines


@pytest.mark.parametrize("loop", ["uvloop", "trio"])
def test_loop_that_is_not_installed_is_an_error(
    loop: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, loop, None)
    assert __main__.main(["demo", "--loop", loop]) == 2
    line = f"{loop} is not installed; pip install 'anyio_rst[{loop}]'"
    assert capsys.readouterr() == ("", f"anyio-rst demo: {line}\n")


@pytest.mark.parametrize("argv", [["demo", "--loop", "gevent"], ["dance"], []])
def test_wrong_command_line_is_an_error(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    err = refusal(argv, capsys)
    assert err.startswith("usage: anyio-rst")


# What was not measured is no claim.


def not_measured(way: Way, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    """That is what comes of *way* on both sides, and *told* the reason."""
    see = see_by_curl if way in HTTP_WAYS else see_by_socket
    row = demo.measure("asyncio", way, see)
    assert row == dict.fromkeys((PLAIN, OURS), Seen("not measured", None))
    lines = [f"anyio-rst demo: {way.name}, {side}: {told}" for side in (PLAIN, OURS)]
    assert capsys.readouterr() == ("", "\n".join([*lines, ""]))


def test_server_that_does_not_start_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    missing = Way("is not there", RAISES.handler)
    not_measured(missing, "the server is gone: StopIteration", capsys)


def test_program_that_cannot_be_run_is_told() -> None:
    with pytest.raises(NotMeasured, match="cannot run /no/such: No such file"):
        with running(["/no/such"]):
            pass


def test_silence_of_a_server_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_demo_processes, "PATIENCE", 0.1)
    with running([sys.executable, "-c", "input()"]) as process:
        with pytest.raises(NotMeasured, match="the server said nothing"):
            process.next_line()


@contextmanager
def listening(*lines: str) -> Iterator[tuple[socket.socket, Process]]:
    """A server that does not answer, whose process says its port and then *lines*."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        said = iter([str(listener.getsockname()[1]), *lines])
        yield listener, cast("Any", SimpleNamespace(next_line=lambda: next(said)))


def test_no_end_is_neither_truth_nor_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_demo_clients, "PATIENCE", 0.1)
    with listening() as (_, server):
        with pytest.raises(NotMeasured, match="no end within"):
            see_by_socket(RAISES, server)


def test_no_connection_is_neither_truth_nor_lie() -> None:
    with listening() as (listener, server):
        listener.close()
        with pytest.raises(NotMeasured, match="Connection refused"):
            see_by_socket(RAISES, server)


@pytest.mark.parametrize("status", [7, 28])
def test_other_failures_of_curl_are_no_ending(
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "curl").write_text(f"#!/bin/sh\nexit {status}\n")
    (tmp_path / "curl").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    not_measured(HTTP_WAYS[0], f"curl: exit {status}", capsys)


def test_server_that_ended_on_its_own_proves_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    way = dataclasses.replace(KILLED, exits=False)
    not_measured(way, "the server has ended", capsys)


def test_server_that_did_not_end_proves_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    has_ended = Process.has_ended

    def has_ended_soon(server: Process) -> bool:
        monkeypatch.setattr(_demo_processes, "PATIENCE", 0.1)
        try:
            return has_ended(server)
        finally:
            monkeypatch.setattr(_demo_processes, "PATIENCE", LONG)

    monkeypatch.setattr(Process, "has_ended", has_ended_soon)
    way = dataclasses.replace(RAISES, exits=True)
    not_measured(way, "the server has not ended", capsys)


def test_whole_answer_of_a_handler_that_did_not_finish_proves_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    way = dataclasses.replace(RAISES, answer=RAISES.answer[:1000])
    not_measured(way, "all of the answer arrived", capsys)


def test_send_that_was_not_cut_proves_nothing() -> None:
    ours, theirs = socket.socketpair()
    server: Any = SimpleNamespace(next_line=lambda: "not cut")
    with ours, theirs, pytest.raises(NotMeasured, match="the send was not cut short"):
        theirs.send(b"x")
        cut_the_send(ours, server)


@pytest.mark.parametrize("loop", LOOPS)
def test_cut_is_forced(loop: str) -> None:
    """Whatever the time and the buffers: all that arrives is what the buffers held."""
    row = demo.measure(loop, CUT, see_by_socket)
    for side, end, true in ((PLAIN, "FIN", False), (OURS, "RST", True)):
        size, seen_end = row[side].text.rsplit(", ", 1)
        assert (seen_end, row[side].true) == (end, true)
        # The kernel doubles what is asked for: socket(7). A segment may be beyond it.
        assert 0 < int(size.replace(",", "")) <= 2 * (2 * BUFFER + BUFFER)


@pytest.mark.usefixtures("only_one_way")
def test_what_could_not_be_measured_is_exit_status_3(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def see(way: Way, server: Process) -> Seen:
        raise NotMeasured("it was dark")

    monkeypatch.setattr(demo, "see_by_socket", see)
    assert __main__.main(["demo"]) == 3
    out, err = capsys.readouterr()
    assert table(out) == {RAISES.name: ["2,000", *["not measured", "?"] * 2]}
    assert "anyio_rst told the truth in 0 of 1 rows, 1 not measured" in out.splitlines()
    assert err.count(": it was dark\n") == 2


def test_lie_is_worse_than_what_is_not_known() -> None:
    lie, unknown = Seen("", true=False), Seen("", true=None)
    rows = [{PLAIN: lie, OURS: each} for each in (lie, unknown)]
    assert demo.exit_status(rows) == demo.exit_status(rows[::-1]) == 1
    assert demo.exit_status([{PLAIN: unknown, OURS: Seen("", true=True)}]) == 0


# Signals.


@dataclasses.dataclass
class Running:
    """The demo as a program, and all that it started: they have its mark."""

    process: subprocess.Popen[str]
    mark: bytes

    def read_lines(self, count: int) -> None:
        assert self.process.stdout is not None
        for _ in range(count):
            assert self.process.stdout.readline()

    def others(self) -> set[int]:
        found = set()
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                marked = self.mark in (directory / "environ").read_bytes()
            except OSError:  # it is gone
                continue
            if marked and int(directory.name) != self.process.pid:
                found.add(int(directory.name))
        return found

    def end(self) -> tuple[int, str, set[int]]:
        """Its status, its complaint, and whom it left behind."""
        _, err = self.process.communicate(timeout=LONG)
        return self.process.returncode, err, self.others()


@pytest.fixture
def running_demo() -> Iterator[Any]:
    if not Path("/proc/self/environ").exists():
        pytest.skip("needs Linux")
    started: list[Running] = []

    def start(loop: str) -> Running:
        mark = str(uuid.uuid4())
        process = subprocess.Popen(
            [sys.executable, "-m", "anyio_rst", "demo", "--loop", loop],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "MARK": mark},
            start_new_session=True,
        )
        started.append(Running(process, mark.encode()))
        return started[-1]

    yield start
    for each in started:
        with each.process as process:
            process.kill()


@pytest.mark.parametrize(
    ("loop", "lines"), [("asyncio", 2), ("uvloop", 3), ("trio", 8), ("asyncio", 12)]
)
def test_ctrl_c_is_one_line_and_status_130(
    loop: str, lines: int, running_demo: Any
) -> None:
    demo = running_demo(loop)
    demo.read_lines(lines)
    while not demo.others():
        assert demo.process.poll() is None
    os.killpg(demo.process.pid, signal.SIGINT)  # as a terminal does
    assert demo.end() == (130, "anyio-rst demo: interrupted\n", set())


def test_ctrl_c_again_and_again(running_demo: Any) -> None:
    demo = running_demo("asyncio")
    demo.read_lines(2)
    while demo.process.poll() is None:
        os.killpg(demo.process.pid, signal.SIGINT)
    assert demo.end() == (130, "anyio-rst demo: interrupted\n", set())


@pytest.mark.skipif(not Path("/proc/self/wchan").exists(), reason="needs Linux")
def test_ctrl_c_while_nobody_reads_on() -> None:
    """As in `anyio-rst demo | less`: what is yet to be written is not waited for."""
    receive, send = os.pipe()
    os.set_blocking(send, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(send, bytes(4096))
    os.set_blocking(send, True)
    with open(receive, "rb"), open(send, "wb") as stdout:
        process = subprocess.Popen(
            [sys.executable, "-m", "anyio_rst", "demo"],
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
        )
        with process:
            waits_in = Path(f"/proc/{process.pid}/wchan")
            deadline = time.monotonic() + LONG
            while "pipe_write" not in waits_in.read_text():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=LONG)
    assert (process.returncode, err) == (130, "anyio-rst demo: interrupted\n")


def test_sigterm_is_one_line_and_status_143(running_demo: Any) -> None:
    demo = running_demo("asyncio")
    demo.read_lines(3)
    demo.process.terminate()
    assert demo.end() == (143, "anyio-rst demo: terminated\n", set())


def test_servers_end_with_a_demo_that_is_killed(running_demo: Any) -> None:
    demo = running_demo("asyncio")
    demo.read_lines(3)
    while not demo.others():
        assert demo.process.poll() is None
    demo.process.kill()
    demo.process.wait(LONG)
    deadline = time.monotonic() + LONG
    while demo.others():
        assert time.monotonic() < deadline


def test_reader_that_has_seen_enough_ends_it(running_demo: Any) -> None:
    """As in `anyio-rst demo | head -1`."""
    demo = running_demo("asyncio")
    demo.read_lines(1)
    demo.process.stdout.close()
    demo.process.stdout = None
    assert demo.end() == (141, "", set())


def test_console_script() -> None:
    (script,) = entry_points(group="console_scripts", name="anyio-rst")
    assert script.load() is __main__.main
