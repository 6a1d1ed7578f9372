"""One benchmark: which servers are measured when, and with which load."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from typing import TYPE_CHECKING, Any, TypeVar

from .processes import Load, Server, compiled
from .results import (
    FLATNESS,
    IN_TURN,
    MEMORY,
    RESET,
    UNTIL_RESET,
    WORKLOADS,
    Measurement,
    Row,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

T = TypeVar("T")

ROUNDS = 11
QUICK_ROUNDS = 5
# A new process for each is slow; but what it measures varies little.
NEW_PROCESS_ROUNDS = 5
QUICK_NEW_PROCESS_ROUNDS = 1
WARM_UP = 100  # connections, before memory is measured
WARM_UP_ROUND = -1  # discarded


class Bench:
    def __init__(self, program: Path, rows: list[Row], *, quick: bool) -> None:
        self.measurements: list[Measurement] = []
        self._program = program
        self._rows = rows
        self._quick = quick
        self._rounds = QUICK_ROUNDS if quick else ROUNDS

    def in_turn(self, workloads: list[str]) -> None:
        """Workloads of which the servers are the same, and stay."""
        with self._servers(self._rows, workloads[0]) as servers:
            for workload in workloads:
                for turn, server in self._turns(workload, servers):
                    with self._load(workload, server) as load:
                        self._measure(workload, turn, server, load)

    def flatness(self, workloads: list[str]) -> None:
        """The connections stay, too."""
        rows = [row for row in self._rows if row[0] == "anyio_rst"]
        with contextlib.ExitStack() as stack:
            kept = []
            for workload in workloads:
                for server in stack.enter_context(self._servers(rows, workload)):
                    load = self._load(workload, server)
                    kept.append((workload, server, stack.enter_context(load)))
            for turn, (workload, server, load) in self._turns("open", kept):
                self._measure(workload, turn, server, load)

    def until_reset(self) -> None:
        """Memory, and the reset of all: new processes, and nothing to warm up."""
        rounds = QUICK_NEW_PROCESS_ROUNDS if self._quick else NEW_PROCESS_ROUNDS
        for turn in range(rounds):
            for row in self._rows:
                progress(RESET, turn, rounds)
                with self._servers([row], RESET) as (server,):
                    self._measure_reset(turn, server)

    def _turns(self, what: str, contenders: list[T]) -> Iterator[tuple[int, T]]:
        """One after the other, and back, so that a drift favours none."""
        for turn in range(WARM_UP_ROUND, self._rounds):
            progress(what, turn, self._rounds)
            for contender in contenders if turn % 2 else contenders[::-1]:
                yield turn, contender

    def _measure(self, name: str, turn: int, server: Server, load: Load) -> None:
        before = server.cpu()
        found = load.ask()
        used = server.cpu() - before
        done = found["done"] / WORKLOADS[name].unit
        endings = found
        if WORKLOADS[name].ends_later:
            endings = load.ask()
        if turn != WARM_UP_ROUND:
            rate = done / found["seconds"]
            load_cost = found["cpu"] * 1e6 / done
            self._add(name, turn, server, endings, used / 1000 / done, rate, load_cost)

    def _measure_reset(self, turn: int, server: Server) -> None:
        with Load(self._program, server, "churn {} 64 eof", WARM_UP) as load:
            load.ask()
        before = server.memory()
        with self._load(RESET, server) as load:
            used = server.memory() - before
            with self._load(RESET, server) as second:
                start = server.ask()
                halves = load.answer(), second.answer()
        moment = max(half["moment"] for half in halves)
        found = {name: sum(half[name] for half in halves) for name in halves[0]}
        self._add(MEMORY, turn, server, {}, used / halves[0]["done"])
        self._add(RESET, turn, server, found, (moment - start) * 1000)

    def _add(
        self,
        name: str,
        turn: int,
        server: Server,
        found: dict[str, Any],
        cost: float,
        rate: float | None = None,
        load_cost: float | None = None,
    ) -> None:
        seen = (found.get(kind, 0) for kind in ("fin", "rst", "other", "wrong"))
        self.measurements.append(
            Measurement(name, *server.row, turn, cost, rate, load_cost, *seen)
        )

    @contextlib.contextmanager
    def _servers(self, rows: list[Row], name: str) -> Iterator[list[Server]]:
        with contextlib.ExitStack() as stack:
            serves = WORKLOADS[name].serves
            servers = [stack.enter_context(Server(row, serves)) for row in rows]
            for server in servers:
                server.wait_until_it_listens()
            yield servers

    def _load(self, name: str, server: Server) -> Load:
        workload = WORKLOADS[name]
        amount = workload.quick if self._quick else workload.amount
        return Load(self._program, server, workload.load, amount * workload.unit)


def progress(what: str, turn: int, rounds: int) -> None:
    state = "warm-up" if turn == WARM_UP_ROUND else f"{turn + 1} of {rounds}"
    print(f"\r{what:14}{state:12}", end="", file=sys.stderr, flush=True)


def measure(rows: list[Row], chosen: list[str], *, quick: bool) -> list[Measurement]:
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(compiled(directory), rows, quick=quick)
        for serves in dict.fromkeys(workload.serves for workload in IN_TURN.values()):
            same = [name for name in chosen if name in IN_TURN]
            same = [name for name in same if WORKLOADS[name].serves == serves]
            if same:
                bench.in_turn(same)
        if any(name in UNTIL_RESET for name in chosen):
            bench.until_reset()
        if same := [name for name in chosen if name in FLATNESS]:
            bench.flatness(same)
        print(file=sys.stderr)
    return bench.measurements
