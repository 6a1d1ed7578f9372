from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from anyio_rst import testing

BACKENDS: list[Any] = [
    pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
    pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
    pytest.param(("trio", {}), id="trio"),
]

ASYNCIO = BACKENDS[:2]

# For what is refused, or is so, before a loop has any part in it.
on_one_loop = pytest.mark.parametrize("anyio_backend", BACKENDS[:1], indirect=True)

# Ways for a handler to come by its connection: see serving.serve().
KINDS = ["native", "foreign", "buffered", "trio"]

# Whose stream a socket is taken over from: see serving.stream_and_peer().
OWNERS = ["anyio", "buffered", "trio"]

BACKEND = ["anyio_backend"]

# What differs from one Python to the next, and the modules of tests that would show it.
# They have the marker `every_python`.
DIFFERENCES = {
    "ssl": ["tls", "tls_endings", "tls_handshakes", "tls_sessions", "start_tls"],
    "tasks": ["cancellation", "task_group", "task_cancel", "stop", "waiting", "threads"],
    "frames and signals": ["failures", "interruptions", "forking", "process_death"],
    "asyncio's transports": ["asyncio_streams", "takeover", "wrappers", "stale"],
    "imports and types": ["api", "commands"],
}
EVERY_PYTHON = {f"test_{name}" for names in DIFFERENCES.values() for name in names}


# Whether what is forgotten goes at once, and not when it is collected.
REFCOUNTS = hasattr(sys, "getrefcount")

# What is measured is measured on cores of its own, and PyPy cannot choose them.
if not hasattr(os, "sched_setaffinity"):
    collect_ignore_glob = ["project/test_benchmark*", "project/test_evidence*"]
    collect_ignore_glob += ["project/test_soak*"]

HAS_UVLOOP = find_spec("uvloop") is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in EVERY_PYTHON:
            item.add_marker("every_python")
        case = getattr(item, "callspec", None)
        if not HAS_UVLOOP and case is not None and "uvloop" in case.id.split("-"):
            item.add_marker(pytest.mark.skip("there is no uvloop for this Python"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "anyio_backend" not in metafunc.fixturenames:
        return
    if any(
        "anyio_backend" in mark.args[0]
        for mark in metafunc.definition.iter_markers("parametrize")
    ):
        return  # the test chooses
    for name, kinds in (("kind", KINDS), ("owner", OWNERS)):
        if name in metafunc.fixturenames:
            pairs = [
                pytest.param(backend.values[0], kind, id=f"{backend.id}-{kind}")
                for backend in BACKENDS
                for kind in kinds
                if kind != "trio" or backend.id == "trio"
            ]
            metafunc.parametrize(("anyio_backend", name), pairs, indirect=BACKEND)
            return
    metafunc.parametrize("anyio_backend", BACKENDS, indirect=True)


@pytest.fixture
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_is_not_ignored() -> None:
    """A shell lets what runs in its background ignore it, and programs inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def nothing_blocks_the_loop() -> Iterator[None]:
    """Where blockbuster is installed, by `nox -s blocking`, it sees to that."""
    try:
        blockbuster: Any = importlib.import_module("blockbuster")
    except ImportError:
        yield
        return
    # Peers and programs of the tests block on purpose.
    with blockbuster.blockbuster_ctx(
        "anyio_rst", excluded_modules=["anyio_rst.testing", "anyio_rst.commands"]
    ):
        yield


@pytest.fixture(scope="session", autouse=True)
def process_wide_descriptors() -> None:
    """Let what a loop opens once in a process (libuv: a pipe) be open from the start."""
    for backend in BACKENDS:
        name, options = backend.values[0]
        if backend.id == "uvloop" and not HAS_UVLOOP:
            continue
        anyio.run(anyio.lowlevel.checkpoint, backend=name, backend_options=options)


def collect() -> None:
    """Let all that is forgotten be finalized. On PyPy the owned waits for its owner."""
    for _ in range(1 if REFCOUNTS else 5):
        gc.collect()


@contextmanager
def capturing(port: int) -> Iterator[testing.Capture]:
    """`capture_segments()`, or a test that is skipped where the process may not."""
    try:
        with testing.capture_segments(port) as capture:
            yield capture
    except testing.CaptureUnavailable as exc:
        pytest.skip(str(exc))


def open_descriptors() -> set[str]:
    """What each of this process' descriptors is: a path, a pipe, a socket."""
    found: set[str] = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the one that listdir() used
            found.add(f"{descriptor}: {os.readlink(f'/proc/self/fd/{descriptor}')}")
    return found


@pytest.fixture(autouse=True)
def garbage_is_that_of_the_test() -> Iterator[None]:
    """Whoever collects it does not look through ten thousand tests of pytest's."""
    can_freeze = hasattr(gc, "freeze")  # not on PyPy
    if can_freeze:
        gc.freeze()
    yield
    if can_freeze:
        gc.unfreeze()


@pytest.fixture(autouse=True)
def no_descriptor_left_behind() -> Iterator[None]:
    before = open_descriptors()
    yield
    left = open_descriptors() - before
    if left:
        collect()  # exceptions may keep frames, and with them sockets, alive
        left = open_descriptors() - before
    assert not left
