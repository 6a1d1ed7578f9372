"""What the watch says of connections that have ended: for people, and for programs."""

from __future__ import annotations

import textwrap
import time
from collections import Counter
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from ._output import WIDTH
from ._watch_connection import End

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ._watch_connection import Connection, Half

CLIENT, SERVER = "client", "server"

RED, PLAIN = "\x1b[31m", "\x1b[0m"


def side(connection: Connection, half: Half | None) -> str | None:
    if half is None:
        return None
    return CLIENT if half is connection.client else SERVER


# What people read.


def shown(connection: Connection, *, coloured: bool = False) -> str:
    """Two lines or three."""
    client, server = connection.client.endpoint, connection.server.endpoint
    how = folded(", ".join(phrases(connection)))
    visible = len(how)
    if coloured and connection.end is not End.FIN:
        how = f"{RED}{how}{PLAIN}"
    when = connection.ended or 0.0
    clock = time.strftime("%H:%M:%S", time.localtime(when))
    lines = [f"{clock}.{int(when % 1 * 1000):03} {client} > {server}"]
    if len(lines[0]) > WIDTH:  # of IPv6
        lines[0] = lines[0].replace(" > ", "\n  > ")
    numbers = measures(connection)
    if 2 + visible + 2 + len(numbers) <= WIDTH:
        lines.append(f"  {how}; {numbers}")
    else:
        lines += [f"  {how}", f"  {numbers}"]
    return "\n".join(lines)


def phrases(connection: Connection) -> list[str]:
    """How it ended, in the order of what happened."""
    end = connection.end
    if end is End.REFUSED:
        return ["refused"]
    if end is End.UNANSWERED:
        if connection.server.next is not None:
            return ["no answer to the server's SYN"]
        count = f"{connection.syns} SYNs" if connection.syns > 1 else "the SYN"
        return [f"no answer to {count}"]
    said = [
        (half.fin, f"{side(connection, half)} FIN")
        for half in (connection.client, connection.server)
        if half.fin is not None
    ]
    if connection.reset_by is not None:
        assert connection.ended is not None
        said.append((connection.ended, f"{side(connection, connection.reset_by)} RST"))
    said.sort(key=lambda each: each[0])
    parts = [text for _, text in said]
    if len(said) > 1:
        parts[1] += f" {said[1][0] - said[0][0]:.3f} s later"
    if end is End.UNSEEN:
        parts.append("end not seen")
    if connection.usual_ttl is not None:
        parts.append(
            f"TTL {connection.reset_ttl} after {connection.usual_ttl}: "
            "perhaps from something in between"
        )
    for name, size in zip((CLIENT, SERVER), connection.unacknowledged, strict=True):
        if size:
            parts.append(f"{size:,} bytes of the {name} in flight")
    return parts


def measures(connection: Connection) -> str:
    began = "" if connection.from_start else "open before, "
    up, down = connection.client.sent, connection.server.sent
    text: str = f"{began}{connection.duration:.3f} s, up {up:,}, down {down:,}"
    last = side(connection, connection.last)
    return text if last is None else f"{text}, last {last}"


def folded(text: str) -> str:
    """For a line that is indented by two."""
    if len(text) <= WIDTH - 2:  # textwrap takes long
        return text
    return textwrap.fill(text, WIDTH - 2, subsequent_indent="  ")


# What programs read.


def as_dict(connection: Connection) -> dict[str, Any]:
    """One of `--json`."""
    client, server = connection.client.endpoint, connection.server.endpoint
    first = None
    if connection.first is not None:
        first = "RST" if connection.first_by_rst else "FIN"
    assert connection.end is not None
    assert connection.ended is not None
    return {
        "event": "connection",
        "time": iso(connection.ended),
        "client_address": client.host,
        "client_port": client.port,
        "server_address": server.host,
        "server_port": server.port,
        "from_start": connection.from_start,
        "duration_seconds": round(connection.duration, 6),
        "bytes_up": connection.client.sent,
        "bytes_down": connection.server.sent,
        "last_data": side(connection, connection.last),
        "end": connection.end.value,
        "first": side(connection, connection.first),
        "first_how": first,
        "reset_by": side(connection, connection.reset_by),
        "half_closed_seconds": microseconds(connection.half_closed),
        "in_flight_up": connection.unacknowledged[0],
        "in_flight_down": connection.unacknowledged[1],
        "syns": connection.syns,
        "reset_ttl": connection.reset_ttl,
        "usual_ttl": connection.usual_ttl,
    }


def iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(
        timespec="microseconds"
    )


def microseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


# Totals.

# The columns of the table, and how wide they are.
WIDTHS = {
    "open": 9,
    "client_fin": 10,
    "server_fin": 10,
    "client_rst": 10,
    "server_rst": 10,
    "refused": 9,
    "unanswered": 8,
    "unseen": 8,
}

HEADINGS = (
    "                        FIN                 RST",
    " port     open    client    server    client    server  refused  silent  unseen",
)

# How a connection ended.
KINDS = tuple(WIDTHS)[1:]


class Totals:
    """Of the ports of servers."""

    def __init__(self) -> None:
        self._ended: dict[int, Counter[str]] = {}

    def add(self, connection: Connection) -> None:
        port = connection.server.endpoint.port
        counts = self._ended.get(port)
        if counts is None:
            counts = self._ended[port] = Counter()
        counts[kind(connection)] += 1
        counts["bytes_up"] += connection.client.sent
        counts["bytes_down"] += connection.server.sent

    def rows(self, still_open: Counter[int]) -> list[dict[str, int]]:
        """One for each port, in the order of the connections there were."""
        rows = []
        for port in {*self._ended, *still_open}:
            counts = self._ended.get(port, Counter())
            row = {"port": port, "open": still_open[port]}
            row |= {name: counts[name] for name in (*KINDS, "bytes_up", "bytes_down")}
            rows.append(row)
        rows.sort(key=lambda row: (-in_all(row), row["port"]))
        return rows


def in_all(row: dict[str, int]) -> int:
    return row["open"] + sum(row[name] for name in KINDS)


def kind(connection: Connection) -> str:
    if connection.end is End.FIN:
        return f"{side(connection, connection.first)}_fin"
    if connection.end is End.RST:
        return f"{side(connection, connection.reset_by)}_rst"
    assert connection.end is not None
    return str(connection.end.value).lower()


def table(rows: Iterable[dict[str, int]], most: int) -> list[str]:
    """At most so many ports, with a line that says how many are left out."""
    lines: list[str] = list(HEADINGS)
    rows = list(rows)
    for row in rows[:most]:
        cells = [f"{row['port']:>5}"]
        cells += [f"{row[name]:>{width},}" for name, width in WIDTHS.items()]
        lines.append("".join(cells))
    if rows[most:]:
        others = sum(in_all(row) for row in rows[most:])
        lines.append(f"and {others:,} connections to {len(rows) - most:,} other ports")
    return lines
