"""Compare servers; docs/benchmark.md says how. Linux only."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from evidence import pages
from evidence.results import machine, today, version_of, versions

from . import report
from .results import MEMORY, ROWS, WORKLOADS, Results
from .run import measure
from .servers import CHECKED, CONTENDERS, LOOPS, is_available


def about(*, quick: bool) -> dict[str, str]:
    memory = WORKLOADS[MEMORY].quick if quick else WORKLOADS[MEMORY].amount
    found = {
        "date": today(),
        "run": "quick" if quick else "full",
        "memory": f"{memory:,}",
        "reset": f"{2 * memory:,}",
        **machine(),
        **versions("anyio_rst", "anyio", "trio", "uvloop", "twisted"),
    }
    if is_available("node", "own"):
        found["node"] = version_of("node", "--version", r"v(.+)") or "unknown"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m evidence.bench", description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="a minute and a half, and less exact")
    add("--only", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    add("--loops", nargs="+", choices=LOOPS, default=LOOPS)
    add("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    add("--json", type=Path, help="where to write every figure")
    add("--write", action="store_true", help="results.json and docs/benchmark.*")
    options = parser.parse_args()
    rows = [
        (name, loop)
        for name, loop in ROWS
        if name in options.contenders and loop in options.loops
        if is_available(name, loop)
    ]
    measured = measure(rows, options.only, quick=options.quick)
    results = Results(about(quick=options.quick), measured)
    print(report.tables(results))
    if options.json:
        results.save(options.json)
    if options.write:
        results.save(report.RESULTS)
        pages.write(report.written())
    if any(m.contender in CHECKED for m in results.wrong()):
        print("FAILED: connections ended wrongly, see above", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
