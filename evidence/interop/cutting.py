"""Ask for answers that are cut in the middle.

Linux only, on loopback. Each client asks a plain server through `open_proxy`, which cuts
what the server answers.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from anyio_rst.testing import Proxy, open_proxy
from evidence.certificates import issue
from evidence.results import version_of
from evidence.sockets import HOST

from . import cut_clients, cut_servers, results
from .cut_clients import HTTP, OTHERS
from .cuts import BODIES, ENDS, SIZE, Cut
from .programs import Unavailable, find
from .results import ROUNDS

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future
    from pathlib import Path

    from .results import Told

AT_ONCE = 3

AFTER = SIZE // 2  # bytes down: in the middle

# How the versions of programs are asked for.
PROGRAMS = {
    "curl": ("--version", r"curl ([\d.]+)"),
    "wget": ("--version", r"Wget ([\d.]+)"),
    "node": ("--version", r"v([\d.]+)"),
    "postgres": ("--version", r"PostgreSQL\) ([\d.]+)"),
    "redis-server": ("--version", r"v=([\d.]+)"),
}
PACKAGES = ["requests", "httpx", "aiohttp", "psycopg", "asyncpg", "redis"]


def ask_over_http(
    client: str, body: str, ports: dict[str, int], trust: Path, end: str
) -> Told:
    scheme = "https" if body in ("tls", "close-notify") else "http"
    with open_proxy(ports[scheme]) as proxy:
        target = "close" if body == "tls" else body
        if body == "close-notify":
            target = f"close-notify-{end}"
        else:
            cut(end, proxy)
        url = f"{scheme}://{HOST}:{proxy.port}/{target}"
        return HTTP[client](url, trust)


def ask_another(client: str, port: int, end: str) -> Told:
    return OTHERS[client].ask(port, partial(cut, end))


def cut(end: str, proxy: Proxy) -> None:
    if end != "whole":
        proxy.cut(after=AFTER, kind="fin" if end == "fin" else "rst")


def measure(directory: Path) -> tuple[list[Cut], dict[str, str]]:
    """*directory* is for the servers' files."""
    server, trust = issue(directory, HOST)
    left_out: dict[str, str] = {}
    cells: list[Cut] = []
    asked: list[tuple[Cut, Future[Told]]] = []
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(AT_ONCE))
        ports = stack.enter_context(cut_servers.http(server))

        def ask(client: str, body: str, answer: Callable[[str], Told]) -> None:
            for end in ("whole", *ENDS):
                cell = Cut(client, body, end, [])
                cells.append(cell)
                rounds = range(ROUNDS)
                asked.extend((cell, pool.submit(answer, end)) for _ in rounds)

        for client in HTTP:
            if (reason := cut_clients.why_not(client)) is not None:
                left_out[client] = reason
                continue
            for body in BODIES:
                ask(client, body, partial(ask_over_http, client, body, ports, trust))
        for client, other in OTHERS.items():
            try:
                if (reason := cut_clients.why_not(client)) is not None:
                    raise Unavailable(reason)
                port = stack.enter_context(other.server(directory))
            except Unavailable as exc:
                left_out[client] = str(exc)
            else:
                ask(client, "", partial(ask_another, client, port))
        for cell, told in asked:
            cell.told.append(told.result())
    return cells, left_out


def about() -> dict[str, str]:
    found = results.about("anyio_rst", *PACKAGES)
    for name, (option, pattern) in PROGRAMS.items():
        if (program := find(name)) is not None:
            found[name] = version_of(program, option, pattern) or "of an unknown version"
    return found
