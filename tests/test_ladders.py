"""The ladders of the docs show what passes now."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from anyio_rst.testing import CaptureUnavailable

DOCS = Path(__file__).parents[1] / "docs"
sys.path.append(str(DOCS))

import ladders  # noqa: E402

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("name", ladders.SCENES)
async def test_ladder_shows_what_passes(name: str) -> None:
    """If not: `nox -s ladders` draws it anew, and `git diff` shows the difference."""
    try:
        drawn = await ladders.drawn(name)
    except (CaptureUnavailable, PermissionError) as exc:
        pytest.skip(f"needs CAP_NET_RAW and CAP_NET_ADMIN: {exc}")
    assert drawn == (ladders.DIRECTORY / f"{name}.svg").read_text()
