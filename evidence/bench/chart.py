"""docs/benchmark.svg: what a connection costs each contender, and what it gets."""

from __future__ import annotations

from textwrap import wrap
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from .results import CHURN_FIN, CHURN_RST
from .servers import CONTENDERS, OURS

if TYPE_CHECKING:
    from .results import Results, Spread

HEADINGS = {"asyncio": "asyncio", "uvloop": "uvloop", "trio": "Trio", "own": "others"}
PANELS = {
    CHURN_FIN: "ends in FIN",
    CHURN_RST: "ends in RST",
}
VERSIONS = ("python", "anyio_rst", "anyio", "trio", "uvloop", "twisted", "node")

EXPLANATION = (
    "µs of CPU time: accept, 64 bytes there and back, end.",
    "Less is better. Bar: median; line: all rounds.",
    "Rules: ● held, ◉ in part or by hand, ○ not.",
)

# Pixels. As narrow as a phone, so that nothing has to be made smaller there.
WIDTH = 440
MARGIN = 8
LINE = 22
BAR = 14
DOT = 3
RULES_LEFT = 160
PANELS_LEFT = 218
PANEL = 104
GAP = 8
FIGURE = 34  # room for the figure behind the longest bar
COLUMNS = 60  # of the last lines

STYLE = """
  svg { font-family: system-ui, sans-serif; font-size: 13px }
  .page { fill: #ffffff } text { fill: #1f2328 } .dim { fill: #59636e }
  .title { font-size: 17px; font-weight: 600 } .head { font-weight: 600 }
  .bar { fill: #a9b4c0 } .ours { fill: #1f6feb }
  .dot { fill: none; stroke: #59636e } .held { fill: #59636e }
  .range { stroke: #1f2328; stroke-width: 1.5 }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117 } text { fill: #e6edf3 } .dim { fill: #9198a1 }
    .bar { fill: #57606c } .ours { fill: #4493f8 }
    .dot { stroke: #9198a1 } .held { fill: #9198a1 }
    .range { stroke: #e6edf3 }
  }
"""


def versions(results: Results) -> str:
    about = results.about
    return ", ".join(f"{name} {about[name]}" for name in VERSIONS if name in about)


def text(x: float, y: float, content: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(content)}</text>'


def dots(y: float, contender: str) -> list[str]:
    shapes = []
    for number, held in enumerate(CONTENDERS[contender].rules):
        place = f'cx="{RULES_LEFT + DOT + number * (2 * DOT + 4)}" cy="{y - 4.5:.1f}"'
        shapes.append(f'<circle {place} r="{DOT}" class="dot"/>')
        if held != "no":
            radius = DOT if held == "yes" else DOT / 2
            shapes.append(f'<circle {place} r="{radius}" class="held"/>')
    return shapes


def bar(x: float, y: float, cost: Spread, scale: float, kind: str) -> list[str]:
    low, median, high = (value * scale for value in (cost.low, cost.median, cost.high))
    middle = y - 4.5
    area = f'x="{x}" y="{middle - BAR / 2:.1f}" width="{median:.1f}" height="{BAR}"'
    return [
        f'<rect {area} rx="2" class="{kind}"/>',
        f'<path d="M{x + low:.1f} {middle:.1f}h{high - low:.1f}" class="range"/>',
        text(x + high + 6, y, f"{cost.median:.0f}"),
    ]


def draw(results: Results) -> str:
    rows = results.rows(PANELS)
    costs = [results.cost(name, row) for name in PANELS for row in rows]
    scale = (PANEL - FIGURE) / max(cost.high for cost in costs if cost is not None)
    lefts = [PANELS_LEFT + number * (PANEL + GAP) for number in range(len(PANELS))]

    y = MARGIN + 14.0
    shapes = [text(MARGIN, y, "What one connection costs the server", "title")]
    for line in EXPLANATION:
        y += 0.9 * LINE
        shapes.append(text(MARGIN, y, line, "dim"))
    y += 1.6 * LINE
    shapes.append(text(RULES_LEFT, y, "rules", "head"))
    for x, heading in zip(lefts, PANELS.values(), strict=True):
        shapes.append(text(x, y, heading, "head"))
    loop = ""
    for row in rows:
        if row[1] != loop:
            loop = row[1]
            y += 1.3 * LINE
            shapes.append(text(MARGIN, y, HEADINGS[loop], "head"))
        y += LINE
        shapes.append(text(MARGIN + 8, y, CONTENDERS[row[0]].title.replace("`", "")))
        shapes += dots(y, row[0])
        kind = "bar ours" if row[0] in OURS else "bar"
        for x, name in zip(lefts, PANELS, strict=True):
            if (cost := results.cost(name, row)) is not None:
                shapes += bar(x, y, cost, scale, kind)
    y += LINE
    about = results.about
    machine = f"{about['processor']}, {about['system']}"
    for line in wrap(f"{about['date']}: {versions(results)}; {machine}", COLUMNS):
        y += 0.8 * LINE
        shapes.append(text(MARGIN, y, line, "dim"))
    height = round(y + MARGIN)
    size = f'width="{WIDTH}" height="{height}"'
    box = f'viewBox="0 0 {WIDTH} {height}" role="img"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} {box}>',
            "<title>CPU time per connection, of each server</title>",
            f"<style>{STYLE}</style>",
            f'<rect {size} class="page"/>',
            *shapes,
            "</svg>\n",
        ]
    )
