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


def figures(result: Result) -> dict[str, str]:
    """By what they are."""
    samples = result.samples[:1] + result.samples[-1:]
    counts = {
        "connections": result.connections,
        "of them across the lossy link": result.lossy,
        "`Ending`: FIN": result.endings["FIN"],
        "`Ending`: RST": result.endings["RST"],
        "**disagreements**": result.disagreements(),
        "**lost answers**": (result.verdicts + result.killed)[Verdict.LOST_ANSWER.name],
        **{f"explained: {v.value}": result.verdicts[v.name] for v in EXPLAINED},
        "sipping readers that got all": result.sipped,
        "of them longer than the limit of the drain": result.outlasted,
        "stops of the peers' processes": result.stops,
        "forks of the server": result.forks,
        "servers killed while a forked child lived": result.deaths,
        "their connections": result.killed.total(),
        "of them ended by the death": result.killed[Verdict.KILLED.name],
        "EMFILE episodes": result.episodes,
        "accepts that failed in them": result.accept_failures,
        "packets on the link": result.link["packets"],
        **{f"of them {n}": result.link[n] for n in ("lost", "reordered", "doubled")},
    }
    rss = [f"{value / 2**20:.1f}" for value in result.quarters("rss")]
    blocks = [f"{value:,.0f}" for value in result.quarters("blocks")]
    return {name: f"{count:,}" for name, count in counts.items()} | {
        "RSS, MiB, first to last quarter": " to ".join(rss),
        "memory blocks, first to last quarter": " to ".join(blocks),
        "descriptors, first to last": " to ".join(str(s.descriptors) for s in samples),
        "seconds": f"{result.seconds:,.0f}",
    }


def summary(results: list[Result]) -> str:
    columns = [figures(result) for result in results]
    body = [[name, *(column[name] for column in columns)] for name in columns[0]]
    return table(["", *(r.loop for r in results)], body)


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
