"""What bench, soak and interop share: pages, stored results, and processes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from evidence import ROOT, pages, results
from evidence.__main__ import REPORTS
from evidence.processes import Process, Stuck


@pytest.mark.parametrize("report", REPORTS)
def test_pages_show_the_stored_results(report: ModuleType) -> None:
    for path, content in report.written().items():
        assert path.read_text() == content, path


def test_part_of_a_page_is_written_anew() -> None:
    page = "before\n<!-- x -->\nold\n<!-- end of x -->\nafter"
    new = pages.filled(page, "x", "new")
    assert new == "before\n<!-- x -->\n\nnew\n\n<!-- end of x -->\nafter"
    assert pages.filled(new, "x", "new") == new


@dataclass
class Figure:
    name: str
    cost: float


def test_results_are_stored_a_line_each(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    results.save(path, about={"loop": "µ"}, figures=[Figure("a", 1.5), Figure("b", 2.0)])
    assert '{"name": "b", "cost": 2.0}' in path.read_text().splitlines()
    stored = json.loads(path.read_text())
    assert stored["about"] == {"loop": "µ"}
    assert stored["figures"] == [{"name": "a", "cost": 1.5}, {"name": "b", "cost": 2.0}]


def test_process_answers_until_it_has_died() -> None:
    with Process("cat", ["cat"]) as cat:
        assert cat.ask(json.dumps({"ports": [1]})) == {"ports": [1]}
        cat.tell("one")
        assert cat.line() == "one"
        cat.kill()
        with pytest.raises(Stuck, match="cat has died"):
            cat.line()


@pytest.mark.parametrize(
    ("tool", "option", "value", "message"),
    [
        ("bench", "--only", "speed", "invalid choice: 'speed'"),
        ("soak", "--connections", "10", "must be at least 400"),
        ("soak", "--minutes", "0", "must be greater than 0"),
        ("soak", "--loops", "curio", "invalid choice: 'curio'"),
    ],
)
def test_bad_option_is_refused(tool: str, option: str, value: str, message: str) -> None:
    run = [sys.executable, "-m", f"evidence.{tool}", option, value]
    found = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 2
    assert message in found.stderr
