"""Soak serve_tcp and scopes, and match both sides; docs/soak.md says how. Linux only."""

from __future__ import annotations

import argparse
import ssl
import sys
from importlib.util import find_spec
from pathlib import Path

from evidence import pages
from evidence.loops import LOOPS
from evidence.processes import Stuck
from evidence.results import machine, today, versions

from . import link, relay, report
from .results import Report
from .run import LEAST_PER_ROUND, Soak

CONNECTIONS = 200_000  # of each loop


def about(seed: int, missing: str | None) -> dict[str, str]:
    found = versions("anyio_rst", "anyio", "trio", "uvloop")
    named = [f"{name} {version}" for name, version in found.items()]
    named.append(" ".join(ssl.OPENSSL_VERSION.split()[:2]))
    there = (
        f"loses {relay.LOSS:.0%} of the packets in either direction, doubles "
        f"{relay.DOUBLED:.0%}, and delays each by {relay.DELAY * 1000:.0f} to "
        f"{(relay.DELAY + relay.JITTER) * 1000:.0f} ms"
    )
    return {
        "date": today(),
        "seed": str(seed),
        "versions": ", ".join(named),
        **machine(),
        "link": there if missing is None else f"left out, {missing}",
    }


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
        prog="python -m evidence.soak",
        description=__doc__,
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
    add("--write", action="store_true", help="results.json and docs/soak.md")
    options = parser.parse_args()
    loops = options.loops or [loop for loop in LOOPS if find_spec(loop) is not None]
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
        pages.write(report.written())
    return status


if __name__ == "__main__":
    sys.exit(main())
