"""The parts of a page that are measured: tables, between marks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import ROOT

if TYPE_CHECKING:
    from pathlib import Path

DOCS = ROOT / "docs"


def table(head: list[str], body: list[list[str]], *, numbers: bool = False) -> str:
    """In Markdown, with straight columns.

    *numbers*: all but the first column are flush right.
    """
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    pad, colon = (str.rjust, ":") if numbers else (str.ljust, "-")

    def line(cells: list[str]) -> str:
        (first, width), *others = zip(cells, widths, strict=True)
        padded = [first.ljust(width), *(pad(cell, width) for cell, width in others)]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + colon for width in widths[1:])]
    return "\n".join(map(line, [head, rule, *body]))


def filled(page: str, name: str, content: str) -> str:
    """*page* with *content* between the marks of that *name*."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{content}\n\n{end}{after}"


def write(contents: dict[Path, str]) -> None:
    for path, content in contents.items():
        path.write_text(content)
