"""docs/links.txt: every link of the documentation and the README that leads elsewhere.

`nox -s links` asks the network whether they are good, `nox -s links -- --write` writes
them down. The build of the documentation compares them with those of its pages.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

FILE = Path(__file__).with_name("links.txt")
README = Path(__file__).parents[1] / "README.md"

# Those of Markdown, and those of docstrings.
WRITTEN = re.compile(r"(?:\]\(|\]: |<)(https?://[^)>\s]+)")
CODE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)

logger = logging.getLogger("sphinx.links")


def listed() -> list[str]:
    return FILE.read_text().splitlines()


def written_in(text: str) -> set[str]:
    return set(WRITTEN.findall(CODE.sub("", text)))


class Pages:
    """The links of the pages that are built this time."""

    def __init__(self) -> None:
        self.links = {"README": written_in(README.read_text())}

    def collect(self, app: Sphinx, doctree: Any, docname: str) -> None:
        self.links[docname] = {
            node["refuri"]
            for node in doctree.findall(lambda node: node.tagname == "reference")
            if node.get("refuri", "").startswith(("http:", "https:"))
            and not any(re.match(mine, node["refuri"]) for mine in ours(app))
        }

    def compare(self, app: Sphinx, exception: Exception | None) -> None:
        if exception is not None:
            return
        links = set().union(*self.links.values())
        if "write_links" in app.tags:
            FILE.write_text("".join(f"{link}\n" for link in sorted(links)))
        for link in sorted(links.difference(listed())):
            logger.warning("docs/links.txt does not have %s", link)
        if self.links.keys() >= app.env.found_docs:  # not those that have changed alone
            for link in sorted(set(listed()).difference(links)):
                logger.warning("docs/links.txt has %s, which no page has", link)


def ours(app: Sphinx) -> list[str]:
    patterns: list[str] = app.config.linkcheck_ignore
    return patterns


def setup(app: Sphinx) -> None:
    pages = Pages()
    app.connect("doctree-resolved", pages.collect)
    app.connect("build-finished", pages.compare)
