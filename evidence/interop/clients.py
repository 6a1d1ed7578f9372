"""What clients make of an answer: functions of its URL and of the certificate file."""

from __future__ import annotations

import http.client
import os
import re
import socket
import subprocess
import urllib.request
from collections.abc import Callable, Sized
from pathlib import Path
from urllib.parse import urlsplit

import h11
import httpx

from evidence.certificates import client_context
from evidence.sockets import RESET_ON_CLOSE

from .results import JUDGE, Told

PATIENCE = 30.0  # seconds
LONGEST = 120  # letters of what a client says

END_OF_HEAD = b"\r\n\r\n"


Client = Callable[[str, Path], Told]


def request(url: str) -> bytes:
    parts = urlsplit(url)
    head = f"GET {parts.path} HTTP/1.1", f"Host: {parts.netloc}", "Connection: close"
    return "\r\n".join(head).encode() + END_OF_HEAD


def connect(url: str) -> socket.socket:
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname or "", parts.port or 0), PATIENCE)


def read_to_end(sock: socket.socket) -> tuple[bytes, str]:
    """What the kernel says: every byte, and how the connection ended."""
    received = bytearray()
    try:
        while chunk := sock.recv(65536):
            received += chunk
    except ConnectionResetError:
        return bytes(received), "RST"
    return bytes(received), "FIN"


def parse(received: bytes, ending: str) -> tuple[int, bool]:
    """The size of the body, and whether that is all of it."""
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="GET", target="/", headers=[("Host", "")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(received)
    if ending == "FIN":
        connection.receive_data(b"")
    size = 0
    try:
        while isinstance(event := connection.next_event(), h11.Response | h11.Data):
            if isinstance(event, h11.Data):
                size += len(event.data)
    except h11.RemoteProtocolError:  # an end in the middle of a message
        return size, False
    return size, isinstance(event, h11.EndOfMessage)


def by_socket(url: str, _certificate: Path) -> Told:
    """The judge: a plain socket, and h11 for what HTTP says of the end."""
    with connect(url) as sock:
        sock.sendall(request(url))
        received, said = read_to_end(sock)
    return judged(received, said)


def judged(received: bytes, ending: str) -> Told:
    size, complete = parse(received, ending)
    if b"transfer-encoding: chunked" in received.partition(END_OF_HEAD)[0].lower():
        ending += f", last chunk {'there' if complete else 'missing'}"
    return Told(ending, size, noticed=not complete)


def by_command(
    *command: str | Path,
    message: str,
    given: bytes = b"",
    more: dict[str, str] | None = None,
) -> Told:
    """*message* is the pattern of what is essential in what it says of a failure.

    *more* is for its environment.
    """
    done = subprocess.run(
        command,
        input=given,
        capture_output=True,
        timeout=PATIENCE,
        check=False,
        env={"PATH": os.environ["PATH"], "LC_ALL": "C", **(more or {})},
    )
    said = f"exit {done.returncode}"
    if done.returncode:
        found = re.search(message, done.stderr.decode())
        if found is None:
            raise RuntimeError(f"{command} says {said}, and: {done.stderr.decode()}")
        said += ": " + re.sub(r"byte \d+", "byte …", found[1])
    size = len(done.stdout)
    if given:  # it knows nothing of HTTP, and shows everything
        size, _ = parse(done.stdout, "FIN")
    return Told(said, size, noticed=done.returncode != 0)


def by_curl(url: str, certificate: Path) -> Told:
    quiet = "--disable", "--silent", "--show-error", "--noproxy", "*"
    return by_command(
        "curl", *quiet, "--cacert", certificate, url, message=r"curl: \(\d+\) (.*)"
    )


def by_wget(url: str, certificate: Path) -> Told:
    once = "--no-config", "--no-proxy", "--tries=1", "--output-document=-"
    trust = f"--ca-certificate={certificate}"
    return by_command("wget", *once, trust, url, message=r" - (.*?)\.? ?Giving up")


def by_netcat(url: str, _certificate: Path) -> Told:
    parts = urlsplit(url)
    address = f"{parts.hostname}", f"{parts.port}"
    return by_command("nc", *address, given=request(url), message="(.*)")


def by_openssl(url: str, certificate: Path) -> Told:
    return by_command(
        *("openssl", "s_client", "-quiet", "-verify_return_error"),
        *("-CAfile", certificate, "-connect", urlsplit(url).netloc),
        given=request(url),
        message=r"(read:errno=\d+|unexpected eof while reading)",
    )


def by_urllib(url: str, certificate: Path) -> Told:
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}),
        urllib.request.HTTPSHandler(context=client_context(certificate)),
    )

    def read() -> bytes:
        with opener.open(url, timeout=PATIENCE) as response:
            content: bytes = response.read()
            return content

    return by_call(read, OSError, http.client.HTTPException)


def by_httpx(url: str, certificate: Path) -> Told:
    trust = client_context(certificate)
    with httpx.Client(verify=trust, trust_env=False, timeout=PATIENCE) as client:
        return by_call(lambda: client.get(url).content, httpx.HTTPError)


def by_call(call: Callable[[], Sized], *errors: type[Exception]) -> Told:
    """The error is told without what is different each time: ports, numbers of bytes."""
    try:
        return Told("returns", len(call()), noticed=False)
    except errors as exc:
        text, name = " ".join(str(exc).split()), type(exc).__name__
    text = re.sub(r"\d+ (bytes|more)", r"… \1", text)
    text = re.sub(r"0x[0-9a-f]+", "0x…", text)
    text = re.sub(r"(?<=127\.0\.0\.1[:,] )\d+|(?<=127\.0\.0\.1:)\d+", "…", text)
    text = re.sub(r"\d+ at most|\b\d{5,}\b", "…", text)
    said = f"{name}: {text}"
    if len(said) > LONGEST:
        said = f"{said[:LONGEST].rstrip()} …"
    return Told(said, None, noticed=True)


BY_SCHEME: dict[str, dict[str, Client]] = {
    "http": {
        JUDGE: by_socket,
        "curl": by_curl,
        "wget --tries=1": by_wget,
        "nc": by_netcat,
        "urllib.request": by_urllib,
        "httpx": by_httpx,
    },
    "https": {
        "curl": by_curl,
        "wget --tries=1": by_wget,
        "openssl s_client": by_openssl,
    },
}


def reset(url: str) -> None:
    """Ask, wait for the beginning of the answer, and reset."""
    with connect(url) as sock:
        sock.sendall(request(url))
        sock.recv(1)
        sock.setsockopt(*RESET_ON_CLOSE)


def half_close(url: str) -> Told:
    """Ask, wait for the beginning of the answer, send FIN, and read on."""
    with connect(url) as sock:
        sock.sendall(request(url))
        received = sock.recv(1)
        sock.shutdown(socket.SHUT_WR)
        rest, said = read_to_end(sock)
    return judged(received + rest, said)
