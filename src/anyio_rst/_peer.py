"""What is known about the peer's end."""

from __future__ import annotations

import enum

from anyio import BrokenResourceError

__all__ = ["ConnectionLost", "PeerClose", "PeerReset"]


class PeerClose(enum.Enum):
    """How the peer ended its side of the connection, as far as it was seen."""

    FIN = "FIN"
    """Its FIN was read. It has nothing more to send."""

    RST = "RST"
    """It reset the connection."""

    LOST = "LOST"
    """It sent no end, but it or the path to it is gone, by a time-out (ETIMEDOUT, see
    *keepalive* of :func:`serve_tcp`) or an unreachable host or network."""

    NONE = "NONE"
    """Nothing was seen before the connection was closed here."""


class ConnectionLost(BrokenResourceError):
    """The connection was lost, and not by a fault on this side.

    Raised by :class:`Connection`, from the :exc:`OSError` that reported it. What has been
    received may be truncated.
    """


class PeerReset(ConnectionLost):
    """The peer reset the connection: what has been received may be truncated.

    The peer's FIN raises :exc:`anyio.EndOfStream`, and another loss (a time-out, an
    unreachable host) a plain :exc:`ConnectionLost`.
    """
