"""Who notices an answer that is cut in the middle: `python -m interop.cuts --help`.

Linux only, on loopback. Each client asks a plain server through `open_proxy`, which cuts
what the server answers. docs/interop.md says what it is.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anyio_rst.testing import Proxy, open_proxy

from . import cut_clients, cut_servers, report
from .cut_clients import HTTP, OTHERS
from .cut_servers import BODY, HOST, Unavailable
from .results import Told
from .run import certify

RESULTS = Path(__file__).parent / "cuts.json"
BEGIN, END = "<!-- cuts -->\n", "<!-- end of cuts -->"

ROUNDS = 3
AT_ONCE = 3

# Bytes down, in the middle of each answer.
AFTER = BODY // 2

ENDS = {"fin": "FIN", "rst": "RST"}

# How the body says where it ends, and what cuts it: the proxy, or the server itself,
# since a proxy cannot make a close_notify.
BODIES = {
    "close": "ends with the connection",
    "length": "Content-Length",
    "chunked": "chunks",
    "chunked-close": "chunks, `Connection: close`",
    "tls": "TLS, without close_notify",
    "close-notify": "TLS, with close_notify",
}

# How the versions of programs are asked for.
VERSIONS = {
    "curl": ("--version", r"curl ([\d.]+)"),
    "wget": ("--version", r"Wget ([\d.]+)"),
    "node": ("--version", r"v([\d.]+)"),
    "postgres": ("--version", r"PostgreSQL\) ([\d.]+)"),
    "redis-server": ("--version", r"v=([\d.]+)"),
}
PACKAGES = ["requests", "httpx", "aiohttp", "psycopg", "asyncpg", "redis"]


@dataclass(frozen=True)
class Cell:
    """What a client made of an answer of a kind, each time."""

    client: str
    body: str
    end: str  # of ENDS; "whole": all of it
    told: list[Told]

    @property
    def noticed(self) -> bool | None:
        """None if not every time the same."""
        (first, *others) = {told.noticed for told in self.told}
        return None if others else first


@dataclass(frozen=True)
class Cuts:
    about: dict[str, str]
    left_out: dict[str, str]  # clients, each with the reason
    cells: list[Cell]

    def save(self) -> None:
        cells = ",\n".join(json.dumps(asdict(cell)) for cell in self.cells)
        RESULTS.write_text(
            f'{{"about": {json.dumps(self.about)},\n'
            f'"left_out": {json.dumps(self.left_out)},\n"cells": [\n{cells}\n]}}\n'
        )

    def find(self, client: str, body: str, end: str) -> Cell | None:
        for cell in self.cells:
            if (cell.client, cell.body, cell.end) == (client, body, end):
                return cell
        return None


def load() -> Cuts:
    found: dict[str, Any] = json.loads(RESULTS.read_text())
    cells = [
        Cell(**{**cell, "told": [Told(**told) for told in cell["told"]]})
        for cell in found["cells"]
    ]
    return Cuts(found["about"], found["left_out"], cells)


# Measuring.


def ask_over_http(
    client: str, body: str, end: str, ports: dict[str, int], certificate: Path
) -> Told:
    scheme = "https" if body in ("tls", "close-notify") else "http"
    with open_proxy(ports[scheme]) as proxy:
        target = "close" if body == "tls" else body
        if body == "close-notify":
            target = f"close-notify-{end}"
        elif end != "whole":
            proxy.cut(after=AFTER, kind="fin" if end == "fin" else "rst")
        url = f"{scheme}://{HOST}:{proxy.port}/{target}"
        return HTTP[client](url, certificate)


def ask_another(client: str, end: str, port: int) -> Told:
    def cut(proxy: Proxy) -> None:
        if end != "whole":
            proxy.cut(after=AFTER, kind="fin" if end == "fin" else "rst")

    return OTHERS[client].ask(port, cut)


def measure(directory: Path) -> tuple[list[Cell], dict[str, str]]:
    """*directory* is for the servers' files."""
    certificate = certify(directory)
    left_out: dict[str, str] = {}
    cells: list[Cell] = []
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(AT_ONCE))
        ports = stack.enter_context(cut_servers.http(certificate))
        asked = []
        for client in HTTP:
            reason = cut_clients.why_not(client)
            if reason is not None:
                left_out[client] = reason
                continue
            for body in BODIES:
                for end in ("whole", *ENDS):
                    cell = Cell(client, body, end, [])
                    cells.append(cell)
                    how = client, body, end, ports, certificate
                    asked += [
                        (cell, pool.submit(ask_over_http, *how)) for _ in range(ROUNDS)
                    ]
        for client, other in OTHERS.items():
            try:
                reason = cut_clients.why_not(client)
                if reason is not None:
                    raise Unavailable(reason)
                port = stack.enter_context(other.server(directory))
            except Unavailable as exc:
                left_out[client] = str(exc)
                continue
            for end in ("whole", *ENDS):
                cell = Cell(client, "", end, [])
                cells.append(cell)
                asked += [
                    (cell, pool.submit(ask_another, client, end, port))
                    for _ in range(ROUNDS)
                ]
        for cell, answer in asked:
            cell.told.append(answer.result())
    return cells, left_out


def about() -> dict[str, str]:
    found = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "system": platform.system(),
        "rounds": str(ROUNDS),
        "python": platform.python_version(),
        "anyio_rst": importlib.metadata.version("anyio_rst"),
    }
    for package in PACKAGES:
        if not cut_clients.is_missing(package):
            found[package] = importlib.metadata.version(package)
    for name, (option, pattern) in VERSIONS.items():
        program = cut_servers.find(name)
        if program is not None:
            done = subprocess.run([program, option], capture_output=True, text=True)
            version = re.search(pattern, done.stdout)
            found[name] = version[1] if version else "of an unknown version"
    return found


# The tables.


def verdict(cell: Cell | None) -> str:
    return "" if cell is None else report.VERDICTS[cell.noticed]


def over_http(cuts: Cuts, end: str) -> str:
    clients = [name for name in HTTP if name not in cuts.left_out]
    body = [
        [f"`{client}`", *(verdict(cuts.find(client, kind, end)) for kind in BODIES)]
        for client in clients
    ]
    return report.table(["client", *BODIES.values()], body)


def by_other_protocols(cuts: Cuts) -> str:
    body = [
        [
            f"`{client}`",
            other.title,
            *(verdict(cuts.find(client, "", end)) for end in ENDS),
        ]
        for client, other in OTHERS.items()
        if client not in cuts.left_out
    ]
    return report.table(["client", "asks for", *ENDS.values()], body)


def words(cuts: Cuts) -> str:
    body = []
    for cell in cuts.cells:
        if cell.end != "whole":
            said = report.each(told.said for told in cell.told)
            kind = BODIES.get(cell.body, "")
            body.append([f"`{cell.client}`", kind, ENDS[cell.end], said])
    return report.table(["client", "body", "cut by", "what it says"], body)


def is_whole(cell: Cell) -> bool:
    return all(not told.noticed and told.size == BODY for told in cell.told)


def tables(cuts: Cuts) -> str:
    found = dict(cuts.about)
    date, system, rounds = (found.pop(name) for name in ("date", "system", "rounds"))
    versions = ", ".join(f"{name} {version}" for name, version in found.items())
    whole = [cell for cell in cuts.cells if cell.end == "whole"]
    wrong = [f"`{cell.client}`" for cell in whole if not is_whole(cell)]
    but = f", but for those of {', '.join(dict.fromkeys(wrong))}" if wrong else ""
    left_out = [f"`{name}` ({reason})" for name, reason in cuts.left_out.items()]
    parts = [
        f"{date}, {system}, each {rounds} times: {versions}.",
        f"All answers that were not cut arrived whole{but}.",
        f"Left out: {', '.join(left_out)}." if left_out else "None was left out.",
        "### Cut by a FIN",
        over_http(cuts, "fin"),
        "### Cut by an RST",
        over_http(cuts, "rst"),
        "### Other protocols",
        by_other_protocols(cuts),
        "### What they said of it",
        words(cuts),
    ]
    return "\n\n".join(parts)


def written(cuts: Cuts) -> str:
    """The page as it should be."""
    return report.filled(report.PAGE.read_text(), tables(cuts), BEGIN, END)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure who notices a cut.")
    parser.add_argument(
        "--write", action="store_true", help="interop/cuts.json and docs/interop.md"
    )
    options = parser.parse_args()
    if shutil.which("openssl") is None:
        raise SystemExit("missing: openssl; on Debian: apt-get install openssl")
    found = about()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        directory.chmod(0o711)  # PostgreSQL is another user, and has files there
        cells, left_out = measure(directory)
    cuts = Cuts(found, left_out, cells)
    print(tables(cuts))
    if options.write:
        cuts.save()
        report.PAGE.write_text(written(cuts))


if __name__ == "__main__":
    main()
