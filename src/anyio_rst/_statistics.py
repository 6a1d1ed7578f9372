"""The counts of a server: its connections and endings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ._ending import Cause, CloseKind

__all__ = ["ServerStatistics"]

K = TypeVar("K")


@dataclass(frozen=True)
class ServerStatistics:
    """What a :class:`Server` has done up to one moment.

    *accepted_connections* is the sum of *open_connections* and of either mapping.
    """

    open_connections: int
    """Connections whose handlers are running or whose drains are under way."""

    accepted_connections: int
    """Connections accepted since the start."""

    endings_by_kind: Mapping[CloseKind, int]
    """Connections that have ended, by :attr:`Ending.kind`; every kind is in it."""

    endings_by_cause: Mapping[Cause, int]
    """Connections that have ended, by :attr:`Ending.cause`; every cause is in it."""


class Totals(Mapping[K, int]):
    """Read-only. Unlike a mapping proxy, it can be copied, and pickled for a parent."""

    __slots__ = ("_totals",)

    def __init__(self, totals: dict[K, int]) -> None:
        self._totals = totals

    def __getitem__(self, key: K) -> int:
        return self._totals[key]

    def __iter__(self) -> Iterator[K]:
        return iter(self._totals)

    def __len__(self) -> int:
        return len(self._totals)

    def __repr__(self) -> str:
        return repr(self._totals)
