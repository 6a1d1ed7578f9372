"""What goes over the wire, and between which addresses."""

from __future__ import annotations

import random
import struct
from typing import TYPE_CHECKING

from .plans import ENDLESS, KIB, Manner

if TYPE_CHECKING:
    from .plans import Plan

# The request: id, work, size of the answer, bytes that follow, milliseconds it may take.
REQUEST = struct.Struct("!IBIII")

# What a peer uploads.
FLOOD = bytes(64 * KIB)

# Each answer is a piece of this, at a place that its id determines, so that a byte that
# is missing, doubled or somebody else's is seen.
_PLACES = 2**16
PATTERN = random.Random(0).randbytes(ENDLESS + _PLACES)


def request(plan: Plan) -> bytes:
    return REQUEST.pack(
        plan.number, plan.work, plan.size, plan.upload, int(plan.timeout * 1000)
    )


def place(number: int) -> int:
    """Where in the pattern the answer for connection *number* begins."""
    return number * 40503 % _PLACES  # neighbours are far apart


# Addresses. Each connection has one of its own, so that it can be told from all others
# even if its id never arrives. They are used again only when all others have been, many
# minutes later. Not the ports below 1024, nor, on loopback, those that the kernel gives
# to other programs, nor those of the programs that the tests run (below 20,000): while a
# peer has one, nobody can listen there.
LOOPBACK_PORTS = range(20_000, 32_000)
LINK_PORTS = range(2_000, 50_000)
# The link drops everything of these from some moment on; the moment is the remainder.
VANISHING_PORTS = range(50_001, 65_001)
VANISH_AFTER = (Manner.BEFORE_REQUEST, Manner.WAITING, Manner.IN_ANSWER)

SERVER_ADDRESS, PEER_ADDRESS = "192.0.2.1", "192.0.2.2"  # of the link: RFC 5737
