"""The tables of answers that are cut in the middle."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evidence.pages import table

from .cuts import BODIES, ENDS, OTHERS
from .words import VERDICTS, each, measured

if TYPE_CHECKING:
    from .cuts import Cut, Cuts


def verdict(cell: Cut | None) -> str:
    return "" if cell is None else VERDICTS[cell.noticed]


def over_http(cuts: Cuts, end: str) -> str:
    clients = dict.fromkeys(cell.client for cell in cuts.cells if cell.body)
    body = [
        [f"`{client}`", *(verdict(cuts.find(client, kind, end)) for kind in BODIES)]
        for client in clients
    ]
    return table(["client", *BODIES.values()], body)


def by_other_protocols(cuts: Cuts) -> str:
    body = [
        [f"`{client}`", asked, *(verdict(cuts.find(client, "", end)) for end in ENDS)]
        for client, asked in OTHERS.items()
        if client not in cuts.left_out
    ]
    return table(["client", "asks for", *ENDS.values()], body)


def words(cuts: Cuts) -> str:
    body = []
    for cell in cuts.cells:
        if cell.end != "whole":
            said = each(told.said for told in cell.told)
            kind = BODIES.get(cell.body, "")
            body.append([f"`{cell.client}`", kind, ENDS[cell.end], said])
    return table(["client", "body", "cut by", "what it says"], body)


def tables(cuts: Cuts) -> str:
    whole = [cell for cell in cuts.cells if cell.end == "whole"]
    wrong = [f"`{cell.client}`" for cell in whole if not cell.is_right]
    but = f", but for those of {', '.join(dict.fromkeys(wrong))}" if wrong else ""
    left_out = [f"`{name}` ({reason})" for name, reason in cuts.left_out.items()]
    parts = [
        measured(cuts.about),
        f"All answers that were not cut arrived whole{but}.",
        f"Left out: {', '.join(left_out)}." if left_out else "None was left out.",
        "### Cut by a FIN",
        over_http(cuts, "fin"),
        "### Cut by an RST",
        over_http(cuts, "rst"),
        "### Other protocols",
        by_other_protocols(cuts),
        "### What they said of it",
        words(cuts),
    ]
    return "\n\n".join(parts)
