"""The programs on the pages of docs/ do what the pages say, judged by plain sockets."""

from __future__ import annotations

from test_readme import ROOT

DOCS = ROOT / "docs"


def test_the_programs_shown_are_those_that_are_tested() -> None:
    """A page includes them from files. test_pytest_plugin.py runs those of one page."""
    pages = {page.name for page in DOCS.glob("*.md") if "```python\n" in page.read_text()}
    assert pages == {"testing.md"}
