"""docs/links.txt has every link that leads elsewhere, for those who can follow them."""

from __future__ import annotations

import ast

from test_readme import ROOT

import links

PAGES = [*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")]
# What the build makes of names in code. That these are all, it says itself.
OF_NAMES = (
    "https://docs.python.org/3/library/",
    "https://anyio.readthedocs.io/en/stable/api.html#",
    "https://trio.readthedocs.io/en/stable/reference-",
    "https://outcome.readthedocs.io/en/stable/api.html#",
    "https://www.python-httpx.org/",
)


def docstrings() -> list[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [
        ast.get_docstring(node) or ""
        for path in (ROOT / "src").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, documented)
    ]


def of_names(listed: list[str]) -> set[str]:
    return {link for link in listed if link.startswith(OF_NAMES)}


def test_the_list_has_the_links_of_all_pages_and_docstrings_and_no_others() -> None:
    """If not: `nox -s links -- --write`."""
    texts = [page.read_text() for page in PAGES] + docstrings()
    written = set().union(*map(links.written_in, texts))
    listed = links.listed()
    assert listed == sorted(set(listed))
    assert written <= set(listed)
    assert [one for one in listed if one not in written | of_names(listed)] == []
