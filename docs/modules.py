"""The map of the modules in CONTRIBUTING.md, from their imports and their docstrings.

`python docs/modules.py` writes it.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "anyio_rst"
PAGE = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- modules -->\n", "<!-- end of modules -->\n"


@cache
def tree(name: str) -> ast.Module:
    path = PACKAGE / f"{name}.py"
    path = path if path.exists() else PACKAGE / name / "__init__.py"
    return ast.parse(path.read_text())


def names() -> list[str]:
    """The modules of the package, and the packages in it."""
    modules = [path.stem for path in PACKAGE.glob("*.py")]
    packages = [path.parent.name for path in PACKAGE.glob("*/__init__.py")]
    return sorted({*modules, *packages} - {"__init__"})


def imports(name: str) -> set[str]:
    """What *name* needs of the package when it runs, not only to be type-checked."""
    path = PACKAGE / name
    files = path.glob("*.py") if path.is_dir() else [path.with_suffix(".py")]
    found: set[str] = set()
    for file in files:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.level == 1 + path.is_dir():
                found |= {
                    (node.module or alias.name).partition(".")[0] for alias in node.names
                }
            elif isinstance(node, ast.ImportFrom) and path.is_dir():
                package, _, module = (node.module or "").partition(".")
                found |= {module.partition(".")[0]} if package == "anyio_rst" else set()
    return found & set(names()) - {name}


@cache
def layer(name: str) -> int:
    """The length of the longest way down."""
    return max((1 + layer(other) for other in imports(name)), default=0)


def summary(name: str) -> str:
    docstring = ast.get_docstring(tree(name)) or ""
    return docstring.partition("\n\n")[0].replace("\n", " ")


def draw() -> str:
    """A table, the lowest layer last: each module imports only from those below it."""
    lines = ["| layer | module | what it is |", "| ---: | --- | --- |"]
    lines += (
        f"| {layer(name)} | `{name}` | {summary(name)} |"
        for name in sorted(names(), key=lambda name: (-layer(name), name))
    )
    return "\n".join(lines) + "\n"


def page() -> str:
    """CONTRIBUTING.md, with the map of now."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n" + draw() + "\n" + END + after


if __name__ == "__main__":
    PAGE.write_text(page())
