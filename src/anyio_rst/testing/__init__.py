"""For tests of protocols: real connections on loopback, and a peer that judges them.

Nothing here is a mock. The peer is a plain socket, and reports what the kernel reported.
"""

from __future__ import annotations

from ._assertions import assert_fin, assert_rst
from ._capture import (
    Capture,
    CaptureUnavailable,
    Direction,
    Segment,
    TCPFlag,
    capture_segments,
)
from ._faults import Faults
from ._observer import Peer, Seen, connect_peer
from ._pair import open_pair, open_peer
from ._proxy import Proxy, open_proxy
from ._relay import ProxyConnection

__all__ = [
    "Capture",
    "CaptureUnavailable",
    "Direction",
    "Faults",
    "Peer",
    "Proxy",
    "ProxyConnection",
    "Seen",
    "Segment",
    "TCPFlag",
    "assert_fin",
    "assert_rst",
    "capture_segments",
    "connect_peer",
    "open_pair",
    "open_peer",
    "open_proxy",
]

for _name in __all__:
    # Shown, and pickled, under the names that users import.
    globals()[_name].__module__ = __name__
