"""The tables of resets on their way, and the page of these and of the cuts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from evidence.pages import DOCS, filled, table

from . import cuts
from .cuts import BODIES, ENDS, OTHERS
from .results import (
    ANSWERS,
    CHUNKS,
    HALF_FIN,
    HALF_RST,
    JUDGE,
    LONG_HALF_RST,
    ROUTES,
    load,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from .cuts import Cut, Cuts
    from .results import Cell, Results, Told

HERE = Path(__file__).parent
RESULTS, CUTS = HERE / "results.json", HERE / "cuts.json"
PAGE = DOCS / "interop.md"

VERDICTS = {True: "noticed", False: "**not noticed**", None: "**not always**"}

FAILURES = [HALF_RST, LONG_HALF_RST, CHUNKS, HALF_FIN]


def each(said: Iterable[str]) -> str:
    """Once, if it was the same each time."""
    return " or ".join(sorted(set(said)))


def measured(about: dict[str, str]) -> str:
    about = dict(about)
    date, system, rounds = (about.pop(name) for name in ("date", "system", "rounds"))
    versions = ", ".join(f"{name} {version}" for name, version in about.items())
    return f"{date}, {system}, each {rounds} times: {versions}."


def code(client: str) -> str:
    return client if client == JUDGE else f"`{client}`"


def verdict(cell: Cell) -> str:
    if cell.client == JUDGE:
        return each(told.said for told in cell.told)
    return VERDICTS[cell.noticed]


def noticed(results: Results, answer: str, scheme: str = "http") -> str:
    """Who notices that *answer* is not all."""
    found = results.find(answer, scheme)
    asked = list(dict.fromkeys(client for _, client in found))
    routes = dict.fromkeys(route for route, _ in found)
    body = [
        [ROUTES[route].title, *(verdict(found[route, client]) for client in asked)]
        for route in routes
    ]
    return table(["proxy", *map(code, asked)], body)


def in_words(results: Results, answer: str, scheme: str = "http") -> str:
    """The same in a sentence, if that is enough."""
    found = list(results.find(answer, scheme).values())
    if all(cell.noticed is False for cell in found):
        return "No client noticed, with or without a proxy."
    return noticed(results, answer, scheme)


def long(results: Results) -> str:
    short, found = results.find(HALF_RST), results.find(LONG_HALF_RST)
    if all(found[at].noticed is cell.noticed for at, cell in short.items()):
        size = next(iter(found.values())).there_was
        return f"It was the same with a long answer, of which half is {size:,} bytes."
    return f"Of a long answer:\n\n{noticed(results, LONG_HALF_RST)}"


def sizes(tolds: list[Told], there_was: int) -> str:
    """From the smallest to the largest; nothing if the client does not say."""
    found = [told.size for told in tolds if told.size is not None]
    if not found:
        return ""
    low, high = min(found), max(found)
    if low == there_was:
        return "all"
    if low == high:
        return f"{low:,} of {there_was:,} B"
    return f"{low:,} to {high:,} of {there_was:,} B"


def in_full(tolds: list[Told], there_was: int) -> str:
    parts = [each(told.said for told in tolds), sizes(tolds, there_was)]
    return ", ".join(filter(None, parts))


def wrong(results: Results) -> str:
    """Whole answers that did not arrive as such."""
    whole = [cell for cell in results.cells if ANSWERS[cell.answer].is_whole]
    total = sum(len(cell.told) for cell in whole)
    bad = [cell for cell in whole if not cell.is_right]
    if not bad:
        return f"All {total} complete answers arrived, and no client reported an error."
    lines = [
        f"- {ROUTES[cell.route].title}, {code(cell.client)}, "
        f"{ANSWERS[cell.answer].title}: {in_full(cell.told, cell.there_was)}"
        for cell in bad
    ]
    return "\n".join([f"Of {total} whole answers, these did not arrive:", "", *lines])


def upstream(results: Results) -> str:
    head = [
        "proxy",
        "the client resets: the origin gets",
        "the client sends FIN: the origin gets",
        "and the client gets of the answer",
    ]
    body = [
        [
            ROUTES[row.route].title,
            each(row.of_reset),
            each(row.of_fin),
            in_full(row.after_fin, row.there_was),
        ]
        for row in results.upstream
    ]
    return table(head, body)


def said(results: Results, client: str, scheme: str) -> str:
    """Word for word, and how much of what the origin sent the client had."""
    found = {name: results.find(name, scheme) for name in FAILURES}
    routes = [route for route, other in found[HALF_RST] if other == client]

    def cell(answer: str, route: str) -> str:
        at = found[answer][route, client]
        return in_full(at.told, at.there_was)

    body = [
        [ROUTES[route].title, *(cell(answer, route) for answer in FAILURES)]
        for route in routes
    ]
    return table(["proxy", *(ANSWERS[answer].title for answer in FAILURES)], body)


def words(results: Results) -> Iterator[str]:
    for cell in dict.fromkeys((cell.scheme, cell.client) for cell in results.cells):
        scheme, client = cell
        title = code(client)
        yield f"### {title[0].upper()}{title[1:]}{', TLS' if scheme == 'https' else ''}"
        yield said(results, client, scheme)


def tables(results: Results) -> str:
    parts = [
        measured(results.about),
        wrong(results),
        "## The origin fails half way, and resets",
        noticed(results, HALF_RST),
        long(results),
        "## It fails half way, and sends FIN",
        in_words(results, HALF_FIN),
        "## It fails half way through chunks, and resets",
        noticed(results, CHUNKS),
        "## TLS, through proxies that do not look into it",
        "The origin fails half way, and resets:",
        noticed(results, HALF_RST, "https"),
        "It fails half way, and AnyIO's TLS still sends a close_notify and FIN:",
        in_words(results, HALF_FIN, "https"),
        "## The client ends first",
        upstream(results),
        "## What the clients said, and how much of what was sent they got",
        *words(results),
    ]
    return "\n\n".join(parts)


# Cut in the middle.


def judged(cell: Cut | None) -> str:
    return "" if cell is None else VERDICTS[cell.noticed]


def over_http(found: Cuts, end: str) -> str:
    clients = dict.fromkeys(cell.client for cell in found.cells if cell.body)
    body = [
        [f"`{client}`", *(judged(found.find(client, kind, end)) for kind in BODIES)]
        for client in clients
    ]
    return table(["client", *BODIES.values()], body)


def by_other_protocols(found: Cuts) -> str:
    body = [
        [
            f"`{client}`",
            asked,
            *(judged(found.find(client, "", end)) for end in ENDS),
        ]
        for client, asked in OTHERS.items()
        if client not in found.left_out
    ]
    return table(["client", "asks for", *ENDS.values()], body)


def cut_words(found: Cuts) -> str:
    body = []
    for cell in found.cells:
        if cell.end != "whole":
            said = each(told.said for told in cell.told)
            kind = BODIES.get(cell.body, "")
            body.append([f"`{cell.client}`", kind, ENDS[cell.end], said])
    return table(["client", "body", "cut by", "what it says"], body)


def cut_tables(found: Cuts) -> str:
    whole = [cell for cell in found.cells if cell.end == "whole"]
    wrong = [f"`{cell.client}`" for cell in whole if not cell.is_right]
    but = f", except those of {', '.join(dict.fromkeys(wrong))}" if wrong else ""
    left_out = [f"`{name}` ({reason})" for name, reason in found.left_out.items()]
    parts = [
        measured(found.about),
        f"All answers that were not cut arrived complete{but}.",
        f"Left out: {', '.join(left_out)}." if left_out else "No client was left out.",
        "### Cut by a FIN",
        over_http(found, "fin"),
        "### Cut by an RST",
        over_http(found, "rst"),
        "### Other protocols",
        by_other_protocols(found),
        "### What the clients reported",
        cut_words(found),
    ]
    return "\n\n".join(parts)


def written() -> dict[Path, str]:
    """The page, as the stored results have it."""
    page = filled(PAGE.read_text(), "results", tables(load(RESULTS)))
    return {PAGE: filled(page, "cuts", cut_tables(cuts.load(CUTS)))}
