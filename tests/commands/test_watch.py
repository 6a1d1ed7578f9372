"""The watch, judged by plain blocking sockets whose ends are known."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from cutting import OUR_ADDRESS, PEERS_ADDRESS, cable, carry, link, on_machine
from hypothesis import given, settings
from hypothesis import strategies as st
from test_commands import refusal
from test_model import PROFILE
from test_probe import NO_SECONDS
from test_readme import GREETING, connect, free_port, running

from anyio_rst import __main__
from anyio_rst.commands import _watch_capture, _watch_printer
from anyio_rst.commands import watch as command
from anyio_rst.commands._interruption import Interrupted, interruption
from anyio_rst.commands._output import WIDTH
from anyio_rst.commands._watch_capture import Capture, Unavailable
from anyio_rst.commands._watch_connection import End
from anyio_rst.commands._watch_printer import Printer
from anyio_rst.commands._watch_segments import Unreadable, parse
from anyio_rst.commands._watch_table import Table
from anyio_rst.testing import CaptureUnavailable, _capture, capture_segments

from serving import LONG

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "watch.md").read_text()

WATCH = [sys.executable, "-m", "anyio_rst", "watch"]


def why_not() -> str | None:
    try:
        with capture_segments(0):
            return None
    except CaptureUnavailable as exc:
        return str(exc)


UNAVAILABLE = why_not()

captures = pytest.mark.skipif(UNAVAILABLE is not None, reason=UNAVAILABLE or "")
needs_link = pytest.mark.skipif(
    UNAVAILABLE is not None or link.available() is not None,
    reason=UNAVAILABLE or link.available() or "",
)

Record = dict[str, Any]


@contextmanager
def program(
    *options: str,
    namespace: int | None = None,
    stdout: int = subprocess.PIPE,
    env: dict[str, str] | None = None,
    watch: Sequence[str] = WATCH,
) -> Iterator[subprocess.Popen[str]]:
    """It is killed at the end."""

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*watch, *options],
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | (env or {}),
        )

    with start() if namespace is None else on_machine(namespace, start) as process:
        try:
            yield process
        finally:
            process.kill()


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


class Watching:
    """The program, which says what it sees as JSON."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.totals: Record = {}

    def next(self) -> Record:
        record: Record = json.loads(next_line(self.process))
        return record


@contextmanager
def watching(*options: str, **where: Any) -> Iterator[Watching]:
    """It sees all that begins in the block, at the end of which it gets Ctrl-C."""
    with program("--json", *options, **where) as process:
        watch = Watching(process)
        assert watch.next()["event"] == "watching"
        yield watch
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=LONG)
    assert (process.returncode, err) == (130, "")
    (line,) = out.splitlines()
    watch.totals = json.loads(line)
    assert watch.totals["event"] == "totals"
    assert watch.totals["lost_packets"] == watch.totals["unreadable_packets"] == 0


@contextmanager
def listening(host: str = "127.0.0.1") -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, 0), family=family)
    except OSError:
        pytest.skip(f"no {host} here")
    with listener:
        listener.settimeout(LONG)
        yield listener


def pair(listener: socket.socket) -> tuple[socket.socket, socket.socket]:
    """Client and server."""
    client = socket.create_connection(listener.getsockname()[:2], timeout=LONG)
    server, _ = listener.accept()
    server.settimeout(LONG)
    return client, server


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def read_to_end(sock: socket.socket) -> int:
    size = 0
    while data := sock.recv(2**20):
        size += len(data)
    return size


def receive(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        chunk = sock.recv(size - len(data))
        assert chunk
        data += chunk
    return bytes(data)


def is_reset(sock: socket.socket) -> None:
    with pytest.raises(ConnectionResetError):
        read_to_end(sock)


# Known ends.

BIG = 3_000_000  # in segments of up to 64 KB, on loopback


def server_finishes(client: socket.socket, server: socket.socket) -> None:
    client.sendall(b"hello")
    receive(server, 5)
    sending = threading.Thread(target=server.sendall, args=[bytes(BIG)])
    sending.start()
    receive(client, BIG)
    sending.join()
    server.close()
    assert read_to_end(client) == 0
    client.close()


def client_finishes(client: socket.socket, server: socket.socket) -> None:
    client.close()
    assert read_to_end(server) == 0
    server.close()


def server_answers_after_a_half_close(
    client: socket.socket, server: socket.socket
) -> None:
    client.sendall(b"request")
    client.shutdown(socket.SHUT_WR)
    assert read_to_end(server) == 7
    threading.Event().wait(0.1)
    server.sendall(b"answer")
    server.close()
    assert read_to_end(client) == 6
    client.close()


def server_resets(client: socket.socket, server: socket.socket) -> None:
    server.sendall(b"half")
    assert receive(client, 4) == b"half"
    reset(server)
    is_reset(client)
    client.close()


def client_resets(client: socket.socket, server: socket.socket) -> None:
    reset(client)
    is_reset(server)
    server.close()


def server_closes_with_unread_input(client: socket.socket, server: socket.socket) -> None:
    client.sendall(b"hello")
    server.recv(1, socket.MSG_PEEK)
    server.close()
    is_reset(client)
    client.close()


def server_resets_what_it_has_not_delivered(
    client: socket.socket, server: socket.socket
) -> None:
    server.setblocking(False)
    with suppress(BlockingIOError):  # until the client's window is closed
        while True:
            server.send(bytes(65536))
    # What is queued, and was never sent, is not in flight.
    reset(server)
    with suppress(ConnectionResetError):
        read_to_end(client)
    client.close()


def client_is_gone_when_the_server_answers(
    client: socket.socket, server: socket.socket
) -> None:
    client.close()
    assert read_to_end(server) == 0
    server.sendall(b"too late")
    poll = select.poll()
    poll.register(server, select.POLLERR)
    assert poll.poll(LONG * 1000)
    server.close()


def client_resets_after_the_servers_fin(
    client: socket.socket, server: socket.socket
) -> None:
    server.shutdown(socket.SHUT_WR)
    assert read_to_end(client) == 0
    reset(client)
    poll = select.poll()
    poll.register(server, select.POLLERR)
    assert poll.poll(LONG * 1000)
    server.close()


ENDS: list[tuple[Callable[[socket.socket, socket.socket], None], Record]] = [
    (
        server_finishes,
        {
            "end": "FIN",
            "first": "server",
            "first_how": "FIN",
            "bytes_up": 5,
            "bytes_down": BIG,
            "last_data": "server",
        },
    ),
    (
        client_finishes,
        {"end": "FIN", "first": "client", "bytes_up": 0, "last_data": None},
    ),
    (
        server_answers_after_a_half_close,
        {
            "end": "FIN",
            "first": "client",
            "bytes_up": 7,
            "bytes_down": 6,
            "last_data": "server",
        },
    ),
    (
        server_resets,
        {
            "end": "RST",
            "first": "server",
            "first_how": "RST",
            "reset_by": "server",
            "bytes_down": 4,
            "last_data": "server",
            "half_closed_seconds": None,
            "usual_ttl": None,
        },
    ),
    (client_resets, {"end": "RST", "first": "client", "reset_by": "client"}),
    (
        server_closes_with_unread_input,
        {"end": "RST", "reset_by": "server", "bytes_up": 5, "last_data": "client"},
    ),
    (server_resets_what_it_has_not_delivered, {"end": "RST", "reset_by": "server"}),
    (
        client_is_gone_when_the_server_answers,
        {
            "end": "RST",
            "first": "client",
            "first_how": "FIN",
            "reset_by": "client",
            "bytes_down": 8,
            "in_flight_down": 8,
        },
    ),
    (
        client_resets_after_the_servers_fin,
        {"end": "RST", "first": "server", "first_how": "FIN", "reset_by": "client"},
    ),
]


@captures
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_known_ends(host: str) -> None:
    with listening(host) as listener:
        port = listener.getsockname()[1]
        with watching("--port", str(port)) as watch:
            for end, expected in ENDS:
                client, server = pair(listener)
                ours = client.getsockname()
                end(client, server)
                told = watch.next()
                assert {key: told[key] for key in expected} == expected, end
                assert told["client_address"] == told["server_address"] == host
                assert (told["client_port"], told["server_port"]) == (ours[1], port)
                assert told["from_start"] is True
                assert told["syns"] == 1
                assert 0 < told["duration_seconds"] < LONG
                if end is server_answers_after_a_half_close:
                    assert 0.1 <= told["half_closed_seconds"] < told["duration_seconds"]
    (row,) = watch.totals["ports"]
    assert {name: count for name, count in row.items() if "bytes" not in name} == {
        "port": port,
        "open": 0,
        "client_fin": 2,
        "server_fin": 1,
        "client_rst": 3,
        "server_rst": 3,
        "refused": 0,
        "unanswered": 0,
        "unseen": 0,
    }


@captures
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_refused(host: str) -> None:
    with listening(host) as listener:
        address = listener.getsockname()[:2]
    with watching("--port", str(address[1]), "--interface", "lo") as watch:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address, timeout=LONG)
        told = watch.next()
    assert (told["end"], told["first"], told["first_how"]) == ("REFUSED", "server", "RST")
    assert watch.totals["ports"][0]["refused"] == 1


@captures
def test_connection_that_was_open_before() -> None:
    with listening() as listener:
        port = listener.getsockname()[1]
        client, server = pair(listener)
        with watching("--port", str(port)) as watch:
            client.sendall(b"hello")
            reset(server)
            is_reset(client)
            client.close()
            told = watch.next()
    assert told["from_start"] is False
    assert (told["end"], told["reset_by"], told["bytes_up"]) == ("RST", "server", 5)
    assert (told["client_address"], told["server_port"]) == ("127.0.0.1", port)


@captures
def test_open_connections_are_counted() -> None:
    with listening() as listener:
        port = listener.getsockname()[1]
        with watching("--port", str(port)) as watch:
            for client, server in [pair(listener) for _ in range(3)]:
                client_finishes(client, server)
            for _ in range(3):
                assert watch.next()["end"] == "FIN"
            kept = pair(listener)
        for sock in kept:
            sock.close()
    (row,) = watch.totals["ports"]
    assert (row["open"], row["client_fin"]) == (1, 3)


@captures
def test_other_ports_are_left_out() -> None:
    with listening() as listener, listening() as other:
        with watching("--port", str(listener.getsockname()[1])) as watch:
            client_finishes(*pair(other))
            client_finishes(*pair(listener))
            assert watch.next()["server_port"] == listener.getsockname()[1]
    assert len(watch.totals["ports"]) == 1


@captures
def test_many_are_counted_or_said_to_be_lost() -> None:
    many = 1000
    with listening() as listener:
        port = str(listener.getsockname()[1])
        with program("--port", port, "--json") as process:
            assert process.stdout is not None
            lines = iter(process.stdout)
            next(lines)
            for _ in range(many):
                client, server = pair(listener)
                server.sendall(b"x")
                assert client.recv(1) == b"x"
                client_finishes(client, server)
            process.send_signal(signal.SIGINT)
            *ended, totals = map(json.loads, lines)
    if not totals["lost_packets"]:
        assert len(ended) == many
        assert {(each["end"], each["bytes_down"]) for each in ended} == {("FIN", 1)}


# Two machines.


@needs_link
def test_what_is_sent_again_counts_once() -> None:
    with cable() as between:
        with watching(namespace=between.ours) as watch:
            listener = on_machine(between.ours, socket.create_server, (OUR_ADDRESS, 0))
            with listener, between.connect(listener.getsockname()[1]) as peer:
                sock, _ = listener.accept()
                between.cut()
                sock.sendall(bytes(1000))
                poll = select.poll()
                # The kernel counts them: tcpi_total_retrans, linux/tcp.h.
                while struct.unpack_from("I", tcp_info(sock), 100)[0] == 0:
                    poll.poll(10)
                between.mend()
                sock.close()
                peer.sock.settimeout(LONG)
                assert read_to_end(peer.sock) == 1000
            told = watch.next()
    assert told["server_address"] == OUR_ADDRESS
    assert told["client_address"] == PEERS_ADDRESS
    assert (told["bytes_down"], told["end"], told["first"]) == (1000, "FIN", "server")


def tcp_info(sock: socket.socket) -> bytes:
    info: bytes = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
    return info


# The same, that gives up sooner.
IMPATIENT = """\
import sys
from anyio_rst.__main__ import main
from anyio_rst.commands import _watch_table
_watch_table.PATIENCE = 0.3
sys.exit(main())
"""


@needs_link
def test_never_answered() -> None:
    def connect() -> None:
        with pytest.raises(TimeoutError):
            socket.create_connection((PEERS_ADDRESS, 80), timeout=0.1)

    impatient = [sys.executable, "-c", IMPATIENT, "watch"]
    with cable() as between:
        between.cut()
        with watching(namespace=between.ours, watch=impatient) as watch:
            on_machine(between.ours, connect)
            told = watch.next()
    assert (told["end"], told["first"], told["syns"]) == ("UNANSWERED", None, 1)
    assert (told["server_address"], told["server_port"]) == (PEERS_ADDRESS, 80)
    assert watch.totals["ports"][0]["unanswered"] == 1


def checksum(data: bytes) -> int:
    """RFC 1071."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def forged_reset(source: bytes, target: bytes, sequence: int) -> bytes:
    """Of the connection, with addresses before ports, with a TTL of 3."""
    tcp = source[4:] + target[4:] + struct.pack("!IIBBHHH", sequence, 0, 0x50, 4, 0, 0, 0)
    pseudo = source[:4] + target[:4] + struct.pack("!HH", 6, len(tcp))
    tcp = tcp[:16] + struct.pack("!H", checksum(pseudo + tcp)) + tcp[18:]
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 40, 0, 0, 3, 6, 0) + source[:4] + target[:4]
    return ip[:10] + struct.pack("!H", checksum(ip)) + ip[12:] + tcp


def filter_out(packet: bytes, sender: int, receiver: int) -> None:
    """Let no segment through in which something forbidden is, and reset both sides."""
    if b"forbidden" not in packet:
        carry(packet, sender, receiver)
        return
    segment = parse(packet, len(packet))
    assert segment is not None
    way = segment.way
    source, target = way[:4] + way[8:10], way[4:8] + way[10:]
    os.write(receiver, forged_reset(source, target, segment.sequence))
    os.write(sender, forged_reset(target, source, segment.acknowledgment))


@needs_link
def test_reset_from_something_between() -> None:
    with cable() as between:
        between.carry = filter_out
        listener = on_machine(between.ours, socket.create_server, (OUR_ADDRESS, 0))
        with watching(namespace=between.ours) as watch:
            with listener, between.connect(listener.getsockname()[1]) as peer:
                sock, _ = listener.accept()
                with sock:
                    sock.settimeout(LONG)
                    peer.sock.settimeout(LONG)
                    peer.sock.sendall(b"hello")
                    assert receive(sock, 5) == b"hello"
                    peer.sock.sendall(b"forbidden")
                    is_reset(sock)
                    is_reset(peer.sock)
            told = watch.next()
    assert (told["end"], told["reset_by"], told["bytes_up"]) == ("RST", "client", 5)
    assert (told["reset_ttl"], told["usual_ttl"]) == (3, 64)


@needs_link
def test_interface_that_goes_down() -> None:
    def take_down() -> None:
        with socket.socket() as sock:
            request = struct.pack("16sh22x", link.NAME, 0)
            fcntl.ioctl(sock, link.SIOCSIFFLAGS, request)

    name = link.NAME.decode()
    with (
        cable() as between,
        program("--interface", name, namespace=between.ours) as process,
    ):
        next_line(process)
        assert process.stderr is not None
        on_machine(between.ours, take_down)
        assert process.stderr.readline() == "anyio-rst watch: Network is down\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(LONG) == 130


# What is not seen is said.


@captures
def test_lost_packets_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_watch_capture, "BLOCKS", 1)
    monkeypatch.setattr(_watch_capture, "FRAMES", 256)
    printer = Printer(as_json=False)
    with listening() as listener:
        ports = [listener.getsockname()[1]]
        with closing(Capture(None, ports)) as capture:
            for _ in range(100):
                client_finishes(*pair(listener))
            watch = command.Watch(capture, Table(ports), printer)
            watch.look(last=True)
            assert capture.lost() == 0
            # And it goes on.
            client_finishes(*pair(listener))
            watch.look(last=True)
    printer.end(Counter(), 1.0)
    out, err = capsys.readouterr()
    lost = printer.lost
    assert lost > 0
    assert err == f"anyio-rst watch: {lost:,} packets lost, because they came too fast\n"
    assert out.splitlines()[-1] == f"{lost:,} packets lost, which are not counted"
    assert out.count("client FIN, server FIN") >= 2


@captures
def test_what_comes_too_early_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before there is a filter, it is whatever passes this machine."""
    attach_filter = _capture.attach_filter

    def attach_late(*arguments: Any) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind(("127.0.0.1", 0))
            for _ in range(50):
                sock.sendto(bytes(60_000), sock.getsockname())
        attach_filter(*arguments)

    monkeypatch.setattr(_watch_capture, "attach_filter", attach_late)
    with closing(Capture(None, [1])) as capture:
        assert list(capture.packets()) == []
        assert capture.lost() == 0


@captures
def test_status_tells_of_lost_packets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Capture, "lost", lambda _: 5)
    assert __main__.main(["watch", "--for", "0.1", "--port", "1"]) == command.LOST
    monkeypatch.setattr(Capture, "lost", lambda _: 0)
    assert __main__.main(["watch", "--for", "0.1", "--port", "1"]) == 0


@captures
def test_unreadable_packets_are_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise Unreadable

    monkeypatch.setattr(command, "parse", fail)
    with listening() as listener:
        ports = [listener.getsockname()[1]]
        with closing(Capture("lo", ports)) as capture:
            client_finishes(*pair(listener))
            printer = Printer(as_json=False)
            command.Watch(capture, Table(ports), printer).look(last=True)
    assert printer.unreadable >= 6
    printer.end(Counter(), 1.0)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"{printer.unreadable} packets could not be read"


# The command.


@pytest.mark.skipif(os.geteuid() != 0, reason="nobody else can give up CAP_NET_RAW")
def test_without_the_right_to_it_says_what_to_do() -> None:
    program = (
        "import os, sys\n"
        "from anyio_rst.__main__ import main\n"
        "os.setuid(65534)\n"
        "sys.exit(main(['watch']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (77, "")
    assert done.stderr == (
        "anyio-rst watch: capturing packets needs CAP_NET_RAW: "
        f"sudo {sys.executable} -m anyio_rst watch\n"
    )


def test_where_there_are_no_packet_sockets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(socket, "AF_PACKET", raising=False)
    assert __main__.main(["watch"]) == 77
    line = "anyio-rst watch: capturing packets needs Linux\n"
    assert capsys.readouterr() == ("", line)


@captures
def test_no_such_interface(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["watch", "--interface", "nowhere0"]) == 77
    line = "anyio-rst watch: there is no interface 'nowhere0'\n"
    assert capsys.readouterr() == ("", line)


def test_too_many_ports(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["watch", *(f"--port={i}" for i in range(1, 102))]) == 2
    assert capsys.readouterr() == ("", "anyio-rst watch: too many ports: at most 100\n")


@captures
def test_as_many_ports_as_there_may_be() -> None:
    with listening() as listener:
        port = listener.getsockname()[1]
        ports = [*range(1, 100), port]
        with watching(*(f"--port={each}" for each in ports)) as watch:
            client_finishes(*pair(listener))
            assert watch.next()["server_port"] == port


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--port", "0"], "argument --port: must be a number from 1 to 65535, not '0'"),
        (["--interface", ""], "argument --interface: must be 1 to 15 bytes long"),
        (["--interface", "x" * 16], "argument --interface: must be 1 to 15 bytes long"),
        (
            ["--for", "0"],
            f"argument --for: {NO_SECONDS}, not '0'",
        ),
        (["8000"], "unrecognized arguments: 8000"),
    ],
)
def test_wrong_arguments(
    argv: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    err = refusal(["watch", *argv], capsys)
    assert err.splitlines()[-1].endswith(f"error: {line}")


words = st.sampled_from(["--port", "--interface", "--json", "--for", "80", "lo", "1"])


@settings(PROFILE)
@given(st.lists(words | st.text(max_size=20), max_size=6))
def test_fuzzed_arguments_end_in_a_status(argv: list[str]) -> None:
    def fail(interface: str | None, ports: list[int]) -> None:
        assert interface is None or 0 < len(interface) <= 15
        assert len(ports) <= 100
        raise Unavailable("not now")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "Capture", fail)
        status: object = 77
        try:
            status = __main__.main(["watch", *argv])
        except SystemExit as exc:
            status = exc.code
        assert status in (0, 2, 77)


@captures
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_signal_ends_it_with_the_totals(number: int, status: int) -> None:
    with listening() as listener:
        port = listener.getsockname()[1]
        with program("--port", str(port)) as process:
            next_line(process)
            client_finishes(*pair(listener))
            lines = [next_line(process) for _ in range(2)]
            process.send_signal(number)
            out, err = process.communicate(timeout=LONG)
    assert (process.returncode, err) == (status, "")
    assert "\x1b" not in out
    assert lines[0].endswith(f"> 127.0.0.1:{port}\n")
    assert lines[1].startswith("  client FIN, server FIN 0.")
    assert out.splitlines()[-1].split() == [str(port), *"01000000"]


@captures
@pytest.mark.parametrize("at", ["parse", "as_dict", "put"])
def test_interruption_loses_no_connection(
    at: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wherever it strikes."""
    module: Any = command if at == "parse" else _watch_printer
    call = getattr(module, at)
    calls = count()

    def interrupted(*args: Any, **options: Any) -> Any:
        if next(calls) == (7 if at == "parse" else 0):
            signal.raise_signal(signal.SIGINT)
        return call(*args, **options)

    monkeypatch.setattr(module, at, interrupted)
    printer = Printer(as_json=True)
    with listening() as listener:
        ports = [listener.getsockname()[1]]
        with closing(Capture(None, ports)) as capture:
            for _ in range(5):
                client_finishes(*pair(listener))
            watch = command.Watch(capture, Table(ports), printer)
            with interruption.caught(signal.SIGINT):
                with pytest.raises(Interrupted):
                    watch.look()
                printer.is_over = True
                watch.look(last=True)
    printer.end(Counter(), 1.0)
    *ended, totals = map(json.loads, capsys.readouterr().out.splitlines())
    assert len({each["client_port"] for each in ended}) == len(ended) == 5
    assert totals["ports"][0]["client_fin"] == 5


@captures
def test_output_that_nobody_reads_any_more_ends_it() -> None:
    with listening() as listener:
        port = listener.getsockname()[1]
        with program("--port", str(port)) as process:
            next_line(process)
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()
            client_finishes(*pair(listener))
            assert process.wait(LONG) == 141
            assert process.stderr.read() == ""


@captures
def test_interruption_where_nobody_reads() -> None:
    """The pipe is full, and stays so."""
    with listening() as listener:
        port = listener.getsockname()[1]
        receive, send = os.pipe()
        fcntl.fcntl(send, fcntl.F_SETPIPE_SZ, 4096)
        with program("--port", str(port), stdout=send) as process:
            os.close(send)
            assert os.read(receive, 1000).startswith(b"watching")
            waits_in = Path(f"/proc/{process.pid}/wchan")
            deadline = time.monotonic() + LONG
            while not waits_in.read_text().endswith("pipe_write"):
                assert time.monotonic() < deadline
                client_finishes(*pair(listener))
            process.send_signal(signal.SIGINT)
            assert process.wait(LONG) == 130
            assert process.stderr is not None
            assert process.stderr.read() == ""
        os.close(receive)


def test_interruption_between_two_lines_where_nobody_reads() -> None:
    """The totals would wait for a pipe that is full already."""
    receive, send = os.pipe()
    with open(receive, "rb"), open(send, "wb"):
        with program("--port", "1", stdout=send) as process:
            assert os.read(receive, 1000).startswith(b"watching")
            os.set_blocking(send, False)
            with pytest.raises(BlockingIOError):
                while True:
                    os.write(send, b"x")
            os.set_blocking(send, True)
            process.send_signal(signal.SIGINT)
            assert process.wait(LONG) == 130
            assert process.stderr is not None
            assert process.stderr.read() == ""


# On a terminal.


@contextmanager
def on_a_terminal(port: int, **env: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    ours, theirs = pty.openpty()
    env = {"TERM": "xterm", "COLUMNS": "80", "LINES": "24", **env}
    try:
        with program("--port", str(port), stdout=theirs, env=env) as process:
            os.close(theirs)
            yield process, ours
    finally:
        os.close(ours)


def read_until(terminal: int, text: str) -> str:
    data = b""
    while text.encode() not in data:
        assert select.select([terminal], [], [], LONG)[0], data
        try:
            data += os.read(terminal, 4096)
        except OSError as exc:  # it is over
            raise AssertionError(data.decode()) from exc
    return data.decode()


def screen(data: str) -> list[str]:
    """What a terminal shows of it, that knows what the watch uses."""
    lines = [""]
    at = 0
    for part in re.findall(r"\x1b\[\d*[A-Z]|\x1b\[\d*m|\r|\n|[^\x1b\r\n]+", data):
        if part == "\n":
            at += 1
            if at == len(lines):
                lines.append("")
        elif part == "\x1b[J":
            del lines[at:]
            lines.append("")
        elif part.endswith("A") and part[0] == "\x1b":
            at -= int(part[2:-1])
            assert at >= 0
        elif part != "\r" and part[0] != "\x1b":
            lines[at] = part
    return lines


@captures
@pytest.mark.parametrize(
    ("env", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)], ids=str
)
def test_totals_stay_below_on_a_terminal(env: dict[str, str], coloured: bool) -> None:
    with listening() as listener:
        port = listener.getsockname()[1]
        with on_a_terminal(port, **env) as (process, terminal):
            data = read_until(terminal, "unseen")
            client_finishes(*pair(listener))
            data += read_until(terminal, f"{port:>5}        0         1")
            client_resets(*pair(listener))
            row = f"{port:>5}        0         1         0         1"
            data += read_until(terminal, row)
            process.send_signal(signal.SIGINT)
            data += read_until(terminal, row)
            assert process.wait(LONG) == 130
    red = "\x1b[31mclient RST\x1b[0m; "
    assert (red in data) is coloured
    assert ("client RST; " in data) is not coloured
    shown = screen(data)
    assert max(map(len, shown)) <= WIDTH
    assert shown[0] == f"watching TCP connections of port {port} on all interfaces"
    assert sum("unseen" in line for line in shown) == 1
    assert [bool(re.match(r"\d\d:", line)) for line in shown[1:5]] == [True, False] * 2


@captures
def test_terminal_that_can_do_nothing_is_a_file() -> None:
    with listening() as listener:
        port = listener.getsockname()[1]
        with on_a_terminal(port, TERM="dumb") as (process, terminal):
            data = read_until(terminal, "watching")
            client_resets(*pair(listener))
            data += read_until(terminal, "client RST; ")
            process.send_signal(signal.SIGINT)
            data += read_until(terminal, "unseen")
            assert process.wait(LONG) == 130
    assert "\x1b" not in data


# The documentation.


def sessions() -> list[list[tuple[str, str]]]:
    blocks = re.findall(r"```console\n(.*?)```", DOCS, re.DOTALL)
    step = re.compile(r"^\$ (.*)\n((?:[^$].*\n|\n)*)", re.MULTILINE)
    return [step.findall(block) for block in blocks]


def without_numbers(output: str) -> str:
    """Of times, and of the ports that the kernel chose."""
    output = re.sub(r"\d+\.\d+ s", "N s", output)
    output = re.sub(r"\d\d:\d\d:\d\d\.\d+", "TIME", output)
    output = re.sub(r"(\d\.1:)\d+ >", r"\1N >", output)
    output = re.sub(r'(seconds|_port|"port)": [\d.]+', r'\1": N', output)
    return re.sub(r'"time": ".*?"', '"time": TIME', output)


@captures
def test_documented_output_is_what_is_printed() -> None:
    clients, ((command, expected),), ((json_command, expected_json),) = sessions()
    assert max(map(len, expected.splitlines())) <= WIDTH
    with running(GREETING) as (port, server):
        connect(port, server).close()
        nobody = free_port()

        def here(text: str) -> str:
            return text.replace("8000", str(port)).replace("8001", str(nobody))

        def ask(client: str) -> None:
            subprocess.run(
                f'anyio-rst() {{ "$PYTHON" -m anyio_rst "$@"; }}\n{here(client)}',
                shell=True,
                executable="/bin/bash",
                env={**os.environ, "PYTHON": sys.executable},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=LONG,
                check=False,
            )

        def watched(typed: str, asked: list[tuple[str, str]], lines: int) -> str:
            start = "sudo anyio-rst watch "
            assert typed.startswith(start)
            with program(*here(typed.removeprefix(start)).split()) as process:
                out = next_line(process)
                for client, _ in asked:
                    ask(client)
                    out += "".join(next_line(process) for _ in range(lines))
                process.send_signal(signal.SIGINT)
                rest, err = process.communicate(timeout=LONG)
            assert err == ""
            return without_numbers(out + rest)

        told = watched(command, clients, 2)
        for number, documented in ((port, "8000"), (nobody, "8001")):
            told = re.sub(rf"(?m)^ *{number}\b", f" {documented}", told)
            told = re.sub(rf"\b{number}\b", documented, told)
        assert told == without_numbers(expected)
        told = watched(json_command, clients[:1], 1).replace(f"[{port}]", "[8000]")
        assert told == without_numbers(expected_json)


def test_documented_keys_are_those_of_the_program() -> None:
    ((_, output),) = sessions()[-1]
    _, record, _ = map(json.loads, output.splitlines())
    table = DOCS[DOCS.index("| key |") :]
    keys = [
        key
        for cell in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
        for key in re.findall(r"`(\w+)`", cell)
    ]
    assert ["event", *keys] == list(record)


def test_documented_ends_are_those_of_the_program() -> None:
    ends = re.findall(r"^\| `([A-Z]+)` \|", DOCS, re.MULTILINE)
    assert list(dict.fromkeys(ends)) == [end.value for end in End]
