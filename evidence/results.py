"""What is stored of a run: its figures, and what it was run on."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any


def save(path: Path, **parts: Any) -> None:
    """As JSON. Each item of a list has a line, so that a diff shows what has changed."""

    def text(part: object, indent: int | None = None) -> str:
        return json.dumps(part, indent=indent, ensure_ascii=False, default=vars)

    lines = []
    for name, part in parts.items():
        if isinstance(part, list):
            lines.append(f'"{name}": [\n' + ",\n".join(map(text, part)) + "\n]")
        else:
            lines.append(f'"{name}": {text(part, 1)}')
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def machine() -> dict[str, str]:
    return {
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "processor": _processor(),
        "cores": str(os.cpu_count()),
    }


def described(about: dict[str, str]) -> str:
    """The machine, for a page."""
    return f"{about['processor']}, {about['cores']} cores, {about['system']}"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def versions(*packages: str) -> dict[str, str]:
    """Of Python, and of those *packages* that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def version_of(program: str, option: str, pattern: str) -> str | None:
    """What *program* says of itself; None if *pattern* is not found in that."""
    done = subprocess.run([program, option], capture_output=True, text=True)
    found = re.search(pattern, done.stdout + done.stderr)
    return found and found[1]
