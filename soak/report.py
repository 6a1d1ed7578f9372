"""What a run has found, as tables; `python -m soak.report` writes docs/soak.md anew."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .judge import WRONG, Verdict
from .plans import Way
from .shares import KINDS

if TYPE_CHECKING:
    from .records import Seen

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
PAGE = HERE.parent / "docs" / "soak.md"
BEGIN, END = "<!-- results -->\n", "<!-- end of results -->"

# What may be held at the end over what was held at the beginning. A connection that is
# not let go of is two kilobytes and two dozen blocks, so that of a long run one in a
# hundred would be seen.
RSS_GROWTH = 0.10
BLOCKS_GROWTH = 0.05

SEEN = ("FIN", "RST", "NONE", "RESET")
EXPLAINED = [
    v for v in Verdict if v not in (Verdict.AGREED, Verdict.KILLED) and v not in WRONG
]


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


def table(head: list[str], body: list[list[str]]) -> str:
    """In Markdown, with straight columns."""
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]

    def line(cells: list[str]) -> str:
        left, *right = zip(cells, widths, strict=True)
        padded = [left[0].ljust(left[1]), *(cell.rjust(width) for cell, width in right)]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(map(line, [head, rule, *body]))


def summary(results: list[Result]) -> str:
    def mib(result: Result) -> str:
        return " to ".join(f"{value / 2**20:.1f}" for value in result.quarters("rss"))

    def blocks(result: Result) -> str:
        return " to ".join(f"{value:,.0f}" for value in result.quarters("blocks"))

    def descriptors(result: Result) -> str:
        return " to ".join(
            str(s.descriptors) for s in result.samples[:1] + result.samples[-1:]
        )

    rows: list[tuple[str, list[str]]] = [
        ("connections", [f"{r.connections:,}" for r in results]),
        ("of them across the lossy link", [f"{r.lossy:,}" for r in results]),
        ("`Ending`: FIN", [f"{r.endings['FIN']:,}" for r in results]),
        ("`Ending`: RST", [f"{r.endings['RST']:,}" for r in results]),
        ("**disagreements**", [f"{r.disagreements():,}" for r in results]),
        (
            "**lost answers**",
            [f"{(r.verdicts + r.killed)[Verdict.LOST_ANSWER.name]:,}" for r in results],
        ),
        *(
            (f"explained: {v.value}", [f"{r.verdicts[v.name]:,}" for r in results])
            for v in EXPLAINED
        ),
        ("sipping readers that got all", [f"{r.sipped:,}" for r in results]),
        (
            "of them longer than the limit of the drain",
            [f"{r.outlasted:,}" for r in results],
        ),
        ("stops of the peers' processes", [f"{r.stops:,}" for r in results]),
        ("forks of the server", [f"{r.forks:,}" for r in results]),
        ("servers killed while a forked child lived", [f"{r.deaths:,}" for r in results]),
        ("their connections", [f"{r.killed.total():,}" for r in results]),
        (
            "of them ended by the death",
            [f"{r.killed[Verdict.KILLED.name]:,}" for r in results],
        ),
        ("EMFILE episodes", [f"{r.episodes:,}" for r in results]),
        ("accepts that failed in them", [f"{r.accept_failures:,}" for r in results]),
        ("packets on the link", [f"{r.link['packets']:,}" for r in results]),
        *(
            (f"of them {name}", [f"{r.link[name]:,}" for r in results])
            for name in ("lost", "reordered", "doubled")
        ),
        ("RSS, MiB, first to last quarter", [mib(r) for r in results]),
        ("memory blocks, first to last quarter", [blocks(r) for r in results]),
        ("descriptors, first to last", [descriptors(r) for r in results]),
        ("seconds", [f"{r.seconds:,.0f}" for r in results]),
    ]
    return table(["", *(r.loop for r in results)], [[name, *row] for name, row in rows])


def by_kind(result: Result) -> str:
    body = []
    for kind in KINDS:
        seen = result.seen.get(kind, Counter())
        counts = [sum(seen.values()), *(seen[close] for close in SEEN)]
        body.append([kind, *(f"{count:,}" for count in counts)])
    head = ["connections", "saw FIN", "saw RST", "saw neither", "reset"]
    return table([f"peers, {result.loop}", *head], body)


def by_way(results: list[Result]) -> str:
    body = []
    for way in Way:
        found = [r.ways.get(way.value, Counter()) for r in results]
        counts = [f"{sum(f.values()):,} / {number_wrong(f):,}" for f in found]
        body.append([way.value, *counts])
    head = "connections / **disagreements** among them"
    return table([head, *(r.loop for r in results)], body)


def by_cause(results: list[Result]) -> str:
    causes = sorted({cause for result in results for cause in result.causes})
    body = [[f"`{c}`", *(f"{r.causes[c]:,}" for r in results)] for c in causes]
    return table(["`Ending.cause`", *(r.loop for r in results)], body)


def tables(report: Report) -> str:
    about, results = report.about, report.results
    machine = f"{about['processor']}, {about['cores']} cores, {about['system']}"
    parts = [
        f"{about['date']}, seed {about['seed']}: {about['versions']}; {machine}.",
        f"The lossy link: {about['link']}.",
        summary(results),
        by_way(results),
        *map(by_kind, results),
        by_cause(results),
    ]
    return "\n\n".join(parts)


def filled(page: str, content: str) -> str:
    """*page* with *content* between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{content}\n\n{END}{after}"


def write(report: Report) -> None:
    PAGE.write_text(filled(PAGE.read_text(), tables(report)))


if __name__ == "__main__":
    write(load(RESULTS))
