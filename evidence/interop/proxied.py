"""Ask for answers through proxies, and end what was asked.

Linux only, on loopback, with the programs of Debian.
"""

from __future__ import annotations

import itertools
import shutil
from contextlib import ExitStack, asynccontextmanager
from typing import TYPE_CHECKING, TypeVar

import anyio
import anyio.to_thread

from evidence.certificates import issue
from evidence.results import version_of
from evidence.sockets import HOST, free_ports

from . import clients, origins, proxies, results
from .origins import RECORDER, Recorder, over
from .proxies import Forward
from .results import ANSWERS, ROUNDS, ROUTES, TLS_ROUTES, Cell, Upstream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

T = TypeVar("T")

# Debian's package, and where its program shows its version.
PROGRAMS = {
    "nginx": ("nginx", "-v", r"nginx/([\d.]+)"),
    "haproxy": ("haproxy", "-v", r"version ([\d.]+)"),
    "curl": ("curl", "--version", r"curl ([\d.]+)"),
    "wget": ("wget", "--version", r"Wget ([\d.]+)"),
    "nc": ("netcat-openbsd", "-h", r"Debian patchlevel ([\d.]+)"),
    "openssl": ("openssl", "version", r"OpenSSL ([\d.]+)"),
}
STREAM_PACKAGE = "libnginx-mod-stream"
PYTHON_PACKAGES = ["anyio_rst", "anyio", "h11", "httpx"]

AT_ONCE = 4

PATIENCE = 30.0  # seconds

Ports = dict[tuple[str, str], int]  # by route and origin


class Measuring:
    def __init__(self, ports: Ports, recorder: Recorder, trust: Path) -> None:
        self._ports = ports
        self._recorder = recorder
        self._trust = trust
        self._limit = anyio.CapacityLimiter(AT_ONCE)

    async def ask(self, cell: Cell) -> None:
        answer, ask = ANSWERS[cell.answer], clients.BY_SCHEME[cell.scheme][cell.client]
        port = self._ports[cell.route, over(cell.scheme, answer.origin)]
        url = f"{cell.scheme}://{HOST}:{port}{answer.target}"
        for _ in range(ROUNDS):
            told = await anyio.to_thread.run_sync(
                ask, url, self._trust, limiter=self._limit
            )
            cell.told.append(told)

    async def end(self, row: Upstream) -> None:
        """The connection from the client's side, either way."""
        for turn in range(ROUNDS):
            target = f"/{row.route}/{turn}"
            _, end = await self._recorded(row.route, f"{target}/reset", clients.reset)
            row.of_reset.append(end)
            told, end = await self._recorded(
                row.route, f"{target}/fin", clients.half_close
            )
            row.of_fin.append(end)
            row.after_fin.append(told)

    async def _recorded(
        self, route: str, target: str, end: Callable[[str], T]
    ) -> tuple[T, str]:
        known = self._recorder.expect(target)
        url = f"http://{HOST}:{self._ports[route, RECORDER]}{target}"
        found = await anyio.to_thread.run_sync(end, url)
        with anyio.fail_after(PATIENCE):
            return found, await known()


async def measure(directory: Path) -> tuple[list[Cell], list[Upstream]]:
    """*directory* is for the programs' files."""
    server, trust = issue(directory, HOST)
    cells = [
        Cell(route, scheme, name, client, len(origins.body(answer)), [])
        for scheme, routes in (("http", ROUTES), ("https", TLS_ROUTES))
        for name, answer in ANSWERS.items()
        for route in routes
        for client in clients.BY_SCHEME[scheme]
    ]
    upstream = [Upstream(route, Recorder.there_is, [], [], []) for route in ROUTES]
    recorder = Recorder()
    async with (
        origins.running(recorder, server) as listening,
        proxied(listening, directory) as ports,
        anyio.create_task_group() as tg,
    ):
        measuring = Measuring(ports, recorder, trust)
        for cell in cells:
            tg.start_soon(measuring.ask, cell)
        for row in upstream:
            tg.start_soon(measuring.end, row)
    return cells, upstream


@asynccontextmanager
async def proxied(listening: dict[str, int], directory: Path) -> AsyncIterator[Ports]:
    """Where each origin is reached by each route."""
    ports: Ports = {}
    forwards: dict[str, list[Forward]] = {program: [] for program in proxies.COMMANDS}
    free = iter(free_ports(len(ROUTES) * len(listening)))
    async with anyio.create_task_group() as tg:
        for (name, route), origin in itertools.product(ROUTES.items(), listening):
            if not route.program:
                ports[name, origin] = listening[origin]
            elif route.program in forwards:
                ports[name, origin] = next(free)
                forward = Forward(route, ports[name, origin], listening[origin])
                forwards[route.program].append(forward)
            else:
                port = await origins.serve_proxy(tg, listening[origin])
                ports[name, origin] = port
        with ExitStack() as stack:
            for program, forwarded in forwards.items():
                stack.enter_context(proxies.running(program, forwarded, directory))
            yield ports
        tg.cancel_scope.cancel()


def check_programs() -> None:
    """Nothing is measured if a part of it could not be.

    Raises:
      SystemExit: something is missing; it says what to install.
    """
    missing = {name: row[0] for name, row in PROGRAMS.items() if not shutil.which(name)}
    if not proxies.STREAM_MODULE.exists():
        missing["nginx' stream module"] = STREAM_PACKAGE
    if missing:
        packages = " ".join(dict.fromkeys(missing.values()))
        raise SystemExit(
            f"missing: {', '.join(missing)}; on Debian: apt-get install {packages}"
        )


def about() -> dict[str, str]:
    found = results.about(*PYTHON_PACKAGES)
    for name, (package, option, pattern) in PROGRAMS.items():
        version = version_of(name, option, pattern)
        if version is None:
            raise SystemExit(f"{name} is another one than that of Debian's {package}")
        found[name] = version
    return found
