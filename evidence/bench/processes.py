"""The processes of the benchmark: a server, the load on it, and what they cost.

CPU time and memory are read from /proc, so Linux only.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from evidence.processes import OTHER_CORES, SERVER_CORES, Process, Stuck, module

if TYPE_CHECKING:
    from .results import Row

POLL = 0.003  # seconds
PATIENCE = 30.0  # seconds, for a server to come to rest


class Server(Process):
    def __init__(self, row: Row, serves: str) -> None:
        name = f"{' on '.join(row)}, {serves}"
        super().__init__(name, module("bench.servers", *row, serves))
        self.row = row
        self.port = ""

    def wait_until_it_listens(self) -> None:
        self.port = self.line()
        self.pin(SERVER_CORES)

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
        raise Stuck(f"{self.name} does not come to rest")

    def _cpu(self) -> int:
        # The first field, of all threads: Documentation/scheduler/sched-stats.rst.
        tasks = (self.proc / "task").glob("*/schedstat")
        return sum(int(task.read_text().split()[0]) for task in tasks)

    def _sleeps(self) -> bool:
        # The first field after the name, which is in parentheses: proc_pid_stat(5).
        return (self.proc / "stat").read_text().rpartition(") ")[2][0] == "S"

    def memory(self) -> int:
        """In KiB: its own, without what it shares, and without the kernel's."""
        self.cpu()
        lines = (self.proc / "smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


class Load(Process):
    """The program in load/, ready to go."""

    def __init__(self, program: Path, server: Server, words: str, amount: int) -> None:
        mode, *numbers = words.format(amount).split()
        super().__init__(f"the load ({mode})", [program, mode, server.port, *numbers])
        self.pin(OTHER_CORES[:1])
        self.line()  # "open"


def compiled(directory: str) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        raise SystemExit("the load is a program in C, and there is no compiler (cc)")
    program = Path(directory, "load")
    sources = sorted(Path(__file__).with_name("load").glob("*.c"))
    subprocess.run([compiler, "-O2", "-o", program, *sources], check=True)
    return program
