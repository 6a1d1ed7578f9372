"""Which `Ending` belongs to which peer."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .records import Ended, Seen
    from .report import Result


class Endings:
    """Those of a round: by the address of the peer.

    A scope does not know that of a peer that had reset before (`Ending.remote_address` is
    None then). If it has read the request, that says whose it is. If not, any peer of the
    same way that has reset is as good as the other.
    """

    def __init__(self, result: Result) -> None:
        self._result = result
        self._by_address: dict[tuple[str, int], Ended] = {}
        self._by_number: dict[int, Ended] = {}
        self._nameless: defaultdict[str, list[Ended]] = defaultdict(list)

    def add(self, ended: Ended) -> None:
        if ended.kind != "REFUSED":
            self._result.endings[ended.kind] += 1
            self._result.causes[ended.cause] += 1
        if ended.host is not None and ended.port is not None:
            key = ended.host, ended.port
            if key in self._by_address:
                self._result.faults.append(f"two Endings of one connection: {ended}")
            self._by_address[key] = ended
        elif ended.number is not None:
            self._by_number[ended.number] = ended
        else:
            self._nameless[ended.way].append(ended)

    def pop(self, seen: Seen) -> Ended | None:
        ended = self._by_address.pop((seen.host, seen.port), None)
        if ended is None and seen.close == "RESET":
            ended = self._by_number.pop(seen.number, None)
            if ended is None and self._nameless[seen.way]:
                ended = self._nameless[seen.way].pop()
        return ended

    def left(self) -> Iterator[Ended]:
        yield from self._by_address.values()
        yield from self._by_number.values()
        for nameless in self._nameless.values():
            yield from nameless
