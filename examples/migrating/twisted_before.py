from twisted.internet import reactor
from twisted.internet.protocol import Factory, Protocol


class Greet(Protocol):
    def connectionMade(self):
        self.overdue = reactor.callLater(60, self.transport.abortConnection)

    def dataReceived(self, name):
        self.transport.write(b"Hello, ")
        self.transport.write(name.decode("ascii").upper().encode())
        self.transport.loseConnection()

    def connectionLost(self, reason):
        if self.overdue.active():
            self.overdue.cancel()


reactor.listenTCP(8000, Factory.forProtocol(Greet))
reactor.run()
