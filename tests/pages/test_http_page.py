"""docs/http.md: its table is measured, with a plain socket that cuts the body."""

from __future__ import annotations

import re
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from test_download import needs

from evidence import ROOT
from evidence.certificates import issue, server_context
from evidence.interop import clients, cut_clients
from evidence.sockets import HOST, RESET_ON_CLOSE

from serving import LONG

if TYPE_CHECKING:
    from evidence.interop.results import Told

CLOSE_NOTIFY = "close_notify"
HALF = b"half"


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """RFC 9113, 4.1."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(
        f">BBI{len(payload)}s", kind, flags, stream, payload
    )


# SETTINGS and its acknowledgement; HEADERS with END_HEADERS, ":status: 200" is entry 8 of
# the static table (RFC 7541); DATA without END_STREAM.
HTTP2 = b"".join(
    [
        frame(4, 0, 0, b""),
        frame(4, 1, 0, b""),
        frame(1, 4, 1, b"\x88"),
        frame(0, 0, 1, HALF),
    ]
)
BODIES = {
    "without a length": b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + HALF,
    "Content-Length": b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n" + HALF,
    "chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\n%b\r\n" % HALF,
    "HTTP/2": HTTP2,
}


@dataclass
class Cutting:
    """A server of one connection."""

    listener: socket.socket
    response: bytes
    end: str
    context: ssl.SSLContext | None

    def serve(self) -> None:
        sock, _ = self.listener.accept()
        sock.settimeout(LONG)
        # Or the answer waits for the client to acknowledge the tickets, and is reset.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.context is not None:
            sock = self.context.wrap_socket(sock, server_side=True)
        with sock, suppress(OSError):  # the client may leave as it likes
            sock.recv(1000)
            sock.sendall(self.response)
            if self.end == "RST":
                sock.setsockopt(*RESET_ON_CLOSE)
                return
            if self.end == CLOSE_NOTIFY:
                assert isinstance(sock, ssl.SSLSocket)
                sock = sock.unwrap()
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(1000):  # a close with unread input would be an RST
                pass


@contextmanager
def cutting(response: bytes, end: str, context: ssl.SSLContext | None) -> Iterator[str]:
    """Its URL."""
    with socket.create_server((HOST, 0)) as listener:
        server = Cutting(listener, response, end, context)
        thread = threading.Thread(target=server.serve)
        thread.start()
        scheme = "http" if context is None else "https"
        yield f"{scheme}://{HOST}:{listener.getsockname()[1]}/"
        thread.join(LONG)
        assert not thread.is_alive()


def by_curl(url: str, certificate: Path) -> Told:
    quiet = "--disable", "--silent", "--show-error", "--noproxy", "*"
    return clients.by_command(
        *("curl", *quiet, "--http2-prior-knowledge", url), message=r"curl: \(\d+\) (.*)"
    )


CLIENTS = {
    "curl": clients.by_curl,
    "wget": clients.by_wget,
    "urllib": clients.by_urllib,
    "httpx": clients.by_httpx,
    "requests": cut_clients.by_requests,
}


def curl_notices() -> bool | None:
    """Whether a missing close_notify is an error to it; None where nobody has tried."""
    if shutil.which("curl") is None:
        return None
    told = subprocess.run(["curl", "-V"], capture_output=True, text=True, check=True)
    version = [int(number) for number in told.stdout.split()[1].split(".")]
    if [7, 88, 1] < version < [8, 14, 1]:
        return None
    return version >= [8, 14, 1]


CELLS = {
    "noticed": True,
    "**not noticed**": False,
    "3.13": sys.version_info >= (3, 13),
    "8.14": curl_notices(),
}

ROWS = re.findall(r"^\| (.*) \|$", (ROOT / "docs" / "http.md").read_text(), re.MULTILINE)
HEAD, _, *TABLE = [[cell.strip() for cell in row.split(" |")] for row in ROWS]


def test_table_is_whole() -> None:
    assert [name.strip("`") for name in HEAD[1:]] == list(CLIENTS)
    plain = [f"{body}, {end}" for body in BODIES for end in ("FIN", "RST")]
    secure = [f"TLS, without a length, {end}" for end in (CLOSE_NOTIFY, "FIN", "RST")]
    assert [what for what, *_ in TABLE] == plain + secure


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, Path]:
    """For a server, and for its clients."""
    certificate, trust = issue(tmp_path_factory.mktemp("http"), HOST)
    return server_context(certificate), trust


@needs("curl")
@needs("wget")
@pytest.mark.parametrize(
    ("what", "client", "told"),
    [
        (what, client, told)
        for what, *cells in TABLE
        for client, told in zip(CLIENTS, cells, strict=False)
        if told
    ],
)
def test_who_notices(
    what: str, client: str, told: str, authority: tuple[ssl.SSLContext, Path]
) -> None:
    *secure, body, end = what.split(", ")
    context, certificate = authority
    ask = CLIENTS[client] if body != "HTTP/2" else by_curl
    response = BODIES[body]
    with cutting(response, end, context if secure else None) as url:
        found = ask(url, certificate)
    assert CELLS[told] in (found.noticed, None), found
