"""The benchmark: what it counts."""

from __future__ import annotations

import sys

import pytest

from evidence.bench import __main__ as command
from evidence.bench import report
from evidence.bench.results import ROWS, WORKLOADS, Measurement, Results, load
from evidence.bench.servers import ANYIO_LOOPS, CHECKED, CONTENDERS
from evidence.bench.targets import COMPARISONS, Comparison, verdict


@pytest.fixture(scope="module")
def results() -> Results:
    return load(report.RESULTS)


def test_results_are_those_of_a_full_run_in_which_no_ending_was_wrong(
    results: Results,
) -> None:
    assert results.about["run"] == "full"
    checked = [m for m in results.measurements if m.contender in CHECKED]
    assert checked
    assert all(m.is_right for m in checked)


def test_ratio_is_the_median_of_what_was_measured_side_by_side() -> None:
    costs = {"anyio": [30.0, 20.0, 90.0], "anyio_rst": [10.0, 10.0, 10.0]}
    measurements = [
        Measurement("churn-fin", contender, "trio", turn, cost)
        for contender, found in costs.items()
        for turn, cost in enumerate(found)
    ]
    ratio = Results({}, measurements).ratio(
        "churn-fin", ("anyio", "trio"), ("anyio_rst", "trio")
    )
    assert ratio is not None
    assert (ratio.median, ratio.low, ratio.high) == (3.0, 2.0, 9.0)


def test_scope_is_compared_with_the_plain_stream_and_the_rules_by_hand() -> None:
    compared = {(c.one, c.other) for c in COMPARISONS}
    assert {("anyio", "scope"), ("scope", "anyio"), ("scope", "by_hand")} <= compared
    assert ("anyio", "anyio_rst") in compared
    for comparison in COMPARISONS:
        for contender in (comparison.one, comparison.other):
            assert {(contender, loop) for loop in ANYIO_LOOPS} <= set(ROWS)
        assert comparison.targets.keys() <= WORKLOADS.keys()


def test_contenders_that_are_compared_take_turns_one_after_the_other() -> None:
    turns = list(CONTENDERS)
    for comparison in COMPARISONS:
        assert abs(turns.index(comparison.one) - turns.index(comparison.other)) == 1


@pytest.mark.parametrize(
    ("bound", "cost", "reached"),
    [
        ("at least", 19.0, True),
        ("at least", 18.9, False),
        ("at most", 19.0, True),
        ("at most", 19.1, False),
    ],
)
def test_target_that_is_missed_stands_out(bound: str, cost: float, reached: bool) -> None:
    comparison = Comparison("anyio", "scope", bound, {"pingpong-1": (1.9, 1.2, 1.0)})
    results = Results(
        {},
        [
            Measurement("pingpong-1", "anyio", "asyncio", 0, cost),
            Measurement("pingpong-1", "scope", "asyncio", 0, 10.0),
        ],
    )
    found = verdict(results, comparison, "pingpong-1", "asyncio")
    assert found is not None
    assert (found.measured, found.target) == (round(cost / 10, 2), 1.9)
    assert found.reached is reached
    assert verdict(results, comparison, "pingpong-1", "trio") is None
    text = f"{found.measured:.2f} (1.90)"
    assert report.against_target(found) == (text if reached else f"**{text}**")


def test_report_counts_the_targets_that_are_missed(results: Results) -> None:
    found = [
        verdict(results, comparison, workload, loop)
        for comparison in COMPARISONS
        for workload in comparison.targets
        for loop in ANYIO_LOOPS
    ]
    judged = [each for each in found if each is not None]
    missed = [each for each in judged if not each.reached]
    text, *tables = report.targets(results)
    assert text.endswith(f": {len(missed)} of {len(judged)}.")
    assert sum(table.count("**") for table in tables) == 2 * len(missed)


@pytest.mark.parametrize("contender", [*CHECKED, "node"])
def test_wrong_ending_fails_the_run(
    contender: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = CONTENDERS[contender].loops[0]
    wrong = Measurement("churn-rst", contender, loop, 0, 1.0, fin=1, rst=9)
    monkeypatch.setattr(command, "measure", lambda *_, **__: [wrong])
    monkeypatch.setattr(sys, "argv", ["bench"])
    assert command.main() == (1 if contender in CHECKED else 0)


@pytest.mark.parametrize("workload", ["churn-fin", "churn-rst"])
def test_wrong_ending_is_no_right_measurement(workload: str) -> None:
    assert Measurement(workload, "anyio", "trio", 0, 1.0, fin=5, rst=5).is_right is False
    right = {"churn-fin": {"fin": 5}, "churn-rst": {"rst": 5}}[workload]
    assert Measurement(workload, "anyio", "trio", 0, 1.0, **right).is_right
    assert not Measurement(workload, "anyio", "trio", 0, 1.0, **right, wrong=1).is_right
