"""Non-blocking sockets and epoll, with nothing between: the floor for Python."""

from __future__ import annotations

import select
import socket
import sys
from typing import NoReturn

from evidence.sockets import HOST, RESET_ON_CLOSE

from . import BACKLOG, CHUNK, RECEIVE, announce_port, announce_reset

ACCEPTS_PER_TURN = 64


class Echo:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def readable(self) -> None:
        data = self.sock.recv(RECEIVE)
        if data:
            self.send(data)
        else:
            self.close()

    def send(self, data: bytes) -> None:
        sent = self.sock.send(data)
        if sent < len(data):
            self.unsent = memoryview(data)[sent:]
            poller.modify(self.sock, select.EPOLLOUT)

    def writable(self) -> None:
        self.unsent = self.unsent[self.sock.send(self.unsent) :]
        if not self.unsent:
            poller.modify(self.sock, select.EPOLLIN)

    def close(self) -> None:
        del open_now[self.sock.fileno()]
        self.sock.close()

    def reset(self) -> None:
        self.sock.setsockopt(*RESET_ON_CLOSE)
        self.close()


class Fin(Echo):
    def readable(self) -> None:
        self.sock.send(self.sock.recv(RECEIVE))
        self.close()


class Rst(Echo):
    def readable(self) -> None:
        self.sock.send(self.sock.recv(RECEIVE))
        self.reset()


class Download(Echo):
    def readable(self) -> None:
        self.left = int(self.sock.recv(RECEIVE))
        self.unsent = memoryview(CHUNK)[: self.left]
        poller.modify(self.sock, select.EPOLLOUT)

    def writable(self) -> None:
        sent = self.sock.send(self.unsent)
        self.left -= sent
        self.unsent = self.unsent[sent:] or memoryview(CHUNK)[: self.left]
        if not self.left:
            self.close()


PEERS: dict[str, type[Echo]] = {
    "fin": Fin,
    "rst": Rst,
    "echo": Echo,
    "download": Download,
}

poller = select.epoll()
open_now: dict[int, Echo] = {}


def accept(listener: socket.socket, peer: type[Echo]) -> None:
    for _ in range(ACCEPTS_PER_TURN):
        try:
            sock, _address = listener.accept()
        except BlockingIOError:
            return
        sock.setblocking(False)
        open_now[sock.fileno()] = peer(sock)
        poller.register(sock, select.EPOLLIN)


def reset_all() -> NoReturn:
    announce_reset()
    for peer in list(open_now.values()):
        peer.reset()
    sys.exit()


def run(contender: str, loop: str, workload: str) -> None:
    peer = PEERS[workload]
    listener = socket.create_server((HOST, 0), backlog=BACKLOG)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.setblocking(False)
    announce_port(listener.getsockname()[1])
    poller.register(listener, select.EPOLLIN)
    poller.register(sys.stdin, select.EPOLLIN)
    while True:
        for fd, event in poller.poll():
            if fd == listener.fileno():
                accept(listener, peer)
            elif fd == sys.stdin.fileno():
                reset_all()
            elif event & select.EPOLLOUT:
                open_now[fd].writable()
            else:
                open_now[fd].readable()
