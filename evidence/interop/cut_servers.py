"""Servers that answer as servers do, for a proxy to cut: plain threads, and programs."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
import tempfile
import threading
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from evidence.certificates import server_context
from evidence.sockets import HOST, RESET_ON_CLOSE, free_ports

from .cuts import SIZE
from .programs import Unavailable, find, running

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PATIENCE = 30.0  # seconds

CONTENT = b"x" * SIZE


@contextmanager
def serving(behave: Callable[[socket.socket], object]) -> Iterator[int]:
    """The port of a server that treats each connection so, in a thread of its own."""

    def serve_one(sock: socket.socket) -> None:
        with sock, suppress(OSError):
            sock.settimeout(PATIENCE)
            behave(sock)

    def serve() -> None:
        with suppress(OSError):
            while True:
                sock, _ = listener.accept()
                thread = threading.Thread(target=serve_one, args=[sock])
                threads.append(thread)
                thread.start()

    threads: list[threading.Thread] = []
    with socket.create_server((HOST, 0)) as listener:
        accepting = threading.Thread(target=serve)
        accepting.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
            accepting.join()
            for thread in threads:  # no client is left
                thread.join()


def read_to_end(sock: socket.socket) -> None:
    while sock.recv(65536):
        pass


# HTTP.


def answered(sock: socket.socket) -> str:
    """Send what is asked for, and return that."""
    request = b""
    while b"\r\n\r\n" not in request:
        request += sock.recv(1000)
    target = request.split()[1].decode().removeprefix("/")
    head, body = b"Connection: close\r\n", CONTENT
    if target == "length":
        head = b"Content-Length: %d\r\n" % SIZE
    elif target in ("chunked", "chunked-close"):
        head = b"Transfer-Encoding: chunked\r\n"
        if target == "chunked-close":
            head += b"Connection: close\r\n"
        chunk = CONTENT[: SIZE // 8]
        body = (b"%x\r\n%b\r\n" % (len(chunk), chunk)) * 8 + b"0\r\n\r\n"
    elif target in ("close-notify-fin", "close-notify-rst"):
        body = CONTENT[: SIZE // 2]
    sock.sendall(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n" + body)
    return target


def over_tcp(sock: socket.socket) -> None:
    answered(sock)
    sock.shutdown(socket.SHUT_WR)
    read_to_end(sock)


def over_tls(context: ssl.SSLContext, sock: socket.socket) -> None:
    with context.wrap_socket(sock, server_side=True) as tls:
        target = answered(tls)
        tls.setblocking(False)
        with suppress(ssl.SSLWantReadError):
            tls.unwrap()  # the close_notify has been sent, and is not answered yet
        if target == "close-notify-rst":
            tls.setsockopt(*RESET_ON_CLOSE)
            return
        socket.socket.shutdown(tls, socket.SHUT_WR)
        tls.settimeout(PATIENCE)
        while socket.socket.recv(tls, 65536):
            pass


@contextmanager
def http(certificate: Path) -> Iterator[dict[str, int]]:
    """A port for each scheme."""
    context = server_context(certificate)
    with serving(over_tcp) as plain, serving(lambda sock: over_tls(context, sock)) as tls:
        yield {"http": plain, "https": tls}


# FTP (RFC 959): as much as it takes to send one file.


def ftp_session(sock: socket.socket) -> None:
    data_port = 0
    with ExitStack() as stack, sock.makefile("rb") as lines:
        sock.sendall(b"220 ready\r\n")
        listener = stack.enter_context(socket.create_server((HOST, 0)))
        listener.settimeout(PATIENCE)
        for line in lines:
            word, _, rest = line.decode().strip().partition(" ")
            if rest == "WHERE":  # SITE is for what FTP has not: the way past the proxy
                sock.sendall(b"200 %d\r\n" % listener.getsockname()[1])
            elif rest.startswith("PROXY"):
                data_port = int(rest.split()[1])
                sock.sendall(b"200 noted\r\n")
            elif word == "PASV":
                high, low = divmod(data_port, 256)
                address = ",".join([*HOST.split("."), str(high), str(low)])
                sock.sendall(f"227 Entering Passive Mode ({address})\r\n".encode())
            elif word == "RETR":
                sock.sendall(b"150 here it comes\r\n")
                send_file(listener)
                sock.sendall(b"226 that was all\r\n")
            elif word == "QUIT":
                sock.sendall(b"221 goodbye\r\n")
                return
            else:
                sock.sendall(b"230 fine\r\n" if word == "USER" else b"200 fine\r\n")


def send_file(listener: socket.socket) -> None:
    """All is well for a server whose kernel has taken the file."""
    data, _ = listener.accept()
    with data, suppress(OSError):
        data.settimeout(PATIENCE)
        data.sendall(CONTENT)
        data.shutdown(socket.SHUT_WR)
        read_to_end(data)


@contextmanager
def ftp(_: Path) -> Iterator[int]:
    with serving(ftp_session) as port:
        yield port


# Databases.


@contextmanager
def redis(directory: Path) -> Iterator[int]:
    server = find("redis-server")
    if server is None:
        raise Unavailable("no redis-server")
    (port,) = free_ports(1)
    options = ["--port", str(port), "--bind", HOST, "--save", "", "--dir", str(directory)]
    with running([server, *options], [port]):
        yield port


@contextmanager
def postgresql(directory: Path) -> Iterator[int]:
    """A cluster of its own. It does not run as root, so as who owns Debian's."""
    initdb, server = find("initdb"), find("postgres")
    if initdb is None or server is None:
        raise Unavailable("no PostgreSQL server")
    user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    data = Path(tempfile.mkdtemp(prefix="postgresql-", dir=directory))
    if user:
        shutil.chown(data, "postgres")
    create = [initdb, "--pgdata", str(data), "--auth", "trust", "--username", "me"]
    done = subprocess.run([*user, *create, "--no-sync"], capture_output=True, cwd="/")
    if done.returncode:
        raise Unavailable("initdb fails")
    (port,) = free_ports(1)
    options = ["-D", str(data), "-p", str(port), "-h", HOST, "-k", str(data)]
    with running([*user, server, *options], [port]):
        yield port
