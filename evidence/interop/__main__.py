"""Measure who notices an end; docs/interop.md says how. Linux only, on loopback."""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
from pathlib import Path

import anyio

from evidence import pages

from . import cutting, proxied, report
from .cuts import Cuts
from .results import Results

# Where Debian has daemons, and the PATH of users does not look.
DAEMONS = "/usr/sbin"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m evidence.interop", description=__doc__
    )
    parser.add_argument(
        "--write", action="store_true", help="the stored results and docs/interop.md"
    )
    options = parser.parse_args()
    os.environ["PATH"] += os.pathsep + DAEMONS
    # Half of the answers are to fail.
    for logger in ("anyio_rst", "anyio.streams.tls"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        # PostgreSQL and nginx' workers are other users, and have files there.
        directory.chmod(0o711)

        about = cutting.about()
        cells, left_out = cutting.measure(directory)
        cuts = Cuts(about, left_out, cells)
        print(report.cut_tables(cuts))
        if options.write:
            cuts.save(report.CUTS)

        proxied.check_programs()
        about = proxied.about()
        results = Results(about, *anyio.run(proxied.measure, directory))
        print(report.tables(results))
    if options.write:
        results.save(report.RESULTS)
        pages.write(report.written())


if __name__ == "__main__":
    main()
