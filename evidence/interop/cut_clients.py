"""What clients make of an answer that is cut: by HTTP, and in other protocols."""

from __future__ import annotations

import asyncio
import ftplib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from anyio_rst.testing import Proxy, open_proxy
from evidence.certificates import client_context
from evidence.sockets import HOST

from . import clients, cut_servers
from .cut_servers import PATIENCE
from .cuts import SIZE
from .programs import find
from .results import Told

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

FETCH = """
fetch(process.argv[1])
  .then(response => response.arrayBuffer())
  .then(body => process.stdout.write("x".repeat(body.byteLength)))
  .catch(error => {
    const cause = error.cause ?? error;
    console.error(`fetch: ${error.message}: ${cause.code ?? cause.message}`);
    process.exitCode = 1;
  });
"""


def package(name: str) -> Any:
    """Imported here, since one that is not installed only leaves its client out."""
    return importlib.import_module(name)


def by_requests(url: str, certificate: Path) -> Told:
    requests = package("requests")
    with requests.Session() as session:
        session.trust_env = False
        get = partial(session.get, url, verify=str(certificate), timeout=PATIENCE)
        return clients.by_call(lambda: get().content, requests.RequestException)


def by_aiohttp(url: str, certificate: Path) -> Told:
    aiohttp = package("aiohttp")

    async def ask() -> Any:
        async with (
            aiohttp.ClientSession() as session,
            session.get(url, ssl=client_context(certificate)) as response,
        ):
            return await response.read()

    return clients.by_call(lambda: asyncio.run(ask()), aiohttp.ClientError)


def by_node(url: str, certificate: Path) -> Told:
    return clients.by_command(
        *("node", "--eval", FETCH, url),
        message=r"fetch: (.*)",
        more={"NODE_EXTRA_CA_CERTS": str(certificate)},
    )


HTTP: dict[str, clients.Client] = {
    "curl": clients.by_curl,
    "wget --tries=1": clients.by_wget,
    "urllib.request": clients.by_urllib,
    "requests": by_requests,
    "httpx": clients.by_httpx,
    "aiohttp": by_aiohttp,
    "fetch of Node": by_node,
}


# Of a client in another protocol: a function of the server's port, and of what is to be
# called with the proxy when the answer is about to come.
Cutter = Callable[[Proxy], None]
Ask = Callable[[int, Cutter], Told]


def by_ftplib(port: int, cut: Cutter) -> Told:
    """The data has a connection of its own, and that is what is cut."""
    content = bytearray()

    def retrieve() -> bytearray:
        client.retrbinary("RETR file", content.extend)
        return content

    with ftplib.FTP(timeout=PATIENCE) as client:
        client.connect(HOST, port)
        client.login("me")
        where = int(client.sendcmd("SITE WHERE").split()[1])
        with open_proxy(where) as proxy:
            client.sendcmd(f"SITE PROXY {proxy.port}")
            cut(proxy)
            return clients.by_call(retrieve, *ftplib.all_errors)


# Text, and as many bytes on the way.
QUERY = f"SELECT repeat('x', {SIZE})"


def by_psycopg(port: int, cut: Cutter) -> Told:
    psycopg = package("psycopg")
    with open_proxy(port) as proxy:
        address = f"host={HOST} port={proxy.port} user=me dbname=postgres"
        with psycopg.connect(address) as connection:
            cut(proxy)
            ask = partial(connection.execute, QUERY)
            return clients.by_call(lambda: ask().fetchone()[0], psycopg.Error)


def by_asyncpg(port: int, cut: Cutter) -> Told:
    asyncpg = package("asyncpg")

    async def ask() -> Any:
        connection = await asyncpg.connect(
            host=HOST, port=proxy.port, user="me", database="postgres", ssl=False
        )
        try:
            cut(proxy)
            return await connection.fetchval(QUERY, timeout=PATIENCE)
        finally:
            connection.terminate()

    errors = OSError, asyncpg.PostgresError, asyncpg.InterfaceError
    with open_proxy(port) as proxy:
        return clients.by_call(lambda: asyncio.run(ask()), *errors)


def by_redis(port: int, cut: Cutter) -> Told:
    """It asks again, several times, by itself; each of its connections is cut."""
    redis = package("redis")
    with open_proxy(port) as proxy, redis.Redis(host=HOST, port=proxy.port) as client:
        client.set("file", cut_servers.CONTENT)
        cut(proxy)
        return clients.by_call(lambda: client.get("file"), redis.RedisError)


@dataclass(frozen=True)
class Other:
    """A client that speaks another protocol than HTTP."""

    server: Callable[[Path], AbstractContextManager[int]]
    ask: Ask


OTHERS = {
    "ftplib": Other(cut_servers.ftp, by_ftplib),
    "psycopg": Other(cut_servers.postgresql, by_psycopg),
    "asyncpg": Other(cut_servers.postgresql, by_asyncpg),
    "redis-py": Other(cut_servers.redis, by_redis),
}

# What a client is: a package of Python's, or a program.
PACKAGES = {
    "requests": "requests",
    "httpx": "httpx",
    "aiohttp": "aiohttp",
    "psycopg": "psycopg",
    "asyncpg": "asyncpg",
    "redis-py": "redis",
}
PROGRAMS = {"curl": "curl", "wget --tries=1": "wget", "fetch of Node": "node"}


def why_not(client: str) -> str | None:
    """Why it cannot take part, if so."""
    name, program = PACKAGES.get(client), PROGRAMS.get(client)
    if name is not None and find_spec(name) is None:
        return f"{name} is not installed"
    if program is not None and find(program) is None:
        return f"{program} is not installed"
    return None
