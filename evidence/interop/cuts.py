"""What is measured of answers that are cut in the middle, and what was."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evidence.results import save

from .results import Repeated, restored

if TYPE_CHECKING:
    from pathlib import Path

    from .results import Told

SIZE = 400_000  # bytes, of each answer
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


# What is asked for in other protocols than HTTP.
OTHERS = {
    "ftplib": "a file, whose length it does not ask for",
    "psycopg": "a row of PostgreSQL",
    "asyncpg": "a row of PostgreSQL",
    "redis-py": "a value of Redis",
}


@dataclass(frozen=True)
class Cut(Repeated):
    """What a client made of an answer of a kind, each time."""

    client: str
    body: str  # of BODIES; "": in another protocol than HTTP
    end: str  # of ENDS; "whole": all of it
    told: list[Told]

    @property
    def is_right(self) -> bool:
        """The whole answer, and nothing else."""
        return all(not told.noticed and told.size == SIZE for told in self.told)


@dataclass(frozen=True)
class Cuts:
    about: dict[str, str]
    left_out: dict[str, str]  # clients, each with the reason
    cells: list[Cut]

    def save(self, path: Path) -> None:
        save(path, **vars(self))

    def find(self, client: str, body: str, end: str) -> Cut | None:
        for cell in self.cells:
            if (cell.client, cell.body, cell.end) == (client, body, end):
                return cell
        return None


def load(path: Path) -> Cuts:
    found = json.loads(path.read_text())
    cells = [Cut(**restored(cell, "told")) for cell in found["cells"]]
    return Cuts(found["about"], found["left_out"], cells)
