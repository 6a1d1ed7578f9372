"""The programs that the pages show are files, and stand in the pages as they are.

`python docs/shown.py` writes them behind their marks, `<!-- examples/name.py -->`. So a
page has its code in whatever renders it.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])

_SHOWN = re.compile(
    r"(<!-- (examples/\S+) -->\n)(?:```\w+\n.*?^```\n)?", re.MULTILINE | re.DOTALL
)
_LANGUAGES = {".py": "python", ".txt": "text"}


def programs(page: str) -> list[str]:
    """The files that *page* shows, in order."""
    return [path for _, path in _SHOWN.findall(page)]


def with_programs(page: str) -> str:
    """*page*, with the files of now."""

    def show(mark: re.Match[str]) -> str:
        file = ROOT / mark[2]
        return f"{mark[1]}```{_LANGUAGES[file.suffix]}\n{file.read_text()}```\n"

    return _SHOWN.sub(show, page)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(with_programs(path.read_text()))
