"""Finding the close_notify of a TLS stream from outside."""

from __future__ import annotations

import math

# Of a record: type, version, length, in bytes (RFC 8446, 5.1; RFC 5246, 6.2.1).
HEADER = 5
ALERT, HANDSHAKE, APPLICATION_DATA = 21, 22, 23
MAJOR_VERSION = 3

# TLS 1.3 calls every record application data, and the true type is in it: two bytes of
# an alert, that type, and the tag of each of its usual ciphers (RFC 8446, 5.2, 9.1).
ENCRYPTED_ALERT = 2 + 1 + 16

# An alert in the clear: level and description (RFC 8446, 6). 0 is close_notify.
CLEAR_ALERT = 2


class CloseNotify:
    """Looks at one direction of a connection for the record that may be a close_notify.

    What is encrypted is told apart by its type and length alone.
    """

    def __init__(self) -> None:
        self.limit: float = 0
        """Bytes from the beginning that certainly come before it."""
        self.is_there: bool = False
        """Whether what is behind :attr:`limit` is such a record, and complete."""
        self._offset = 0
        self._header = bytearray()
        self._body = bytearray()
        self._left = 0  # bytes of the record that are to come
        self._suspected = False
        self._is_tls = False

    def feed(self, data: bytes) -> None:
        """Look at what comes next."""
        view = memoryview(data)
        while view and self.limit != math.inf:
            view = self._read_body(view) if self._left else self._read_header(view)

    def _read_header(self, view: memoryview) -> memoryview:
        if not self._header:
            self._passes()  # something follows on what was suspected
        taken = view[: HEADER - len(self._header)]
        self._header += taken
        self._offset += len(taken)
        header = self._header
        kind = header[0]
        if not self._is_tls and kind != HANDSHAKE:
            self.limit = math.inf
        elif len(header) == HEADER:
            self._left = int.from_bytes(header[3:], "big")
            self._is_tls = True
            if header[1] != MAJOR_VERSION or not ALERT - 1 <= kind <= APPLICATION_DATA:
                self.limit = math.inf
            self._suspected = kind == ALERT or (
                kind == APPLICATION_DATA and self._left == ENCRYPTED_ALERT
            )
            header.clear()
            if not self._suspected:
                self._passes()
        return view[len(taken) :]

    def _read_body(self, view: memoryview) -> memoryview:
        taken = view[: self._left]
        self._left -= len(taken)
        self._offset += len(taken)
        if not self._suspected:
            self._passes()
        else:
            self._body += taken
            if not self._left:
                in_clear = len(self._body) == CLEAR_ALERT
                self.is_there = not in_clear or self._body[1] == 0
                if not self.is_there:
                    self._passes()
        return view[len(taken) :]

    def _passes(self) -> None:
        if self.limit != math.inf:
            self.limit = self._offset
        self.is_there = self._suspected = False
        self._body.clear()
