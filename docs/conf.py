"""The pages that `nox -s docs` builds."""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path
from typing import TYPE_CHECKING

from docutils import nodes
from sphinx.pycode import ModuleAnalyzer

if TYPE_CHECKING:
    from sphinx.addnodes import pending_xref
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

PYPROJECT = (Path(__file__).parents[1] / "pyproject.toml").read_text()

project = "anyio_rst"
author = "the anyio_rst developers"
(release,) = re.findall(r'^version = "(.*)"$', PYPROJECT, re.MULTILINE)
(source,) = re.findall(r'^Source = "(.*)"$', PYPROJECT, re.MULTILINE)

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
# With warnings as errors: a reference to nothing fails the build.
nitpicky = True
default_role = "code"

myst_heading_anchors = 3

# Copy the commands, without their prompt and what they print.
copybutton_exclude = ".linenos, .gp, .go"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
# "host, port" in Args is two parameters, which have their types in the signature.
napoleon_use_param = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"anyio_rst {release}"
html_theme_options = {"source_view_link": f"{source}/blob/main/docs/{{filename}}"}
html_static_path = ["_static"]
html_css_files = ["tables.css", "theme.css"]
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False

# Where the names of others are documented. (Intersphinx would have to load their
# inventories at each build, and a build should need no network.)
PAGES = {
    "anyio": "https://anyio.readthedocs.io/en/stable/api.html",
    "outcome": "https://outcome.readthedocs.io/en/stable/api.html",
    "trio": "https://trio.readthedocs.io/en/stable/reference-io.html",
    "trio.Nursery": "https://trio.readthedocs.io/en/stable/reference-core.html",
    "asyncio": "https://docs.python.org/3/library/asyncio-stream.html",
    "httpx": "https://www.python-httpx.org/api/",
    "builtins": "https://docs.python.org/3/library/exceptions.html",
    "contextlib": "https://docs.python.org/3/library/contextlib.html",
    "ipaddress": "https://docs.python.org/3/library/ipaddress.html",
    "socket": "https://docs.python.org/3/library/socket.html",
    "ssl": "https://docs.python.org/3/library/ssl.html",
    "types": "https://docs.python.org/3/library/types.html",
}
# Signatures show these without their module: autodoc_typehints_format.
MODULES = {
    "AbstractAsyncContextManager": "contextlib",
    "IPv4Address": "ipaddress",
    "IPv6Address": "ipaddress",
    "SSLContext": "ssl",
    "TaskGroup": "anyio.abc",
    "TaskStatus": "anyio.abc",
}
# Aliases, which the descriptions of the parameters spell out, and what is awaited or
# entered where it is made.
nitpick_ignore = [("py:class", name) for name in ("TCPStream", "FinishOn", "Connecting")]


def analyze(package: str) -> None:
    """Let autodoc find what the modules of *package* say of its public names.

    It looks for the docstrings of attributes in the module that a class names as its
    own, and that is the package.
    """
    analyzer = ModuleAnalyzer.for_module(package)
    analyzer.analyze()
    for found in pkgutil.iter_modules(importlib.import_module(package).__path__):
        module = ModuleAnalyzer.for_module(f"{package}.{found.name}")
        module.analyze()
        analyzer.attr_docs |= module.attr_docs
        analyzer.tagorder |= module.tagorder


def link(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement
) -> nodes.reference | None:
    """A link to the documentation of somebody else's name, if there is that name."""
    target: str = node["reftarget"]
    if node["refdomain"] != "py":
        return None
    if target in MODULES:
        target = f"{MODULES[target]}.{target}"
    package = target.partition(".")[0]
    if package not in PAGES:
        package, target = "builtins", f"builtins.{target}"
    try:
        pkgutil.resolve_name(target)
    except (ImportError, AttributeError):
        return None
    anchor = target.removeprefix("builtins.")
    if node["reftype"] == "mod":
        anchor = f"module-{anchor}"
    uri = f"{PAGES.get(target, PAGES[package])}#{anchor}"
    return nodes.reference("", "", content, internal=False, refuri=uri)


def setup(app: Sphinx) -> None:
    analyze("anyio_rst")
    analyze("anyio_rst.testing")
    app.connect("missing-reference", link)
