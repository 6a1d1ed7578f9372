"""TCP connections that end truthfully: FIN for success, RST for everything else."""

from __future__ import annotations

from ._connect import connect_tcp
from ._connection import Connection
from ._ending import Cause, CloseKind, Ending, FinishOn, TLSSession
from ._idle import Idle
from ._limits import Drain
from ._peer import ConnectionLost, PeerClose, PeerReset
from ._scope import TCPStream, connection_scope, scoped
from ._serve import serve_tcp
from ._server import Server
from ._statistics import ServerStatistics

__version__ = "0.1.0"

__all__ = [
    "Cause",
    "CloseKind",
    "Connection",
    "ConnectionLost",
    "Drain",
    "Ending",
    "FinishOn",
    "Idle",
    "PeerClose",
    "PeerReset",
    "Server",
    "ServerStatistics",
    "TCPStream",
    "TLSSession",
    "connect_tcp",
    "connection_scope",
    "scoped",
    "serve_tcp",
]

for _name in __all__:
    if not isinstance(globals()[_name], str):  # an alias, for annotations
        # Shown, and pickled, under the names that users import.
        globals()[_name].__module__ = __name__
