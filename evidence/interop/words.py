"""What was told, and when and with what, in the words of a page."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

from evidence.results import today, versions

if TYPE_CHECKING:
    from collections.abc import Iterable

ROUNDS = 3  # everything is asked so often

VERDICTS = {True: "noticed", False: "**not noticed**", None: "**not always**"}


def each(said: Iterable[str]) -> str:
    """Once, if it was the same each time."""
    return " or ".join(sorted(set(said)))


def about(*packages: str) -> dict[str, str]:
    """When, and with what; the versions of programs are to follow."""
    return {
        "date": today(),
        "system": platform.system(),
        "rounds": str(ROUNDS),
        **versions(*packages),
    }


def measured(about: dict[str, str]) -> str:
    about = dict(about)
    date, system, rounds = (about.pop(name) for name in ("date", "system", "rounds"))
    versions = ", ".join(f"{name} {version}" for name, version in about.items())
    return f"{date}, {system}, each {rounds} times: {versions}."
