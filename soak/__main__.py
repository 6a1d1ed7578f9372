"""Soak servers and scopes: `python -m soak --help`; docs/soak.md says how. Linux only."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import os
import platform
import ssl
import sys
from pathlib import Path

from . import link, relay, report
from .processes import Stuck
from .report import Report
from .run import LEAST_PER_ROUND, Soak

LOOPS = ("asyncio", "uvloop", "trio")
CONNECTIONS = 200_000  # of each loop


def about(seed: int, missing: str | None) -> dict[str, str]:
    versions = [f"python {platform.python_version()}"]
    for package in ("anyio_rst", "anyio", "trio", "uvloop"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    versions.append(" ".join(ssl.OPENSSL_VERSION.split()[:2]))
    there = (
        f"loses {relay.LOSS:.0%} of the packets in either direction, doubles "
        f"{relay.DOUBLED:.0%}, and delays each by {relay.DELAY * 1000:.0f} to "
        f"{(relay.DELAY + relay.JITTER) * 1000:.0f} ms"
    )
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "seed": str(seed),
        "versions": ", ".join(versions),
        "processor": processor(),
        "cores": str(os.cpu_count()),
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "link": there if missing is None else f"left out, {missing}",
    }


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be greater than 0, not {text}")
    return value


def number_of_connections(text: str) -> int:
    value = int(text)
    if value < LEAST_PER_ROUND:
        raise argparse.ArgumentTypeError(f"must be at least {LEAST_PER_ROUND}")
    return value


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m soak",
        description="Soak serve_tcp and scopes, and match both sides.",
    )
    add = parser.add_argument
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument(
        "--connections",
        type=number_of_connections,
        help=f"through each loop (default: {CONNECTIONS:,})",
    )
    amount.add_argument("--minutes", type=positive, help="for all loops together")
    amount.add_argument("--short", action="store_true", help="the same as --minutes 5")
    add("--loops", nargs="+", choices=LOOPS, help="default: all that are installed")
    add("--seed", type=int, default=0, help="of what the peers and the link do")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--no-link", action="store_true", help="loopback alone")
    where.add_argument(
        "--link-only",
        action="store_true",
        help="small connections across the link, to find what is rare there",
    )
    add("--json", type=Path, help="where to write every figure")
    add("--write", action="store_true", help="soak/results.json and docs/soak.md")
    options = parser.parse_args()
    loops = options.loops or [
        loop for loop in LOOPS if loop == "asyncio" or importlib.util.find_spec(loop)
    ]
    minutes = 5.0 if options.short else options.minutes
    missing = "as asked" if options.no_link else link.available()
    if missing is not None:
        if options.link_only:
            parser.error(f"there is no lossy link: {missing}")
        print(f"WITHOUT THE LOSSY LINK: {missing}", file=sys.stderr)
    results = []
    for loop in loops:
        with Soak(
            loop,
            options.seed,
            with_link=missing is None,
            link_only=options.link_only,
        ) as soak:
            seconds = minutes and minutes * 60 / len(loops)
            connections = None if minutes else options.connections or CONNECTIONS
            results.append(soak.result)
            try:
                soak.run(connections, seconds)
            except Stuck as exc:
                soak.result.faults.append(str(exc))
            except KeyboardInterrupt:
                soak.result.faults.append("interrupted")
                break
    found = Report(about(options.seed, missing), results)
    print(report.tables(found))
    if options.json:
        found.save(options.json)
    status = 0
    for result in results:
        for failure in result.failures():
            print(f"FAILED, {result.loop}: {failure}", file=sys.stderr)
            status = 1
    if options.write and not status:
        found.save(report.RESULTS)
        report.write(found)
    return status


if __name__ == "__main__":
    sys.exit(main())
