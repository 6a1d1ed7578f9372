"""Compare servers: `python bench/run.py --help`; docs/benchmark.md says how.

Linux only: the CPU time and the memory of the servers are read from /proc.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import report
from results import (
    FLATNESS,
    IN_TURN,
    MEMORY,
    RESET,
    ROWS,
    UNTIL_RESET,
    WORKLOADS,
    Measurement,
    Results,
    Row,
    load,
)
from servers import CHECKED, CONTENDERS, LOOPS, is_available

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from typing_extensions import Self

T = TypeVar("T")

HERE = Path(__file__).parent
ROUNDS = 11
QUICK_ROUNDS = 5
# A new process for each is slow; but what it measures varies little.
NEW_PROCESS_ROUNDS = 5
QUICK_NEW_PROCESS_ROUNDS = 1
WARM_UP = 100  # connections, before memory is measured
WARM_UP_ROUND = -1  # discarded
POLL = 0.003  # seconds
PATIENCE = 30.0  # seconds

# One core for the servers, another one for the load.
CORES = sorted(os.sched_getaffinity(0))
SERVER_CORE, LOAD_CORE = CORES[-1], CORES[0]


class Process:
    def __init__(self, name: str, command: Sequence[str | Path]) -> None:
        self._name = name
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._proc = Path("/proc", str(self._process.pid))

    def read_line(self) -> str:
        line = self._stdout.readline().strip()
        if not line:
            raise SystemExit(f"{self._name} died")
        return line

    def write_line(self) -> None:
        self._stdin.write("\n")
        self._stdin.flush()

    def pin(self, core: int) -> None:
        for task in (self._proc / "task").iterdir():
            os.sched_setaffinity(int(task.name), {core})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:
            self._process.kill()


class Server(Process):
    def __init__(self, row: Row, serves: str) -> None:
        super().__init__(
            f"{' on '.join(row)}, {serves}",
            [sys.executable, HERE / "servers.py", *row, serves],
        )
        self.row = row
        self.port = ""

    def wait_until_it_listens(self) -> None:
        self.port = self.read_line()
        self.pin(SERVER_CORE)

    def cpu(self) -> int:
        """In nanoseconds, once it has nothing left to do.

        The load does not see the end of the last connections' work.
        """
        before = self._cpu()
        for _ in range(int(PATIENCE / POLL)):
            time.sleep(POLL)
            now = self._cpu()
            if now == before and self._sleeps():
                return now
            before = now
        raise SystemExit(f"{self._name} does not come to rest")

    def _cpu(self) -> int:
        # The first field, of all threads: Documentation/scheduler/sched-stats.rst.
        tasks = (self._proc / "task").glob("*/schedstat")
        return sum(int(task.read_text().split()[0]) for task in tasks)

    def _sleeps(self) -> bool:
        # The first field after the name, which is in parentheses: proc_pid_stat(5).
        return (self._proc / "stat").read_text().rpartition(") ")[2][0] == "S"

    def memory(self) -> int:
        """In KiB: its own, without what it shares, and without the kernel's."""
        self.cpu()
        lines = (self._proc / "smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


class Load(Process):
    """The program in load/, ready to go."""

    def __init__(self, program: Path, server: Server, words: str, amount: int) -> None:
        mode, *numbers = words.format(amount).split()
        super().__init__(f"the load ({mode})", [program, mode, server.port, *numbers])
        self.pin(LOAD_CORE)
        self.read_line()  # "open"

    def result(self) -> dict[str, Any]:
        result: dict[str, Any] = json.loads(self.read_line())
        return result


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
        load.write_line()
        found = load.result()
        used = server.cpu() - before
        done = found["done"] / WORKLOADS[name].unit
        endings = found
        if WORKLOADS[name].ends_later:
            load.write_line()
            endings = load.result()
        if turn != WARM_UP_ROUND:
            rate = done / found["seconds"]
            load_cost = found["cpu"] * 1e6 / done
            self._add(name, turn, server, endings, used / 1000 / done, rate, load_cost)

    def _measure_reset(self, turn: int, server: Server) -> None:
        with Load(self._program, server, "churn {} 64 eof", WARM_UP) as load:
            load.write_line()
            load.result()
        before = server.memory()
        with self._load(RESET, server) as load:
            used = server.memory() - before
            with self._load(RESET, server) as second:
                server.write_line()
                start = float(server.read_line())
                halves = load.result(), second.result()
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


def compiled(directory: str) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        raise SystemExit("the load is a program in C, and there is no compiler (cc)")
    program = Path(directory, "load")
    sources = sorted((HERE / "load").glob("*.c"))
    subprocess.run([compiler, "-O2", "-o", program, *sources], check=True)
    return program


def about(*, quick: bool) -> dict[str, str]:
    memory = WORKLOADS[MEMORY].quick if quick else WORKLOADS[MEMORY].amount
    found = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "run": "quick" if quick else "full",
        "memory": f"{memory:,}",
        "reset": f"{2 * memory:,}",
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "processor": processor(),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
    }
    for package in ("anyio_rst", "anyio", "trio", "uvloop", "twisted"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    if node := shutil.which("node"):
        version = subprocess.run([node, "--version"], capture_output=True, text=True)
        found["node"] = version.stdout.strip().removeprefix("v")
    return found


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def measure(rows: list[Row], chosen: list[str], *, quick: bool) -> Results:
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
    return Results(about(quick=quick), bench.measurements)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare servers.")
    add = parser.add_argument
    add("--quick", action="store_true", help="a minute and a half, and less exact")
    add("--only", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    add("--loops", nargs="+", choices=LOOPS, default=LOOPS)
    add("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    add("--json", type=Path, help="where to write every figure")
    add("--write", action="store_true", help="bench/results.json and docs/benchmark.*")
    options = parser.parse_args()
    rows = [
        (name, loop)
        for name, loop in ROWS
        if name in options.contenders and loop in options.loops
        if is_available(name, loop)
    ]
    results = measure(rows, options.only, quick=options.quick)
    print(report.tables(results))
    if options.json:
        results.save(options.json)
    if options.write:
        results.save(report.RESULTS)
        report.write(load(report.RESULTS))  # rounded as they are stored
    if any(m.contender in CHECKED for m in results.wrong()):
        print("FAILED: connections ended wrongly, see above", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
