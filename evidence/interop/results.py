"""What is measured of resets on their way, and what was."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evidence.results import save, today, versions

if TYPE_CHECKING:
    from pathlib import Path


ROUNDS = 3  # everything is asked so often

JUDGE = "a plain socket"


@dataclass(frozen=True)
class Told:
    """By a client."""

    said: str
    size: int | None  # of the body, in bytes; None if the client does not hand it out
    noticed: bool  # that it was not all


@dataclass(frozen=True)
class Route:
    """From the origin to the client; *program* "" is no proxy at all."""

    title: str
    program: str = ""
    mode: str = "tcp"
    option: str = ""  # a line of the program's configuration


ROUTES = {
    "direct": Route("none"),
    "proxy.py": Route("`examples/proxy.py`", "proxy.py"),
    "nginx-stream": Route("nginx `stream`", "nginx"),
    "nginx-half-close": Route(
        "nginx `stream`, `proxy_half_close on`", "nginx", "tcp", "proxy_half_close on;"
    ),
    "haproxy-tcp": Route("HAProxy `mode tcp`", "haproxy"),
    "haproxy-nolinger": Route(
        "HAProxy `mode tcp`, `option nolinger`", "haproxy", "tcp", "option nolinger"
    ),
    "nginx-http": Route("nginx `http`", "nginx", "http"),
    "nginx-http-unbuffered": Route(
        "nginx `http`, `proxy_buffering off`", "nginx", "http", "proxy_buffering off;"
    ),
    "haproxy-http": Route("HAProxy `mode http`", "haproxy", "http"),
    "haproxy-abortonclose": Route(
        "HAProxy `mode http`, `option abortonclose`",
        "haproxy",
        "http",
        "option abortonclose",
    ),
}
# Those that TLS passes through unseen.
TLS_ROUTES = [
    name for name, route in ROUTES.items() if route.mode == "tcp" and not route.option
]


@dataclass(frozen=True)
class Answer:
    """Of an origin: what it does, and the table that is asked of it."""

    title: str
    origin: str  # see origins.py
    first: int
    last: int  # it fails at 0

    @property
    def target(self) -> str:
        return f"/{self.first}/{self.last}"

    @property
    def is_whole(self) -> bool:
        return self.first > 0


HALF_RST, LONG_HALF_RST, CHUNKS = "half-rst", "long-half-rst", "half-chunks-rst"
HALF_FIN = "half-fin"

ANSWERS = {
    "whole": Answer("all of it, FIN", "truthful", 1, 1000),
    "long-whole": Answer("all of a long one, FIN", "truthful", 1, 40_000),
    HALF_RST: Answer("half of it, RST", "truthful", -500, 500),
    LONG_HALF_RST: Answer("half of a long one, RST", "truthful", -40_000, 500),
    CHUNKS: Answer("half of it, in chunks, RST", "chunked", -500, 500),
    HALF_FIN: Answer("half of it, FIN (plain AnyIO)", "plain", -500, 500),
}


def about(*packages: str) -> dict[str, str]:
    """When it was measured, and with what; the versions of programs are to follow."""
    return {
        "date": today(),
        "system": platform.system(),
        "rounds": str(ROUNDS),
        **versions(*packages),
    }


class Repeated:
    """What was asked several times, with an answer each time."""

    told: list[Told]

    @property
    def noticed(self) -> bool | None:
        """None if not every time the same."""
        (first, *others) = {told.noticed for told in self.told}
        return None if others else first


@dataclass(frozen=True)
class Cell(Repeated):
    """What a client made of an answer, each time."""

    route: str
    scheme: str
    answer: str
    client: str
    there_was: int  # bytes of the body that the origin sent
    told: list[Told]

    @property
    def is_right(self) -> bool:
        if not ANSWERS[self.answer].is_whole:
            return self.noticed is True
        complete = all(told.size == self.there_was for told in self.told)
        return self.noticed is False and complete


@dataclass(frozen=True)
class Upstream:
    """What an origin half way in its answer was told of the client's end, each time."""

    route: str
    there_was: int  # bytes of the answer
    of_reset: list[str]
    of_fin: list[str]
    after_fin: list[Told]  # what the client made of the answer


@dataclass(frozen=True)
class Results:
    about: dict[str, str]
    cells: list[Cell]
    upstream: list[Upstream]

    def save(self, path: Path) -> None:
        save(path, **vars(self))

    def find(self, answer: str, scheme: str = "http") -> dict[tuple[str, str], Cell]:
        """By route and client."""
        return {
            (cell.route, cell.client): cell
            for cell in self.cells
            if (cell.answer, cell.scheme) == (answer, scheme)
        }


def restored(row: dict[str, Any], name: str) -> dict[str, Any]:
    """*row* with what was told, stored under *name*."""
    return {**row, name: [Told(**told) for told in row[name]]}


def load(path: Path) -> Results:
    found = json.loads(path.read_text())
    return Results(
        found["about"],
        [Cell(**restored(row, "told")) for row in found["cells"]],
        [Upstream(**restored(row, "after_fin")) for row in found["upstream"]],
    )
