"""The tables of the results, and what they are written to: docs/benchmark.*."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from evidence import pages
from evidence.pages import DOCS, filled
from evidence.results import described

from . import chart
from .results import FLATNESS, IN_TURN, UNTIL_RESET, WORKLOADS, base, load
from .servers import ANYIO_LOOPS, CONTENDERS, RULES, title
from .targets import COMPARISONS, verdicts

if TYPE_CHECKING:
    from .results import Results, Row, Spread
    from .targets import Verdict

RESULTS = Path(__file__).parent / "results.json"
PAGE, CHART = DOCS / "benchmark.md", DOCS / "benchmark.svg"

table = partial(pages.table, numbers=True)

COMPARED = IN_TURN | UNTIL_RESET

# Shown side by side; where the ratio is above 1, the first is cheaper.
PAIRS = (
    ("`serve_tcp` and AnyIO's own listener", "anyio_rst", "anyio"),
    ("A scope around AnyIO's stream, and the plain stream", "scope", "anyio"),
    ("A scope, and the same rules by hand", "scope", "by_hand"),
    ("asyncio's streams, and the same with a scope", "asyncio_streams", "asyncio_scoped"),
)


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def median(spread: Spread | None) -> str:
    return "" if spread is None else number(spread.median)


def ratio(spread: Spread | None) -> str:
    if spread is None:
        return ""
    if spread.low == spread.high:
        return f"{spread.median:.2f}"
    return f"{spread.median:.2f} ({spread.low:.2f} to {spread.high:.2f})"


def versus(results: Results, one: str, other: str, loop: str) -> str:
    """Two contenders on a loop, workload by workload."""
    names = CONTENDERS[one].title, CONTENDERS[other].title
    rows = (one, loop), (other, loop)
    body = [
        [
            f"{workload.title}, {workload.cost}",
            *(median(results.cost(name, row)) for row in rows),
            ratio(results.ratio(name, rows[1], rows[0])),
            *(median(results.rate(name, row)) for row in rows),
        ]
        for name, workload in COMPARED.items()
        if all(results.cost(name, row) for row in rows)
    ]
    rates = (f"{name}, per second" for name in names)
    return table([loop, *names, f"{names[1]} / {names[0]}", *rates], body)


def pairs(results: Results, one: str, other: str) -> list[str]:
    rows = results.rows(COMPARED)
    return [
        versus(results, one, other, loop)
        for name, loop in rows
        if name == one and (other, loop) in rows
    ]


def everybody(results: Results) -> str:
    def cell(name: str, row: Row) -> str:
        found = results.ratio(name, row, base(row))
        factor = "" if found is None else f" ({found.median:.2f})"
        return median(results.cost(name, row)) + factor

    names = [name for name in COMPARED if results.rows([name])]
    head = [f"{COMPARED[name].title}, {COMPARED[name].cost.split()[0]}" for name in names]
    body = [
        [title(row), *(cell(name, row) for name in names)] for row in results.rows(names)
    ]
    return table(["", *head], body)


def rules(results: Results) -> str:
    measured = {contender for contender, _ in results.rows(WORKLOADS)}
    body = [
        [contender.title, *contender.rules]
        for name, contender in CONTENDERS.items()
        if name in measured
    ]
    return table(["", *RULES], body)


def flatness(results: Results) -> str:
    first, *others = FLATNESS
    head = [f"{workload.title}, µs" for workload in FLATNESS.values()]
    head += [f"{FLATNESS[name].title} / {FLATNESS[first].title}" for name in others]
    body = [
        [
            title(row),
            *(median(results.cost(name, row)) for name in FLATNESS),
            *(ratio(results.ratio(name, row, row, first)) for name in others),
        ]
        for row in results.rows(FLATNESS)
    ]
    return table(["", *head], body)


def against_target(found: Verdict | None) -> str:
    if found is None:
        return ""
    text = f"{found.measured:.2f} ({found.target:.2f})"
    return text if found.reached else f"**{text}**"


def targets(results: Results) -> list[str]:
    """What the ratios are, beside what they are to be."""
    tables = []
    judged = []
    for comparison in COMPARISONS:
        found = verdicts(results, comparison)
        judged += [each for row in found.values() for each in row.values() if each]
        names = (CONTENDERS[name].title for name in (comparison.one, comparison.other))
        head = f"{' / '.join(names)}, {comparison.bound}"
        body = [
            [COMPARED[workload].title, *map(against_target, row.values())]
            for workload, row in found.items()
        ]
        tables += [table([head, *ANYIO_LOOPS], body)] if body else []
    missed = sum(not each.reached for each in judged)
    text = (
        "The median of each ratio of CPU time (of the reset, of time; of the memory, of "
        "size), in parentheses the target, and **in bold** what misses it: "
        f"{missed} of {len(judged)}."
    )
    return [text, *tables] if tables else []


def endings(results: Results) -> str:
    total = sum(m.fin + m.rst + m.other for m in results.measurements)
    seen = f"The clients saw {total:,} connections end"
    wrong = results.wrong()
    if not wrong:
        return f"{seen}, each one as it should, and no wrong byte."
    lines = [f"- {title(m.row)}, {m.workload}: {m.endings}" for m in wrong]
    return "\n".join([f"{seen}, all as they should but for these:", "", *lines])


def tables(results: Results) -> str:
    about, machine = results.about, described(results.about)
    parts = [
        f"{about['date']}, {about['run']} run: {chart.versions(results)}; {machine}.",
        f"Reset: {about['reset']} connections; memory: with {about['memory']} open.",
        endings(results),
    ]
    if found := targets(results):
        parts += ["### Targets", *found]
    for heading, one, other in PAIRS:
        if found := pairs(results, one, other):
            parts += [f"### {heading}", *found]
    if results.rows(COMPARED):
        parts += ["### All servers", everybody(results), rules(results)]
    if results.rows(FLATNESS):
        parts += ["### With more connections open", flatness(results)]
    return "\n\n".join(parts)


def summary(results: Results) -> str:
    """What AnyIO's own listener costs, compared with `serve_tcp`."""
    loops = CONTENDERS["anyio"].loops

    def cell(name: str, loop: str) -> str:
        found = results.ratio(name, ("anyio", loop), ("anyio_rst", loop))
        return "" if found is None else f"{found.median:.2f}"

    body = [
        [workload.title, *(cell(name, loop) for loop in loops)]
        for name, workload in COMPARED.items()
        if results.rows([name])
    ]
    return table(["AnyIO's listener / `serve_tcp`", *loops], body)


def written() -> dict[Path, str]:
    """Every file that shows the stored results, as it should be."""
    results = load(RESULTS)
    page = filled(PAGE.read_text(), "summary", summary(results))
    return {
        PAGE: filled(page, "results", tables(results)),
        CHART: chart.draw(results),
    }
