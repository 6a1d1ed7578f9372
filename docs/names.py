"""Code in the text that names something public links to where that is documented."""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import pkgutil
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.nodes import make_refnode

import anyio_rst

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

PYTHON = "https://docs.python.org/3/library"
# Where the names of others are documented: the longest that begins a name counts, and
# for the rest of Python the page of the module. (Intersphinx would have to load their
# inventories at each build, and a build should need no network.)
PAGES = {
    "anyio": "https://anyio.readthedocs.io/en/stable/api.html",
    "httpx": "https://www.python-httpx.org/exceptions/",
    "httpx.AsyncBaseTransport": "https://www.python-httpx.org/advanced/transports/",
    "httpx.AsyncClient": "https://www.python-httpx.org/api/",
    "httpx.AsyncHTTPTransport": "https://www.python-httpx.org/advanced/transports/",
    "httpx.Client": "https://www.python-httpx.org/api/",
    "outcome": "https://outcome.readthedocs.io/en/stable/api.html",
    "trio": "https://trio.readthedocs.io/en/stable/reference-io.html",
    "trio.Nursery": "https://trio.readthedocs.io/en/stable/reference-core.html",
    "trio.testing": "https://trio.readthedocs.io/en/stable/reference-testing.html",
    "asyncio": f"{PYTHON}/asyncio-stream.html",
    "asyncio.Server": f"{PYTHON}/asyncio-eventloop.html",
    "asyncio.Task": f"{PYTHON}/asyncio-task.html",
    "asyncio.CancelledError": f"{PYTHON}/asyncio-exceptions.html",
    "asyncio.Protocol": f"{PYTHON}/asyncio-protocol.html",
    "asyncio.ProactorEventLoop": f"{PYTHON}/asyncio-eventloop.html",
    "asyncio.WriteTransport": f"{PYTHON}/asyncio-protocol.html",
    "asyncio.loop": f"{PYTHON}/asyncio-eventloop.html",
    "asyncio.run": f"{PYTHON}/asyncio-runner.html",
}
TYPES = ("bytearray", "bytes", "dict", "frozenset", "list", "memoryview", "str", "tuple")
PAGES |= {f"builtins.{name}": f"{PYTHON}/stdtypes.html" for name in TYPES}
PAGES["builtins.None"] = f"{PYTHON}/constants.html"
# The variables of the text: what they are.
VARIABLES = {
    "conn": ["anyio_rst.Connection"],
    "connection": ["anyio_rst.Connection"],
    "ending": ["anyio_rst.Ending"],
    "idle": ["anyio_rst.Idle"],
    "capture": ["anyio_rst.testing.Capture"],
    "server": ["anyio_rst.Server", "asyncio.Server"],
    "Server": ["anyio_rst.Server", "asyncio.Server"],
    "tg": ["anyio.abc.TaskGroup"],
    "tg.cancel_scope": ["anyio.CancelScope"],
    "transport": ["asyncio.WriteTransport"],
    "listener": ["anyio.abc.Listener"],
    "stream": ["anyio.abc.ByteStream", "trio.abc.Stream"],
    "reader": ["asyncio.StreamReader"],
    "writer": ["asyncio.StreamWriter"],
    "writer.transport": ["asyncio.WriteTransport"],
    "Task": ["asyncio.Task"],
    "exc": ["builtins.BaseException"],
}
# Of whom a page speaks, where a name is that of several.
SPOKEN_OF = {
    "asyncio_streams": "anyio_rst.asyncio_streams",
    "testing": "anyio_rst.testing",
}
# What needs no class in front of it.
FREE = {"function", "class", "exception", "module"}
# Where names without their module are looked for.
NAMESPACES = {
    "AnyIO": ("anyio", "anyio.abc", "anyio.streams.buffered", "anyio.streams.tls"),
    "Trio": ("trio", "trio.abc", "trio.testing"),
    "Python": ("builtins", "ssl", "socket", "collections.abc", "contextlib", "typing"),
    "asyncio": ("asyncio",),
}
OTHERS = {"Twisted", "uvloop"}
PACKAGES = {*sys.stdlib_module_names, *PAGES, "anyio_rst"}
# Methods that are named without what they belong to.
METHODS_OF = (
    "anyio.abc.TaskGroup",
    "anyio.streams.buffered.BufferedByteReceiveStream",
    "trio.abc.Stream",
    "asyncio.StreamReader",
    "asyncio.Server",
    "ssl.SSLSocket",
)
# And parameters.
PARAMETERS_OF = (
    "anyio_rst.serve_tcp",
    "anyio_rst.connect_tcp",
    "anyio_rst.Connection.start_tls",
    "anyio_rst.testing.open_peer",
    "anyio_rst.testing.connect_peer",
)
# Of a newer Python, or of Windows.
ALSO_THERE = {
    "asyncio.ProactorEventLoop",
    "asyncio.Server.abort_clients",
    "asyncio.Server.close_clients",
}
# Modules of Python that are named without anything of theirs.
MODULES = {"multiprocessing", "socketserver", "ssl", "urllib"}
# What has fields that are named without it.
FIELDS_OF = ("Ending", "ServerStatistics", "testing.Seen")
# Words that are none of these names on a page: others' methods, fixtures, fields.
NOT_MEANT = {
    "benchmark": {"receive", "send"},
    "contributing": {"kind"},
    "migrating": {"transport.write", "Protocol", "ConnectionLost", "ConnectionDone"},
    "probe": {"LOST", "tls"},
    "tutorial": {"peer"},
}

WORDS = r"(?:finally: )?(?:\w+ = )?(?:await |async with |with )?"
# Parameters that are something else as a rule.
WORDS_TOO = {"handler", "host", "hostname", "port", "tls"}

PARAMETER = re.compile(r"([a-z_]+)(=.*)?", re.DOTALL)
CODE = re.compile(
    r"(?:finally: )?(?:\w+ = )?(?:await |async with |with )?"
    r"([A-Za-z]\w*(?:\.[A-Za-z]\w*|\.__version__)*)"
    r"(\(.*\))?"
    r"(?: as \w+)?:?",
    re.DOTALL,
)
OWNER = re.compile(r"(\w+)['\u2019]s (?:own )?$")


# The names of others.


def elsewhere(name: str) -> str | None:
    """The address at which a name of others is documented, if there is that name."""
    if is_module(name):
        return f"{PYTHON}/{name}.html#module-{name}"
    documented = defining(name)
    if documented is None or "._" in documented or documented.startswith("_"):
        return None
    page = page_of(documented)
    if page is None or documented.startswith("httpx."):
        return page  # without anchors for names
    return f"{page}#{documented.removeprefix('builtins.')}"


def is_module(name: str) -> bool:
    if name.partition(".")[0] not in sys.stdlib_module_names:
        return False
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def defining(name: str) -> str | None:
    """*name* as it is documented: of the class that defines it; None if there is none."""
    if name in ALSO_THERE:
        return name
    owner_name, _, member = name.rpartition(".")
    try:
        pkgutil.resolve_name(name)
        owner = pkgutil.resolve_name(owner_name)
    except (ImportError, AttributeError, ValueError):
        return None
    if not isinstance(owner, type) or name.startswith("asyncio."):
        return name
    cls = next(cls for cls in owner.__mro__ if member in vars(cls))
    if cls is owner or cls.__module__.partition(".")[0] not in PAGES:
        return name
    return f"{cls.__module__}.{cls.__qualname__}.{member}"


def page_of(name: str) -> str | None:
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if page := PAGES.get(".".join(parts[:end])):
            return page
    if parts[0] == "builtins":
        value = getattr(builtins, parts[1])
        is_exception = isinstance(value, type) and issubclass(value, BaseException)
        return f"{PYTHON}/{'exceptions' if is_exception else 'functions'}.html"
    module = name
    while module := module.rpartition(".")[0]:
        if is_module(module):
            return f"{PYTHON}/{module}.html"
    return None


# Those of this library.


def is_member(name: str, module: str) -> bool:
    """Whether it is in *module*, or in a class of it."""
    rest = name.removeprefix(f"{module}.")
    return rest != name and (rest[0].isupper() or "." not in rest)


def is_field(name: str) -> bool:
    """Whether it is a field of a dataclass, which has no value of its own."""
    cls, _, field = name.rpartition(".")
    try:
        return field in getattr(pkgutil.resolve_name(cls), "__dataclass_fields__", ())
    except (ImportError, AttributeError, ValueError):
        return False


def parameters_of(function: str) -> set[str]:
    return set(inspect.signature(pkgutil.resolve_name(function)).parameters)


# What the text says.


def is_inside(node: nodes.Node, *kinds: type[nodes.Element]) -> bool:
    return any(isinstance(around, kinds) for around in ancestors(node))


def ancestors(node: nodes.Node) -> Iterator[nodes.Element]:
    while (around := node.parent) is not None:
        yield around
        node = around


def described(code: nodes.Node) -> list[str]:
    """What the text is the description of: a method, its class, its module."""
    names: list[str] = []
    module = None
    for around in ancestors(code):
        if isinstance(around, addnodes.desc) and around["domain"] == "py":
            signature = around[0]
            assert isinstance(signature, addnodes.desc_signature)
            names += signature["ids"][:1]
            module = signature.get("module")
    return [*names, module] if module else names


def owner_of(code: nodes.Node) -> str:
    """Whose it is said to be: "AnyIO's `serve()`"."""
    assert code.parent is not None
    at = code.parent.index(code)
    match = OWNER.search(code.parent[at - 1].astext()) if at else None
    return match[1] if match else ""


class Links(SphinxPostTransform):
    default_priority = 20  # after the references that are marked as such

    def run(self, **kwargs: Any) -> None:
        self.docname = self.env.docname
        self.objects = self.env.domains.python_domain.objects
        for code in list(self.document.findall(nodes.literal)):
            if not is_inside(code, nodes.reference, nodes.title, addnodes.pending_xref):
                self.link(code)

    def link(self, code: nodes.literal) -> None:
        for name in self.candidates(code):
            if (reference := self.reference(code, name)) is not None:
                code.replace_self(reference)
                reference.append(code)
                return

    def reference(self, code: nodes.literal, name: str) -> nodes.reference | None:
        if not name.startswith("anyio_rst"):
            uri = elsewhere(name)
            return nodes.reference("", "", internal=False, refuri=uri) if uri else None
        while name not in self.objects:
            documented = defining(name)
            if documented is None and not is_field(name):
                return None
            if documented is not None and not documented.startswith("anyio_rst"):
                return self.reference(code, documented)
            name = name.rpartition(".")[0]  # the class explains it
        if name in described(code):
            return None
        target = self.objects[name]
        builder = self.app.builder
        return make_refnode(
            builder, self.docname, target.docname, target.node_id, [], name
        )

    def candidates(self, code: nodes.literal) -> Iterator[str]:
        """What it may name, the likely first."""
        not_meant = NOT_MEANT.get(self.docname, ())
        text = code.astext()
        if match := CODE.fullmatch(text):
            name, call = match.groups()
            owner = owner_of(code)
            head = name.rpartition(".")[0]
            if name in MODULES or (head and name.partition(".")[0] in PACKAGES):
                yield name
            if owner in NAMESPACES:
                yield from (f"{space}.{name}" for space in NAMESPACES[owner])
            elif owner in OTHERS or name in not_meant:
                return
            elif head:
                member = name.rpartition(".")[2]
                yield from (f"{cls}.{member}" for cls in VARIABLES.get(head, ()))
                yield f"anyio_rst.{name}"
            else:
                yield from self.without_owner(code, name, bool(call))
        if (match := PARAMETER.fullmatch(text)) and match[1] not in not_meant:
            yield from self.with_parameter(match[1])

    def without_owner(
        self, code: nodes.literal, name: str, is_call: bool
    ) -> Iterator[str]:
        yield from self.known(f"{around}.{name}" for around in described(code))
        yield from self.unique(name, is_call)
        if name not in PAGES:
            yield from self.known([f"anyio_rst.{name}"])
        if name[0].isupper() or "_" in name or (is_call and hasattr(builtins, name)):
            for spaces in NAMESPACES.values():
                yield from (f"{space}.{name}" for space in spaces)
        if is_call and ("_" in name or name.startswith("read")):
            yield from (f"{cls}.{name}" for cls in METHODS_OF)

    def with_parameter(self, name: str) -> Iterator[str]:
        if name not in WORDS_TOO:
            functions = [f"{SPOKEN_OF.get(self.docname)}.scoped", *PARAMETERS_OF]
            for function in self.known(functions):
                if name in parameters_of(function):
                    yield function

    def known(self, names: Iterable[str]) -> Iterator[str]:
        return (name for name in names if name in self.objects)

    def unique(self, name: str, is_call: bool) -> Iterator[str]:
        """The one object that is called so, of the module that the page speaks of."""
        found = [
            known
            for known in self.objects
            if known.endswith(f".{name}") and self.is_meant(known, name, is_call)
        ]
        for module in (SPOKEN_OF.get(self.docname, "anyio_rst"), "anyio_rst"):
            names = [known for known in found if is_member(known, module)]
            # One of the same name is a kind, and follows from the cause.
            causes = [known for known in names if known.startswith("anyio_rst.Cause.")]
            if len(names) == 1 or causes:
                yield (causes or names)[0]
        free = [known for known in found if self.objects[known].objtype in FREE]
        if len(free) == 1:
            yield free[0]

    def is_meant(self, known: str, name: str, is_call: bool) -> bool:
        """A word may be anything: a method has to be called, or to have an underscore."""
        kind = self.objects[known].objtype
        if kind in ("class", "exception", "module"):
            return name not in PAGES
        if kind in ("method", "function"):
            return is_call or "_" in name
        fields = tuple(f"anyio_rst.{cls}." for cls in FIELDS_OF)
        return not is_call and (name.isupper() or known.startswith(fields))


# What is marked as a name, by a role or in a signature.


def imported() -> dict[str, str]:
    """What the modules import from others, by the name that it has in them."""
    return {
        alias.name: f"{statement.module}.{alias.name}"
        for file in Path(anyio_rst.__path__[0]).rglob("*.py")
        for statement in ast.walk(ast.parse(file.read_text()))
        if isinstance(statement, ast.ImportFrom) and not statement.level
        for alias in statement.names
    }


IMPORTED = imported()


def link(
    app: Sphinx,
    env: BuildEnvironment,
    node: addnodes.pending_xref,
    content: nodes.TextElement,
) -> nodes.reference | None:
    """A link to the documentation of somebody else's name, if there is that name."""
    target: str = node["reftarget"]
    if node["refdomain"] != "py":
        return None
    if "." not in target and node["reftype"] != "mod":
        target = IMPORTED.get(target, f"builtins.{target}")
    uri = elsewhere(target)
    return nodes.reference("", "", content, internal=False, refuri=uri) if uri else None


def setup(app: Sphinx) -> None:
    app.add_post_transform(Links)
    app.connect("missing-reference", link)
