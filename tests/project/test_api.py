"""What is public, word for word. A change of the interface is a change of this file.

The types are held by `type_tests.py`.
"""

from __future__ import annotations

import ast
import enum
import inspect
import itertools
import pkgutil
import re
import textwrap
from collections.abc import Iterator
from importlib.metadata import distribution, version
from pathlib import Path
from types import ModuleType
from typing import Any

import anyio
import pytest

import anyio_rst
import pytest_anyio_rst
from anyio_rst import asyncio_streams, httpx, lowlevel, testing, trio_streams

ROOT = Path(__file__).parents[2]

API = """\
anyio_rst.Cause: enum.Enum
anyio_rst.Cause.RETURNED = 'RETURNED'
anyio_rst.Cause.CLOSED = 'CLOSED'
anyio_rst.Cause.FINISH_ON = 'FINISH_ON'
anyio_rst.Cause.RAISED = 'RAISED'
anyio_rst.Cause.CANCELLED = 'CANCELLED'
anyio_rst.Cause.GROUP_FAILED = 'GROUP_FAILED'
anyio_rst.Cause.TORN_SEND = 'TORN_SEND'
anyio_rst.Cause.ABORTED = 'ABORTED'
anyio_rst.Cause.DETACHED = 'DETACHED'
anyio_rst.CloseKind: enum.Enum
anyio_rst.CloseKind.FIN = 'FIN'
anyio_rst.CloseKind.RST = 'RST'
anyio_rst.CloseKind.DETACHED = 'DETACHED'
anyio_rst.Connection: anyio.abc.SocketStream
anyio_rst.Connection.ending
anyio_rst.Connection.idle(timeout=None)
anyio_rst.Connection.is_stale()
anyio_rst.Connection.aclose()
anyio_rst.Connection.abort()
anyio_rst.Connection.detach()
anyio_rst.Connection.create_task_group()
anyio_rst.Connection.from_socket(sock_or_fd)
anyio_rst.Connection.remote_address
anyio_rst.Connection.state
anyio_rst.Connection.extra_attributes
anyio_rst.Connection.receive(max_bytes=65536)
anyio_rst.Connection.send(item)
anyio_rst.Connection.send_eof()
anyio_rst.Connection.start_tls(ssl_context=None, *, server_side=None, hostname=None,
    standard_compatible=True)
anyio_rst.ConnectionLost: anyio.BrokenResourceError
anyio_rst.Drain(timeout=5.0, max_bytes=None, total=None): builtins.object
anyio_rst.Ending(kind, cause, outcome, peer, remote_address, discarded, unacknowledged,
    fin_sent_before_reset, duration, sent, received, tls): builtins.object
anyio_rst.Ending.as_dict()
anyio_rst.FinishOn = type[BaseException] | Iterable[type[BaseException]]
anyio_rst.Idle: builtins.object
anyio_rst.Idle.ended
anyio_rst.Idle.stopping
anyio_rst.Idle.timed_out
anyio_rst.PeerClose: enum.Enum
anyio_rst.PeerClose.FIN = 'FIN'
anyio_rst.PeerClose.RST = 'RST'
anyio_rst.PeerClose.LOST = 'LOST'
anyio_rst.PeerClose.NONE = 'NONE'
anyio_rst.PeerReset: anyio_rst.ConnectionLost
anyio_rst.Server: builtins.object
anyio_rst.Server.connections
anyio_rst.Server.statistics()
anyio_rst.Server.stop()
anyio_rst.Server.stopping
anyio_rst.ServerStatistics(open_connections, accepted_connections, endings_by_kind,
    endings_by_cause): builtins.object
anyio_rst.TCPStream = ByteStream | BufferedByteReceiveStream | trio.SocketStream |
    trio.SSLStream[trio.SocketStream]
anyio_rst.TLSSession: builtins.tuple
anyio_rst.TLSSession.version
anyio_rst.TLSSession.cipher
anyio_rst.connect_tcp(host, port, *, local_host=None, local_port=None,
    happy_eyeballs_delay=0.25, tls=False, ssl_context=None, tls_hostname=None,
    tls_standard_compatible=True, finish_on=(), drain=Drain(timeout=1.0, max_bytes=None,
    total=None), keepalive=None)
anyio_rst.connection_scope(stream, *, finish_on=(), drain=Drain(timeout=5.0,
    max_bytes=None, total=None), keepalive=None)
anyio_rst.scoped(handler, *, finish_on=(), drain=Drain(timeout=5.0, max_bytes=None,
    total=None), keepalive=None)
anyio_rst.serve_tcp(handler, port=0, *, host=None, backlog=65536, reuse_port=False,
    sockets=None, max_connections=None, finish_on=(), drain=Drain(timeout=5.0,
    max_bytes=None, total=None), keepalive=None, propagate_errors=False,
    task_group=None, on_ending=None, preamble=None, ssl_context=None,
    tls_standard_compatible=True, handshake_timeout=30.0, task_status=Ellipsis)
anyio_rst.testing.Capture: builtins.object
anyio_rst.testing.Capture.segments
anyio_rst.testing.Capture.having(flags)
anyio_rst.testing.CaptureUnavailable: builtins.RuntimeError
anyio_rst.testing.Direction: enum.Enum
anyio_rst.testing.Direction.FROM_PORT = 'from the port'
anyio_rst.testing.Direction.TO_PORT = 'to the port'
anyio_rst.testing.Faults(): builtins.object
anyio_rst.testing.Faults.shorten_sends(count, size)
anyio_rst.testing.Faults.reset_after(size)
anyio_rst.testing.Peer(sock): builtins.object
anyio_rst.testing.Peer.send(data)
anyio_rst.testing.Peer.send_eof()
anyio_rst.testing.Peer.reset()
anyio_rst.testing.Peer.close()
anyio_rst.testing.Peer.stop_reading()
anyio_rst.testing.Peer.receive_exactly(size, *, timeout=10.0)
anyio_rst.testing.Peer.read_to_end(*, timeout=10.0)
anyio_rst.testing.Proxy: builtins.object
anyio_rst.testing.Proxy.connections
anyio_rst.testing.Proxy.cut(*, after=0, kind='fin', direction='down', every=1,
    close_notify=False)
anyio_rst.testing.Proxy.mend()
anyio_rst.testing.Proxy.slow(*, delay=0.0, rate=None, chunk=None)
anyio_rst.testing.ProxyConnection(number, client, up, down, client_end, upstream_end,
    first_end, cut, cut_direction, error, aborted, duration): builtins.object
anyio_rst.testing.Seen(data, close, elapsed=0.0): builtins.object
anyio_rst.testing.Segment(direction, other_port, flags, sequence, length):
    builtins.object
anyio_rst.testing.TCPFlag: enum.Flag
anyio_rst.testing.TCPFlag.FIN = 1
anyio_rst.testing.TCPFlag.SYN = 2
anyio_rst.testing.TCPFlag.RST = 4
anyio_rst.testing.TCPFlag.PSH = 8
anyio_rst.testing.TCPFlag.ACK = 16
anyio_rst.testing.TCPFlag.URG = 32
anyio_rst.testing.TCPFlag.ECE = 64
anyio_rst.testing.TCPFlag.CWR = 128
anyio_rst.testing.assert_fin(peer, data=None, *, timeout=10.0)
anyio_rst.testing.assert_rst(peer, *, timeout=10.0)
anyio_rst.testing.capture_segments(port)
anyio_rst.testing.connect_peer(port, *, host='127.0.0.1', receive_buffer=None)
anyio_rst.testing.open_pair(*, host='127.0.0.1', finish_on=(), drain=Drain(timeout=5.0,
    max_bytes=None, total=None))
anyio_rst.testing.open_peer(*, host='127.0.0.1', finish_on=(), drain=Drain(timeout=5.0,
    max_bytes=None, total=None), faults=None, small_buffers=False)
anyio_rst.testing.open_proxy(port, *, host='127.0.0.1')
anyio_rst.lowlevel.arm(sock)
anyio_rst.lowlevel.disarm(sock)
anyio_rst.lowlevel.finish(sock)
anyio_rst.lowlevel.reset(sock)
anyio_rst.lowlevel.reset_on_failure(sock)
anyio_rst.lowlevel.set_keepalive(sock, seconds)
anyio_rst.lowlevel.unacknowledged(sock)
anyio_rst.asyncio_streams.Streams: builtins.object
anyio_rst.asyncio_streams.Streams.reader
anyio_rst.asyncio_streams.Streams.writer
anyio_rst.asyncio_streams.Streams.ending
anyio_rst.asyncio_streams.connection_scope(reader, writer, *, finish_on=(),
    drain=Drain(timeout=5.0, max_bytes=None, total=None), keepalive=None,
    on_ending=None)
anyio_rst.asyncio_streams.scoped(handler, *, finish_on=(), drain=Drain(timeout=5.0,
    max_bytes=None, total=None), keepalive=None, on_ending=None)
anyio_rst.httpx.AsyncHTTPTransport(verify=True, cert=None, trust_env=True, http1=True,
    http2=False, limits=Limits(max_connections=100, max_keepalive_connections=20,
    keepalive_expiry=5.0), proxy=None, uds=None, local_address=None, retries=0,
    socket_options=None): httpx.AsyncBaseTransport
anyio_rst.httpx.AsyncHTTPTransport.handle_async_request(request)
anyio_rst.httpx.AsyncHTTPTransport.aclose()
anyio_rst.trio_streams.SocketOptions: builtins.object
anyio_rst.trio_streams.SocketOptions.socket
anyio_rst.trio_streams.SocketOptions.setsockopt(level, option, value, length=None)
anyio_rst.trio_streams.SocketOptions.getsockopt(level, option, buffersize=0)
anyio_rst.trio_streams.TrioStream: trio.abc.HalfCloseableStream
anyio_rst.trio_streams.TrioStream.send_eof()
anyio_rst.trio_streams.TrioStream.send_all(data)
anyio_rst.trio_streams.TrioStream.wait_send_all_might_not_block()
anyio_rst.trio_streams.TrioStream.receive_some(max_bytes=None)
anyio_rst.trio_streams.TrioStream.aclose()
anyio_rst.trio_streams.TrioTLSStream: trio.abc.Stream
anyio_rst.trio_streams.TrioTLSStream.do_handshake()
anyio_rst.trio_streams.TrioTLSStream.transport_stream
anyio_rst.trio_streams.TrioTLSStream.send_all(data)
anyio_rst.trio_streams.TrioTLSStream.wait_send_all_might_not_block()
anyio_rst.trio_streams.TrioTLSStream.receive_some(max_bytes=None)
anyio_rst.trio_streams.TrioTLSStream.aclose()
anyio_rst.trio_streams.as_trio_stream(conn)
anyio_rst.trio_streams.scoped(handler, *, finish_on=(), drain=Drain(timeout=5.0,
    max_bytes=None, total=None), keepalive=None)
"""

# Made by the library alone, so what makes them is no promise.
MADE_HERE = (
    anyio_rst.Connection,
    anyio_rst.Idle,
    anyio_rst.Server,
    anyio_rst.TLSSession,
    asyncio_streams.Streams,
    testing.Capture,
    testing.Proxy,
    trio_streams.SocketOptions,
    trio_streams.TrioStream,
    trio_streams.TrioTLSStream,
)

# What is in a package of its own, and what is in one file.
PACKAGES = [anyio_rst, testing]
MODULES = [*PACKAGES, lowlevel, asyncio_streams, httpx, trio_streams]


def called(function: Any) -> str:
    """The parameters as one calls it: names, kinds and defaults."""
    parameters = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.default is anyio.TASK_STATUS_IGNORED:  # shown with its address
            parameter = parameter.replace(default=...)
        parameters.append(parameter.replace(annotation=parameter.empty))
    return str(inspect.Signature(parameters))


def is_private(cls: type) -> bool:
    return "._" in f"{cls.__module__}.{cls.__name__}"


def members(cls: type) -> dict[str, Any]:
    """What it defines for its users, but for the fields of a dataclass.

    A base that has no public name counts as a part of it.
    """
    fields = getattr(cls, "__dataclass_fields__", {})
    bases = itertools.takewhile(is_private, cls.__mro__[1:])
    return {
        name: member.__func__ if isinstance(member, classmethod) else member
        for defining in (cls, *bases)
        for name, member in vars(defining).items()
        if not name.startswith("_") and name not in fields
    }


def described(module: ModuleType) -> Iterator[str]:
    """A line for each public name, and for each public name within it."""
    for name in module.__all__:
        public = getattr(module, name)
        path = f"{module.__name__}.{name}"
        if isinstance(public, str):  # an alias, for annotations
            yield f"{path} = {public}"
            continue
        if not isinstance(public, type):
            yield path + called(public)
            continue
        base = next(cls for cls in public.__mro__[1:] if not is_private(cls))
        made = "__init__" in vars(public) and public not in MADE_HERE
        yield f"{path}{called(public) if made else ''}: {base.__module__}.{base.__name__}"
        if issubclass(public, enum.Enum):
            yield from (f"{path}.{item.name} = {item.value!r}" for item in public)
            continue
        for inner, member in members(public).items():
            yield f"{path}.{inner}{called(member) if callable(member) else ''}"


def test_the_interface_is_frozen() -> None:
    lines = [
        textwrap.fill(line, 88, subsequent_indent="    ")
        for module in MODULES
        for line in described(module)
    ]
    assert lines == re.split(r"\n(?! )", API.rstrip())


def public_names(module: ModuleType) -> set[str]:
    # Pytest puts names of its own into a plugin's distribution: "@pytest_ar".
    return {name for name in dir(module) if name.isidentifier() and name[0] != "_"}


def test_the_fixtures_and_the_command_are_frozen() -> None:
    imported = {"TYPE_CHECKING", "annotations", "pytest"}
    fixtures = public_names(pytest_anyio_rst) - imported
    assert fixtures == {
        "rst_connect",
        "rst_pair",
        "rst_peer",
        "rst_proxy",
        "rst_segments",
    }
    points = {
        (point.group, point.name, point.value)
        for point in distribution("anyio_rst").entry_points
    }
    assert points == {
        ("console_scripts", "anyio-rst", "anyio_rst.__main__:main"),
        ("pytest11", "anyio_rst", "pytest_anyio_rst"),
    }


@pytest.mark.parametrize("module", PACKAGES)
def test_nothing_else_looks_public(module: ModuleType) -> None:
    public: list[str] = module.__all__
    assert public == sorted(set(public))
    submodules = {
        found.name
        for found in pkgutil.iter_modules(module.__path__)
        if not found.name.startswith("_")
    }
    # Of the commands, what they take and print is an interface, and no name.
    adapters = {"asyncio_streams", "httpx", "lowlevel", "trio_streams"}
    known = adapters | {"commands", "testing"}
    assert submodules == (known if module is anyio_rst else set())
    assert public_names(module) - submodules - {"annotations"} == set(public)


@pytest.mark.parametrize("module", MODULES)
def test_what_is_public_is_documented(module: ModuleType) -> None:
    assert module.__doc__
    for name in module.__all__:
        public = getattr(module, name)
        if isinstance(public, str):
            continue  # an alias has its docstring in its module
        assert public.__module__ == module.__name__
        assert public.__doc__, name
        if isinstance(public, type) and not issubclass(public, enum.Enum):
            for inner in members(public):
                # What overrides a method of AnyIO may have its documentation.
                assert inspect.getdoc(getattr(public, inner)), f"{name}.{inner}"


@pytest.mark.parametrize("module", MODULES)
def test_the_type_tests_have_all_that_is_public(module: ModuleType) -> None:
    imported = {
        alias.name
        for program in (ROOT / "tests").rglob("type_tests*.py")
        for node in ast.walk(ast.parse(program.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module == module.__name__
        for alias in node.names
    }
    # That what is imported is used, Ruff sees to.
    assert imported - {"testing"} == set(module.__all__)


def test_the_version_is_the_same_everywhere() -> None:
    history = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## (.*)$", history, re.MULTILINE)
    date = r"unreleased|\d{4}-\d\d-\d\d"
    versions = [re.fullmatch(rf"\[(.+)\] - (?:{date})", heading) for heading in headings]
    assert versions
    assert all(versions), headings
    latest = versions[0]
    assert latest is not None
    assert anyio_rst.__version__ == latest[1] == version("anyio_rst")
