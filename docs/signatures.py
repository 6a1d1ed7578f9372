"""How the reference shows the interface: as those see it who use it."""

from __future__ import annotations

import enum
import importlib
import inspect
import pkgutil
import re
from typing import TYPE_CHECKING, Any

import anyio
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective

import anyio_rst

if TYPE_CHECKING:
    from docutils import nodes
    from sphinx import addnodes
    from sphinx.application import Sphinx

# Classes that the library alone makes.
NOT_CALLED = {"anyio_rst.testing.Capture"}


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
        analyzer.annotations |= module.annotations
        analyzer.tagorder |= module.tagorder


def is_private(cls: type) -> bool:
    return "._" in f"{cls.__module__}.{cls.__qualname__}"


def show_bases(
    app: Sphinx, name: str, obj: type, options: object, bases: list[type]
) -> None:
    """Bases that have no public name are a part of the class: show theirs."""
    while private := [base for base in bases if is_private(base)]:
        for base in private:
            at = bases.index(base)
            bases[at : at + 1] = base.__bases__


def show_as_async(cls: type) -> None:
    """Methods that return a coroutine are async functions, to those who call them."""
    for name, function in list(vars(cls).items()):
        returned = getattr(function, "__annotations__", {}).get("return", "")
        if match := re.fullmatch(r"Coroutine\[Any, Any, (.*)\]", str(returned)):
            setattr(cls, name, as_async(function, match[1]))


def as_async(function: Any, returned: str) -> object:
    async def shown() -> None: ...

    signature = inspect.signature(function).replace(return_annotation=returned)
    shown.__doc__ = function.__doc__
    shown.__module__ = function.__module__
    shown.__qualname__ = function.__qualname__
    shown.__annotations__ = {**function.__annotations__, "return": returned}
    vars(shown)["__signature__"] = signature
    return shown


def show_signature(
    app: Sphinx,
    what: str,
    name: str,
    obj: object,
    options: object,
    signature: str | None,
    returned: str | None,
) -> tuple[str, str | None] | None:
    if signature is None:
        return None
    if isinstance(obj, enum.EnumMeta) or name in NOT_CALLED:
        return "", None
    # The default of *task_status*, which has no other name than that of its constant.
    ignored = type(anyio.TASK_STATUS_IGNORED).__qualname__
    signature = re.sub(
        rf"<[\w.]*\b{ignored}[^>]*>", "anyio.TASK_STATUS_IGNORED", signature
    )
    if inspect.isgeneratorfunction(getattr(obj, "__wrapped__", None)):
        returned = re.sub(r"^Iterator", "AbstractContextManager", str(returned))
    return signature, returned


def show_values(
    app: Sphinx, what: str, name: str, obj: object, skip: bool, options: object
) -> bool | None:
    """The members of an enum are shown, also where their names say it all."""
    return False if isinstance(obj, enum.Enum) and obj.name == name else None


def hide_object(
    app: Sphinx, domain: str, objtype: str, content: addnodes.desc_content
) -> None:
    """That a class is an object, everybody knows."""
    if content.children and content[0].astext() == "Bases: object":
        del content[0]


class Alias(SphinxDirective):
    """`.. autoalias:: name`: an alias of the current module, with its value."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        (name,) = self.arguments
        module = self.env.ref_context["py:module"]
        docs = {
            known: lines
            for (_, known), lines in ModuleAnalyzer.for_module(module).attr_docs.items()
        }
        value = getattr(importlib.import_module(module), name)
        lines = [f".. py:type:: {name}", f"   :canonical: {value}", ""]
        lines += [f"   {line}" for line in docs[name]]
        return self.parse_text_to_nodes("\n".join(lines))


def setup(app: Sphinx) -> None:
    analyze("anyio_rst")
    analyze("anyio_rst.testing")
    for cls in anyio_rst.Connection.__mro__:
        if cls.__module__.startswith("anyio_rst"):
            show_as_async(cls)
    app.add_directive("autoalias", Alias)
    app.connect("autodoc-process-bases", show_bases)
    app.connect("autodoc-process-signature", show_signature)
    app.connect("autodoc-skip-member", show_values)
    app.connect("object-description-transform", hide_object)
