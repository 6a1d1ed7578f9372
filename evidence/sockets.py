"""Sockets on loopback, as programs have them that know nothing of anyio_rst."""

from __future__ import annotations

import resource
import socket
import struct

HOST = "127.0.0.1"

# For setsockopt(): a close discards what is unsent, and sends RST instead of FIN.
RESET_ON_CLOSE = socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
FIN_ON_CLOSE = socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0)


def free_ports(count: int) -> list[int]:
    """Free now, and different."""
    sockets = [socket.create_server((HOST, 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


def allow_descriptors() -> None:
    """As many as this process may have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
