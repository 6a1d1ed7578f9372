"""The ladders of the docs show what passes now."""

from __future__ import annotations

from pathlib import Path

import pytest

from anyio_rst.testing import CaptureUnavailable

import ladders

DOCS = Path(__file__).parents[2] / "docs"

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("name", ladders.SCENES)
async def test_ladder_shows_what_passes(name: str) -> None:
    """If not: `nox -s ladders` draws it anew, and `git diff` shows the difference."""
    try:
        drawn = await ladders.drawn(name)
    except (CaptureUnavailable, PermissionError) as exc:
        pytest.skip(f"needs CAP_NET_RAW and CAP_NET_ADMIN: {exc}")
    assert drawn == (ladders.DIRECTORY / f"{name}.svg").read_text()


def test_every_ladder_is_one_of_the_scenes_and_in_the_text() -> None:
    names = {f"{name}.svg" for name in ladders.SCENES}
    assert {path.name for path in ladders.DIRECTORY.iterdir()} == names
    text = (DOCS / "explanation.md").read_text()
    assert {name for name in names if f"](ladders/{name})" in text} == names
