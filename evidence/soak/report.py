"""The tables of the results, and the page that they are written to: docs/soak.md."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

from evidence import pages
from evidence.pages import DOCS, filled
from evidence.results import described

from .judge import WRONG, Verdict
from .plans import Way
from .results import Report, Result, load, number_wrong
from .shares import KINDS

RESULTS = Path(__file__).with_name("results.json")
PAGE = DOCS / "soak.md"

SEEN = ("FIN", "RST", "NONE", "RESET")
EXPLAINED = [
    v for v in Verdict if v not in (Verdict.AGREED, Verdict.KILLED) and v not in WRONG
]

table = partial(pages.table, numbers=True)


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
    about, results, machine = report.about, report.results, described(report.about)
    parts = [
        f"{about['date']}, seed {about['seed']}: {about['versions']}; {machine}.",
        f"The lossy link: {about['link']}.",
        summary(results),
        by_way(results),
        *map(by_kind, results),
        by_cause(results),
    ]
    return "\n\n".join(parts)


def written() -> dict[Path, str]:
    """The page, as the stored results have it."""
    return {PAGE: filled(PAGE.read_text(), "results", tables(load(RESULTS)))}
