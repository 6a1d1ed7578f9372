"""docs/frameworks.md: uvicorn, hypercorn and aiohttp, judged by curl, httpx and sockets.

The applications are in asgi_cases.py; they run in the real servers, as processes.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
from test_download import needs
from test_readme import connect, free_port
from test_serve_processes import read_to_end

from anyio_rst import PeerClose, lowlevel

import download
from asgi_cases import BIG, HALF, WHOLE
from serving import LONG

HERE = Path(__file__).parents[1]
ROOT = HERE.parent
EXAMPLES = ROOT / "examples"

Process = subprocess.Popen[str]

SERVERS = [
    "uvicorn-h11-asyncio",
    "uvicorn-h11-uvloop",
    "uvicorn-httptools-asyncio",
    "uvicorn-httptools-uvloop",
    "hypercorn-asyncio",
    "hypercorn-uvloop",
    "hypercorn-trio",
    "aiohttp-asyncio",
    "aiohttp-uvloop",
]

HYPERCORN = [name for name in SERVERS if name.startswith("hypercorn")]

# Seconds for which a server that is told to stop lets its applications go on.
GRACE = 1


def command(server: str, listener: int, *, armed: bool, tls: str = "") -> list[str]:
    """How one starts it, from the command line or in a program, on a listening socket."""
    name, *kind, loop = server.split("-")
    python = sys.executable
    if name == "uvicorn":
        app, http = "cases", repr(kind[0])
        if armed:
            app, http = "armed", {"h11": "app.H11", "httptools": "app.HttpTools"}[kind[0]]
        settings = f"fd={listener}, loop={loop!r}, lifespan='off'"
        settings += f", timeout_graceful_shutdown={GRACE}, ssl_certfile={tls or None!r}"
        run = f"uvicorn.run(app.{app}, http={http}, {settings})"
        return [python, "-c", f"import uvicorn, asgi_cases as app; {run}"]
    if name == "hypercorn":
        app = "asgi_cases:by_address" if armed else "asgi_cases:cases"
        options = ["-b", f"fd://{listener}", "-k", loop, f"--graceful-timeout={GRACE}"]
        if tls:
            options += ["--certfile", tls, "--keyfile", tls]
        return [python, "-m", "hypercorn", app, *options]
    arguments = ["armed" if armed else "plain", str(listener), loop, str(GRACE), tls]
    return [python, str(HERE / "asgi_cases.py"), *arguments]


@dataclass
class Service:
    port: int
    process: Process
    scheme: str

    def url(self, path: str) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}{path}"

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=LONG)


@contextmanager
def serving(
    server: str,
    *,
    armed: bool = True,
    listener_armed: bool = False,
    tls: str = "",
    change: tuple[str, str] = ("", ""),
) -> Iterator[Service]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        if listener_armed:
            lowlevel.arm(listener)
        descriptor = listener.fileno()
        arguments = command(server, descriptor, armed=armed, tls=tls)
        arguments = [argument.replace(*change) for argument in arguments]
        port = listener.getsockname()[1]
        with process_of(arguments, pass_fds=[descriptor]) as process:
            listener.close()  # or nobody learns that the server did not start
            yield Service(port, process, "https" if tls else "http")


@contextmanager
def process_of(arguments: list[str], **options: Any) -> Iterator[Process]:
    path = os.pathsep.join([str(HERE), str(EXAMPLES), *sys.path])
    with subprocess.Popen(
        arguments,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path},
        text=True,
        start_new_session=True,
        **options,
    ) as process:
        try:
            yield process
        finally:
            # hypercorn's worker, too, which a killed parent leaves behind.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module", params=SERVERS)
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    with serving(request.param) as started:
        yield started


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def servers_but(word: str) -> pytest.MarkDecorator:
    names = [name for name in SERVERS if word not in name]
    return pytest.mark.parametrize("service", names, indirect=True)


def curl(url: str, *options: str) -> tuple[int, bytes]:
    """Its exit status, and the body."""
    quiet = "--disable", "--silent", "--show-error", "--noproxy", "*"
    done = subprocess.run(
        ["curl", *quiet, *options, url], capture_output=True, timeout=LONG, check=False
    )
    return done.returncode, done.stdout


VERSIONS = ["--http1.0", "--http1.1"]  # without a length: to the end, and in chunks
LENGTHS = ["none", "length"]
FAILURES = ["raises", "times_out"]

each_version = pytest.mark.parametrize("version", VERSIONS)
each_length = pytest.mark.parametrize("length", LENGTHS)


@needs("curl")
@each_version
@each_length
@pytest.mark.parametrize("way", ["done", "at_once"])
def test_whole_answer(service: Service, version: str, length: str, way: str) -> None:
    assert curl(service.url(f"/{length}/{way}"), version) == (0, WHOLE)


@needs("curl")
@each_version
@each_length
@pytest.mark.parametrize("way", FAILURES)
def test_failure_half_way(service: Service, version: str, length: str, way: str) -> None:
    status, body = curl(service.url(f"/{length}/{way}"), version)
    assert status == 56
    assert body in (HALF, b"")


@needs("curl")
def test_what_it_is_for(server: str) -> None:
    """Without it, half of an answer is a whole one."""
    # With httptools uvicorn sends chunks to a client of HTTP/1.0, too.
    status = 18 if "httptools" in server else 0
    with serving(server, armed=False) as service:
        assert curl(service.url("/none/raises"), "--http1.0") == (status, HALF)


@needs("curl")
@each_version
@servers_but("aiohttp")  # which adds the end itself
def test_answer_that_is_forgotten(service: Service, version: str) -> None:
    status, body = curl(service.url("/none/returns"), version)
    assert status == 56
    assert body == HALF


@needs("curl")
@each_version
def test_failure_before_the_answer_is_an_answer(service: Service, version: str) -> None:
    url = service.url("/none/refuses")
    status, body = curl(
        url, version, "--output", "/dev/null", "--write-out", "%{http_code}"
    )
    assert (status, body) == (0, b"500")


@each_length
def test_httpx(service: Service, length: str) -> None:
    with httpx.Client(trust_env=False, timeout=LONG) as client:
        assert client.get(service.url(f"/{length}/done")).content == WHOLE
        for way in FAILURES:
            with pytest.raises(httpx.ReadError, match="reset by peer"):
                client.get(service.url(f"/{length}/{way}"))
        assert client.get(service.url(f"/{length}/done")).content == WHOLE


def ask(sock: socket.socket, *paths: str, version: str = "1.1") -> None:
    requests = [f"GET {path} HTTP/{version}\r\nHost: x\r\n\r\n" for path in paths]
    sock.sendall("".join(requests).encode())


def receive(sock: socket.socket, end: bytes) -> bytes:
    data = b""
    while end not in data:
        chunk = sock.recv(1000)
        assert chunk, data
        data += chunk
    return data


@pytest.mark.parametrize(("length", "end"), [("length", WHOLE), ("none", b"0\r\n\r\n")])
def test_connection_that_stays(service: Service, length: str, end: bytes) -> None:
    with service.connect() as sock:
        for _ in range(2):
            ask(sock, f"/{length}/done")
            receive(sock, end)
        ask(sock, f"/{length}/raises")
        seen = read_to_end(sock)
    assert seen.close is PeerClose.RST


def test_requests_that_do_not_wait_for_answers(service: Service) -> None:
    with service.connect() as sock:
        ask(sock, "/length/done", "/length/raises", "/length/done")
        seen = read_to_end(sock)
    assert seen.data.count(WHOLE) == 1
    assert seen.close is PeerClose.RST


def test_answer_of_a_connection_does_not_end_another(service: Service) -> None:
    with service.connect() as one, service.connect() as other:
        ask(one, "/length/done")
        receive(one, WHOLE)
        ask(other, "/none/waits")
        receive(other, HALF)
        ask(one, "/none/raises")
        assert read_to_end(one).close is PeerClose.RST
        other.settimeout(0.2)
        with pytest.raises(TimeoutError):
            other.recv(1)


def slow_reader(service: Service) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(LONG)
    sock.connect(("127.0.0.1", service.port))
    return sock


@each_length
def test_slow_reader_gets_all_of_it(service: Service, length: str) -> None:
    """The socket is disarmed before the server closes it."""
    with slow_reader(service) as sock:
        ask(sock, f"/{length}/big", version="1.0")
        seen = read_to_end(sock)
    assert seen.close is PeerClose.FIN
    head, _, body = seen.data.partition(b"\r\n\r\n")
    if b"chunked" in head:
        body = b"".join(body.split(b"\r\n")[1::2])
    assert body == BIG


def test_stop(server: str) -> None:
    """Who waits for the rest of an answer gets an RST, who has all of it a FIN."""
    if server == "hypercorn-asyncio" and sys.version_info >= (3, 12):
        # It waits in Server.wait_closed(), which since then is for all connections.
        pytest.skip("hypercorn never gets to its graceful time-out here")
    with serving(server) as service, service.connect() as idle:
        ask(idle, "/length/done")
        receive(idle, WHOLE)
        with service.connect() as half:
            ask(half, "/none/waits")
            receive(half, HALF)
            service.process.send_signal(signal.SIGTERM)
            assert read_to_end(half).close is PeerClose.RST
        assert read_to_end(idle).close is PeerClose.FIN


@servers_but("trio")
def test_cancelled_task(service: Service) -> None:
    with service.connect() as sock:
        ask(sock, "/none/cancelled")
        assert read_to_end(sock).close is PeerClose.RST


def test_killed_process(server: str) -> None:
    with serving(server) as service, service.connect() as sock:
        ask(sock, "/none/killed", version="1.0")
        close = read_to_end(sock).close
    assert close is (PeerClose.FIN if server.startswith("hypercorn") else PeerClose.RST)


@needs("curl")
@pytest.mark.parametrize("server", HYPERCORN)
def test_armed_listening_socket_is_no_help(server: str) -> None:
    """hypercorn sends FIN by itself, and an armed close takes from a slow reader."""
    with serving(server, armed=False, listener_armed=True) as service:
        assert curl(service.url("/none/raises"), "--http1.0") == (0, HALF)
        with slow_reader(service) as sock:
            ask(sock, "/none/big", version="1.0")
            assert read_to_end(sock).close is PeerClose.RST


@needs("curl")
@pytest.mark.parametrize("option", ["http='h11'", "http=app.H11, reset_contextvars=True"])
def test_uvicorn_that_does_not_show_its_connections(option: str) -> None:
    change = "http=app.H11", option
    with serving("uvicorn-h11-asyncio", change=change) as service:
        options = "--output", "/dev/null", "--write-out", "%{http_code}"
        assert curl(service.url("/none/done"), *options) == (0, b"500")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("frameworks") / "server.pem"
    trustme.CA().issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(
        path
    )
    return str(path)


@needs("curl")
def test_tls(server: str, certificate: str) -> None:
    with serving(server, tls=certificate) as service:
        for version in VERSIONS:
            status, body = curl(service.url("/none/done"), version, "--insecure")
            # On Trio hypercorn sends no close_notify, and curl 8 tells of that.
            assert status == 0 or (server, status) == ("hypercorn-trio", 56)
            assert body == WHOLE
            status, body = curl(service.url("/none/raises"), version, "--insecure")
            assert status == 56
            assert body in (HALF, b"")


@needs("curl")
@pytest.mark.parametrize("server", SERVERS)
def test_unix_socket_has_no_reset(server: str, tmp_path: Path) -> None:
    """What is whole arrives all the same."""
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        descriptor = listener.fileno()
        arguments = command(server, descriptor, armed=True)
        with process_of(arguments, pass_fds=[descriptor]):
            listener.close()
            options = "--unix-socket", path, "--http1.0"
            assert curl("http://x/length/done", *options) == (0, WHOLE)
            assert curl("http://x/length/raises", *options) == (18, HALF)


@needs("curl")
@servers_but("hypercorn")
def test_proxy_that_names_its_client(service: Service) -> None:
    """By X-Forwarded-For, which uvicorn believes if it comes from 127.0.0.1."""
    header = "--header", "X-Forwarded-For: 192.0.2.1"
    assert curl(service.url("/none/done"), "--http1.0", *header) == (0, WHOLE)
    status, body = curl(service.url("/none/raises"), "--http1.0", *header)
    assert status == 56
    assert body in (HALF, b"")


@needs("curl")
@pytest.mark.parametrize("service", HYPERCORN, indirect=True)
def test_http2_has_ends_of_its_own(service: Service) -> None:
    assert curl(service.url("/none/done"), "--http2-prior-knowledge") == (0, WHOLE)
    assert curl(service.url("/none/raises"), "--http2-prior-knowledge") == (18, HALF)


@needs("curl")
@pytest.mark.parametrize(
    "command",
    [
        f"{EXAMPLES}/asgi_uvicorn.py 8000",
        "-m uvicorn asgi_uvicorn:app --http asgi_uvicorn:Http --port 8000",
        "-m hypercorn -k trio -b 127.0.0.1:8000 asgi_hypercorn:app",
        f"{EXAMPLES}/aiohttp_server.py 8000",
    ],
    ids=["uvicorn", "uvicorn command", "hypercorn command", "aiohttp"],
)
def test_program(command: str) -> None:
    port = free_port()
    arguments = command.replace("8000", str(port)).split()
    with process_of([sys.executable, *arguments]) as process:
        connect(port, process).close()
        status, body = curl(f"http://127.0.0.1:{port}/1/1000", "--http1.0")
        assert (status, body) == (0, download.table(1, 1001))
        status, body = curl(f"http://127.0.0.1:{port}/-500/500", "--http1.0")
        assert status == 56
        assert download.table(-500, 0).startswith(body)


def test_middleware_is_short() -> None:
    assert len((EXAMPLES / "asgi.py").read_text().splitlines()) <= 40


def test_page_shows_the_programs() -> None:
    page = (ROOT / "docs" / "frameworks.md").read_text()
    for name in ("asgi.py", "asgi_uvicorn.py", "asgi_hypercorn.py", "aiohttp_server.py"):
        assert f"<!-- examples/{name} -->" in page
