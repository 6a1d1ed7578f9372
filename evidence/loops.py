"""The event loops that a program may run on."""

from __future__ import annotations

from typing import Any

LOOPS = ("asyncio", "uvloop", "trio")


def options(loop: str) -> dict[str, Any]:
    """For `anyio.run()`."""
    if loop == "trio":
        return {"backend": "trio"}
    return {"backend": "asyncio", "backend_options": {"use_uvloop": loop == "uvloop"}}
