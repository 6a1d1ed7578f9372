"""Twisted's protocols, on its default reactor, which is epoll."""

from __future__ import annotations

import sys
from typing import Any

from twisted.internet import interfaces, protocol
from twisted.internet import reactor as default_reactor
from zope.interface import implementer  # type: ignore[import-untyped]

from evidence.sockets import HOST

from . import BACKLOG, CHUNK, announce_port, announce_reset

reactor: Any = default_reactor  # one of several classes, says its type

# Every open connection, for the reset of all.
transports: set[Any] = set()


# Without it, the FIN of the client would discard what is still unsent.
@implementer(interfaces.IHalfCloseableProtocol)
class Echo(protocol.Protocol):
    transport: Any

    def connectionMade(self) -> None:
        transports.add(self.transport)
        self.transport.setTcpNoDelay(True)
        self.transport.registerProducer(self.transport, True)

    def connectionLost(self, reason: object = None) -> None:
        transports.discard(self.transport)

    def dataReceived(self, data: bytes) -> None:
        self.transport.write(data)

    def readConnectionLost(self) -> None:
        self.transport.unregisterProducer()
        self.transport.loseConnection()

    def writeConnectionLost(self) -> None:
        pass


class Fin(Echo):
    def dataReceived(self, data: bytes) -> None:
        self.transport.write(data)
        self.transport.unregisterProducer()
        self.transport.loseConnection()


class Rst(Echo):
    """A pull producer, since that is asked for more when what it wrote has been sent."""

    def connectionMade(self) -> None:
        transports.add(self.transport)
        self.transport.setTcpNoDelay(True)

    def dataReceived(self, data: bytes) -> None:
        self.data = data
        self.transport.registerProducer(self, False)

    def resumeProducing(self) -> None:
        if self.data:
            self.transport.write(self.data)
            self.data = b""
        else:
            self.transport.unregisterProducer()
            self.transport.abortConnection()

    def stopProducing(self) -> None:
        pass


class Download(Echo):
    def connectionMade(self) -> None:
        transports.add(self.transport)
        self.transport.setTcpNoDelay(True)

    def dataReceived(self, data: bytes) -> None:
        self.left = int(data)
        self.transport.registerProducer(self, True)
        self.resumeProducing()

    def pauseProducing(self) -> None:
        self.paused = True

    def resumeProducing(self) -> None:
        self.paused = False
        while self.left > 0 and not self.paused:
            chunk = CHUNK[: self.left]
            self.left -= len(chunk)
            self.transport.write(chunk)
        if not self.left:
            self.transport.unregisterProducer()
            self.transport.loseConnection()

    def stopProducing(self) -> None:
        self.left = 0


PROTOCOLS = {"fin": Fin, "rst": Rst, "echo": Echo, "download": Download}


class Command:
    """Waits for a line on stdin."""

    def fileno(self) -> int:
        return sys.stdin.fileno()

    def doRead(self) -> None:
        announce_reset()
        for transport in list(transports):
            transport.abortConnection()
        reactor.callLater(0, reactor.stop)

    def connectionLost(self, reason: object) -> None:
        pass

    def logPrefix(self) -> str:
        return "command"


def run(contender: str, loop: str, workload: str) -> None:
    factory = protocol.Factory.forProtocol(PROTOCOLS[workload])
    listener = reactor.listenTCP(0, factory, backlog=BACKLOG, interface=HOST)
    announce_port(listener.getHost().port)
    reactor.addReader(Command())
    reactor.run()
