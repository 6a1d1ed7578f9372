"""What a run has found, and whether that is a failure."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .judge import WRONG, Verdict

if TYPE_CHECKING:
    from pathlib import Path

    from .records import Seen

# What may be held at the end over what was held at the beginning. A connection that is
# not let go of is two kilobytes and two dozen blocks, so that of a long run one in a
# hundred would be seen.
RSS_GROWTH = 0.10
BLOCKS_GROWTH = 0.05


@dataclass
class Sample:
    """What the server's process held at rest, with every connection ended."""

    rss: int
    descriptors: int
    blocks: int


@dataclass
class Result:
    """Of one loop."""

    loop: str
    connections: int = 0
    lossy: int = 0
    seen: dict[str, Counter[str]] = field(default_factory=dict)
    """By the kind of the peer, and what it saw."""
    ways: dict[str, Counter[str]] = field(default_factory=dict)
    """The verdicts, by the way."""
    endings: Counter[str] = field(default_factory=Counter)
    causes: Counter[str] = field(default_factory=Counter)
    verdicts: Counter[str] = field(default_factory=Counter)
    sipped: int = 0
    """Slow readers over loopback that got all."""
    outlasted: int = 0
    """Of these, drains that took longer than the limit."""
    stops: int = 0
    stopped: float = 0.0
    """Seconds, of all stops."""
    forks: int = 0
    deaths: int = 0
    killed: Counter[str] = field(default_factory=Counter)
    """The verdicts on the connections of servers that were killed."""
    episodes: int = 0
    accept_failures: int = 0
    link: Counter[str] = field(default_factory=Counter)
    samples: list[Sample] = field(default_factory=list)
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)
    """What is wrong, apart from single connections."""
    wrong: list[str] = field(default_factory=list)
    """The first connections that are, in full."""

    def add(self, seen: Seen, verdict: Verdict) -> None:
        self.connections += 1
        self.lossy += seen.lossy
        self.seen.setdefault(seen.kind, Counter())[seen.close] += 1
        self.verdicts[verdict.name] += 1
        self.ways.setdefault(seen.way, Counter())[verdict.name] += 1

    def disagreements(self) -> int:
        return number_wrong(self.verdicts) + number_wrong(self.killed)

    def quarters(self, name: str) -> tuple[float, float]:
        """The means of the first and of the last quarter, without the warm-up."""
        values = [getattr(sample, name) for sample in self.samples]
        values = values[1:] if len(values) > 1 else values
        size = max(1, len(values) // 4)
        return sum(values[:size]) / size, sum(values[-size:]) / size

    def growth(self) -> list[str]:
        """What is not flat."""
        if len(self.samples) < 2:
            return ["there is nothing to compare the first sample with"]
        found = []
        for name, most in (("rss", RSS_GROWTH), ("blocks", BLOCKS_GROWTH)):
            first, last = self.quarters(name)
            if last > first * (1 + most):
                found.append(f"{name} grew from {first:,.0f} to {last:,.0f}")
        first, last = (self.samples[index].descriptors for index in (0, -1))
        if first != last:
            found.append(f"descriptors: {first} at first, {last} at last")
        return found

    def failures(self) -> list[str]:
        found = [*self.faults, *self.growth()]
        if self.disagreements():
            found.append(f"{self.disagreements()} disagreements")
            for way, verdicts in self.ways.items():
                if wrong := number_wrong(verdicts):
                    found.append(f"{wrong} of them: {way}")
        return found

    @classmethod
    def load(cls, stored: dict[str, Any]) -> Result:
        result = cls(**stored)
        result.samples = [Sample(**sample) for sample in stored["samples"]]
        result.seen = {kind: Counter(seen) for kind, seen in stored["seen"].items()}
        result.ways = {way: Counter(found) for way, found in stored["ways"].items()}
        for name in ("endings", "causes", "verdicts", "killed", "link"):
            setattr(result, name, Counter(stored.get(name, ())))
        return result


def number_wrong(verdicts: Counter[str]) -> int:
    return sum(verdicts[verdict.name] for verdict in WRONG)


@dataclass
class Report:
    about: dict[str, str]
    results: list[Result]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self, indent=1, default=vars) + "\n")


def load(path: Path) -> Report:
    stored = json.loads(path.read_text())
    return Report(stored["about"], [Result.load(result) for result in stored["results"]])
