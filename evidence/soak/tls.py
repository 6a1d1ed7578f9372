"""TLS, the peer's side of it.

`ssl.SSLSocket` would not do: what comes behind a close_notify, be it a FIN or an RST, it
does not tell.
"""

from __future__ import annotations

import errno
import ssl
from contextlib import suppress
from typing import TYPE_CHECKING

from evidence.certificates import client_context

from .plans import KIB

if TYPE_CHECKING:
    import socket

RECORD = 16 * KIB  # at most that much is encrypted before the socket has taken it
LEAST_READ = 4 * KIB  # however little is asked for: a record has to be whole


def peer_context(trust: str, *, old: bool) -> ssl.SSLContext:
    context = client_context(trust)
    if old:
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    return context


class TLSSocket:
    """TLS on a non-blocking socket, with those of its methods that a peer needs.

    They raise BlockingIOError and the other errors of the socket as its own do.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, host: str) -> None:
        self._sock = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)
        self._unsent = b""
        self._said_goodbye = False
        self.close_notify = False
        """Whether the other side has sent one."""
        self.sent = 0
        """Encrypted bytes."""

    def do_handshake(self) -> None:
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._flush()
                if not self._fill(LEAST_READ):
                    raise OSError(errno.ENODATA, "FIN in the handshake") from None
            else:
                self._flush()
                return

    def send(self, data: bytes) -> int:
        """What this returns has been taken, and the rest of it goes out before more."""
        self._flush()
        taken = self._tls.write(data[:RECORD])
        with suppress(BlockingIOError):
            self._flush()
        return taken

    def recv(self, size: int) -> bytes:
        """Nothing at a FIN, with a close_notify before it or not.

        What comes between the two is returned as it is.
        """
        while not self.close_notify:
            try:
                data = self._tls.read(size)
            except ssl.SSLWantReadError:
                if not self._fill(max(size, LEAST_READ)):
                    return b""
                continue
            except ssl.SSLZeroReturnError:
                data = b""
            if data:
                return data
            self.close_notify = True
        return self._incoming.read() or self._sock.recv(size)

    def shutdown(self, how: int) -> None:
        """Of writing: a close_notify, and then the FIN."""
        self._flush()
        if not self._said_goodbye:
            self._said_goodbye = True
            with suppress(ssl.SSLWantReadError):  # the other side's, which is for recv()
                self._tls.unwrap()
            self._flush()
        self._sock.shutdown(how)

    def _fill(self, size: int) -> bool:
        data = self._sock.recv(size)
        self._incoming.write(data)
        return bool(data)

    def _flush(self) -> None:
        self._unsent += self._outgoing.read()
        while self._unsent:
            count = self._sock.send(self._unsent)
            self._unsent = self._unsent[count:]
            self.sent += count
