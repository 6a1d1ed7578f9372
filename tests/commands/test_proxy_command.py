"""`anyio-rst proxy`, as a program between plain sockets and curl."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_commands import refusal
from test_model import PROFILE
from test_readme import connect, free_port, running
from test_rst_proxy import BODY, HEADS, curl, http_server, read_exactly

from anyio_rst import PeerClose, __main__
from anyio_rst.commands import proxy as command
from anyio_rst.commands._output import WIDTH
from anyio_rst.commands._proxy_report import HEAD, Totals, row
from anyio_rst.testing import Proxy, ProxyConnection

from serving import LONG

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "cutting.md").read_text()

PROXY = [sys.executable, "-m", "anyio_rst", "proxy"]


class Running:
    """The command, which has said where it listens."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.first = self.next_line()
        (port,) = re.findall(r"(?:127.0.0.1:|\[::1\]:|\"port\": )(\d+)", self.first)[:1]
        self.port = int(port)

    def next_line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def end(self, number: int = signal.SIGINT) -> tuple[int, list[str], str]:
        """Its status, and the rest of what it says."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=LONG)
        return self.process.returncode, out.splitlines(), err


@contextmanager
def started(*argv: str) -> Iterator[Running]:
    with subprocess.Popen(
        [*PROXY, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield Running(process)
        finally:
            process.kill()


def listening() -> socket.socket:
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(LONG)
    return listener


def port_of(listener: socket.socket) -> str:
    return str(listener.getsockname()[1])


def without_times(text: str) -> str:
    return re.sub(r" +\d+\.\d{3} ", " N ", text)


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        ([], 0, ""),
        (["--cut", "down"], 52, "down: FIN"),
        (["--cut", "down", "--after", "1057"], 18, "down: FIN"),
        (["--cut", "down", "--after", "1057", "--with", "rst"], 56, "down: RST"),
        (["--cut", "down", "--after", "1057", "--with", "silence"], 28, "down: silence"),
        (["--cut", "up", "--after", "3", "--with", "rst"], 56, "up: RST"),
        (["--cut", "down", "--every", "2"], 0, ""),
        (["--delay", "2"], 28, ""),
        (["--rate", "5000"], 28, ""),
        (["--chunk", "999"], 0, ""),
    ],
    ids=str,
)
def test_what_curl_says(options: list[str], status: int, said: str) -> None:
    with http_server(HEADS["length"], BODY) as port:
        with started("0", "localhost", str(port), *options) as proxy:
            assert curl(proxy.port, "--max-time", "1.5")[0] == status
            assert proxy.next_line() == HEAD.rstrip()
            line = proxy.next_line()
            assert line.split()[0] == "1"
            assert line.endswith(said)
            assert proxy.end()[0] == 130


def test_lines_and_summary() -> None:
    with listening() as listener:
        argv = ["0", "127.0.0.1", port_of(listener), "--cut", "down", "--after", "3"]
        with started(*argv) as proxy:
            assert proxy.first == (
                f"listening on 127.0.0.1:{proxy.port}, for 127.0.0.1:{port_of(listener)}"
            )
            assert proxy.next_line() == HEAD.rstrip()
            address = "127.0.0.1", proxy.port
            with socket.create_connection(address, LONG) as client:
                with listener.accept()[0] as server:
                    client.sendall(b"12345")
                    assert read_exactly(server, 5) == b"12345"
                    server.sendall(b"1234")
                    assert read_exactly(client, 3) == b"123"
                    assert client.recv(1) == b""
            cells = without_times(proxy.next_line()).split()
            assert cells == ["1", "5", "3", "N", "client", "FIN", "down:", "FIN"]
            with socket.create_connection(address, LONG) as client:
                with listener.accept()[0] as server:
                    client.sendall(b"1")
                    assert server.recv(1) == b"1"
                    status, lines, err = proxy.end()
                    for sock in (client, server):
                        with pytest.raises(ConnectionResetError):
                            sock.recv(1)
    assert (status, err) == (130, "")
    assert without_times(lines[0]).split() == ["2", "1", "0", "N", "proxy"]
    assert lines[1:] == ["2 connections, 1 cut, 1 open at the end; 6 bytes up, 3 down"]


def test_json() -> None:
    with listening() as listener:
        upstream = port_of(listener)
    with started("[::1]:0", "127.0.0.1", upstream, "--json") as proxy:
        assert json.loads(proxy.first) == {
            "event": "listening",
            "host": "::1",
            "port": proxy.port,
            "upstream": f"127.0.0.1:{upstream}",
        }
        with pytest.raises(ConnectionResetError):
            with socket.create_connection(("::1", proxy.port), LONG) as client:
                client.recv(1)
        seen: dict[str, Any] = json.loads(proxy.next_line())
        status, lines, err = proxy.end()
    fields = [field.name for field in dataclasses.fields(ProxyConnection)]
    assert list(seen) == ["event", *fields]
    assert (seen["event"], seen["number"], seen["error"]) == (
        "connection",
        1,
        "Connection refused",
    )
    assert seen["client"][0] == "::1"
    assert (seen["client_end"], seen["first_end"], seen["cut"]) == ("NONE", None, None)
    (summary,) = map(json.loads, lines)
    totals = dataclasses.asdict(Totals(connections=1, unreachable=1))
    assert summary == {"event": "summary", **totals}
    assert (status, err) == (130, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_while_nobody_reads_the_output(number: int) -> None:
    """The pipe is full, and its reader stays away."""
    with listening() as listener:
        upstream = port_of(listener)
    with started("0", "127.0.0.1", upstream, "--json") as proxy:
        assert proxy.process.stdout is not None
        for _ in range(300):  # of more than 200 bytes each; a pipe has room for 64 KiB
            with pytest.raises(ConnectionResetError):
                with socket.create_connection(("127.0.0.1", proxy.port), LONG) as client:
                    client.recv(1)
        proxy.process.send_signal(number)
        assert proxy.process.wait(LONG) == 128 + number
        lines = proxy.process.stdout.read().splitlines()
        assert all(json.loads(line) for line in lines)


def test_reader_that_leaves_is_status_141() -> None:
    with listening() as listener:
        upstream = port_of(listener)
    with started("0", "127.0.0.1", upstream) as proxy:
        assert proxy.process.stdout is not None
        proxy.process.stdout.close()
        with pytest.raises(ConnectionResetError):
            with socket.create_connection(("127.0.0.1", proxy.port), LONG) as client:
                client.recv(1)
        assert proxy.process.wait(LONG) == 141


def test_sigterm_is_status_143() -> None:
    with started("0", "127.0.0.1", "1") as proxy:
        assert proxy.next_line() == HEAD.rstrip()
        summary = "0 connections, 0 cut; 0 bytes up, 0 down"
        assert proxy.end(signal.SIGTERM) == (143, [summary], "")


def test_nothing_but_asyncio_is_needed() -> None:
    program = (
        "import sys\n"
        "for name in 'trio', 'uvloop', 'pytest': sys.modules[name] = None\n"
        "from anyio_rst.__main__ import main\n"
        "sys.exit(main())"
    )
    argv = [sys.executable, "-c", program, "proxy", "0", "127.0.0.1", "1"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            proxy = Running(process)
            assert proxy.end()[0] == 130
        finally:
            process.kill()


# What it refuses.


def test_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with listening() as listener:
        port = port_of(listener)
        assert __main__.main(["proxy", port, "127.0.0.1", "1"]) == 2
    where = f"cannot listen on 127.0.0.1:{port}"
    line = f"anyio-rst proxy: {where}: Address already in use\n"
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize("host", ["no-such-name.invalid", "☃" * 64])
def test_host_to_listen_on_that_there_is_not(
    host: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert __main__.main(["proxy", f"{host}:0", "127.0.0.1", "1"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"anyio-rst proxy: (cannot listen on )?.*\n", err)


WHOLE = "must be a whole number, at least {}, not {!r}"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--after", "-1"], f"argument --after: {WHOLE.format(0, '-1')}"),
        (["--after", "1k"], f"argument --after: {WHOLE.format(0, '1k')}"),
        (["--every", "0"], f"argument --every: {WHOLE.format(1, '0')}"),
        (["--rate", "1.5"], f"argument --rate: {WHOLE.format(1, '1.5')}"),
        (["--chunk", "0"], f"argument --chunk: {WHOLE.format(1, '0')}"),
    ],
)
def test_wrong_arguments(
    options: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    err = refusal(["proxy", "0", "h", "80", *(f"{'='.join(options)}",)], capsys)
    assert err.splitlines()[-1] == f"anyio-rst proxy: error: {line}"


@pytest.mark.parametrize(
    "listen", ["", "x", "65536", "-1", "::1:9000", "h:", ":9", "[]:9"]
)
def test_wrong_address_to_listen_on(
    listen: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exited:
        __main__.main(["proxy", "--", listen, "h", "80"])
    assert exited.value.code == 2
    assert "error: argument LISTEN: must" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--after", "1"], "--after needs --cut up or --cut down"),
        (["--with", "rst"], "--with needs --cut up or --cut down"),
        (["--every", "2"], "--every needs --cut up or --cut down"),
        (["--close-notify"], "--close-notify needs --cut up or --cut down"),
        (
            ["--cut", "up", "--close-notify", "--after", "0"],
            "--close-notify and --after cannot be combined",
        ),
    ],
)
def test_what_does_not_go_together(
    options: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert __main__.main(["proxy", "0", "h", "80", *options]) == 2
    assert capsys.readouterr() == ("", f"anyio-rst proxy: {line}\n")


NUMBERS = st.one_of(
    st.integers().map(str), st.floats().map(str), st.text(max_size=5), st.just("9" * 5000)
)
OPTIONS = st.one_of(
    st.sampled_from([["--json"], ["--close-notify"], ["--cut=up"], ["--cut=down"]]),
    st.builds(
        lambda name, value: [f"--{name}={value}"],
        st.sampled_from(["after", "every", "delay", "rate", "chunk", "with", "cut"]),
        NUMBERS,
    ),
    st.text().map(lambda text: [text]),
)


@settings(PROFILE)
@given(
    listen=st.one_of(NUMBERS, st.text()),
    host=st.text(),
    port=NUMBERS,
    options=st.lists(OPTIONS, max_size=5),
)
def test_garbage_is_run_or_refused(
    listen: str, host: str, port: str, options: list[list[str]]
) -> None:
    argv = [listen, host, port, *(word for option in options for word in option)]
    with pytest.MonkeyPatch.context() as patch:
        ran: list[Proxy] = []
        patch.setattr(command, "pass_on", lambda proxy, *_: ran.append(proxy))
        with (
            open(os.devnull, "w") as null,
            contextlib.redirect_stdout(null),
            contextlib.redirect_stderr(null),
        ):
            status: object = None
            try:
                status = __main__.main(["proxy", *argv])
            except SystemExit as exc:
                status = exc.code
        # 2 is also that of one that cannot listen; 0: help
        assert status == 2 or (status == 0 and not ran)


# What it prints.


def seen_by_all(**fields: Any) -> ProxyConnection:
    values: dict[str, Any] = {
        "number": 9999,
        "client": ("127.0.0.1", 1),
        "up": 99_999_999,
        "down": 9_999_999_999,
        "client_end": PeerClose.FIN,
        "upstream_end": PeerClose.FIN,
        "first_end": "client",
        "cut": "silence",
        "cut_direction": "down",
        "error": None,
        "aborted": False,
        "duration": 999.0,
    }
    return ProxyConnection(**{**values, **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"aborted": True, "upstream_end": PeerClose.NONE},
        {
            "error": "Temporary failure in name resolution",
            "client_end": PeerClose.NONE,
            "upstream_end": PeerClose.NONE,
            "cut": None,
        },
    ],
)
def test_rows_fit_a_terminal(fields: dict[str, Any]) -> None:
    assert len(row(seen_by_all(**fields))) <= WIDTH
    assert len(HEAD) <= WIDTH


def test_no_colours() -> None:
    assert "\x1b" not in row(seen_by_all())


# The documentation.

DOWNLOAD = (ROOT / "examples" / "download.py").read_text()


def keys_of(table: str) -> list[str]:
    return [
        key
        for cell in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
        for key in re.findall(r"`(\w+)`", cell)
    ]


def test_table_of_keys_is_that_of_the_code() -> None:
    fields = [field.name for field in dataclasses.fields(ProxyConnection)]
    assert keys_of(DOCS[DOCS.index("| key |") :]) == fields
    totals = [field.name for field in dataclasses.fields(Totals)]
    (summary,) = re.findall(r"`summary` \((.*?)\)", DOCS, re.DOTALL)
    assert re.findall(r"`(\w+)`", summary) == totals


def sessions() -> Iterator[tuple[str, str, list[tuple[str, str]]]]:
    """What the proxy is started as, what it prints, and what its clients do and print."""
    blocks = re.findall(r"```console\n\$ (.*?)```", DOCS, re.DOTALL)
    for served, asked in zip(blocks[::2], blocks[1::2], strict=True):
        start, _, told = served.partition("\n")
        steps = [step.partition("\n")[::2] for step in asked.split("\n$ ")]
        yield start, told, steps


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
@pytest.mark.parametrize(("start", "told", "steps"), list(sessions()))
def test_documented_output_is_what_is_printed(
    start: str, told: str, steps: list[tuple[str, str]], tmp_path: Path
) -> None:
    port = free_port()
    with running(DOWNLOAD) as (origin, server):
        connect(origin, server).close()

        def here(text: str) -> str:
            return text.replace("8000", str(origin)).replace("9000", str(port))

        def there(text: str) -> str:
            return text.replace(str(origin), "8000").replace(str(port), "9000")

        name, *argv = here(start).split()
        assert name == "anyio-rst"
        assert argv.pop(0) == "proxy"
        # The last line comes with Ctrl-C, which terminals show as ^C.
        before, _, after = told.partition("^C\n")
        with started(*argv) as proxy:
            for step, output in steps:
                done = subprocess.run(
                    ["bash", "-c", here(step)],
                    cwd=tmp_path,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    timeout=LONG,
                    check=False,
                    text=True,
                )
                assert there(done.stdout).strip() == output.strip()
            rest = [proxy.next_line() for _ in before.splitlines()[1:]]
            printed = there("\n".join([proxy.first, *rest]))
            assert max(map(len, printed.splitlines())) <= WIDTH
            assert without_times(printed) == without_times(before.rstrip("\n"))
            assert proxy.end() == (130, after.splitlines(), "")
