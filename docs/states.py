"""docs/states.svg: a connection's way from open to ended, from the code's own tables.

`python docs/states.py` draws it.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from xml.sax.saxutils import escape

from anyio_rst import Cause, CloseKind, Drain
from anyio_rst._ending import KIND_OF

FILE = Path(__file__).with_name("states.svg")

WIDTH = 800
LINE = 20

# What leads from one state to another besides the causes: nothing that has an Ending.
DEATH = "the process dies"
LIMITS = ["the peer's FIN", *(f"Drain.{field.name}" for field in fields(Drain))]
CUT_SHORT = ["cancellation", "abort()"]

STYLE = """
  svg { font: 14px system-ui, sans-serif } .page { fill: #ffffff }
  text { fill: #1f2328 } .dim { fill: #59636e } .state { font-weight: 600 }
  .code { font-family: ui-monospace, monospace; font-size: 13px }
  rect.box { fill: none; stroke: #8b949e; stroke-width: 1.5 }
  .FIN { stroke: #1a7f37; fill: #1a7f37 } .RST { stroke: #cf222e; fill: #cf222e }
  .DETACHED { stroke: #59636e; fill: #59636e }
  path.arrow { fill: none; stroke-width: 2 }
  text.FIN, text.RST, text.DETACHED { stroke: none; font-weight: 600 }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117 } text { fill: #e6edf3 } .dim { fill: #9198a1 }
    rect.box { stroke: #6e7681 }
    .FIN { stroke: #3fb950; fill: #3fb950 } .RST { stroke: #ff7b72; fill: #ff7b72 }
    .DETACHED { stroke: #9198a1; fill: #9198a1 }
  }
"""

PEER = {
    CloseKind.FIN: "the peer reads all, then end of stream",
    CloseKind.RST: "the peer gets ECONNRESET",
    CloseKind.DETACHED: "the peer notices nothing",
}


def causes(kind: CloseKind) -> list[str]:
    return [cause.value for cause in Cause if KIND_OF[cause] is kind]


def text(x: int, y: int, words: str, style: str = "", anchor: str = "start") -> str:
    return (
        f'<text x="{x}" y="{y}" text-anchor="{anchor}" class="{style}">'
        f"{escape(words)}</text>"
    )


def box(x: int, y: int, width: int, height: int, name: str, lines: list[str]) -> str:
    middle = x + width // 2
    parts = [
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" class="box"/>',
        text(middle, y + 26, name, "state", "middle"),
    ]
    parts += (
        text(middle, y + 26 + LINE * count, line, "dim", "middle")
        for count, line in enumerate(lines, 1)
    )
    return "\n".join(parts)


def arrow(path: str, head: tuple[int, int], kind: CloseKind) -> str:
    x, y = head
    return (
        f'<path d="{path}" class="arrow {kind.value}"/>\n'
        f'<path d="M{x} {y}l-10 -6v12z" class="{kind.value}"/>'
    )


def detour(x: int, y: int, low: int, end: int, kind: CloseKind) -> str:
    """An arrow from (x, y) down to *low*, and up again at *end*."""
    return (
        f'<path d="M{x} {y}V{low}H{end}V{y + 2}" class="arrow {kind.value}"/>\n'
        f'<path d="M{end} {y}l-6 10h12z" class="{kind.value}"/>'
    )


def label(x: int, y: int, kind: CloseKind, lines: list[str]) -> str:
    """What causes an arrow, and what the peer sees of it."""
    title = {CloseKind.DETACHED: "nothing is sent"}.get(kind, kind.value)
    parts = [text(x, y, title, kind.value)]
    parts += (
        text(x, y + LINE * count, line, "code") for count, line in enumerate(lines, 1)
    )
    parts.append(text(x, y + LINE * (len(lines) + 1), PEER[kind], "dim"))
    return "\n".join(parts)


def wrapped(words: list[str], count: int) -> list[str]:
    """*count* words a line."""
    return [", ".join(words[at : at + count]) for at in range(0, len(words), count)]


def draw() -> str:
    earned = wrapped(causes(CloseKind.FIN), 3)
    failed = wrapped(causes(CloseKind.RST), 3)
    given = causes(CloseKind.DETACHED)
    top = 70
    ends = top + 40  # the row of the states
    reset = ends + 150
    detached = reset + LINE * (len(failed) + 4)
    height = detached + LINE * 4
    parts = [
        box(20, top, 130, 80, "open", ["armed: death", "resets it"]),
        box(440, top, 130, 80, "finishing", ["the FIN is out;", "it drains"]),
        box(680, top, 100, 80, "ended", ["conn.ending"]),
        arrow(f"M150 {ends}H432", (440, ends), CloseKind.FIN),
        label(160, ends - 72, CloseKind.FIN, earned),
        arrow(f"M570 {ends}H672", (680, ends), CloseKind.FIN),
        *(
            text(625, ends + 8 + LINE * count, line, "dim", "middle")
            for count, line in enumerate([*LIMITS, *CUT_SHORT], 1)
        ),
        detour(80, top + 80, detached, 745, CloseKind.DETACHED),
        detour(110, top + 80, reset, 715, CloseKind.RST),
        label(152, reset + 22, CloseKind.RST, [*failed, DEATH]),
        label(152, detached + 22, CloseKind.DETACHED, given),
    ]
    description = "; ".join(
        f"{PEER[kind]} after {', '.join(causes(kind))}" for kind in CloseKind
    )
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
            "<title>A connection is open, then finishing, then ended</title>",
            f"<desc>{escape(description)}.</desc>",
            f"<style>{STYLE}</style>",
            f'<rect width="{WIDTH}" height="{height}" rx="6" class="page"/>',
            *parts,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    FILE.write_text(draw())
