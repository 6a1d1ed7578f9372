"""examples/log_json.py: what plain clients do, and the lines that it gets."""

from __future__ import annotations

import json
import logging
import socket
import struct
from typing import TYPE_CHECKING, Any

from test_readme import connect, free_port
from test_serve_processes import Process, echoes, example, finish, loops, running

import log_json
from serving import LONG

if TYPE_CHECKING:
    import pytest


def told(process: Process) -> dict[str, Any]:
    """The next line."""
    assert process.stdout is not None
    entry: dict[str, Any] = json.loads(process.stdout.readline())
    return entry


@loops
def test_line_for_each_ending(loop: str) -> None:
    port = free_port()
    with running([*example("log_json.py", loop), str(port)]) as process:
        with connect(port, process) as first:
            port_of_first = first.getsockname()[1]
            echoes(first, b"hello")
            finish(first)
        assert "listening on" in told(process)["message"]
        entry = told(process)
        assert (entry["level"], entry["logger"]) == ("INFO", "echo")
        assert (entry["message"], entry["chunks"]) == ("a connection has ended", 1)
        assert entry["time"].endswith("+00:00")
        ending = entry["ending"]
        assert 0 < ending.pop("duration") < LONG
        assert ending == {
            "kind": "FIN",
            "cause": "RETURNED",
            "error": None,
            "peer": "FIN",
            "remote_address": ["::ffff:127.0.0.1", port_of_first],
            "sent": 5,
            "received": 5,
            "discarded": 0,
            "unacknowledged": 0,
            "fin_sent_before_reset": False,
            "tls": None,
        }
        with connect(port, process) as second:
            echoes(second, b"hello")
            reset = struct.pack("ii", 1, 0)
            second.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        entries = [told(process), told(process)]
        (ending,) = [entry["ending"] for entry in entries if "ending" in entry]
        assert (ending["kind"], ending["peer"]) == ("RST", "RST")
        assert ending["error"]["type"] == "PeerReset"
        # And what the library says of it, as lines of the same kind.
        (entry,) = [entry for entry in entries if "ending" not in entry]
        assert (entry["level"], entry["logger"]) == ("INFO", "anyio_rst")
        assert entry["message"].startswith("the peer went away: ")


def test_record_is_one_line_whatever_is_in_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.handler.setFormatter(log_json.JSONFormatter())
    try:
        raise ValueError("two\nlines, \x1b[31m and \u2028 more")
    except ValueError as exc:
        logging.getLogger("anyio_rst").exception("a handler failed:\n%s", exc)
    (line,) = caplog.text.splitlines()
    assert line.isascii()
    assert line.isprintable()
    entry = json.loads(line)
    assert entry["message"].startswith("a handler failed:\ntwo\nlines")
    assert entry["traceback"].startswith("Traceback (most recent call last):\n")
    assert "more" in entry["traceback"]
