"""What is drawn from the code shows the code of now."""

from __future__ import annotations

from anyio_rst import Cause

import modules
import states


def test_states_are_those_of_the_code() -> None:
    """If not: `python docs/states.py`."""
    assert states.draw() == states.FILE.read_text()


def test_every_cause_is_an_arrow() -> None:
    assert all(cause.value in states.draw() for cause in Cause)


def test_map_of_the_modules_is_that_of_their_imports() -> None:
    """If not: `python docs/modules.py`."""
    assert modules.page() == modules.PAGE.read_text()


def test_imports_go_down() -> None:
    for name in modules.names():
        below = {modules.layer(other) for other in modules.imports(name)}
        assert max(below, default=-1) < modules.layer(name)
