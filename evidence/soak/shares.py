"""Which connections go on at the same time, and how many of each kind there are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .plans import Way

if TYPE_CHECKING:
    from collections.abc import Mapping

# In a hundred.
KINDS = {
    "good": 38,
    "failing": 20,
    "slow": 6,
    "sipping": 2,
    "flooding": 10,
    "half-closing": 10,
    "resetting": 10,
    "vanishing": 4,
}

# The peers of a server that is going to be killed; all of them at once.
KILLED_KINDS = {
    "holding": 4,
    "good": 2,
    "failing": 1,
    "slow": 2,
    "sipping": 4,
    "flooding": 2,
    "half-closing": 1,
}


@dataclass(frozen=True, eq=False)
class Share:
    """Peers that go about it at the same time, in a process of their own."""

    part: float
    """Of all connections of a run."""
    ways: Mapping[Way, int]
    """How often, in comparison; a loop may not have all of them."""
    lossy: bool = False
    small: bool = False
    kinds: Mapping[str, int] = field(default_factory=KINDS.copy)


NATIVE_SHARE = Share(0.7, {Way.NATIVE: 6, Way.NATIVE_TLS: 1})
SCOPES_SHARE = Share(0.2, {way: 1 for way in Way if way.is_scope})
LOSSY_SHARE = Share(0.1, {Way.NATIVE: 6, Way.NATIVE_TLS: 1}, lossy=True)
SHARES = (NATIVE_SHARE, SCOPES_SHARE, LOSSY_SHARE)

KILLED_SHARE = Share(1, dict.fromkeys(Way, 1), kinds=KILLED_KINDS)
# Instead of all others, to find what is rare on the link. Those that vanish would hold up
# the rest.
LINK_KINDS = {kind: weight for kind, weight in KINDS.items() if kind != "vanishing"}
LINK_SHARE = Share(1, LOSSY_SHARE.ways, lossy=True, small=True, kinds=LINK_KINDS)
ALL_SHARES = (*SHARES, KILLED_SHARE, LINK_SHARE)
