"""What the ratios of the costs are to be, and whether they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .results import (
    CHURN_EOF,
    CHURN_FIN,
    CHURN_RST,
    DOWNLOAD,
    ECHO,
    LOCKSTEP_100,
    MEMORY,
    PINGPONG_1,
    PINGPONG_100,
    RESET,
)
from .servers import ANYIO_LOOPS

if TYPE_CHECKING:
    from .results import Results


@dataclass(frozen=True)
class Comparison:
    """The cost of *one* divided by that of *other*."""

    one: str
    other: str
    bound: str  # "at least" or "at most"
    targets: dict[str, tuple[float, float, float]]  # workload: on each of ANYIO_LOOPS


COMPARISONS = (
    Comparison(
        "anyio",
        "scope",
        "at least",
        {
            PINGPONG_1: (1.0, 1.0, 1.0),
            PINGPONG_100: (1.9, 1.2, 1.0),
            LOCKSTEP_100: (1.9, 1.2, 1.0),
            ECHO: (2.3, 2.0, 1.1),
        },
    ),
    # What all the rules cost, taking the stream over included.
    Comparison(
        "scope",
        "anyio",
        "at most",
        {CHURN_FIN: (1.6, 1.6, 1.4), CHURN_RST: (1.2, 1.2, 1.1)},
    ),
    # Not dearer than what a user would have to write without the library.
    Comparison(
        "scope",
        "by_hand",
        "at most",
        {CHURN_FIN: (1.0, 1.0, 1.0), CHURN_RST: (1.0, 1.0, 1.0)},
    ),
    # Where nothing more was asked for: what it had in version 0.1, rounded down.
    Comparison(
        "anyio",
        "anyio_rst",
        "at least",
        {
            CHURN_FIN: (2.4, 2.0, 1.4),
            CHURN_RST: (3.0, 2.4, 1.9),
            CHURN_EOF: (2.2, 1.9, 1.4),
            PINGPONG_1: (1.05, 1.0, 1.05),
            PINGPONG_100: (2.0, 1.4, 1.05),
            ECHO: (2.6, 2.5, 1.2),
            DOWNLOAD: (0.9, 1.0, 1.1),
            RESET: (1.4, 1.4, 1.5),
            MEMORY: (1.5, 1.3, 1.5),
        },
    ),
)


@dataclass(frozen=True)
class Verdict:
    measured: float
    target: float
    reached: bool


def verdict(
    results: Results, comparison: Comparison, workload: str, loop: str
) -> Verdict | None:
    """None: not measured."""
    rows = (comparison.one, loop), (comparison.other, loop)
    found = results.ratio(workload, *rows)
    if found is None:
        return None
    target = comparison.targets[workload][ANYIO_LOOPS.index(loop)]
    measured = round(found.median, 2)  # as the tables show it
    least = comparison.bound == "at least"
    reached = measured >= target if least else measured <= target
    return Verdict(measured, target, reached)


def verdicts(
    results: Results, comparison: Comparison
) -> dict[str, dict[str, Verdict | None]]:
    """Of each workload of which something was measured, on each loop."""
    found = {
        workload: {
            loop: verdict(results, comparison, workload, loop) for loop in ANYIO_LOOPS
        }
        for workload in comparison.targets
    }
    return {name: of for name, of in found.items() if any(of.values())}
