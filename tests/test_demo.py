"""The demo: every row is measured, and a lie of anyio_rst is an exit status."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from contextlib import AbstractContextManager
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from anyio_rst import __main__
from anyio_rst.commands import demo
from anyio_rst.commands._demo_cases import HTTP_WAYS, WAYS, Way
from anyio_rst.commands._demo_clients import Seen, is_true, see_by_socket
from anyio_rst.commands._demo_servers import OURS, PLAIN, running_server

# Only a demo that hangs takes so long.
LONG = 120

LOOPS = ["asyncio", "uvloop", "trio"]

RAISES = next(way for way in WAYS if way.name == "raises an exception")


def table(output: str) -> dict[str, list[str]]:
    """The cells of each line that is a row, by its first one."""
    rows = {}
    for line in output.splitlines():
        assert len(line) <= 100
        name, *cells = re.split("  +", line)
        if len(cells) == 4:
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
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].split("  ")[0] == loop

    with_curl = shutil.which("curl") is not None
    assert ("curl is not installed" in done.stdout) is not with_curl
    ways = [*WAYS, *(HTTP_WAYS if with_curl else ())]
    rows = table(done.stdout)
    assert list(rows) == [way.name for way in ways]
    for way in ways:
        _, plain_verdict, seen, verdict = rows[way.name]
        assert plain_verdict in ("true", "LIE")
        assert verdict == "true"
        if way.finishes:
            size = f"{len(way.answer):,}"
            assert seen == f"{size} of {size} B, FIN"
        elif way in WAYS:
            assert seen.endswith(", RST")
        else:
            assert re.search(", exit [1-9]", seen)

    plain_truths = sum(cells[1] == "true" for cells in rows.values())
    assert lines[-2:] == [
        f"plain AnyIO told the truth in {plain_truths} of {len(rows)} rows",
        f"anyio_rst told the truth in {len(rows)} of {len(rows)} rows",
    ]


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
    ) -> AbstractContextManager[subprocess.Popen[str]]:
        return running_server(loop, PLAIN, way)

    monkeypatch.setattr(demo, "running_server", plain_on_both_sides)
    assert __main__.main(["demo"]) == 1
    output = capsys.readouterr().out
    assert table(output) == {RAISES.name: ["1,000 of 2,000 B, FIN", "LIE"] * 2}
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
    assert "curl is not installed: its part is left out" in output.splitlines()


@pytest.mark.usefixtures("only_one_way")
def test_all_is_every_loop_that_is_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert __main__.main(["demo", "--loop", "all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "  plain AnyIO" in line] == [
        "asyncio",
        "trio",
    ]
    assert "uvloop is not installed, and left out" in lines


@pytest.mark.parametrize("loop", ["uvloop", "trio"])
def test_loop_that_is_not_installed_is_an_error(
    loop: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, loop, None)
    assert __main__.main(["demo", "--loop", loop]) == 2
    assert capsys.readouterr() == ("", f"anyio-rst demo: {loop} is not installed\n")


@pytest.mark.parametrize("argv", [["demo", "--loop", "gevent"], ["dance"], []])
def test_wrong_command_line_is_an_error(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exited:
        __main__.main(argv)
    assert exited.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: anyio-rst")


def test_server_that_does_not_start_is_told() -> None:
    missing = Way("is not there", RAISES.handler)
    with pytest.raises(RuntimeError, match=r"is gone:\n(.*\n)+.*StopIteration"):
        demo.measure("asyncio", missing, see_by_socket)


def test_console_script() -> None:
    (script,) = entry_points(group="console_scripts", name="anyio-rst")
    assert script.load() is __main__.main
