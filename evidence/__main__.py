"""Write the pages anew from the results that are stored: `python -m evidence`."""

from __future__ import annotations

from . import pages
from .bench import report as bench
from .interop import report as interop
from .soak import report as soak

REPORTS = bench, interop, soak

if __name__ == "__main__":
    for report in REPORTS:
        pages.write(report.written())
