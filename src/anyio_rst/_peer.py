"""What becomes known of the other side."""

from __future__ import annotations

import enum

from anyio import BrokenResourceError

__all__ = ["PeerClose", "PeerReset"]


class PeerClose(enum.Enum):
    """How the peer ended its side of the connection, as far as it was seen."""

    FIN = "FIN"
    """Its FIN was read. It has nothing more to send."""

    RST = "RST"
    """It reset the connection."""

    NONE = "NONE"
    """Neither was seen before the connection was closed here."""


class ConnectionLost(BrokenResourceError):
    """The connection was lost, and nobody here is to blame for it."""


class PeerReset(ConnectionLost):
    """The peer reset the connection: what has been received may be truncated.

    Raised by :class:`Connection` from the :exc:`OSError` that told. The peer's FIN
    stays :exc:`anyio.EndOfStream`, and any other loss of the connection (a time-out, an
    unreachable host) a plain :exc:`anyio.BrokenResourceError`.
    """
