"""Assertions about how a connection ended, judged by its peer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anyio_rst._peer import PeerClose

from ._observer import PATIENCE, described

if TYPE_CHECKING:
    from ._observer import Peer, Seen


async def assert_fin(
    peer: Peer, data: bytes | None = None, *, timeout: float = PATIENCE
) -> Seen:
    """Assert that the other side ended with FIN, after exactly *data* if that is given.

    Args:
      peer: reads to the end, unless it has already seen it.
      data: what arrived since the peer last read; None for anything.
      timeout: seconds to wait for the end.

    Raises:
      AssertionError: says what was expected, and what came.
    """
    seen = await peer.read_to_end(timeout=timeout)
    if seen.close is PeerClose.FIN and data in (None, seen.data):
        return seen
    expected = "FIN"
    difference = ""
    if data is not None:
        expected += f" after {described(data)}"
        if data != seen.data:
            pairs = enumerate(zip(data, seen.data, strict=False))
            shorter = min(len(data), len(seen.data))
            first = next((i for i, (a, b) in pairs if a != b), shorter)
            difference = f"; different from offset {first:,} on"
    raise AssertionError(f"expected {expected}; got {_told(seen, timeout)}{difference}")


async def assert_rst(peer: Peer, *, timeout: float = PATIENCE) -> Seen:
    """Assert that the other side ended with RST. The result has the data before it.

    Args:
      peer: reads to the end, unless it has already seen it.
      timeout: seconds to wait for the end.

    Raises:
      AssertionError: says what came instead.
    """
    seen = await peer.read_to_end(timeout=timeout)
    if seen.close is not PeerClose.RST:
        raise AssertionError(f"expected RST; got {_told(seen, timeout)}")
    return seen


def _told(seen: Seen, timeout: float) -> str:
    if seen.close is PeerClose.NONE:
        return f"neither FIN nor RST within {timeout} s, and {described(seen.data)}"
    return f"{seen.close.value} after {described(seen.data)}"
