"""What the proxy says of each connection, and at the end of all."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from anyio_rst._peer import PeerClose

from ._interruption import interruption
from ._output import discard, is_stuck, put

if TYPE_CHECKING:
    from anyio_rst.testing import ProxyConnection

ROW = "{:>4} {:>10} {:>13} {:>7}  {:24}  {}"

HEAD = ROW.format("#", "up", "down", "seconds", "ended by", "done to it")


@dataclass
class Totals:
    """The keys of the summary of `--json`."""

    connections: int = 0
    cut: int = 0
    unreachable: int = 0
    aborted: int = 0
    up: int = 0
    down: int = 0

    def add(self, seen: ProxyConnection) -> None:
        self.connections += 1
        self.cut += seen.cut is not None
        self.unreachable += seen.error is not None
        self.aborted += seen.aborted
        self.up += seen.up
        self.down += seen.down


class Lines:
    """The output: what it says at the beginning, of each connection, and at the end."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._totals = Totals()

    def begin(self, address: tuple[str, int], upstream: str) -> None:
        host, port = address
        if self._as_json:
            self._put(
                {"event": "listening", "host": host, "port": port, "upstream": upstream}
            )
            return
        shown_host = f"[{host}]" if ":" in host else host
        self._put(f"listening on {shown_host}:{port}, for {upstream}")
        self._put(HEAD)

    def add(self, seen: ProxyConnection, *, last: bool = False) -> None:
        self._totals.add(seen)
        self._put(connection_object(seen) if self._as_json else row(seen), last=last)

    def end(self) -> None:
        totals = self._totals
        self._put(
            {"event": "summary", **asdict(totals)} if self._as_json else shown(totals),
            last=True,
        )

    def _put(self, line: str | dict[str, Any], *, last: bool = False) -> None:
        """Print it whole, whatever signal comes; who does not read cannot hold it up.

        Raises:
          Unwritable: see :func:`put`.
        """
        text = line if isinstance(line, str) else json.dumps(line)
        if not last:
            with interruption.held_unless(is_stuck):
                put(text)
            return
        if is_stuck():
            discard(sys.stdout)
        put(text)


# What people read.


def row(seen: ProxyConnection) -> str:
    ends = [("client", seen.client_end), ("upstream", seen.upstream_end)]
    if seen.first_end == "upstream":
        ends.reverse()
    ended = [f"{side} {end.value}" for side, end in ends if end is not PeerClose.NONE]
    if seen.error is not None:
        ended.append(seen.error)
    if seen.aborted:
        ended.append("proxy")
    done = ""
    if seen.cut is not None:
        what = seen.cut if seen.cut == "silence" else seen.cut.upper()
        done = f"{seen.cut_direction}: {what}"
    return ROW.format(
        seen.number,
        f"{seen.up:,}",
        f"{seen.down:,}",
        f"{seen.duration or 0:.3f}",
        ", ".join(ended),
        done,
    ).rstrip()


def shown(totals: Totals) -> str:
    parts = [counted(totals.connections, "connection"), f"{totals.cut:,} cut"]
    if totals.unreachable:
        parts.append(f"{totals.unreachable:,} without an upstream")
    if totals.aborted:
        parts.append(f"{totals.aborted:,} open at the end")
    return f"{', '.join(parts)}; {totals.up:,} bytes up, {totals.down:,} down"


def counted(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"


# What programs read.


def connection_object(seen: ProxyConnection) -> dict[str, Any]:
    values = asdict(seen)
    for key in ("client_end", "upstream_end"):
        values[key] = values[key].value
    values["duration"] = round(values["duration"] or 0, 6)
    return {"event": "connection", **values}
