"""Which `Ending` belongs to which peer, and whether they agree."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

from .judge import WRONG, Verdict, judge
from .plans import NATIVE_WAYS, Way
from .records import Ended, Flow, Seen

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from .processes import Lines
    from .results import Result

SHOWN = 5  # connections of each way that went wrong

EXPECTED_RECORDS = (
    "INFO listening on ",
    "ERROR a handler failed",
    "ERROR accept: ",
    "INFO the peer went away",
    "INFO %s: %r",  # a TLS handshake that failed
)


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


class Matching:
    """Of both sides of a run's connections, and of the sums that the server has kept."""

    def __init__(self, result: Result, evidence: Callable[[int], str]) -> None:
        """*evidence* is what is known of the peer with that port across the link."""
        self._result = result
        self._evidence = evidence
        self._native_endings: Counter[str] = Counter()

    def match(
        self, ended_lines: Lines, seen_lines: Sequence[Lines], flows: Mapping[int, Flow]
    ) -> None:
        """The new lines."""
        result = self._result
        ends = Endings(result)
        for line in ended_lines.new():
            ended = Ended(*line)
            ends.add(ended)
            if Way(ended.way) in NATIVE_WAYS:
                self._native_endings[ended.kind] += 1
        for lines in seen_lines:
            for line in lines.new():
                seen = Seen(*line)
                passed = flows.get(seen.port) if seen.lossy else None
                self._add(seen, ends.pop(seen), passed)
        result.faults += [f"an Ending of no connection: {e}" for e in ends.left()]

    def _add(self, seen: Seen, ended: Ended | None, passed: Flow | None) -> None:
        result = self._result
        verdict, reason = judge(seen, ended, passed)
        result.add(seen, verdict)
        if ended is not None and seen.kind == "sipping" and verdict is Verdict.AGREED:
            result.sipped += not seen.lossy
            result.outlasted += not seen.lossy and ended.waited_in_vain
        of_its_way = sum(result.ways[seen.way][wrong.name] for wrong in WRONG)
        if verdict in WRONG and of_its_way <= SHOWN:
            wrong = f"{seen.way}: {reason}: {seen}, {ended}, {passed}"
            if passed is not None:
                wrong += f"\n{self._evidence(seen.port)}"
            self.show(wrong)

    def show(self, wrong: str) -> None:
        self._result.wrong.append(wrong)
        print(f"\n{wrong}", file=sys.stderr, flush=True)

    def check_totals(self, sample: Mapping[str, Any]) -> None:
        """What the server says of itself at last."""
        faults = self._result.faults
        kinds = {kind: count for kind, count in sample["kinds"].items() if count}
        if kinds != self._native_endings:
            faults.append(f"statistics() has {kinds}, and not {self._native_endings}")
        for record in sample["records"]:
            if not record.startswith(EXPECTED_RECORDS):
                faults.append(f"in the log: {record}")
