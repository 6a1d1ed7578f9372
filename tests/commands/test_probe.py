"""The probe, judged by servers whose ends are known: plain sockets, `ssl`, OpenSSL."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pty
import re
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import datetime, timedelta, timezone
from io import FileIO
from pathlib import Path
from typing import IO, Any

import anyio
import anyio.to_thread
import pytest
import trustme
from hypothesis import given, settings
from hypothesis import strategies as st
from test_commands import refusal
from test_model import PROFILE
from test_readme import GREETING, connect, running

from anyio_rst import __main__
from anyio_rst.commands import _probe_connect
from anyio_rst.commands import probe as command
from anyio_rst.commands._arguments import host_name
from anyio_rst.commands._output import WIDTH
from anyio_rst.commands._probe_report import End, Report, shown
from anyio_rst.commands._probe_waiting import waits_for

from serving import LONG

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "probe.md").read_text()

PROBE = [sys.executable, "-m", "anyio_rst", "probe"]

BIG = 4 * 2**20

Behave = Callable[[socket.socket], object]


@contextmanager
def serving(behave: Behave) -> Iterator[int]:
    """A port on which one connection is accepted, and treated by *behave*."""

    def serve() -> None:
        sock, _ = listener.accept()
        with sock:
            sock.settimeout(LONG)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            behave(sock)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(LONG)
        with ThreadPoolExecutor(1) as executor:
            served = executor.submit(serve)
            yield listener.getsockname()[1]
            served.result(LONG)


@dataclasses.dataclass
class Run:
    status: int
    out: str
    err: str


def run_here(argv: list[str]) -> Run:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = __main__.main(argv)
    return Run(status, out.getvalue(), err.getvalue())


def run_program(argv: list[str], stdin: IO[bytes] | int) -> Run:
    program = [sys.executable, "-m", "anyio_rst", *argv]
    with subprocess.Popen(
        program, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            out, err = process.communicate(timeout=LONG)
        finally:
            process.kill()
    return Run(process.returncode, out, err)


def probe(
    port: int,
    *options: str,
    status: int,
    host: str = "127.0.0.1",
    stdin: IO[bytes] | int | None = None,
) -> dict[str, Any]:
    """What the probe says as JSON. It exits with *status*.

    With *stdin* it runs as a program.
    """
    argv = ["probe", host, str(port), "--json", *options]
    run = run_here(argv) if stdin is None else run_program(argv, stdin)
    assert run.out.count("\n") == 1
    report: dict[str, Any] = json.loads(run.out)
    assert list(report) == [field.name for field in dataclasses.fields(Report)]
    assert report["exit_status"] == run.status == status
    if report["end_seconds"] is None:
        assert run.err == f"anyio-rst probe: {report['error']}\n"
    else:
        assert run.err == ""
    return report


@contextmanager
def piped(data: bytes) -> Iterator[IO[bytes]]:
    """The end of a pipe from which *data* can be read."""
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.seek(0)
        with subprocess.Popen(["cat"], stdin=file, stdout=subprocess.PIPE) as cat:
            assert cat.stdout is not None
            yield cat.stdout


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def read_to_end(sock: socket.socket) -> bytes:
    data = bytearray()
    while chunk := sock.recv(65536):
        data += chunk
    return bytes(data)


def sees_reset(sock: socket.socket) -> None:
    with pytest.raises(ConnectionResetError):
        read_to_end(sock)


# Plain TCP.


@pytest.mark.parametrize("size", [0, 100_000])
@pytest.mark.parametrize(
    ("how", "end", "status", "tcp_end"),
    [
        ("close", "FIN", 0, "FIN"),
        ("reset", "RST", 3, "RST"),
        ("stay", "SILENCE", 5, None),
    ],
)
def test_ends(how: str, size: int, end: str, status: int, tcp_end: str | None) -> None:
    def behave(sock: socket.socket) -> None:
        assert sock.recv(100) == b"go"
        sock.sendall(b"x" * size)
        if how == "reset":
            reset(sock)
        elif how == "stay":
            sees_reset(sock)

    options = ["--timeout", "0.5"] if how == "stay" else []
    with piped(b"go") as stdin, serving(behave) as port:
        report = probe(port, "--send", "-", *options, stdin=stdin, status=status)
    assert report["end"] == end
    assert report["received_bytes"] == size
    assert (report["sent_bytes"], report["sent_all"]) == (2, True)
    assert report["address"] == "127.0.0.1"
    assert report["tcp_end"] == tcp_end
    assert report["tcp_end_seconds"] == (report["end_seconds"] if tcp_end else None)
    assert 0 < report["connect_seconds"] < LONG
    if size:
        assert 0 < report["first_byte_seconds"] <= report["end_seconds"]
    else:
        assert report["first_byte_seconds"] is None
    assert (report["end_seconds"] >= 0.5) is (how == "stay")


def test_what_arrived_before_a_reset_that_a_send_noticed_is_counted() -> None:
    def behave(sock: socket.socket) -> None:
        sock.recv(100)
        sock.sendall(b"x" * 100_000)
        reset(sock)

    with piped(b"x" * BIG) as stdin, serving(behave) as port:
        report = probe(port, "--send", "-", stdin=stdin, status=3)
    assert (report["end"], report["received_bytes"]) == ("RST", 100_000)
    assert report["sent_all"] is False
    assert report["sent_bytes"] < BIG


def test_sending_and_receiving_at_the_same_time() -> None:
    def echo(sock: socket.socket) -> None:
        while chunk := sock.recv(65536):
            sock.sendall(chunk)

    size = 5 * BIG  # more than the buffers of both sides hold
    with piped(b"x" * size) as stdin, serving(echo) as port:
        report = probe(port, "--send", "-", "--half-close", stdin=stdin, status=0)
    assert report["sent_bytes"] == report["received_bytes"] == size
    assert report["sent_all"] is True


def test_file_is_sent(tmp_path: Path) -> None:
    data = os.urandom(100_000)
    (tmp_path / "request").write_bytes(data)
    seen = bytearray()

    def behave(sock: socket.socket) -> None:
        while len(seen) < len(data):
            seen.extend(sock.recv(65536))

    with serving(behave) as port:
        report = probe(port, "--send", str(tmp_path / "request"), status=0)
    assert seen == data
    assert report["sent_bytes"] == len(data)


def test_without_send_nothing_is_sent_and_the_input_left_alone() -> None:
    seen = []

    def behave(sock: socket.socket) -> None:
        sock.sendall(b"hello")
        sock.shutdown(socket.SHUT_WR)
        seen.append(read_to_end(sock))

    receive, send = os.pipe()
    with open(receive, "rb", buffering=0) as stdin, open(send, "wb", buffering=0) as pipe:
        pipe.write(b"keep")
        with serving(behave) as port:
            report = probe(port, status=0, stdin=stdin)
        assert stdin.read(100) == b"keep"
    assert seen == [b""]
    assert (report["sent_bytes"], report["sent_all"]) == (0, None)
    assert report["received_bytes"] == 5


@pytest.mark.parametrize("options", [["--send", "-"], []])
def test_half_close_is_for_servers_that_wait_for_one(options: list[str]) -> None:
    def behave(sock: socket.socket) -> None:
        assert read_to_end(sock) == (b"ping" if options else b"")
        sock.sendall(b"pong")

    with piped(b"ping") as stdin, serving(behave) as port:
        report = probe(port, "--half-close", *options, stdin=stdin, status=0)
    assert (report["end"], report["received_bytes"]) == ("FIN", 4)


def test_without_half_close_the_server_is_waited_for() -> None:
    with piped(b"x") as stdin, serving(sees_reset) as port:
        options = ["--send", "-", "--timeout", "0.3"]
        report = probe(port, *options, stdin=stdin, status=5)
    assert report["sent_all"] is True


def test_fin_of_the_server_ends_the_sending_with_a_reset() -> None:
    def behave(sock: socket.socket) -> None:
        sock.recv(1)
        sock.shutdown(socket.SHUT_WR)
        sees_reset(sock)

    receive, send = os.pipe()
    with open(receive, "rb") as stdin, open(send, "wb", buffering=0) as pipe:
        pipe.write(b"the first part of a longer text")  # and never an end
        with serving(behave) as port:
            report = probe(port, "--send", "-", status=0, stdin=stdin)
    assert (report["end"], report["sent_all"]) == ("FIN", False)


def test_input_may_end_a_little_later_than_the_server() -> None:
    def behave(sock: socket.socket) -> None:
        assert sock.recv(100) == b"all"
        sock.shutdown(socket.SHUT_WR)
        threading.Event().wait(0.2)  # it is later, but not much
        pipe.close()
        assert read_to_end(sock) == b""

    receive, send = os.pipe()
    with open(receive, "rb") as stdin, open(send, "wb", buffering=0) as pipe:
        pipe.write(b"all")
        with serving(behave) as port:
            report = probe(port, "--send", "-", status=0, stdin=stdin)
    assert report["sent_all"] is True


def test_server_that_does_not_read_is_silence() -> None:
    over = threading.Event()
    with serving(lambda _: over.wait(LONG)) as port:
        options = ["--send", "/dev/zero", "--timeout", "0.5"]
        report = probe(port, *options, status=5)
        over.set()
    assert report["sent_all"] is False
    assert report["sent_bytes"] > 0


def test_terminal_that_says_nothing_is_not_the_silence_of_the_server() -> None:
    ready = threading.Event()

    def behave(sock: socket.socket) -> None:
        sock.sendall(b"who?")
        ready.set()
        assert sock.recv(100) == b"me\n"

    ours, theirs = pty.openpty()

    def type_late() -> None:
        assert ready.wait(LONG)
        threading.Event().wait(1)  # longer than --timeout
        os.write(ours, b"me\n")

    typing = threading.Thread(target=type_late)
    typing.start()
    with serving(behave) as port:
        # The FIN of the server ends it, although the terminal is still being read.
        options = ["--send", "-", "--timeout", "0.3"]
        report = probe(port, *options, status=0, stdin=theirs)
    typing.join()
    os.close(ours)
    os.close(theirs)
    assert (report["sent_bytes"], report["received_bytes"]) == (3, 4)


def test_input_in_non_blocking_mode() -> None:
    asked = threading.Event()

    def behave(sock: socket.socket) -> None:
        sock.sendall(b"who?")
        asked.set()
        assert sock.recv(100) == b"me"

    def answer() -> None:
        assert asked.wait(LONG)
        ours.sendall(b"me")

    ours, theirs = socket.socketpair()
    with ours, theirs, serving(behave) as port:
        theirs.setblocking(False)
        answering = threading.Thread(target=answer)
        answering.start()
        report = probe(port, "--send", "-", status=0, stdin=theirs.fileno())
        answering.join()
    assert report["sent_bytes"] == 2


def test_input_that_is_closed_at_the_end_is_no_failure_of_its_reader(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Slow(FileIO):
        """Whose next read comes when it has been closed."""

        def read(self, size: int | None = -1) -> bytes:
            reading.set()
            assert closed.wait(LONG)
            return super().read(size)

        def close(self) -> None:
            super().close()
            closed.set()

    def behave(sock: socket.socket) -> None:
        assert reading.wait(LONG)
        sock.shutdown(socket.SHUT_WR)
        sees_reset(sock)

    reading, closed = threading.Event(), threading.Event()
    (tmp_path / "request").touch()
    before = set(threading.enumerate())
    with pytest.MonkeyPatch.context() as patch, serving(behave) as port:
        patch.setattr(command, "FileIO", Slow)
        argv = ["probe", "127.0.0.1", str(port), "--send", str(tmp_path / "request")]
        assert __main__.main(argv) == 0
    for thread in set(threading.enumerate()) - before:
        thread.join(LONG)  # pytest reports what it raises
    assert printed(capsys)[1] == "sent           0 bytes, not all"


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux")
def test_input_that_fails_resets(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(sees_reset) as port:
        argv = ["probe", "127.0.0.1", str(port), "--send", "/proc/self/mem"]
        assert __main__.main(argv) == 2
    line = "anyio-rst probe: cannot read /proc/self/mem: Input/output error\n"
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize("early", [b"", b"x" * 1000])
@pytest.mark.parametrize("how", ["reset", "fin, reset"])
def test_end_before_the_connect_has_returned_is_no_refusal(
    how: str,
    early: bytes,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    over = threading.Event()

    def behave(sock: socket.socket) -> None:
        sock.sendall(early)
        if how == "fin, reset":
            sock.shutdown(socket.SHUT_WR)
        reset(sock)
        over.set()

    async def wait_writable(sock: socket.socket) -> None:
        assert await anyio.to_thread.run_sync(over.wait, LONG)
        await anyio.wait_writable(sock)

    monkeypatch.setattr(_probe_connect, "wait_writable", wait_writable)
    with serving(behave) as port:
        status = __main__.main(["probe", "127.0.0.1", str(port), "--json"])
    report = json.loads(capsys.readouterr().out)
    expected = ("RST", 3) if how == "reset" else ("FIN", 0)
    assert (report["end"], status) == expected
    assert report["received_bytes"] == len(early)


def test_connection_lost_in_another_way(capsys: pytest.CaptureFixture[str]) -> None:
    """The kernel ends it on behalf of an administrator: ECONNABORTED, `ss --kill`."""
    killed = []

    def behave(sock: socket.socket) -> None:
        sock.sendall(b"x")
        port = str(sock.getpeername()[1])
        command = ["ss", "--kill", "-t", "src", "127.0.0.1", "sport", "=", port]
        with suppress(FileNotFoundError):
            subprocess.run(command, capture_output=True, check=False)
        sock.settimeout(5)
        try:
            killed.append(sock.recv(1))
        except ConnectionResetError:
            killed.append(b"")
        except TimeoutError:
            return

    with serving(behave) as port:
        status = __main__.main(["probe", "127.0.0.1", str(port), "--json"])
    if not killed:
        pytest.skip("no `ss --kill` on this system")
    report = json.loads(capsys.readouterr().out)
    assert (status, report["end"], report["received_bytes"]) == (8, "LOST", 1)
    assert report["error"] == "Software caused connection abort"


# No connection.


def refused() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
    return port


def test_refused_connection() -> None:
    port = refused()
    report = probe(port, status=6)
    assert report["end"] == "NOT_CONNECTED"
    assert report["error"] == (
        f"cannot connect to 127.0.0.1:{port} (127.0.0.1: Connection refused)"
    )
    assert report["address"] is None
    assert report["sent_bytes"] is report["received_bytes"] is None


@pytest.mark.parametrize("name", ["no-such-name.invalid", "a..b", "x" * 64 + ".invalid"])
def test_broken_name(name: str) -> None:
    report = probe(80, host=name, status=6)
    assert re.fullmatch(f"cannot resolve '{re.escape(name)}': .+", report["error"])
    assert report["failed_addresses"] == []


def test_resolver_that_hangs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    over = threading.Event()

    def hang(*_: object, **__: object) -> list[Any]:
        over.wait(LONG)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    assert __main__.main(["probe", "example.org", "80", "--timeout", "0.1"]) == 6
    over.set()
    line = "anyio-rst probe: cannot resolve 'example.org': no answer within 0.1 s\n"
    assert capsys.readouterr() == ("", line)


def test_server_that_does_not_accept() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        waiting: list[socket.socket] = []
        with suppress(TimeoutError):
            while len(waiting) < 10:  # full after one or two
                address = listener.getsockname()
                waiting.append(socket.create_connection(address, timeout=0.3))
        report = probe(address[1], "--timeout", "0.5", status=6)
        for sock in waiting:
            sock.close()
    assert report["error"].endswith("(127.0.0.1: no answer within 0.5 s)")


def test_unreachable_network() -> None:
    isolated = ["unshare", "--map-root-user", "--net"]
    if shutil.which("unshare") is None or subprocess.run([*isolated, "true"]).returncode:
        pytest.skip("a network namespace cannot be made here")
    done = subprocess.run(
        [*isolated, *PROBE, "192.0.2.1", "80"],
        capture_output=True,
        text=True,
        timeout=LONG,
        check=False,
    )
    assert (done.returncode, done.stdout) == (6, "")
    assert done.stderr == (
        "anyio-rst probe: cannot connect to 192.0.2.1:80 "
        "(192.0.2.1: Network is unreachable)\n"
    )


def resolve_to(monkeypatch: pytest.MonkeyPatch, *hosts: str) -> None:
    """Let every name have these addresses."""
    getaddrinfo = socket.getaddrinfo

    def resolve(_: str, port: int, **options: Any) -> list[Any]:
        return [answer for host in hosts for answer in getaddrinfo(host, port, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


def test_addresses_are_tried_in_their_order(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    resolve_to(monkeypatch, "127.0.0.2", "127.0.0.3", "127.0.0.1")
    with serving(lambda sock: sock.sendall(b"x")) as port:
        assert __main__.main(["probe", "example.org", str(port)]) == 0
    lines = [re.sub(r"\d\.\d{3} s", "N s", line) for line in printed(capsys)]
    assert lines == [
        "not connected  127.0.0.2: Connection refused",
        "not connected  127.0.0.3: Connection refused",
        "connected      127.0.0.1 in N s",
        "sent           0 bytes",
        "received       1 bytes, the first after N s",
        "end            FIN after N s",
        f"verdict        {End.FIN.verdict}",
    ]


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    out, err = capsys.readouterr()
    assert err == ""
    return out.splitlines()


def test_every_address_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    resolve_to(monkeypatch, "127.0.0.2", "127.0.0.1")
    port = refused()
    assert __main__.main(["probe", "example.org", str(port)]) == 6
    line = (
        f"anyio-rst probe: cannot connect to example.org:{port} "
        "(127.0.0.2: Connection refused; 127.0.0.1: Connection refused)\n"
    )
    assert capsys.readouterr() == ("", line)


def test_report_fits_a_terminal() -> None:
    names = [f"{i}.example.org" for i in range(20)]
    report = Report("example.org", 443, True, 10.0, address="192.0.2.1")
    report.failed_addresses.append({"address": "2001:db8::1", "error": "no " * 50})
    report.tls_version, report.tls_certificate_names = "TLSv1.3", names
    report.sent_bytes = report.received_bytes = 10**15
    report.conclude(End.TLS_FAILED, "very " * 50 + "long")
    lines = shown(report).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert " ".join(names) in " ".join(line[15:] for line in lines)
    for end in End:
        report.conclude(end)
        assert max(map(len, shown(report).splitlines())) <= WIDTH


@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_ipv6(host: str) -> None:
    try:
        listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("no IPv6 here")
    with listener:
        port = listener.getsockname()[1]
        with subprocess.Popen(
            [*PROBE, host, str(port)], stdout=subprocess.PIPE, text=True
        ) as process:
            listener.settimeout(LONG)
            listener.accept()[0].close()
            assert process.communicate(timeout=LONG)[0].startswith(
                "connected      ::1 in "
            )
    assert process.returncode == 0
    assert (
        f"[::1]:{port} (::1: Connection refused)"
        in (probe(port, host=host, status=6)["error"])
    )


# TLS.

AUTHORITY = trustme.CA()
EXPIRED = AUTHORITY.issue_cert(
    "127.0.0.1", not_after=datetime.now(timezone.utc) - timedelta(days=1)
)


def server_context(
    certificate: trustme.LeafCert | None = None,
    version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = context.maximum_version = version
    (certificate or AUTHORITY.issue_cert("127.0.0.1")).configure_cert(context)
    return context


@pytest.fixture
def trusting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenSSL's own way of naming an authority."""
    AUTHORITY.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))


@pytest.fixture(params=[ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=str)
def version(request: pytest.FixtureRequest) -> Any:
    return request.param


def say_close_notify(tls: ssl.SSLSocket) -> socket.socket:
    """Without waiting for that of the other side."""
    tls.setblocking(False)
    with suppress(ssl.SSLWantReadError):
        tls.unwrap()
    return without_tls(tls)


def without_tls(tls: ssl.SSLSocket) -> socket.socket:
    sock = socket.socket(fileno=tls.detach())
    sock.settimeout(LONG)
    return sock


def close_after_close_notify(tls: ssl.SSLSocket) -> None:
    say_close_notify(tls).close()


def close_after_both_close_notifies(tls: ssl.SSLSocket) -> None:
    tls.unwrap().close()


def reset_after_close_notify(tls: ssl.SSLSocket) -> None:
    reset(say_close_notify(tls))


def stay_after_close_notify(tls: ssl.SSLSocket) -> socket.socket:
    sock = say_close_notify(tls)
    assert 20 < len(read_to_end(sock)) < 60  # a close_notify, and nothing else
    return sock


def close_without_close_notify(tls: ssl.SSLSocket) -> None:
    without_tls(tls).close()


def reset_without_close_notify(tls: ssl.SSLSocket) -> None:
    reset(without_tls(tls))


def stay(tls: ssl.SSLSocket) -> None:
    with without_tls(tls) as sock:
        sees_reset(sock)


@pytest.mark.usefixtures("trusting")
@pytest.mark.parametrize(
    ("finish", "end", "status", "tcp_end"),
    [
        (close_after_close_notify, "CLOSE_NOTIFY", 0, "FIN"),
        (close_after_both_close_notifies, "CLOSE_NOTIFY", 0, "FIN"),
        (reset_after_close_notify, "CLOSE_NOTIFY", 0, "RST"),
        (stay_after_close_notify, "CLOSE_NOTIFY", 0, None),
        (close_without_close_notify, "TRUNCATED", 4, "FIN"),
        (reset_without_close_notify, "RST", 3, "RST"),
        (stay, "SILENCE", 5, None),
    ],
)
def test_ends_of_tls(
    finish: Callable[[ssl.SSLSocket], socket.socket | None],
    end: str,
    status: int,
    tcp_end: str | None,
    version: ssl.TLSVersion,
) -> None:
    def behave(sock: socket.socket) -> None:
        context = server_context(version=version)
        with context.wrap_socket(sock, server_side=True) as tls:
            tls.sendall(b"x" * 100_000)
            kept = finish(tls)
        if kept is not None:
            with kept:
                over.wait(LONG)

    # What stays open after its close_notify does so until the probe is over.
    over = threading.Event()
    options = ["--timeout", "0.5"] if tcp_end is None else []
    with serving(behave) as port:
        report = probe(port, "--tls", *options, status=status)
        over.set()
    assert (report["end"], report["received_bytes"]) == (end, 100_000)
    assert report["tls_version"] == version.name.replace("_", ".")
    assert report["tls_cipher"]
    assert report["tls_certificate_names"] == ["127.0.0.1"]
    assert 0 < report["tls_handshake_seconds"] < LONG
    assert report["tcp_end"] == tcp_end
    assert (report["tcp_end_seconds"] is None) is (tcp_end is None)


def tls_error(behave: Behave, *options: str, status: int = 7) -> str:
    with serving(behave) as port:
        report = probe(port, "--tls", *options, status=status)
    assert (report["end"], report["address"]) == ("TLS_FAILED", "127.0.0.1")
    assert report["received_bytes"] is None
    error = str(report["error"])
    return error.replace(f"127.0.0.1:{port}", "SERVER")


def shake_hands(context: ssl.SSLContext) -> Behave:
    def behave(sock: socket.socket) -> None:
        with suppress(OSError), context.wrap_socket(sock, server_side=True) as tls:
            tls.recv(1)

    return behave


@pytest.mark.usefixtures("trusting")
@pytest.mark.parametrize(
    ("certificate", "error"),
    [
        (EXPIRED, "certificate has expired"),
        (
            AUTHORITY.issue_cert("example.org"),
            "IP address mismatch, certificate is not valid for '127.0.0.1'",
        ),
        (trustme.CA().issue_cert("127.0.0.1"), "unable to get local issuer certificate"),
    ],
    ids=["expired", "other host", "unknown authority"],
)
def test_certificate_that_is_not_valid(certificate: trustme.LeafCert, error: str) -> None:
    told = tls_error(shake_hands(server_context(certificate)))
    assert told == f"the certificate of SERVER is not valid: {error}"


def test_handshake_that_fails() -> None:
    # All of the ClientHello, which may have a kilobyte of post-quantum keys.
    def answer_http(sock: socket.socket) -> None:
        sock.recv(65536)
        sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        sees_reset(sock)

    def close(sock: socket.socket) -> None:
        sock.recv(65536)

    def close_by_reset(sock: socket.socket) -> None:
        sock.recv(65536)
        reset(sock)

    told = tls_error(answer_http)
    assert told.startswith("no TLS with SERVER: ")
    assert told.endswith(" (what it sent is not TLS)")
    assert tls_error(close) == "SERVER closed the connection in the TLS handshake"
    assert tls_error(close_by_reset) == "SERVER reset the connection in the TLS handshake"
    assert tls_error(sees_reset, "--timeout", "0.5") == (
        "no TLS handshake with SERVER within 0.5 s"
    )


@pytest.mark.usefixtures("trusting")
def test_client_certificate_that_is_missed_after_the_handshake() -> None:
    context = server_context()
    context.verify_mode = ssl.CERT_REQUIRED
    AUTHORITY.configure_trust(context)
    with serving(shake_hands(context)) as port:
        report = probe(port, "--tls", status=7)
    assert (report["end"], report["received_bytes"]) == ("TLS_FAILED", 0)
    assert report["error"] == "tlsv13 alert certificate required"


def test_name_that_no_certificate_can_have(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    resolve_to(monkeypatch, "127.0.0.1")
    # Not in IDNA 2008, which AnyIO uses, and too long for the 2003 of older ones.
    name = 64 * "\N{SNOWMAN}"
    with serving(sees_reset) as port:
        assert __main__.main(["probe", name, str(port), "--tls"]) == 7
    line = f"anyio-rst probe: a certificate cannot be for {name!r}\n"
    assert capsys.readouterr() == ("", line)


@pytest.mark.usefixtures("trusting")
@pytest.mark.parametrize("killed", [False, True])
def test_openssl_that_answers_and_that_is_killed(killed: bool, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on the path")
    pem, request = tmp_path / "certificate.pem", tmp_path / "request"
    certificate = AUTHORITY.issue_cert("127.0.0.1")
    certificate.private_key_and_cert_chain_pem.write_to_path(str(pem))
    request.write_bytes(b"GET / HTTP/1.0\r\n\r\n")
    command = ["openssl", "s_server", "-accept", "127.0.0.1:0", "-cert", str(pem)]
    command += ["-www", "-msg", "-tls1_3"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        output = iter(server.stdout)
        accepting = next(filter(None, (re.match(rb"ACC.*:(\d+)", at) for at in output)))
        options = ["--tls", "--json", *([] if killed else ["--send", str(request)])]
        with subprocess.Popen(
            [*PROBE, "127.0.0.1", accepting[1].decode(), *options],
            stdout=subprocess.PIPE,
        ) as client:
            # The last that both send of the handshake.
            tickets = (line for line in output if b"NewSessionTicket" in line)
            next(tickets)
            next(tickets)
            if killed:
                server.kill()
            report = json.loads(client.communicate(timeout=LONG)[0])
        server.kill()
    assert report["end"] == ("TRUNCATED" if killed else "CLOSE_NOTIFY")
    assert client.returncode == (4 if killed else 0)
    assert (report["received_bytes"] == 0) is killed


# The command.


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_ctrl_c_is_status_130(options: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(LONG)
        command = [*PROBE, *map(str, listener.getsockname()), "--send", "-", *options]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdin is not None
            process.stdin.write(b"x")  # and nothing else: it waits for more
            process.stdin.flush()
            sock, _ = listener.accept()
            with sock:
                assert sock.recv(1) == b"x"
                process.send_signal(signal.SIGINT)
                sock.settimeout(LONG)
                sees_reset(sock)
            assert process.wait(LONG) == 130
            assert process.stderr is not None
            assert process.stderr.read() == b""
            assert process.stdout is not None
            output = process.stdout.read().decode()
    if options:
        assert json.loads(output)["end"] == "INTERRUPTED"
    else:
        assert output.splitlines()[-1] == "verdict        no end: interrupted"


def interrupt() -> None:
    """As an impatient user does."""
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)


def interrupted_in(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Before there is anything to be reported."""
    assert __main__.main(["probe", *argv, "--timeout", str(LONG)]) == 130
    assert capsys.readouterr() == ("", "anyio-rst probe: interrupted\n")


def test_ctrl_c_while_it_resolves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    over = threading.Event()

    def hang(*_: object, **__: object) -> list[Any]:
        interrupt()
        over.wait(LONG)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    interrupted_in(["example.org", "80"], capsys)
    over.set()


def test_ctrl_c_before_the_loop_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = anyio.run

    def run_late(*args: Any, **options: Any) -> None:
        interrupt()
        run(*args, **options)

    monkeypatch.setattr(anyio, "run", run_late)
    interrupted_in(["127.0.0.1", str(refused())], capsys)


def test_ctrl_c_while_it_connects(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def wait_writable(_: socket.socket) -> None:
        interrupt()
        await anyio.sleep_forever()

    monkeypatch.setattr(_probe_connect, "wait_writable", wait_writable)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        interrupted_in([*map(str, listener.getsockname())], capsys)


def test_ctrl_c_in_the_handshake(capsys: pytest.CaptureFixture[str]) -> None:
    def behave(sock: socket.socket) -> None:
        sock.recv(1)
        interrupt()
        sees_reset(sock)

    with serving(behave) as port:
        interrupted_in(["127.0.0.1", str(port), "--tls"], capsys)


@pytest.mark.skipif(not Path("/proc/self/wchan").exists(), reason="needs Linux")
def test_ctrl_c_while_it_waits_for_a_file_to_be_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt_open() -> None:
        waits_in = Path(f"/proc/self/task/{os.getpid()}/wchan")
        deadline = time.monotonic() + LONG
        while waits_in.read_text() != "wait_for_partner" and time.monotonic() < deadline:
            time.sleep(0.01)
        interrupt()

    os.mkfifo(tmp_path / "fifo")
    interrupting = threading.Thread(target=interrupt_open)
    interrupting.start()
    interrupted_in(["127.0.0.1", "1", "--send", str(tmp_path / "fifo")], capsys)
    interrupting.join()


@pytest.mark.parametrize("sending", ["all", "on and on"])
def test_ctrl_c_in_a_conversation(
    sending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def behave(sock: socket.socket) -> None:
        sock.recv(1)
        interrupt()
        sees_reset(sock)

    file = Path("/dev/zero") if sending == "on and on" else tmp_path / "request"
    if sending == "all":
        file.write_bytes(b"x")
    before = set(threading.enumerate())
    with serving(behave) as port:
        argv = ["probe", "127.0.0.1", str(port), "--send", str(file)]
        assert __main__.main(argv) == 130
    for reading in set(threading.enumerate()) - before:
        reading.join(LONG)  # nothing of the probe waits for it
    assert printed(capsys)[-1] == "verdict        no end: interrupted"


def test_sigterm_kills_and_resets() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(LONG)
        argv = [*PROBE, *map(str, listener.getsockname()), "--send", "-"]
        with subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdin is not None
            process.stdin.write(b"x")
            process.stdin.flush()
            with listener.accept()[0] as sock:
                sock.settimeout(LONG)
                assert sock.recv(1) == b"x"
                process.terminate()
                sees_reset(sock)
            assert process.communicate(timeout=LONG) == (b"", b"")
    assert process.returncode == -signal.SIGTERM


# As it is typed, and what to type instead.
TYPED = [
    (["http://example.org/"], "example.org 80"),
    (["https://example.org"], "example.org 443 --tls"),
    (["https://me:pw@example.org:8443/a?b", "443"], "example.org 8443 --tls"),
    (["HTTP://[2001:db8::1]:8080/"], "[2001:db8::1] 8080"),
    (["redis://cache/0", "6379"], "cache PORT"),
    (["redis://cache:6379/0"], "cache 6379"),
    (["example.org:80"], "example.org 80"),
    (["example.org:"], "example.org PORT"),
    (["[::1]:443", "443"], "[::1] 443"),
]


@pytest.mark.parametrize(("argv", "instead"), TYPED, ids=str)
def test_what_to_type_instead(
    argv: list[str], instead: str, capsys: pytest.CaptureFixture[str]
) -> None:
    err = refusal(["probe", *argv], capsys)
    assert err.splitlines()[-1].endswith(f": type {instead}")
    if "PORT" not in instead:
        typed = __main__.parse(["probe", *instead.split()])
        assert typed.tls is instead.endswith("--tls")


@settings(PROFILE)
@given(st.text() | st.text(alphabet=":/[]@.?#ah80%-"))
def test_fuzzed_host_is_one_or_the_message_says_what_to_type(text: str) -> None:
    try:
        host = host_name(text)
    except ArgumentTypeError as exc:
        typed = re.search(r": type (\S+) \d+( --tls)?$", str(exc))
        if typed:
            host_name(typed[1])
    else:
        assert host
        assert host.strip("[]") == text.strip("[]")


def test_terminal_is_told_what_is_waited_for() -> None:
    def behave(sock: socket.socket) -> None:
        sock.sendall(b"half")
        while b" waiting for the end" not in shown:
            shown.extend(os.read(ours, 4096))
        sock.sendall(b"and more")

    shown = bytearray()
    ours, theirs = pty.openpty()
    try:
        with serving(behave) as port:
            with subprocess.Popen(
                [*PROBE, "127.0.0.1", str(port)],
                stdout=subprocess.PIPE,
                stderr=theirs,
                text=True,
                env={**os.environ, "TERM": "xterm"},
            ) as process:
                os.close(theirs)
                out, _ = process.communicate(timeout=LONG)
        with suppress(OSError):  # it is over
            while True:
                shown.extend(os.read(ours, 4096))
    finally:
        os.close(ours)
    erase, *lines = shown.decode().split("\r\x1b[K")
    assert erase == lines[-1] == ""
    assert lines[0] == "1 s: 0 bytes sent, 4 received, waiting for the end"
    assert "\x1b" not in out
    assert out.splitlines()[2].startswith("received       12 bytes")


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({}, "waiting for a connection to example.org:443"),
        ({"address": "192.0.2.1", "tls": True}, "waiting for TLS with example.org:443"),
        (
            {"address": "192.0.2.1", "sent_bytes": 1000, "received_bytes": 0},
            "1,000 bytes sent, 0 received, waiting for the end",
        ),
    ],
)
def test_what_is_waited_for(values: dict[str, Any], line: str) -> None:
    report = Report("example.org", 443, False, 10.0)
    assert waits_for(dataclasses.replace(report, **values)) == line


NO_SECONDS = "must be seconds, more than 0 and at most a day"


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["h", "0"], "argument PORT: must be a number from 1 to 65535, not '0'"),
        (["h", "65536"], "argument PORT: must be a number from 1 to 65535, not '65536'"),
        (["h", "http"], "argument PORT: must be a number from 1 to 65535, not 'http'"),
        (["", "80"], "argument HOST: must not be empty"),
        (["[]", "80"], "argument HOST: must not be empty"),
        *(
            (
                ["h", "80", f"--timeout={text}"],
                f"argument --timeout: {NO_SECONDS}, not {text!r}",
            )
            for text in ["0", "-1", "nan", "inf", "86401", "long"]
        ),
    ],
)
def test_wrong_arguments(
    argv: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    err = refusal(["probe", *argv], capsys)
    assert err.splitlines()[-1] == f"anyio-rst probe: error: {line}"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            ["--send", "/no/such/file"],
            "cannot read /no/such/file: No such file or directory",
        ),
        (["--send", "/"], "cannot read /: Is a directory"),
        (["--tls", "--half-close"], "--half-close cannot be combined with --tls"),
    ],
)
def test_what_cannot_be_done_is_told_before_connecting(
    options: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        argv = ["probe", *map(str, listener.getsockname()), *options]
        assert __main__.main(argv) == 2
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert capsys.readouterr() == ("", f"anyio-rst probe: {line}\n")


def test_input_that_is_closed() -> None:
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", *PROBE, "127.0.0.1", "1", "--send", "-"],
        capture_output=True,
        text=True,
        timeout=LONG,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "anyio-rst probe: cannot read -: Bad file descriptor\n"


def test_nothing_but_asyncio_is_needed() -> None:
    program = (
        "import sys\n"
        "for name in 'trio', 'uvloop', 'rich': sys.modules[name] = None\n"
        "from anyio_rst.__main__ import main\n"
        "sys.exit(main())"
    )
    with serving(lambda sock: sock.sendall(b"x")) as port:
        command = [sys.executable, "-c", program, "probe", "127.0.0.1", str(port)]
        done = subprocess.run(command, capture_output=True, timeout=LONG, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


# The documentation.


def test_table_of_exit_statuses_is_that_of_the_code() -> None:
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", DOCS, re.MULTILINE)
    assert rows == [(str(end.status), end.name) for end in End]


def test_table_of_keys_is_that_of_the_code() -> None:
    table = DOCS[DOCS.index("| key |") :]
    keys = [
        key
        for cell in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
        for key in re.findall(r"`(\w+)`", cell)
    ]
    assert keys == [field.name for field in dataclasses.fields(Report)]


def without_times(output: str) -> str:
    output = re.sub(r"\d+\.\d+ s", "N s", output)
    return re.sub(r'_seconds": \d+\.\d+', '_seconds": N', output)


def test_documented_output_is_what_is_printed() -> None:
    """Of our own handler, that returns and that raises."""
    (session,) = re.findall(r"```console\n(.*?)```", DOCS, re.DOTALL)
    steps = re.findall(r"^\$ (.*)\n((?:[^$].*\n)*)", session, re.MULTILINE)
    assert len(steps) >= 5
    with running(GREETING) as (port, server):
        connect(port, server).close()
        for command, output in steps:
            here = command.replace("8000", str(port))
            done = subprocess.run(
                f'anyio-rst() {{ "$PYTHON" -m anyio_rst "$@"; }}\n{here}',
                shell=True,
                executable="/bin/bash",
                env={**os.environ, "PYTHON": sys.executable},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=LONG,
                check=False,
            )
            told = done.stdout.decode().replace(str(port), "8000")
            if "--json" not in command:
                assert max(map(len, told.splitlines())) <= WIDTH
            assert without_times(told) == without_times(output)
