"""What there is to measure, what was measured, and the medians and ratios of that."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evidence.results import save

from .servers import CONTENDERS, LOOPS

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

Row = tuple[str, str]  # contender, loop

ROWS: list[Row] = [
    (name, loop)
    for loop in LOOPS
    for name, contender in CONTENDERS.items()
    if loop in contender.loops
]

MIB = 2**20
OPEN = (10, 1000, 10_000)


@dataclass(frozen=True)
class Workload:
    title: str
    cost: str
    serves: str  # see contenders/__init__.py
    load: str  # the arguments of load/ but for the port; {} is the amount
    ending: str  # of every connection
    amount: int  # a round, in units
    quick: int
    unit: int = 1
    # The load ends its connections after the measurement, and says then what it saw.
    ends_later: bool = False


def churn(title: str, serves: str, end: str, ending: str) -> Workload:
    cost = "µs CPU per connection"
    return Workload(title, cost, serves, f"churn {{}} 64 {end}", ending, 2000, 300)


def stream(title: str, serves: str, mode: str) -> Workload:
    cost = "µs CPU per MiB"
    return Workload(title, cost, serves, f"{mode} {{}}", "fin", 128, 32, MIB)


def window(size: int) -> Workload:
    title, cost = f"{size:,} open", "µs CPU per connection"
    return Workload(title, cost, "echo", f"window {{}} {size}", "fin", 2000, 400)


def messages(title: str, mode: str, connections: int, quick: int) -> Workload:
    cost, load = "µs CPU per round trip", f"{mode} {connections} {{}}"
    return Workload(title, cost, "echo", load, "fin", 10_000, quick, ends_later=True)


def until_reset(title: str, cost: str) -> Workload:
    # A scope on asyncio has two descriptors for each connection, and 20,000 is a common
    # limit.
    return Workload(title, cost, "echo", "reset {}", "rst", 4000, 500)


CHURN_FIN, CHURN_RST, CHURN_EOF = "churn-fin", "churn-rst", "churn-eof"
PINGPONG_1, PINGPONG_100, LOCKSTEP_100 = "pingpong-1", "pingpong-100", "lockstep-100"
ECHO, DOWNLOAD = "echo", "download"

# Servers stay up, and take turns.
IN_TURN = {
    CHURN_FIN: churn("message and FIN", "fin", "fin", "fin"),
    CHURN_RST: churn("message and RST", "rst", "rst", "rst"),
    CHURN_EOF: churn("message, FIN by the client", "echo", "eof", "fin"),
    PINGPONG_1: messages("messages, 1 connection", "pingpong", 1, 1000),
    PINGPONG_100: messages("messages, 100 clients", "pingpong", 100, 2000),
    LOCKSTEP_100: messages("messages, 100 in lock-step", "lockstep", 100, 2000),
    ECHO: stream("echo of a stream", "echo", "echo"),
    DOWNLOAD: stream("download", "download", "download"),
}
# A new process for each measurement, which gives both: the memory with as many open, the
# reset of twice as many.
RESET, MEMORY = "reset", "memory"
UNTIL_RESET = {
    RESET: until_reset("reset of all", "ms until the last client has seen it"),
    MEMORY: until_reset("memory", "KiB per open connection"),
}
# Of anyio_rst alone.
FLATNESS = {f"open-{size}": window(size) for size in OPEN}

WORKLOADS = IN_TURN | UNTIL_RESET | FLATNESS


@dataclass(frozen=True)
class Measurement:
    workload: str
    contender: str
    loop: str
    round: int
    cost: float
    rate: float | None = None
    load_cost: float | None = None  # CPU of the load, in the unit of cost
    fin: int = 0
    rst: int = 0
    other: int = 0
    wrong: int = 0  # bytes

    @property
    def row(self) -> Row:
        return self.contender, self.loop

    @property
    def endings(self) -> str:
        counts = {"FIN": self.fin, "RST": self.rst, "neither": self.other}
        text = ", ".join(f"{count:,} {kind}" for kind, count in counts.items() if count)
        return f"{text}, {self.wrong:,} wrong bytes" if self.wrong else text

    @property
    def is_right(self) -> bool:
        """Every connection ended as it should, and brought what it should."""
        should = self.fin if WORKLOADS[self.workload].ending == "fin" else self.rst
        return should == self.fin + self.rst + self.other and not self.wrong


@dataclass(frozen=True)
class Spread:
    median: float
    low: float
    high: float


def spread(values: list[float]) -> Spread | None:
    if not values:
        return None
    return Spread(*(round(f(values), 3) for f in (statistics.median, min, max)))


def base(row: Row) -> Row:
    """What a row is compared with: anyio_rst on the same loop."""
    _, loop = row
    return "anyio_rst", "asyncio" if loop == "own" else loop


@dataclass
class Results:
    about: dict[str, str]
    measurements: list[Measurement]

    def _by_round(self, workload: str, row: Row) -> dict[int, Measurement]:
        return {
            m.round: m
            for m in self.measurements
            if m.workload == workload and m.row == row
        }

    def rows(self, workloads: Collection[str]) -> list[Row]:
        """In the order of `ROWS`."""
        measured = {m.row for m in self.measurements if m.workload in workloads}
        return [row for row in ROWS if row in measured]

    def cost(self, workload: str, row: Row) -> Spread | None:
        return spread([m.cost for m in self._by_round(workload, row).values()])

    def rate(self, workload: str, row: Row) -> Spread | None:
        rounds = self._by_round(workload, row).values()
        return spread([m.rate for m in rounds if m.rate is not None])

    def ratio(
        self, workload: str, row: Row, of: Row, of_workload: str | None = None
    ) -> Spread | None:
        """How many times the cost of *of*, compared round by round."""
        ours = self._by_round(workload, row)
        theirs = self._by_round(of_workload or workload, of)
        return spread(
            [m.cost / theirs[turn].cost for turn, m in ours.items() if turn in theirs]
        )

    def wrong(self) -> list[Measurement]:
        return [m for m in self.measurements if not m.is_right]

    def save(self, path: Path) -> None:
        medians = [
            {"workload": workload, "contender": row[0], "loop": row[1]}
            | {
                name: found
                for name, found in (
                    ("cost", self.cost(workload, row)),
                    ("rate", self.rate(workload, row)),
                    ("ratio", self.ratio(workload, row, base(row))),
                )
                if found is not None
            }
            for workload in WORKLOADS
            for row in self.rows([workload])
        ]
        save(
            path,
            about=self.about,
            units={name: workload.cost for name, workload in WORKLOADS.items()},
            medians=medians,
            measurements=[rounded(vars(m)) for m in self.measurements],
        )


def rounded(item: dict[str, Any]) -> dict[str, Any]:
    return {
        name: round(value, 3) if isinstance(value, float) else value
        for name, value in item.items()
    }


def load(path: Path) -> Results:
    found = json.loads(path.read_text())
    return Results(found["about"], [Measurement(**m) for m in found["measurements"]])
