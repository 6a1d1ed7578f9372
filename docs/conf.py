"""The pages that `nox -s docs` builds."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms import SphinxTransform

import anyio_rst

if TYPE_CHECKING:
    from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent))
PYPROJECT = (Path(__file__).parents[1] / "pyproject.toml").read_text()

project = "anyio_rst"
author = "the anyio_rst developers"
release = anyio_rst.__version__
(source,) = re.findall(r'^Source = "(.*)"$', PYPROJECT, re.MULTILINE)

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "links",
    "names",
    "signatures",
]
exclude_patterns = ["_build"]
# With warnings as errors: a reference to nothing fails the build.
nitpicky = True
default_role = "code"

myst_heading_anchors = 3

# Copy the commands, without their prompt and what they print.
copybutton_exclude = ".linenos, .gp, .go"

autodoc_member_order = "bysource"
autodoc_default_options = {"show-inheritance": True}
autodoc_typehints_format = "short"
# One parameter a line where it is longer.
python_maximum_signature_line_length = 78
napoleon_numpy_docstring = False
# "host, port" in Args is two parameters, which have their types in the signature.
napoleon_use_param = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"anyio_rst {release}"
html_theme_options = {
    "source_view_link": f"{source}/blob/main/docs/{{filename}}",
    "dark_css_variables": {"color-inline-code-background": "#25282c"},
}
html_static_path = ["_static"]
html_css_files = ["tables.css", "theme.css"]
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False

# What is awaited or entered where it is made.
nitpick_ignore = [("py:class", "Connecting")]

# It is a placeholder until somebody publishes this.
linkcheck_ignore = [re.escape(source)]

# What a page is searched by, and is to be found by before all others.
SEARCHED = {
    "asyncio_streams": ["StreamReader", "StreamWriter"],
    "faq": ["UNIX socket", "WebSocket", "WebSockets"],
    "frameworks": ["ASGI"],
    "http": ["HTTP/1.1"],
    "observability": ["logging", "metrics", "OpenTelemetry", "Prometheus"],
    "processes": ["zero downtime"],
    "stopping": ["graceful shutdown", "keep-alive", "SIGTERM"],
    "tls": ["SSL", "STARTTLS"],
    "troubleshooting": ["ECONNRESET", "EMFILE", "EPIPE"],
}


class Searched(SphinxTransform):
    """The words that a page is searched by: index entries of the sections they name."""

    default_priority = 400

    def apply(self, **kwargs: Any) -> None:
        page, *sections = self.document.findall(nodes.section)
        for word in SEARCHED.get(self.env.docname, ()):
            named = [one for one in sections if word.lower() in one[0].astext().lower()]
            section = (named or [page])[0]
            entry = ("single", word, section["ids"][0], "main", None)
            section.insert(1, addnodes.index(entries=[entry]))


def setup(app: Sphinx) -> None:
    app.add_transform(Searched)
