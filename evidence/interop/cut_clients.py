"""What clients make of an answer that is cut: by HTTP, and in other protocols."""

from __future__ import annotations

import asyncio
import ftplib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
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
        try:
            answer = session.get(url, verify=str(certificate), timeout=PATIENCE)
        except requests.RequestException as exc:
            return clients.raised(exc)
        return Told("returns", len(answer.content), noticed=False)


def by_aiohttp(url: str, certificate: Path) -> Told:
    aiohttp = package("aiohttp")

    async def ask() -> int:
        async with aiohttp.ClientSession() as session:
            trust: Any = client_context(certificate)
            async with session.get(url, ssl=trust) as response:
                return len(await response.read())

    try:
        return Told("returns", asyncio.run(ask()), noticed=False)
    except aiohttp.ClientError as exc:
        return clients.raised(exc)


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
    size = 0

    def take(data: bytes) -> None:
        nonlocal size
        size += len(data)

    with ftplib.FTP(timeout=PATIENCE) as client:
        client.connect(HOST, port)
        client.login("me")
        where = int(client.sendcmd("SITE WHERE").split()[1])
        with open_proxy(where) as proxy:
            client.sendcmd(f"SITE PROXY {proxy.port}")
            cut(proxy)
            try:
                client.retrbinary("RETR file", take)
            except ftplib.all_errors as exc:
                return clients.raised(exc)
    return Told("returns", size, noticed=False)


# Text, and as many bytes on the way.
QUERY = f"SELECT repeat('x', {SIZE})"


def by_psycopg(port: int, cut: Cutter) -> Told:
    psycopg = package("psycopg")
    with open_proxy(port) as proxy:
        address = f"host={HOST} port={proxy.port} user=me dbname=postgres"
        with psycopg.connect(address) as connection:
            cut(proxy)
            try:
                row = connection.execute(QUERY).fetchone()
            except psycopg.Error as exc:
                return clients.raised(exc)
            assert row is not None
            return Told("returns", len(row[0]), noticed=False)


def by_asyncpg(port: int, cut: Cutter) -> Told:
    asyncpg = package("asyncpg")

    async def ask(proxy: Proxy) -> int:
        connection = await asyncpg.connect(
            host=HOST, port=proxy.port, user="me", database="postgres", ssl=False
        )
        try:
            cut(proxy)
            return len(await connection.fetchval(QUERY, timeout=PATIENCE))
        finally:
            connection.terminate()

    with open_proxy(port) as proxy:
        try:
            return Told("returns", asyncio.run(ask(proxy)), noticed=False)
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as exc:
            return clients.raised(exc)


def by_redis(port: int, cut: Cutter) -> Told:
    """It asks again, several times, by itself; each of its connections is cut."""
    redis = package("redis")
    with open_proxy(port) as proxy, redis.Redis(host=HOST, port=proxy.port) as client:
        client.set("file", cut_servers.CONTENT)
        cut(proxy)
        try:
            found: Any = client.get("file")
        except redis.RedisError as exc:
            return clients.raised(exc)
        return Told("returns", len(found), noticed=False)


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
